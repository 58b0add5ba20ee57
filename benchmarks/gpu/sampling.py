"""Stage ops, sampling: against one read of the logits at the copy rate, and against others.

B rows, V vocabulary ids; logits in bf16, drawn from N(0, 1) and N(0, 5).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from op_rows.sample import TOP_P, torch_sample, torch_top_p
from timing import row
from torch import Tensor

from gpu.clock import Call, copies, fitted, interleaved, sets_for
from gpu.pieces import Context, Piece, Result, gated, need
from megarlx.ops import sample

VOCABULARIES, BATCHES = (50_304, 100_352, 151_936), (64, 256, 1024)
SMALL = ((330,), (16,))
DEVIATIONS = (1.0, 5.0)
COMPILED_AT = 256  # rows: one shape a vocabulary is compiled
HAS_FLASHINFER = importlib.util.find_spec("flashinfer") is not None


class Inputs:
    """Sets of logits that together do not fit into the L2 cache."""

    def __init__(self, context: Context, size: int, batch: int, deviation: float) -> None:
        device = context.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        count = sets_for(size * batch * dtype.itemsize, context.small)
        self.logits = [
            (torch.randn(batch, size, device=device) * deviation).to(dtype) for _ in range(count)
        ]
        ids = torch.arange(batch, device=device)
        self.keys = torch.stack([ids, torch.full_like(ids, 3)], 1)
        self.seed = torch.ones(1, dtype=torch.int64, device=device)
        self.one = torch.ones(1, device=device)
        self.bytes = self.logits[0].nbytes

    def ours(self, **filters: Any) -> Call:
        return lambda i: sample(
            self.logits[i % len(self.logits)],
            seed=self.seed,
            keys=self.keys,
            temperature=self.one,
            **filters,
        )

    def each(self, function: Callable[[Tensor], object]) -> Call:
        """`function` of one set of logits, in fp32 as the others want them."""
        return lambda i: function(self.logits[i % len(self.logits)].float())


def measured(context: Context, deviation: float, filtered: bool) -> Result:
    sizes = context.either((VOCABULARIES, BATCHES), SMALL)
    copy, moved = copies(context.device, context.small)
    rows: list[Result] = []
    for size in sizes[0]:
        compiled = torch.compile(torch_sample, dynamic=False)
        for batch in sizes[1]:
            if context.seconds_left() < 15:
                return {"rows": rows, "cut": f"at V {size} B {batch}: the time was over"}
            x = Inputs(context, size, batch, deviation)
            p = torch.full((1,), TOP_P, device=context.device)
            k = torch.full((1,), 50, dtype=torch.int64, device=context.device)
            functions: dict[str, Call] = {"copy": copy}
            if filtered:
                functions["top-p 0.9"] = x.ours(top_p=p)
                functions["top-k 50"] = x.ours(top_k=k)
                functions["top-k 50 and top-p 0.9"] = x.ours(top_k=k, top_p=p)
                functions["torch sort-based top-p"] = x.each(
                    functools.partial(torch_top_p, heat=x.one)
                )
            else:
                functions["unfiltered"] = x.ours()
                functions["torch softmax + multinomial"] = x.each(
                    functools.partial(torch_sample, heat=x.one)
                )
                if batch in (COMPILED_AT, *SMALL[1]) and deviation == DEVIATIONS[0]:
                    functions["torch.compile of the same"] = x.each(
                        functools.partial(compiled, heat=x.one)
                    )
            if HAS_FLASHINFER:
                functions |= flashinfer_calls(x, filtered)
            seconds = interleaved(functions, context.device, budget_seconds=4)
            shape = f"V {size} B {batch} N(0,{deviation:g})"
            copied = moved / seconds["copy"] / 1e9
            ours = [n for n in seconds if n.startswith(("top-", "unfiltered"))]
            for name in ours:
                rate = x.bytes / seconds[name] / 1e9
                line = row(f"sample, {name}", shape, rate, copied, "copy", "GB/s")
                rows.append(
                    gated(line, 0.5 if filtered else 0.8, filtered or size * batch >= 10**7)
                )
            first = seconds[ours[0]] * 1e6
            for name in seconds:
                if name in ours or name == "copy":
                    continue
                line = row(f"sample, {ours[0]}", shape, first, seconds[name] * 1e6, name, "us")
                rows.append(gated(line, 1.0, "flashinfer" in name))
    return {"rows": rows, "flashinfer": "there" if HAS_FLASHINFER else "absent"}


def flashinfer_calls(x: Inputs, filtered: bool) -> dict[str, Call]:
    sampling = need("flashinfer.sampling")
    if filtered:
        return {
            "flashinfer softmax + top_p_sampling_from_probs": x.each(
                lambda z: sampling.top_p_sampling_from_probs(torch.softmax(z, -1), TOP_P)
            )
        }
    wide = [z.float() for z in x.logits]  # it takes fp32: the widening is not counted against it
    return {
        "flashinfer sampling_from_logits": lambda i: sampling.sampling_from_logits(
            wide[i % len(wide)]
        )
    }


def growth(context: Context) -> Result:
    """How the time of a draw grows with the vocabulary, with the batch, with what is kept."""
    found: Result = {"rows": []}
    vocabularies = context.either([32_768, 65_536, 98_304, 131_072, 196_608, 262_144], [128, 256])
    batches = context.either([1, 64, 256, 512, 1024], [1, 4])
    series = {
        "vocabulary": [(v, context.either(256, 4)) for v in vocabularies],
        "batch": [(context.either(151_936, 256), b) for b in batches],
    }
    for what, cases in series.items():
        xs, ts = [], []
        for size, batch in cases:
            inputs = Inputs(context, size, batch, 1.0)
            calls = {"ours": inputs.ours()}
            ts.append(interleaved(calls, context.device, rounds=7)["ours"] * 1e6)
            xs.append(float(size if what == "vocabulary" else batch))
        found[what] = {"x": xs, "us": ts, "fit": fitted(xs, ts)}
    return found


PIECES = [
    *(
        Piece(
            f"sample-deviation{d:g}", 60, functools.partial(measured, deviation=d, filtered=False)
        )
        for d in DEVIATIONS
    ),
    *(
        Piece(
            f"filtered-deviation{d:g}", 90, functools.partial(measured, deviation=d, filtered=True)
        )
        for d in DEVIATIONS
    ),
    Piece("sample-growth", 40, growth),
]
