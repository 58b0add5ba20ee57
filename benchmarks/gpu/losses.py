"""Token losses: from logits against a copy, from hidden states against bare products.

T tokens, d hidden size, V vocabulary; bf16 on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from op_rows.token_loss import backward_of
from timing import row
from torch import Tensor

from gpu.clock import Call, copies, fitted, interleaved, products
from gpu.compiled import compiled, with_compiled
from gpu.pieces import Context, Piece, Result, gated, note, there
from gpu.trace import traced
from megarlx.ops.linear_token_loss import linear_token_loss
from megarlx.ops.loss_spec import LossSpec
from megarlx.ops.token_loss import token_loss

VOCABULARIES = (50_304, 151_936)
SPEC = LossSpec()


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def repeated(function: Callable[[], object]) -> Call:
    """A call that takes no counter: its inputs are far larger than the L2 cache."""
    return lambda _: function()


def from_logits(context: Context, size: int) -> Result:
    device, tokens = context.device, context.either(8192, 16)
    size = context.either(size, 330)
    logits = torch.randn(tokens, size, device=device, dtype=dtype_on(device)).mul_(2)
    logits.requires_grad_()
    targets = torch.randint(0, size, (tokens,), device=device)
    normalizer = torch.tensor(float(tokens), device=device)
    copy, moved = copies(device, context.small)

    def ours() -> Tensor:
        return token_loss(logits, targets, SPEC, normalizer=normalizer).loss

    call = backward_of(ours, logits)
    functions: dict[str, Call] = {
        "copy": copy,
        "ours": repeated(call),
        "F.cross_entropy": repeated(
            backward_of(lambda: F.cross_entropy(logits.float(), targets), logits)
        ),
    }
    whole = compiled(context, lambda x: F.cross_entropy(x.float(), targets))
    with_compiled(functions, "torch.compile", repeated(backward_of(lambda: whole(logits), logits)))
    absent = []
    if there("liger_kernel"):
        from liger_kernel.transformers import LigerCrossEntropyLoss

        liger = LigerCrossEntropyLoss()
        # It writes the gradient over its input: a view for autograd, the same work.
        functions["Liger"] = repeated(backward_of(lambda: liger(logits, targets), logits))
    else:
        absent.append("Liger")
    if there("transformer_engine") and device.type == "cuda":
        from transformer_engine.pytorch import parallel_cross_entropy

        functions["Transformer Engine"] = repeated(
            backward_of(
                lambda: parallel_cross_entropy(logits[None], targets[None], 0.0, True), logits
            )
        )
    else:
        absent.append("Transformer Engine")
    seconds = interleaved(functions, device, rounds=7)
    shape = f"T {tokens} V {size}"
    # One read and one write of the logits: the gradient takes as many bytes.
    rate = 2 * logits.nbytes / seconds["ours"] / 1e9
    rows = [
        gated(row("token_loss", shape, rate, moved / seconds["copy"] / 1e9, "copy", "GB/s"), 0.85)
    ]
    rows += [
        row("token_loss", shape, 1e3 * seconds["ours"], 1e3 * seconds[name], name, "ms")
        for name in seconds
        if name not in ("ours", "copy")
    ]
    profile = traced(lambda: [call() for _ in range(4)], device)
    return {
        "rows": rows,
        "absent": absent,
        "profile": profile.tell(f"4 × token_loss, {shape}", top=10),
    }


class Linear:
    """Hidden states and a head."""

    def __init__(self, context: Context, tokens: int, hidden_size: int, size: int) -> None:
        device, dtype = context.device, dtype_on(context.device)
        self.hidden = torch.randn(tokens, hidden_size, device=device, dtype=dtype)
        self.weight = torch.randn(size, hidden_size, device=device, dtype=dtype)
        self.weight.div_(hidden_size**0.5)
        self.targets = torch.randint(0, size, (tokens,), device=device)
        self.normalizer = torch.tensor(float(tokens), device=device)
        for tensor in (self.hidden, self.weight):
            tensor.requires_grad_()

    def ours(self, into: Tensor | None = None, kept_gradients_mib: int = 0) -> Tensor:
        return linear_token_loss(
            self.hidden,
            self.weight,
            self.targets,
            SPEC,
            normalizer=self.normalizer,
            weight_grad_=into,
            kept_gradients_mib=kept_gradients_mib,
        ).loss

    def eager(self) -> Tensor:
        return F.cross_entropy((self.hidden @ self.weight.t()).float(), self.targets)

    def call(self, loss: Callable[[], Tensor]) -> Call:
        return repeated(backward_of(loss, self.hidden, self.weight))


def from_hidden(context: Context, size: int) -> Result:
    device = context.device
    tokens, hidden_size, size = context.either((8192, 2048, size), (64, 32, 330))
    x = Linear(context, tokens, hidden_size, size)
    product, operations = products(device, context.small)
    buffer = torch.zeros(size, hidden_size, device=device)
    logits = torch.empty(tokens, size, device=device, dtype=x.hidden.dtype)
    out_hidden, out_weight = torch.empty_like(x.hidden), torch.empty_like(x.weight)

    @torch.no_grad()
    def bare(_: int) -> None:
        torch.mm(x.hidden, x.weight.t(), out=logits)
        torch.mm(logits, x.weight, out=out_hidden)
        torch.mm(logits.t(), x.hidden, out=out_weight)

    ours = {
        "ours": x.call(lambda: x.ours()),
        "ours, gradient added to a buffer": x.call(lambda: x.ours(buffer)),
        "ours, gradients by logits kept": x.call(lambda: x.ours(None, 1 << 20)),
        "ours, kept and added to a buffer": x.call(lambda: x.ours(buffer, 1 << 20)),
    }
    functions: dict[str, Call] = {
        "product": product,
        **ours,
        "the three bare products": bare,
        "F.cross_entropy(hidden @ weight.T)": x.call(lambda: x.eager()),
    }
    whole = compiled(context, lambda h, w: F.cross_entropy((h @ w.t()).float(), x.targets))
    with_compiled(functions, "torch.compile", x.call(lambda: whole(x.hidden, x.weight)))
    absent = []
    if there("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        functions["Liger fused linear"] = x.call(lambda: liger(x.weight, x.hidden, x.targets))
    else:
        absent.append("Liger")
    seconds = interleaved(functions, device, rounds=5)
    shape = f"T {tokens} d {hidden_size} V {size}"
    square = operations / seconds["product"] / 1e12
    rows = []
    for name in ours:
        rate = 6 * tokens * size * hidden_size / seconds[name] / 1e12
        label = name.replace("ours", "linear_token_loss")
        line = row(label, shape, rate, square, "8192³ product", "TFLOP/s")
        rows.append(gated(line, 0.88))
    rows += [
        row("linear_token_loss", shape, 1e3 * seconds["ours"], 1e3 * seconds[name], name, "ms")
        for name in seconds
        if not name.startswith("ours") and name != "product"
    ]
    profile = traced(lambda: x.call(x.ours)(0), device)
    return {
        "rows": rows,
        "absent": absent,
        "profile": profile.tell(f"linear_token_loss, {shape}", top=14),
    }


def peak(context: Context) -> Result:
    """Memory above inputs and their gradients: it must not grow with T, and with V as a chunk.

    A CPU's allocator counts nothing: there is only the call.
    """
    found: Result = {"rows": []}
    if context.device.type == "cpu":
        Linear(context, 64, 32, 330).ours().backward()
        return found
    cases = [(4096, 50_304), (16_384, 50_304), (65_536, 50_304), (16_384, 151_936)]
    megabytes = {}
    for tokens, size in context.either(cases, [(64, 330)]):
        for route in ("ours", "eager"):
            if route == "eager" and tokens * size > 2**30:
                continue
            torch.cuda.empty_cache()
            x = Linear(context, tokens, 2048, size)
            kept = torch.cuda.memory_allocated() + x.hidden.nbytes + x.weight.nbytes
            torch.cuda.reset_peak_memory_stats()
            (x.ours() if route == "ours" else x.eager()).backward()
            torch.cuda.synchronize()
            most = (torch.cuda.max_memory_allocated() - kept) / 2**20
            megabytes[f"{route} T {tokens} V {size}"] = round(most, 1)
            del x
    note(f"MiB above inputs and gradients: {megabytes}")
    return {**found, "megabytes_above_inputs_and_gradients": megabytes}


def growth(context: Context) -> Result:
    """Time against tokens, and against the vocabulary."""
    tokens = context.either([512, 2048, 8192, 32_768, 65_536], [32, 64])
    sizes = context.either([32_768, 65_536, 131_072, 262_144], [128, 256])
    found: Result = {"rows": []}
    for what, cases in {
        "tokens": [(t, context.either(50_304, 330)) for t in tokens],
        "vocabulary": [(context.either(4096, 64), v) for v in sizes],
    }.items():
        xs, ts = [], []
        for count, size in cases:
            x = Linear(context, count, context.either(2048, 32), size)
            calls = {"ours": x.call(x.ours)}
            ts.append(interleaved(calls, context.device, rounds=5)["ours"] * 1e3)
            xs.append(float(count if what == "tokens" else size))
            del x, calls
        found[what] = {"x": xs, "ms": ts, "fit": fitted(xs, ts)}
        note(f"linear_token_loss against {what}: {found[what]}")
    return found


PIECES = [
    *(Piece(f"token_loss-{v}", 15, functools.partial(from_logits, size=v)) for v in VOCABULARIES),
    *(Piece(f"linear_loss-{v}", 13, functools.partial(from_hidden, size=v)) for v in VOCABULARIES),
    Piece("linear_loss-memory", 5, peak),
    Piece("linear_loss-growth", 30, growth),
]
