"""Rows of the op `sample`. B rows, V vocabulary ids."""

from __future__ import annotations

import torch
from timing import Row, interleaved_seconds, row
from torch import Tensor

from megarlx.ops import sample

SIZES = [(V, B) for V in (97, 330, 50304, 151936) for B in (16, 128, 1024) if V * B <= 5e7]
FILTERED = [(97, 1024), (50304, 16), (151936, 16)]
HEAT = 0.7
TOP_P = 0.9


def torch_sample(logits: Tensor, heat: Tensor) -> Tensor:
    return torch.multinomial(torch.softmax(logits / heat, -1), 1)


def torch_top_p(logits: Tensor, heat: Tensor) -> Tensor:
    ordered, ids = torch.sort(logits / heat, descending=True)
    p = torch.softmax(ordered, -1)
    p = p.masked_fill(p.cumsum(-1) - p > TOP_P, 0.0)
    return ids.gather(-1, torch.multinomial(p, 1))


def rows() -> list[Row]:
    found: list[Row] = []
    generator = torch.Generator().manual_seed(0)
    heat, one, seed = torch.tensor([HEAT]), torch.ones(1), torch.ones(1, dtype=torch.long)
    compiled = torch.compile(torch_sample, dynamic=True)
    for size, batch in SIZES:
        logits = torch.randn(batch, size, generator=generator) * 2
        keys = torch.stack([torch.arange(batch), torch.zeros(batch, dtype=torch.long)], 1)
        target = torch.empty_like(logits)
        seconds = interleaved_seconds(
            {
                "ours": lambda x=logits, k=keys: sample(x, seed=seed, keys=k, temperature=heat),
                "ours at 1": lambda x=logits, k=keys: sample(x, seed=seed, keys=k, temperature=one),
                "torch softmax + multinomial": lambda x=logits: torch_sample(x, heat),
                "torch.compile of the same": lambda x=logits: compiled(x, heat),
                "copy of the logits": lambda x=logits, t=target: t.copy_(x),
            },
            budget_seconds=4.0,
        )
        shape = f"V {size} B {batch}"
        names = list(seconds)
        found += [
            row("sample", shape, seconds["ours"] * 1e6, seconds[name] * 1e6, name, "us")
            for name in names[2:]
        ]
        found.append(
            row(
                *("sample, temperature 1", shape, seconds["ours at 1"] * 1e6),
                *(seconds[names[2]] * 1e6, names[2], "us"),
            )
        )
    for size, batch in FILTERED:
        logits = torch.randn(batch, size, generator=generator) * 2
        keys = torch.stack([torch.arange(batch), torch.zeros(batch, dtype=torch.long)], 1)
        seconds = interleaved_seconds(
            {
                "ours": lambda x=logits, k=keys: sample(
                    x, seed=seed, keys=k, temperature=heat, top_p=TOP_P
                ),
                "torch sort-based top-p": lambda x=logits: torch_top_p(x, heat),
            },
            budget_seconds=4.0,
        )
        name = "torch sort-based top-p"
        ours, theirs = seconds["ours"] * 1e6, seconds[name] * 1e6
        found.append(row("sample, top-p 0.9", f"V {size} B {batch}", ours, theirs, name, "us"))
    return found
