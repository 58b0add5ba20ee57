"""Peak memory of a training step: planned, beside what torch's CPU allocator really gave.

python benchmarks/memory.py [--json PATH] [--markdown PATH]

Each case runs in a process of its own, one rank of it; its peers are a fake process group.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from typing import Any

import torch
from timing import add_outputs, cpu_name

from megarlx.config.model import family_config
from megarlx.planning.job import Job
from megarlx.planning.measure import measure
from megarlx.planning.memory import rank_memory

OLMO2 = family_config(
    "olmo2", vocab_size=8000, hidden_size=384, layers=8, heads=6, intermediate_size=1024
)
LLAMA3 = family_config(
    "llama3",
    vocab_size=16_000,
    hidden_size=512,
    layers=8,
    heads=8,
    kv_heads=2,
    intermediate_size=1408,
)
QWEN3 = family_config(
    "qwen3",
    vocab_size=12_000,
    hidden_size=320,
    layers=12,
    heads=8,
    kv_heads=4,
    head_dim=64,
    intermediate_size=960,
)


def job(model: object, **changes: object) -> Job:
    batch = {"sequences_per_step": 4, "sequences_per_microbatch": 2, "sequence_length": 128}
    made = Job(model, **{**batch, "precision": "fp32", "on_gpu": False, **changes})  # type: ignore[arg-type]
    made.check()
    return made


CASES: dict[str, tuple[Job, int]] = {
    "olmo2 20M, everything kept": (job(OLMO2), 0),
    "llama3 39M, full recomputation": (job(LLAMA3, recompute="full", sequence_length=256), 0),
    "qwen3 tied, selective, 2 objectives, DP 2": (
        job(QWEN3, recompute="selective", objectives=2, dp=2),
        1,
    ),
    "olmo2, TP 2 with sequence parallel": (job(OLMO2, tp=2, sequence_parallel=True), 1),
    "llama3, PP 4, rank 1 of 1F1B": (job(LLAMA3, pp=4, sequences_per_step=8), 1),
}


def look(case: str) -> dict[str, Any]:
    """In a fresh process."""
    torch.set_num_threads(1)
    planned_for, rank = CASES[case]
    measured, planned = measure(planned_for, rank), rank_memory(planned_for, rank)
    return {
        "name": case,
        "size": f"{planned_for.model.parameters() / 1e6:.1f}M, {planned_for}",
        "ours": planned.peak,
        "baseline": measured.peak,
        "baseline_name": "CPU allocator",
        "ratio": planned.peak / measured.peak,
        "unit": "bytes",
        "planned_between_steps": planned.persistent,
        "measured_between_steps": measured.persistent,
        "step_ratio": (planned.peak - planned.persistent) / (measured.peak - measured.persistent),
    }


def table(rows: list[dict]) -> str:
    lines = [
        "# Memory of a training step on a CPU, planned and measured",
        "",
        f"Command: `python {' '.join(sys.argv)}`",
        "",
        f"- cpu: {cpu_name()}",
        f"- torch: {torch.__version__}",
        "",
        "Measured is the most that torch's CPU allocator had given out at once in two steps, from "
        "its own record (the profiler's memory events), for one rank whose peers are a fake "
        "process group; planned is `megarlx/planning/memory.py`. *Step* is what a step adds to "
        "weights, gradients and optimizer: activations and workspace alone.",
        "",
        "| configuration | rank's layout | planned MB | measured MB | ratio | ratio of the step |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['name']} | {r['size']} | {r['ours'] / 1e6:.1f} | {r['baseline'] / 1e6:.1f} | "
            f"{r['ratio']:.3f} | {r['step_ratio']:.3f} |"
        )
    worst = max(abs(r["ratio"] - 1) for r in rows)
    lines += ["", f"Largest difference: {worst:.1%} (to be within 10%)."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    add_outputs(parser)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    for case in CASES:
        with context.Pool(1) as pool:
            rows.append(pool.apply(look, (case,)))
        print(f"{case}: planned / measured {rows[-1]['ratio']:.3f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(table(rows))
    if any(abs(r["ratio"] - 1) > 0.1 for r in rows):
        sys.exit("planned and measured memory differ by more than 10%")


if __name__ == "__main__":
    main()
