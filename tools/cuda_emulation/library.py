"""The emulated kernels in this process: loaded once, pretending to run on a card of some kind."""

from __future__ import annotations

import ctypes
import functools
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import megarlx.ops  # noqa: F401  (its ops are what the emulated ones stand in for)

from .build import CSRC, KINDS, build
from .rewrite import NAMESPACE, operators

ORDERS = ("forwards", "backwards", "random")
SMALL, LARGE = 101_376, 232_448  # bytes of shared memory that a block may have: sm_86 and sm_90


@dataclass(frozen=True)
class PretendedCard:
    multiprocessors: int = 2
    """few, so that loops over a grid go round"""
    shared_bytes: int = LARGE
    order: str = "random"
    """of the threads of a block, and of the blocks"""
    seed: int = 1
    poison: int = 0xFF
    """the bytes of shared memory that nobody has written"""
    inexact_exp2: bool = False
    """ex2.approx is off by as much as it may be"""

    @staticmethod
    def drawn_from(text: str) -> PretendedCard:
        """One of many, always the same for the same text."""
        bits = zlib.crc32(text.encode())

        def pick(*choices: Any) -> Any:
            nonlocal bits
            bits, which = divmod(bits, len(choices))
            return choices[which]

        return PretendedCard(
            multiprocessors=pick(1, 2, 132),
            shared_bytes=pick(49_152, SMALL, LARGE),
            order=pick("forwards", "backwards", "random", "random"),
            seed=bits,
            poison=pick(0xFF, 0x7F, 0x00, 0xA5),
            inexact_exp2=pick(False, True),
        )


class Library:
    """torch.ops.megarlx_emulated, and the engine under it."""

    def __init__(self, path: Path) -> None:
        torch.ops.load_library(str(path))
        self.engine = ctypes.CDLL(str(path))
        self.engine.emulated_pretend.argtypes = [
            *(ctypes.c_int, ctypes.c_uint64, ctypes.c_int),
            *(ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ]
        self.engine.emulated_launches.restype = ctypes.c_long
        self.ops = getattr(torch.ops, NAMESPACE)
        self.names = operators(CSRC)
        self.with_autograd = operators(CSRC, "Autograd")
        for name in self.names:
            # A fake tensor learns its shape from the op that this one stands in for.
            torch.library.register_fake(f"{NAMESPACE}::{name}", getattr(torch.ops.megarlx, name))
        self.pretend(PretendedCard())

    def pretend(self, card: PretendedCard) -> None:
        self.engine.emulated_pretend(
            ORDERS.index(card.order),
            card.seed,
            card.poison,
            card.multiprocessors,
            card.shared_bytes,
            card.inexact_exp2,
        )

    def launches(self, kernel: str) -> int:
        """How often a kernel has been launched so far."""
        return self.engine.emulated_launches(kernel.encode())


@functools.cache
def load(kind: str = "plain") -> Library:
    return Library(build(KINDS[kind]))


class EmulatedKernels:
    """Inside `with`, megarlx's ops run the emulated kernels on tensors of the CPU, autograd too."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.implementations: torch.library.Library | None = None

    def __enter__(self) -> None:
        self.implementations = torch.library.Library("megarlx", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*may also be overridden")
            for name in self.library.names:
                op = getattr(self.library.ops, name).default
                for key in ("CPU", "AutogradCPU")[: 1 + (name in self.library.with_autograd)]:
                    self.implementations.impl(name, op, key, allow_override=True)

    def __exit__(self, *error: object) -> None:
        self.implementations = None  # takes them back
