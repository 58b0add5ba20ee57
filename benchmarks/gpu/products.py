"""The products of a decode step of few rows, each by the bytes of its matrix, against a copy and
torch's product: in bf16, and with weights in e4m3. Sizes of configs/olmo2_1b.toml.

Letters: R rows, K columns, N outputs.
"""

from __future__ import annotations

import torch
from op_rows.narrow_product import BEYOND_CACHES, Problem
from timing import row

from gpu.clock import interleaved, speeds
from gpu.pieces import ROOT, Context, Piece, Result
from megarlx.config import load_config


def matrices(context: Context) -> dict[str, tuple[int, int]]:
    """(K, N) by name."""
    c = load_config(ROOT / "configs" / "olmo2_1b.toml").model
    hidden, inner, words = context.either(
        (c.hidden_size, c.intermediate_size, c.vocab_size), (32, 48, 80)
    )
    return {
        "qkv": (hidden, 3 * hidden),
        "o": (hidden, hidden),
        "gate and up": (hidden, 2 * inner),
        "down": (inner, hidden),
        "head": (hidden, words),
    }


def measured(context: Context) -> Result:
    found = []
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    copied = speeds(context)["copy_bytes_per_second"]
    beyond = context.either(BEYOND_CACHES, 0)
    for name, (columns, outputs) in matrices(context).items():
        for rows in context.either((1, 8, 16), (2,)):
            problem = Problem(rows, columns, outputs, dtype, context.device, beyond)
            calls = {"bf16": problem.ours, "torch": problem.torchs, "e4m3": problem.fp8}
            seconds = interleaved(calls, context.device, rounds=5, budget_seconds=0.6)
            size = f"R={rows} K={columns} N={outputs}"
            ours, theirs = (1e6 * seconds[key] for key in ("bf16", "torch"))
            found.append(row(f"product, {name}", size, ours, theirs, "torch mm", "us"))
            for kind, moved in (("bf16", problem.bytes), ("e4m3", columns * outputs)):
                rate = moved / seconds[kind] / 1e9
                label = f"product, {name}, {kind}"
                found.append(row(label, size, rate, copied / 1e9, "copy", "GB/s"))
    return {"rows": found}


PIECES = [Piece("products", 4, measured)]
