"""Whether the gradients of a step were finite, asked without a wait for the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flags:
    """Of one step: the objectives whose update was skipped for a gradient that is not finite."""

    step: int
    skipped: Mapping[str, bool]


class FoundInf:
    """Gives a CPU's flags at once, and a GPU's one step later: by then they have been copied, while
    the next step is queued behind them."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self._pending: tuple[int, list[str], Tensor, Any] | None = None

    def put(self, step: int, found_inf: Mapping[str, Tensor]) -> Flags | None:
        """Takes a step's flags in; returns those that are known by now."""
        flags = torch.stack([flag.detach().reshape(()) for flag in found_inf.values()])
        if not self.on_cuda:
            return _read(step, list(found_inf), flags)
        before = self.last()
        host = _pinned_like(flags)
        host.copy_(flags, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending = (step, list(found_inf), host, copied)
        return before

    def last(self) -> Flags | None:
        """The flags that were not given out yet; waits for the device."""
        if self._pending is None:
            return None
        (step, names, host, copied), self._pending = self._pending, None
        copied.synchronize()
        return _read(step, names, host)


def _pinned_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def _read(step: int, names: list[str], flags: Tensor) -> Flags:
    return Flags(step, {n: bool(flag) for n, flag in zip(names, flags.tolist(), strict=True)})
