"""Fused sampling: logits -> token and both of its log-probs, in one read where nothing is filtered.

B rows (sequences), V vocabulary ids (of this shard where a group is given).

The filters apply to the distribution at the given temperature, in this order:
    top_k   keeps the k largest logits (0, or V and more: off)
    top_p   keeps the smallest set of most likely ids that holds at least top_p of what top_k left
            (0 keeps the most likely one, 1: off)
    min_p   keeps ids at least min_p times as likely as the most likely one (0: off)
Ids whose logits are equal are kept or dropped together, so each filter is a threshold on the logit
and a set may hold more than k ids where the k-th largest logit occurs several times.

The noise is a function of (seed, sequence id, position, vocabulary id) alone: equal logits give the
same token whatever the batch, the order of its rows, or the split of the vocabulary over a group.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megarlx.comm.collectives import all_gather
from megarlx.comm.groups import Group

TILE = 128  # ids drawn from together; shards of the vocabulary are cut at its multiples


class Sample(NamedTuple):
    """token -1 (and NaN for both log-probs) flags a row with a NaN, a +inf, or nothing finite."""

    token: Tensor  # int64 [B]
    logprob: Tensor  # fp32 [B]: under the model, that is at temperature 1 without filters
    sampled_logprob: Tensor  # fp32 [B]: under the distribution sampled from; 0 at temperature 0


def sample(
    logits: Tensor,
    *,
    seed: int | Tensor,
    keys: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    group: Group | None = None,
    vocab_size: int | None = None,
) -> Sample:
    """Draws a token for each row of logits [B, V], fp32 or bf16.

    keys [B, 2] int64 are (sequence id, position). temperature, top_k, top_p and min_p are numbers
    or tensors of one value or of one for each row; temperature 0 takes the largest logit, the
    lowest id of equal ones. vocab_size is the real size: ids from there on are padding and never
    drawn. Inside a CUDA graph, give seed and temperature as tensors: numbers are fixed at capture.

    With a group, `logits` is this rank's slice of a vocabulary split evenly at multiples of 128.
    Unfiltered, 104 bytes a row and rank are exchanged; a filter gathers the logits.
    """
    _check_tensor("logits", logits)
    _check_tensor("keys", keys)
    logits = logits.detach()  # a draw has no gradient, and token_loss gives that of log-probs
    device = logits.device
    seed_tensor = _as_tensor("seed", seed, torch.int64, device)
    heat = _as_tensor("temperature", temperature, torch.float32, device)
    filters = (
        _filter("top_k", top_k, 0, torch.int64, device),
        _filter("top_p", top_p, 1.0, torch.float32, device),
        _filter("min_p", min_p, 0.0, torch.float32, device),
    )
    if group is not None and group.size > 1:
        local = logits.shape[-1]
        if local % TILE:
            raise ValueError(
                f"megarlx.sample: the vocabulary slice of logits is {local} ids on each of "
                f"{group.size} ranks; allowed: a multiple of {TILE}"
            )
        whole = local * group.size
        size = _vocab_size(vocab_size, whole)
        if not any(f is not None for f in filters):
            partials = torch.ops.megarlx.sample_partials(
                logits, seed_tensor, keys, heat, group.rank * local, size
            )
            shards = all_gather(partials.unsqueeze(0), group, dim=0)
            return Sample(*torch.ops.megarlx.sample_combine(shards, heat))
        logits = all_gather(logits.contiguous(), group, dim=1)
    else:
        size = _vocab_size(vocab_size, logits.shape[-1] if logits.dim() else 0)
    return Sample(*torch.ops.megarlx.sample(logits, seed_tensor, keys, heat, *filters, size))


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"megarlx.sample: {name} is a {type(value).__name__}; allowed: a torch.Tensor"
        )


def _vocab_size(value: int | None, whole: int) -> int:
    if value is None:
        return whole
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= max(whole, 1):
        raise ValueError(
            f"megarlx.sample: vocab_size is {value!r}; allowed: 1 to the {whole} ids of logits"
        )
    return value


_RANGES = {
    "seed": (-(2**63), 2**63 - 1, "an integer of 64 bits"),
    "temperature": (0.0, torch.finfo(torch.float32).max, "a finite number >= 0 (0: most likely)"),
    "top_k": (0, 2**63 - 1, "an integer, 0 (off) or more"),
    "top_p": (0.0, 1.0, "0 to 1 (1: off)"),
    "min_p": (0.0, 1.0, "0 to 1 (0: off)"),
}


def _as_tensor(name: str, value: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number, checked, as a tensor [1]; a tensor as it is (floating ones cast to fp32)."""
    if isinstance(value, Tensor):
        if dtype.is_floating_point and value.dtype.is_floating_point:
            return value.to(dtype).contiguous()
        return value
    low, high, allowed = _RANGES[name]
    kinds = (int, float) if dtype.is_floating_point else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"megarlx.sample: {name} is {value!r}; allowed: {allowed}, or a tensor")
    if math.isnan(value) or not low <= value <= high:
        raise ValueError(f"megarlx.sample: {name} is {value!r}; allowed: {allowed}")
    return torch.full((1,), value, dtype=dtype, device=device)


def _filter(
    name: str, value: object, off: float, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    if not isinstance(value, Tensor) and not isinstance(value, bool) and value == off:
        return None
    return _as_tensor(name, value, dtype, device)


def sample_reference(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Sample:
    """What `sample` draws from, in plain torch and fp64, by inversion of the given uniforms [B].

    Another source of noise, so other tokens: it is the same distribution and the same log-probs.
    """
    x = logits.double()
    model = torch.log_softmax(x, -1)
    if temperature == 0:
        token = x.argmax(-1)
        return Sample(token, _at(model, token), torch.zeros_like(token, dtype=torch.float32))
    scaled = x / temperature
    ordered = scaled.sort(-1, descending=True).values
    least = torch.full_like(ordered[:, :1], -math.inf)
    if 0 < top_k < x.shape[-1]:
        least = ordered[:, top_k - 1 : top_k]
    if top_p < 1:
        p = torch.softmax(ordered.masked_fill(ordered < least, -math.inf), -1)
        kept = (p.cumsum(-1) < top_p).sum(-1, keepdim=True).clamp(max=x.shape[-1] - 1)
        least = torch.maximum(least, ordered.gather(-1, kept))
    if min_p > 0:
        least = torch.maximum(least, ordered[:, :1] + math.log(min_p))
    sampled = torch.log_softmax(scaled.masked_fill(scaled < least, -math.inf), -1)
    cumulative = sampled.exp().cumsum(-1)
    token = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    token = token.squeeze(-1).clamp(max=x.shape[-1] - 1)
    return Sample(token, _at(model, token), _at(sampled, token))


def _at(logprobs: Tensor, token: Tensor) -> Tensor:
    return logprobs.gather(-1, token[:, None]).squeeze(-1).float()


def _outputs(rows: Tensor, count: int | torch.SymInt) -> tuple[Tensor, Tensor, Tensor]:
    return (
        rows.new_empty((count,), dtype=torch.int64),
        rows.new_empty((count,), dtype=torch.float32),
        rows.new_empty((count,), dtype=torch.float32),
    )


@torch.library.register_fake("megarlx::sample")
def _(
    logits: Tensor,
    seed: Tensor,
    keys: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(logits, logits.shape[0])


@torch.library.register_fake("megarlx::sample_partials")
def _(
    logits: Tensor, seed: Tensor, keys: Tensor, temperature: Tensor, first_id: int, vocab_size: int
) -> Tensor:
    return logits.new_empty((logits.shape[0], 13), dtype=torch.int64)


@torch.library.register_fake("megarlx::sample_combine")
def _(partials: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(partials, partials.shape[1])


@torch.library.register_fake("megarlx::philox")
def _(counters: Tensor, key: Tensor) -> Tensor:
    return torch.empty_like(counters)


@torch.library.register_fake("megarlx::gumbel")
def _(bits: Tensor) -> Tensor:
    return bits.new_empty(bits.shape, dtype=torch.float64)
