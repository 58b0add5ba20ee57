"""The per-token inputs of a loss: as a micro-batch has them, and as the native ops take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megarlx.ops.loss_spec import LossSpec, refuse

FLOATS = (torch.float32, torch.float64, torch.bfloat16)


def precision_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, inputs and results: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class LossInputs:
    """What the loss of a micro-batch is told of its tokens, each in the shape of `targets`."""

    targets: Tensor  # int64
    mask: Tensor | None = None  # bool; None: every token counts
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    token_weights: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    sequence: Tensor | None = None  # int64, which of the micro-batch's a token is of; -1: padding
    sequences: int = 0  # the most in any micro-batch of the batch


@dataclass(frozen=True)
class TokenInputs:
    """All [tokens], normaliser and temperature 0-dim; None is left out."""

    targets: Tensor  # int64
    mask: Tensor | None  # bool
    advantages: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    token_weights: Tensor | None
    normalizer: Tensor
    temperature: Tensor
    # Only functions see these.
    rollout_logprobs: Tensor | None = None
    sequence: Tensor | None = None  # int64
    sequences: int = 0

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """In the order of the native ops."""
        return (
            self.targets,
            self.mask,
            self.advantages,
            self.old_logprobs,
            self.ref_logprobs,
            self.token_weights,
            self.normalizer,
            self.temperature,
        )

    def rows(self, begin: int, end: int) -> TokenInputs:
        return self._each(lambda tensor: tensor[begin:end])

    def select(self, index: Tensor) -> TokenInputs:
        return replace(self._each(lambda tensor: tensor.index_select(0, index)), mask=None)

    def _each(self, change: Any) -> TokenInputs:
        given = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        tensors = {k: v for k, v in given if isinstance(v, Tensor) and v.dim()}
        return replace(self, **{name: change(value) for name, value in tensors.items()})


def flat(tensor: Tensor) -> Tensor:
    """[tokens], contiguous."""
    whole = tensor.dim() == 1 and tensor.is_contiguous()
    return tensor if whole else tensor.reshape(-1).contiguous()


def check_floats(op: str, argument: str, tensor: Any, least_dimensions: int) -> None:
    if not isinstance(tensor, Tensor):
        refuse(op, argument, f"a {type(tensor).__name__}", "a tensor")
    if tensor.dtype not in FLOATS:
        refuse(op, f"{argument}'s dtype", tensor.dtype, "float32, float64, bfloat16")
    if tensor.dim() < least_dimensions:
        allowed = f"at least {least_dimensions} dimensions"
        refuse(op, f"{argument}'s shape", tuple(tensor.shape), allowed)
    if tensor.device.type not in ("cpu", "cuda", "meta"):
        refuse(op, f"{argument}'s device", tensor.device, "cpu, cuda")


def check_vocab_size(op: str, vocab_size: int | None, columns: int) -> int:
    if vocab_size is None:
        return columns
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int | torch.SymInt):
        refuse(op, "vocab_size", repr(vocab_size), "an integer, or None")
    if not 0 < vocab_size <= columns:
        refuse(op, "vocab_size", vocab_size, f"1 to {columns}, the columns of all shards")
    return int(vocab_size)


def prepare(
    op: str,
    spec: LossSpec,
    like: Tensor,
    shape: Sequence[int],
    inputs: LossInputs,
    *,
    normalizer: Tensor | float,
    temperature: Tensor | float,
) -> TokenInputs:
    """Flattens to [tokens]; `like` gives device and precision, `shape` that of a token input."""
    if not isinstance(spec, LossSpec):
        refuse(op, "spec", f"a {type(spec).__name__}", "a LossSpec")
    precision = precision_of(like.dtype)

    def check(argument: str, tensor: Any, dtype: str) -> None:
        if not isinstance(tensor, Tensor):
            refuse(op, argument, f"a {type(tensor).__name__}", f"a {dtype} tensor")
        right = tensor.dtype in FLOATS if dtype == "floating" else str(tensor.dtype) == dtype
        if not right:
            refuse(op, f"{argument}'s dtype", tensor.dtype, dtype)
        if tensor.shape != torch.Size(shape):
            refuse(op, f"{argument}'s shape", tuple(tensor.shape), str(tuple(shape)))
        if tensor.device != like.device:
            refuse(op, f"{argument}'s device", tensor.device, str(like.device))

    def floats(argument: str) -> Tensor | None:
        tensor = getattr(inputs, argument)
        if tensor is None:
            return None
        check(argument, tensor, "floating")
        return flat(tensor.detach().to(precision))

    def others(argument: str, dtype: str) -> Tensor | None:
        tensor = getattr(inputs, argument)
        if tensor is None:
            return None
        check(argument, tensor, dtype)
        return flat(tensor)

    def number(argument: str, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            if value.dim() != 0 or value.is_complex() or value.dtype == torch.bool:
                refuse(op, argument, f"{value.dtype} {tuple(value.shape)}", "a number, 0-dim")
            if value.device != like.device:
                refuse(op, f"{argument}'s device", value.device, str(like.device))
            return value.detach().to(precision)
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse(op, argument, repr(value), "a number, or a 0-dim tensor")
        return torch.full((), value, dtype=precision, device=like.device)

    check("targets", inputs.targets, "torch.int64")
    if (inputs.advantages is None) != (spec.mode == "nll"):
        given = "missing" if inputs.advantages is None else "given"
        refuse(op, "advantages", given, "one a token for a policy loss; none for nll")
    count = inputs.sequences
    if spec.loss.needs_sequence and (inputs.sequence is None or count < 1):
        given = "missing" if inputs.sequence is None else f"given with sequences = {count}"
        allowed = (
            f"the number of each token's sequence, and sequences above it, for {spec.loss.name}"
        )
        refuse(op, "sequence", given, allowed)
    if inputs.ref_logprobs is None and spec.kl != "none":
        refuse(op, "ref_logprobs", "missing", "one a token when kl is k1, k2 or k3")
    if isinstance(temperature, int | float) and not 0 < temperature < float("inf"):
        refuse(op, "temperature", temperature, "a number > 0")
    return TokenInputs(
        flat(inputs.targets),
        others("mask", "torch.bool"),
        floats("advantages"),
        floats("old_logprobs"),
        floats("ref_logprobs"),
        floats("token_weights"),
        number("normalizer", normalizer),
        number("temperature", temperature),
        floats("rollout_logprobs"),
        others("sequence", "torch.int64"),
        count,
    )
