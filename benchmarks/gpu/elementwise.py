"""The elementwise parts of a layer against a copy: norm with residual, SwiGLU, heads.

T tokens; widths of configs/olmo2_1b.toml. Each forward and backward has a floor in bytes: every
input read once, every output written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timing import row
from torch import Tensor

from gpu.clock import Call, copies, interleaved
from gpu.pieces import ROOT, Context, Piece, Result
from megarlx.config import load_config
from megarlx.model.rope import frequencies, rotation
from megarlx.ops.elementwise import (
    attention_heads,
    attention_heads_reference,
    is_native,
    rms_norm,
    swiglu,
)


class Case:
    """A function of tensors; `passes` are the rows' numbers that forward and backward must move."""

    def __init__(
        self,
        function: Callable[..., Tensor | tuple[Tensor, ...]],
        *inputs: Tensor,
        passes: tuple[int, int],
    ) -> None:
        self.function = function
        self.inputs = [x.requires_grad_() for x in inputs]
        self.outputs = self.call()
        self.upstream = [torch.randn_like(x) for x in self.outputs]
        width = len(inputs[0]) * inputs[0].element_size()
        self.bytes = {"forward": passes[0] * width, "backward": passes[1] * width}

    def call(self) -> tuple[Tensor, ...]:
        out = self.function(*self.inputs)
        return out if isinstance(out, tuple) else (out,)

    @torch.no_grad()
    def forward(self, _: int) -> None:
        self.call()

    def backward(self, _: int) -> None:
        torch.autograd.grad(self.outputs, self.inputs, self.upstream, retain_graph=True)


def cases(context: Context) -> dict[str, Case]:
    c = load_config(ROOT / "configs" / "olmo2_1b.toml").model
    tokens, hidden, inner, heads = context.either(
        (16_384, c.hidden_size, c.intermediate_size, c.heads), (16, 24, 40, 3)
    )
    device = context.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    radians = frequencies(c.model_copy(update={"head_dim": hidden // heads}), c.rope_theta).to(
        device
    )
    cos, sin = rotation(torch.arange(tokens, device=device), radians, dtype)
    qkv = drawn(tokens, 3 * hidden)
    attend = attention_heads if is_native(qkv) else attention_heads_reference

    def of_heads(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        named: dict[str, Any] = dict(zip(("q_weight", "k_weight"), weights, strict=False))
        return attend(qkv, cos, sin, heads, heads, **named, eps=c.norm_eps)

    dim = hidden // heads

    return {
        # Forward: x read, y written. Backward: upstream and x read, the gradient of x written.
        "norm": Case(
            lambda x, w: rms_norm(x, w, c.norm_eps),
            *(drawn(tokens, hidden), drawn(hidden)),
            passes=(2 * hidden, 3 * hidden),
        ),
        # The residual's gradient is the upstream itself.
        "norm + residual": Case(
            lambda x, w, y: rms_norm(x, w, c.norm_eps, y),
            *(drawn(tokens, hidden), drawn(hidden), drawn(tokens, hidden)),
            passes=(3 * hidden, 3 * hidden),
        ),
        "SwiGLU": Case(swiglu, drawn(tokens, 2 * inner), passes=(3 * inner, 5 * inner)),
        # The values are a view; backward writes the gradient of all three.
        "heads": Case(of_heads, qkv, drawn(hidden), drawn(hidden), passes=(4 * hidden, 8 * hidden)),
        "heads, norm of each": Case(
            of_heads, qkv, drawn(dim), drawn(dim), passes=(4 * hidden, 8 * hidden)
        ),
        # Without a norm backward does not read the projection.
        "heads, no norm": Case(of_heads, qkv, passes=(4 * hidden, 6 * hidden)),
    }


def measured(context: Context) -> Result:
    copy, moved = copies(context.device, context.small)
    functions: dict[str, Call] = {"copy": copy}
    made = cases(context)
    for name, case in made.items():
        functions[f"{name}, forward"] = case.forward
        functions[f"{name}, backward"] = case.backward
    seconds = interleaved(functions, context.device, rounds=5, budget_seconds=5)
    copied = moved / seconds["copy"] / 1e9
    rows = []
    for name, case in made.items():
        size = " ".join(str(list(x.shape)) for x in case.inputs)
        for part, least in case.bytes.items():
            rate = least / seconds[f"{name}, {part}"] / 1e9
            rows.append(row(f"{name}, {part}", size, rate, copied, "copy", "GB/s"))
    return {"rows": rows}


PIECES = [Piece("elementwise", 3, measured)]
