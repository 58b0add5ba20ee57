"""Sampling: against one read of the logits at the copy rate, and against others.

B rows, V vocabulary ids; logits in bf16, drawn from N(0, 1) and N(0, 5).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from op_rows.sample import TOP_P, torch_sample, torch_top_p
from timing import row
from torch import Tensor

from gpu.clock import Call, copies, fitted, interleaved, sets_for
from gpu.compiled import compiled, with_compiled
from gpu.pieces import Context, Piece, Result, gated, need, note, there
from gpu.trace import traced
from megarlx.ops import sample

SHAPES = ((50_304, 256), (100_352, 64), (151_936, 1024), (151_936, 256))  # V, B
SMALL = ((330, 16),)
DEVIATIONS = (1.0, 5.0)
COMPILED = (151_936, 256)  # the one that torch.compile is asked for


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


def measured(context: Context, deviation: float) -> Result:
    device = context.device
    copy, moved = copies(device, context.small)
    p = torch.full((1,), TOP_P, device=device)
    k = torch.full((1,), 50, dtype=torch.int64, device=device)
    found: Result = {"rows": []}
    for size, batch in context.either(SHAPES, SMALL):
        x = Inputs(context, size, batch, deviation)
        ours = {
            "unfiltered": x.ours(),
            "top-p 0.9": x.ours(top_p=p),
            "top-k 50": x.ours(top_k=k),
            "top-k 50 and top-p 0.9": x.ours(top_k=k, top_p=p),
        }
        # Which of ours a baseline does the work of.
        of = {
            "torch softmax + multinomial": "unfiltered",
            "torch sort-based top-p": "top-p 0.9",
        }
        functions: dict[str, Call] = {"copy": copy, **ours}
        functions["torch softmax + multinomial"] = x.each(
            functools.partial(torch_sample, heat=x.one)
        )
        functions["torch sort-based top-p"] = x.each(functools.partial(torch_top_p, heat=x.one))
        if (size, batch) in (COMPILED, *SMALL) and deviation == DEVIATIONS[0]:
            name = "torch.compile of softmax + multinomial"
            whole = compiled(context, torch_sample)
            with_compiled(functions, name, x.each(functools.partial(whole, heat=x.one)))
            of[name] = "unfiltered"
        if there("flashinfer"):
            for filtered, name in ((False, "unfiltered"), (True, "top-p 0.9")):
                more = flashinfer_calls(x, filtered)
                functions |= more
                of |= dict.fromkeys(more, name)
        seconds = interleaved(functions, device, rounds=5, budget_seconds=2)
        shape, copied = f"V {size} B {batch} N(0,{deviation:g})", moved / seconds["copy"]
        told = {n: f"{1e6 * seconds[n]:.1f} us {x.bytes / seconds[n] / copied:.3f}" for n in ours}
        note(f"sample, {shape}, share of copy: {told}")
        for name in ours:
            rate = x.bytes / seconds[name] / 1e9
            line = row(f"sample, {name}", shape, rate, copied / 1e9, "copy", "GB/s")
            filtered = name != "unfiltered"
            gate, applies = (0.5 if filtered else 0.8), filtered or size * batch >= 10**7
            found["rows"].append(gated(line, gate, applies))
        for name in (n for n in functions if n in of):
            mine, theirs = 1e6 * seconds[of[name]], 1e6 * seconds[name]
            line = row(f"sample, {of[name]}", shape, mine, theirs, name, "us")
            found["rows"].append(gated(line, 1.0, "flashinfer" in name))
    for name, call in ours.items():
        profile = traced(functools.partial(several, call), device)
        found[f"profile, {name}"] = profile.tell(f"4 × {name}, {shape}", top=6)
    return found


def several(call: Call) -> None:
    for i in range(4):
        call(i)


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
        note(f"sample against {what}: {found[what]}")
    return found


PIECES = [
    *(
        Piece(f"sample-deviation{d:g}", 15, functools.partial(measured, deviation=d))
        for d in DEVIATIONS
    ),
    Piece("sample-growth", 10, growth),
]
