"""The parts of a cached decode step between its products and its attention, on a CPU and on CUDA.

They write into buffers of the caller and wait for nothing, so a CUDA graph can hold them. fp32 and
fp64, and on CUDA bf16. Norms and SwiGLU are in ops/decode.py.

B rows of one new token each, H query heads, K key/value heads, D head_dim, P pages of G places, n
pages of a slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megarlx.ops import native

native.load()

NOTHING_DRAWN = -2  # in the history of a row that was frozen before the step


def decode_heads_(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    cosines: Tensor,
    sines: Tensor,
    q: Tensor,
    *,
    table: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    sums: Tensor | None = None,
    ranks: int = 1,
    eps: float = 0.0,
) -> None:
    """QK-norm and rotation of qkv [B, (H + 2K) D] into q [B, H, D] and one layer's cache.

    keys and values are [P, G, K, D]. slots and positions int64 [B] say where the new token of a row
    stands; a slot below 0 leaves the cache alone. Without a table a slot is a page; a table int32
    [slots, 1 + 2n] names the pages of each (model/kv_cache.py). cosines and sines are those of
    every position, [≥ n G, D/2].
    sums [B, 2] and ranks: as in ops/elementwise.py, where a norm spans the heads of several ranks.
    On CUDA a place or page that does not exist is not written, and nothing is raised.
    """
    torch.ops.megarlx.decode_heads_(
        qkv,
        keys,
        values,
        table,
        slots,
        positions,
        cosines,
        sines,
        q_weight,
        k_weight,
        sums,
        ranks,
        eps,
        q,
    )


def merge_attention(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two parts of what a row sees, [B, H, D] each, as over both together.

    The second of each pair is the log-sum-exp of its scores [B, H] of any strides, in fp32 or
    better; so is the second result. A part with an infinity there held nothing. A row depends on no
    other row.
    """
    out: tuple[Tensor, Tensor] = torch.ops.megarlx.merge_attention(a, a_lse, b, b_lse)
    return out


@dataclass(frozen=True)
class StepState:
    """The rows of a decode step on their device, and what was drawn for them lately.

    A row is frozen by its last token: it then takes the idle slot, place 0 and token 0.
    """

    tokens: Tensor  # int64 [B]: the newest token, the step's input
    positions: Tensor  # int64 [B]: its place
    slots: Tensor  # int64 [B]
    keys: Tensor  # int64 [B, 2]: sequence id, the position to be drawn
    last_positions: Tensor  # int64 [B]: of the last token allowed
    frozen: Tensor  # bool [B]
    step: Tensor  # int64 [1]: steps done
    history: Tensor  # int64 [ring, B]: step s in row s % ring
    logprobs: Tensor  # fp32 [2, ring, B]: under the model, under the distribution drawn from

    @staticmethod
    def empty(rows: int, ring: int, device: torch.device | str) -> StepState:
        """All rows frozen, as they are until a sequence takes one."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return StepState(
            *(zeros(rows), zeros(rows), zeros(rows), zeros(rows, 2), zeros(rows)),
            torch.ones(rows, dtype=torch.bool, device=device),
            *(zeros(1), zeros(ring, rows), zeros(2, ring, rows, dtype=torch.float32)),
        )


def decode_advance_(
    state: StepState,
    drawn: Tensor,
    logprob: Tensor,
    sampled_logprob: Tensor,
    *,
    ends: Tensor,
    idle_slot: int,
) -> None:
    """Every row by the token drawn for it; `ends` int64 [n] are the tokens that end a sequence.

    Below 0 is no token (`sample` found no distribution): it ends the row too. All rows are written
    into the history, frozen ones as NOTHING_DRAWN.
    """
    torch.ops.megarlx.decode_advance_(
        drawn,
        logprob,
        sampled_logprob,
        ends,
        state.last_positions,
        idle_slot,
        state.tokens,
        state.positions,
        state.slots,
        state.keys,
        state.frozen,
        state.step,
        state.history,
        state.logprobs,
    )


@torch.library.register_fake("megarlx::decode_heads_")
def _(qkv: Tensor, *arguments: object) -> None:
    return None


@torch.library.register_fake("megarlx::merge_attention")
def _(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(a_lse)


@torch.library.register_fake("megarlx::decode_advance_")
def _(drawn: Tensor, *arguments: object) -> None:
    return None
