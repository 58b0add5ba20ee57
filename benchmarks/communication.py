"""Bytes that a training step sends on each axis: counted in real processes, beside the formula.

python benchmarks/communication.py [--json PATH] [--markdown PATH]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from timing import add_outputs

from megarlx.comm.groups import Layout
from megarlx.parallel.pipeline_plan import PipelinePlan
from megarlx.planning.communication import StepShape, bytes_per_step

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "distributed"))
from grid import BUCKET, LENGTH, SEQUENCES, Case, model, train  # noqa: E402
from harness import Pool  # noqa: E402

CASES = {
    "TP 2": Case("llama3", tp=2, precision="fp32"),
    "TP 4, copied key heads": Case("llama3", tp=4, precision="fp32"),
    "TP 2 with sequence parallel": Case("llama3", tp=2, sequence_parallel=True, precision="fp32"),
    "TP 2, QK-norm over the ranks": Case("olmo2", tp=2, precision="fp32"),
    "TP 2, full recomputation": Case("olmo2", tp=2, recompute="full", precision="fp32"),
    "DP 2": Case("llama3", dp=2, precision="fp32"),
    "DP 4": Case("llama3", dp=4, precision="fp32"),
    "PP 2": Case("llama3", pp=2, precision="fp32"),
    "PP 2, tied embeddings": Case("qwen2", pp=2, tied=True, precision="fp32"),
    "PP 2, V schedule": Case("llama3", pp=2, schedule="zbv", virtual_stages=2, precision="fp32"),
    "TP 2 × PP 2 × DP 2, tied": Case(
        "qwen2", 2, 2, 2, tied=True, sequence_parallel=True, precision="fp32"
    ),
}


def formula(case: Case, rank: int) -> dict[tuple[str, str], int]:
    config = model(case.family, case.tied)
    plan = PipelinePlan.make(
        config.layers,
        case.pp,
        case.schedule,
        case.virtual_stages,
        case.layers_per_stage,
    )
    step = StepShape(
        tokens_per_microbatch=SEQUENCES // case.dp // case.microbatches * LENGTH,
        microbatches=case.microbatches,
        sequence_parallel=case.sequence_parallel,
        recompute=case.recompute,
        bucket_elements=BUCKET,
    )
    return bytes_per_step(config, Layout(pp=case.pp, dp=case.dp, tp=case.tp), plan, step, rank)


def by_axis(sent: dict[tuple[str, str], int]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for (axis, _), count in sent.items():
        totals[axis] = totals.get(axis, 0) + count
    return {axis: total for axis, total in sorted(totals.items()) if total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    add_outputs(parser)
    options = parser.parse_args()
    pool, rows = Pool(), []
    for name, case in CASES.items():
        for rank, result in enumerate(pool.run(case.world_size, train, case, time_limit=120)):
            counted, planned = by_axis(result["sent"]), by_axis(formula(case, rank))
            for axis in sorted({*counted, *planned}):
                row = {"layout": name, "rank": rank, "axis": axis}
                row |= {"counted": counted.get(axis, 0), "formula": planned.get(axis, 0)}
                rows.append(row)
        print(name, "equal" if all(r["counted"] == r["formula"] for r in rows) else "DIFFERS")
    pool.close()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(table(rows))


def table(rows: list[dict]) -> str:
    config = model("llama3", tied=False)
    lines = [
        "# Bytes sent in a training step",
        "",
        f"Command: `python {' '.join(sys.argv)}`",
        "",
        f"A model of {config.parameters():,} parameters ({config.layers} layers, hidden size "
        f"{config.hidden_size}, {config.heads} heads, {config.kv_heads} key heads), {SEQUENCES} "
        f"sequences of {LENGTH} tokens in 4 micro-batches (split over the data-parallel ranks), "
        "fp32, gloo. Counted where messages are sent (`megarlx/comm/collectives.py`, and the "
        "pipeline's sends); the formula is `megarlx/planning/communication.py`. Both use the ring "
        "model stated in `megarlx/comm/groups.py`: the payload, not a backend's packets.",
        "",
        "| layout | rank | axis | counted bytes | formula bytes | equal |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        equal = "yes" if r["counted"] == r["formula"] else "**no**"
        lines.append(
            f"| {r['layout']} | {r['rank']} | {r['axis']} | {r['counted']:,} | {r['formula']:,} "
            f"| {equal} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
