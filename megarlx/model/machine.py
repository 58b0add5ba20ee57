"""What this process computes on, as far as layers and attention depend on it."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from megarlx.choices import Machine, Package
from megarlx.model.attention_flash import flash_version


def this_machine(device: torch.device) -> Machine:
    """To be called before anything on the GPU is computed.

    Where the machine has a cuDNN of its own beside torch's, Transformer Engine does not load any
    more once torch has used cuDNN: it is imported first of all, here.
    """
    if device.type != "cuda":
        return Machine()
    return Machine(
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device),
        transformer_engine=_transformer_engine(),
        flash_attention=_flash_attention(),
    )


def _transformer_engine() -> Package:
    if importlib.util.find_spec("transformer_engine") is None:
        return Package()
    try:
        importlib.import_module("transformer_engine.pytorch")
        top = importlib.import_module("transformer_engine")
    # it finds its own parts while it is imported, and checks that they go together
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return Package(error=_first_line(error))
    return Package(str(top.__version__))


def _flash_attention() -> Package:
    try:
        version = flash_version()
    except (ImportError, OSError) as error:
        return Package(error=_first_line(error))
    return Package() if version is None else Package(str(version))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
