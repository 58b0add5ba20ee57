"""What `auto` becomes on a machine, and why. Pure, and of the standard library alone: the doctor
asks here too, also where everything else is broken.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Attention = Literal["cudnn", "flash", "sdpa", "blocks"]
# What a kernel may have to do besides: a token sees a window; scores are soft-capped; query heads
# share key heads; keys of a cache stand before the new ones.
Served = Literal["window", "cap", "grouped", "cached"]
SERVES: dict[Attention, tuple[Served, ...]] = {
    "cudnn": ("grouped",),
    "flash": ("window", "cap", "grouped", "cached"),
    "sdpa": ("grouped", "cached"),
    "blocks": ("window", "cap", "grouped", "cached"),
}
# The flash-attn that torch brings, and what some versions lack of it: 4 has no backward of
# soft-caps over packed documents.
OF_TORCH = "2 of torch"
TORCH_WITH_FLASH = (2, 12)  # the first; before, its packed function has no grouped heads
FLASH_LACKS: dict[str, tuple[Served, ...]] = {"4": ("cap",), OF_TORCH: ("cap", "cached")}

# Prompt tokens of one prefill: on a CPU two short prompts fill the caches; on a GPU so few are over
# before the next kernel is launched.
PREFILL_TOKENS = {"cpu": 1024, "cuda": 16_384}
# Tokens of a page of the caches: flash-attn 2 takes multiples of 256, and the CPU's kernels compute
# 16 scores at once.
PAGE_TOKENS = {"cpu": 16, "cuda": 256}

# Head dims that the kernels are built for: multiples of HEAD_GRAIN up to these.
WIDEST_HEAD = {"cudnn": 128, "flash": 256}
HEAD_GRAIN = 8
AMPERE = (8, 0)  # the first capability with bf16

# Transformer Engine chooses among attention kernels by these, when it is first called.
ONLY_CUDNN = {"NVTE_FUSED_ATTN": "1", "NVTE_FLASH_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"}


@dataclass(frozen=True)
class Package:
    """An optional package: its version, or why it cannot be used."""

    version: str = ""
    error: str = ""  # it is installed, but does not import

    def lacks(self, name: str) -> str:
        """Why it cannot be used; empty where it can."""
        if self.error:
            return f"{name} is installed, but does not import ({self.error}); see megarlx doctor"
        return "" if self.version else f"{name} is not installed"


@dataclass(frozen=True)
class Machine:
    """What this process computes on."""

    gpu: str = ""  # its name; empty: a CPU
    capability: tuple[int, int] = (0, 0)
    transformer_engine: Package = Package()
    flash_attention: Package = Package()

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        return "cuda" if self.gpu else "cpu"


@dataclass(frozen=True)
class Needs:
    """What a run asks of layers and attention."""

    precision: str
    head_dim: int
    splits_backward: bool = False  # a schedule that computes weight gradients later
    of_attention: frozenset[Served] = frozenset()


@dataclass(frozen=True)
class Choice:
    """What a key became, and why."""

    value: str
    why: str

    def __str__(self) -> str:
        return f"{self.value}: {self.why}"


def flash_of(torch_version: str) -> str:
    """The flash-attn that this torch brings; empty: none."""
    major, minor, *_ = torch_version.split(".")
    return OF_TORCH if (int(major), int(minor)) >= TORCH_WITH_FLASH else ""


def choose_precision(machine: Machine) -> Choice:
    if not machine.gpu:
        return Choice("fp32", "this is a CPU")
    if machine.capability >= AMPERE:
        return Choice("bf16", f"{machine.gpu} computes in it")
    return Choice("fp32", f"{machine.gpu} has no bf16")


def without_layers(machine: Machine) -> str:
    """Why Transformer Engine's layers cannot run here; empty where they can."""
    if not machine.gpu:
        return "Transformer Engine runs on GPUs alone"
    return machine.transformer_engine.lacks("Transformer Engine")


def choose_layers(machine: Machine, needs: Needs) -> Choice:
    why = without_layers(machine) or _unfit_head("cudnn", needs)
    if not why and needs.precision != "bf16":
        why = f"Transformer Engine's layers are for bf16, not {needs.precision}"
    if not why and needs.splits_backward:
        why = "the schedule delays weight gradients, for which megarlx has an op in torch's layers"
    if why:
        return Choice("torch", why)
    return Choice("te", f"Transformer Engine {machine.transformer_engine.version} is here")


def without_attention(kind: Attention, machine: Machine, needs: Needs) -> str:
    """Why this kind of attention cannot run here; empty where it can."""
    if why := unserved(kind, needs.of_attention):
        return why
    if kind in ("sdpa", "blocks"):
        return ""
    name = "Transformer Engine" if kind == "cudnn" else "flash-attn"
    package = machine.transformer_engine if kind == "cudnn" else machine.flash_attention
    if not machine.gpu:
        return f"{name} runs on GPUs alone"
    if needs.precision != "bf16":
        return f"{name}'s attention is for bf16, not {needs.precision}"
    if machine.capability < AMPERE:
        return f"{machine.gpu} is older than {name}'s attention"
    lacks = FLASH_LACKS.get(package.version, ()) if kind == "flash" else ()
    if without := sorted(needs.of_attention & set(lacks)):
        return f"flash-attn {package.version} does not serve {', '.join(without)}"
    return package.lacks(name) or _unfit_head(kind, needs)


def choose_attention(machine: Machine, needs: Needs) -> Choice:
    """The fastest that is here and serves the model: cuDNN through Transformer Engine, flash-attn,
    torch's SDPA, plain torch by blocks of queries."""
    unfit = unserved("sdpa", needs.of_attention)
    if not machine.gpu:
        return Choice("blocks", unfit) if unfit else Choice("sdpa", "this is a CPU")
    cudnn = without_attention("cudnn", machine, needs)
    if not cudnn:
        return Choice("cudnn", f"through Transformer Engine {machine.transformer_engine.version}")
    flash = without_attention("flash", machine, needs)
    if not flash:
        return Choice("flash", f"flash-attn {machine.flash_attention.version} is here; {cudnn}")
    if unfit:
        return Choice("blocks", f"{unfit}; {flash}")
    return Choice("sdpa", f"{cudnn}; {flash}")


def unserved(kind: Attention, needs: Collection[Served]) -> str:
    """What this kind of attention lacks of what is needed; empty where it lacks nothing."""
    lacking = sorted(set(needs) - set(SERVES[kind]))
    if not lacking:
        return ""
    allowed = [name for name, serves in SERVES.items() if set(needs) <= set(serves)]
    return (
        f"{kind} serves {', '.join(SERVES[kind])}, and this needs {', '.join(lacking)}; allowed: "
        f"auto, {', '.join(allowed)}"
    )


def _unfit_head(kind: Attention, needs: Needs) -> str:
    widest = WIDEST_HEAD[kind]
    if needs.head_dim > widest or needs.head_dim % HEAD_GRAIN:
        return (
            f"the head dim is {needs.head_dim}; for {kind} allowed are multiples of {HEAD_GRAIN} "
            f"up to {widest}"
        )
    return ""
