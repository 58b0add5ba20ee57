"""The parts of a decode step around its products, against a copy of as many bytes.

B rows of configs/olmo2_1b.toml, whose parts are 1 and 256 rows of a step: at 1 it is the launch
that is measured, and the row says so by its ratio.
"""

from __future__ import annotations

from functools import partial

import torch
from timing import row

from gpu.clock import Call, interleaved
from gpu.pieces import ROOT, Context, Piece, Result
from megarlx.config import load_config
from megarlx.ops.decode import decode_norm_, decode_swiglu_
from megarlx.ops.decode_parts import StepState, decode_advance_, decode_heads_, merge_attention


def calls(context: Context, rows: int) -> dict[str, tuple[Call, int]]:
    """By name: a call, and the bytes that it must read and write."""
    c = load_config(ROOT / "configs" / "olmo2_1b.toml").model
    hidden, inner, heads = context.either(
        (c.hidden_size, c.intermediate_size, c.heads), (24, 40, 3)
    )
    device, dim, places = context.device, hidden // heads, context.either(1024, 16)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, y, weight, out = drawn(rows, hidden), drawn(rows, hidden), drawn(hidden), drawn(rows, hidden)
    gate_up, gated = drawn(rows, 2 * inner), drawn(rows, inner)
    qkv, q = drawn(rows, 3 * hidden), drawn(rows, heads, dim)
    keys, values = drawn(rows, places, heads, dim), drawn(rows, places, heads, dim)
    slots = torch.arange(rows, device=device)
    positions, turn = torch.full_like(slots, places // 2), drawn(places, dim // 2)
    lse = torch.randn(rows, heads, device=device)
    state = StepState.empty(rows, 4, device)
    drawn_tokens, ends = torch.ones_like(slots), torch.zeros_like(slots[:1])
    number = x.element_size() * rows

    def heads_(_: int) -> None:
        decode_heads_(
            *(qkv, keys, values, slots, positions, turn, turn, q),
            q_weight=weight,
            k_weight=weight,
            eps=c.norm_eps,
        )

    def advance_(_: int) -> None:
        logprob = lse.view(-1)[:rows]
        decode_advance_(state, drawn_tokens, logprob, logprob, ends=ends, idle_slot=0)

    return {
        "norm behind": (lambda _: decode_norm_(x, y, weight, c.norm_eps), 3 * hidden * number),
        "norm before": (
            lambda _: decode_norm_(x, y, weight, c.norm_eps, out),
            4 * hidden * number,
        ),
        "SwiGLU": (lambda _: decode_swiglu_(gate_up, gated), 3 * inner * number),
        "heads": (heads_, 6 * hidden * number),
        "merge": (
            lambda _: merge_attention(q, lse, q, lse),
            3 * hidden * number + 12 * heads * rows,
        ),
        "advance": (advance_, 133 * rows),
    }


def _copy(target: torch.Tensor, source: torch.Tensor, _: int) -> None:
    target.copy_(source)


def measured(context: Context) -> Result:
    found = []
    for rows in context.either((1, 256), (2,)):
        made = calls(context, rows)
        functions: dict[str, Call] = {}
        for name, (call, moved) in made.items():
            source = torch.empty(moved // 2, dtype=torch.uint8, device=context.device)
            target = torch.empty_like(source)
            functions[name] = call
            functions[f"copy of {name}"] = partial(_copy, target, source)
        seconds = interleaved(functions, context.device, rounds=5, budget_seconds=3)
        for name, (_, moved) in made.items():
            ours, copied = (1e6 * seconds[key] for key in (name, f"copy of {name}"))
            size = f"B={rows}, {moved} bytes"
            found.append(row(f"decode {name}", size, ours, copied, "copy of as many bytes", "us"))
    return {"rows": found}


PIECES = [Piece("decode_parts", 3, measured)]
