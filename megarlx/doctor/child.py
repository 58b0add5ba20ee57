"""Run as a script, in a process of its own: imports one module, or tries one computation on the
GPU, and prints facts about it as JSON.

It may crash, print or hang: that is why it is done here and not in the doctor itself.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from types import TracebackType
from typing import Any

Facts = dict[str, Any]


def torch_facts(torch: Any) -> Facts:
    facts: Facts = {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
        "mpi": torch.distributed.is_available() and torch.distributed.is_mpi_available(),
        "nccl": None,
        "cuda_available": False,
        "cuda_error": None,
        "architectures": [],
    }
    if facts["cuda"] is None:
        return facts
    if torch.distributed.is_nccl_available():
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    facts["cuda_available"] = torch.cuda.is_available()
    facts["architectures"] = torch.cuda.get_arch_list()
    if not facts["cuda_available"]:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            facts["cuda_error"] = str(error).splitlines()[0]
    return facts


def gloo_facts(distributed: Any) -> Facts:
    """Makes a group of one: this fails where the machine's own name or interface is not usable."""
    distributed.init_process_group(
        "gloo",
        store=distributed.HashStore(),
        rank=0,
        world_size=1,
        timeout=datetime.timedelta(seconds=20),
    )
    distributed.destroy_process_group()
    return {}


def native_facts(native: Any) -> Facts:
    return {"instruction_set": native.load().instruction_set}


def mpi_facts(mpi4py: Any) -> Facts:
    mpi4py.rc.initialize = False  # the library is to be found and loaded, no job is to be started
    library = importlib.import_module(f"{mpi4py.__name__}.MPI").Get_library_version()
    return {"library": library.strip("\x00\n ").splitlines()[0].split(", package")[0]}


FACTS: Mapping[str, Callable[[Any], Facts]] = {
    "torch": torch_facts,
    "torch.distributed": gloo_facts,
    "megarlx.ops.native": native_facts,
    "mpi4py": mpi_facts,
}


def fused_attention(torch: Any) -> Facts:
    """cuDNN's attention forward and backward, through Transformer Engine."""
    engine = importlib.import_module("transformer_engine.pytorch")
    os.environ.update(importlib.import_module("megarlx.choices").ONLY_CUDNN)
    attention = engine.DotProductAttention(
        2, 64, qkv_format="thd", attn_mask_type="padding_causal", attention_dropout=0.0
    )
    q, k, v = _projections(torch)
    offsets = torch.tensor([0, 50, 128], dtype=torch.int32, device="cuda")
    bounds = {"cu_seqlens_q": offsets, "cu_seqlens_kv": offsets}
    out = attention(q, k, v, **bounds, max_seqlen_q=78, max_seqlen_kv=78)
    _finite(torch, out, q)
    try:
        return {"cudnn": f"cuDNN {torch.backends.cudnn.version()}"}
    except RuntimeError as error:  # attention has run with it all the same
        return {"cudnn": f"a cuDNN that torch would not take: {str(error).splitlines()[0]}"}


def flash_attention(torch: Any) -> Facts:
    flash = importlib.import_module("flash_attn")
    inputs = _projections(torch)
    q, k, v = (x.unflatten(0, (2, 64)) for x in inputs)
    return _finite(torch, flash.flash_attn_func(q, k, v, causal=True), inputs[0])


def own_kernel(torch: Any) -> Facts:
    """The likeliest id of two rows, by the kernel that samples."""
    alone("megarlx.ops.native").load()
    logits = torch.zeros(2, 300, device="cuda")
    logits[1, 7] = 1.0
    seed = torch.zeros(1, dtype=torch.int64, device="cuda")
    keys = torch.zeros(2, 2, dtype=torch.int64, device="cuda")
    cold = torch.zeros(1, device="cuda")
    drawn = torch.ops.megarlx.sample(logits, seed, keys, cold, None, None, None, 300)[0].tolist()
    if drawn != [0, 7]:
        raise RuntimeError(f"megarlx.sample drew {drawn}; right is [0, 7]")
    return {}


def _projections(torch: Any) -> tuple[Any, ...]:
    make = {"dtype": torch.bfloat16, "device": "cuda", "requires_grad": True}
    return tuple(torch.randn(128, 2, 64, **make) for _ in range(3))


def _finite(torch: Any, out: Any, given: Any) -> Facts:
    out.float().sum().backward()
    if not (torch.isfinite(out).all() and torch.isfinite(given.grad).all()):
        raise RuntimeError("its output or gradient is not finite")
    return {}


TRIALS: Mapping[str, Callable[[Any], Facts]] = {
    "fused attention": fused_attention,
    "FlashAttention call": flash_attention,
    "CUDA kernel": own_kernel,
}


def is_there(name: str) -> bool:
    """Whether a module can be found, without importing the packages it lies in.

    FlashAttention 4 lies inside FlashAttention 2's package: where that one is broken, an import
    alone could not tell a broken 4 from one that is not installed.
    """
    top, *below = name.split(".")
    spec = importlib.util.find_spec(top)
    for part in below:
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = PathFinder.find_spec(f"{spec.name}.{part}", list(spec.submodule_search_locations))
    return spec is not None


def alone(name: str) -> Any:
    """A module without the package it lies in: what is asked is whether the compiled code loads."""
    package, _, last = name.rpartition(".")
    found = importlib.util.find_spec(package.split(".")[0])
    assert found is not None
    assert found.submodule_search_locations is not None
    place = Path(found.submodule_search_locations[0], *package.split(".")[1:], f"{last}.py")
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def tried(name: str) -> Facts:
    return TRIALS[name](importlib.import_module("torch"))


def looked_at(name: str) -> Facts:
    if not is_there(name):
        raise ModuleNotFoundError(name, name=name)
    module = alone(name) if name == "megarlx.ops.native" else importlib.import_module(name)
    facts = {"version": str(getattr(module, "__version__", ""))}
    return facts | (FACTS[name](module) if name in FACTS else {})


def main(name: str) -> None:
    # What the module prints goes to stderr; only the answer goes to stdout.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def report(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        json.dump({"error": f"{kind.__name__}: {error}", "missing_module": missing}, answer)
        answer.flush()
        os._exit(1)

    sys.excepthook = report
    json.dump({"facts": tried(name) if name in TRIALS else looked_at(name)}, answer)
    answer.flush()
    # Not by the usual way out: what a broken package does at exit is no news.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
