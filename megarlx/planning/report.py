"""A plan as plain values, for JSON, and as tables, for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megarlx.comm.hardware import Gpu
from megarlx.planning.dry_run import DryRun, first_turn
from megarlx.planning.job import Job
from megarlx.planning.memory import kv_cache_bytes, optimizer_bytes, rank_memory
from megarlx.planning.pieces import Held, Rollouts
from megarlx.planning.rollouts import RolloutTime, generation_seconds, rollout_time
from megarlx.planning.search import RECOMPUTE, Prediction, Search, predict, search
from megarlx.planning.sent import bytes_of_step

GB = 1e9


@dataclass(frozen=True)
class Plan:
    """The configured layout, what generation on it takes, and the best layouts there are."""

    gpu: Gpu
    configured: Prediction
    rollouts: Rollouts
    rollout_time: RolloutTime
    generate_seconds: float  # of a step's samples, where the stage makes any
    kv_cache: int  # of the rollouts, on the worst rank
    activations: dict[str, int]  # of the worst rank, by recomputation
    optimizer: dict[int, int]  # of the worst rank, by number of objectives
    sent: dict[tuple[str, str], int]  # by the worst rank in a step: (axis, operation)
    found: Search


def make_plan(
    job: Job, gpu: Gpu, rollouts: Rollouts, *, cache_counts: bool = False, best: int = 5
) -> Plan:
    """`cache_counts`: the rollouts' cache is there while training, and counts in its memory."""
    held = rollouts if cache_counts else None
    configured = predict(job, gpu, held)
    rank = configured.rank
    pp_rank = job.layout.coordinates(rank)["pp"]
    numbers = job.sizes(pp_rank).flat
    counts = range(1, max(2, job.objectives) + 1)
    alone = job.changed(others=(), held=None)
    return Plan(
        gpu,
        configured,
        rollouts,
        rollout_time(job, gpu, rollouts),
        generation_seconds(job, gpu),
        kv_cache_bytes(job, pp_rank, rollouts),
        {r: rank_memory(job.changed(recompute=r), rank).activations for r in RECOMPUTE},
        {n: optimizer_bytes(alone.changed(objectives=n), numbers) for n in counts},
        {k: v for k, v in bytes_of_step(job, rank).items() if v},
        search(job, job.gpus, gpu, rollouts=held, count=best),
    )


def plan_values(plan: Plan) -> dict[str, Any]:
    """What `--json` prints. Bytes and seconds, without prefixes."""
    configured = plan.configured
    job = configured.job
    return {
        "gpu": asdict(plan.gpu),
        "gpus": job.gpus,
        "parameters": job.model.parameters(),
        "tokens_per_step": round(job.trained_tokens / job.objectives),
        "objectives": job.objectives if not job.others else [o.name for o in job.all_objectives],
        "generate_seconds": plan.generate_seconds,
        "configured": _prediction_values(configured, plan.gpu),
        "activations_by_recompute": plan.activations,
        "optimizer_by_objectives": plan.optimizer,
        "bytes_sent": _by_axis(plan.sent),
        "rollouts": {
            **asdict(plan.rollouts),
            **asdict(plan.rollout_time),
            "kv_cache": plan.kv_cache,
            "tokens_per_second": plan.rollout_time.tokens_per_second,
        },
        "best": [_prediction_values(p, plan.gpu) for p in plan.found.best],
        "layouts_tried": plan.found.tried,
        "layouts_fitting": plan.found.fitting,
    }


def _prediction_values(prediction: Prediction, gpu: Gpu) -> dict[str, Any]:
    job = prediction.job
    return {
        "layout": _layout_values(job),
        "worst_rank": prediction.rank,
        "memory": {**prediction.memory.by_kind(), "peak": prediction.memory.peak},
        "fits": prediction.fits(gpu),
        "step_seconds": {**asdict(prediction.time), "total": prediction.time.total},
        "bubble_fraction": job.plan.bubble_fraction(job.microbatches),
        "mfu": prediction.mfu,
    }


def _layout_values(job: Job) -> dict[str, Any]:
    """The keys of a configuration that give this layout."""
    return {
        **({"layout.replica": job.replica} if job.replica > 1 else {}),
        "layout.tensor": job.tp,
        "layout.pipeline": job.pp,
        "layout.data": job.dp,
        "layout.schedule": job.schedule,
        "layout.virtual_stages": job.virtual_stages,
        "layout.sequence_parallel": job.sequence_parallel,
        "training.sequences_per_microbatch": job.sequences_per_microbatch,
        "training.recompute": job.recompute,
    }


def _by_axis(sent: dict[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    axes: dict[str, dict[str, int]] = {}
    for (axis, operation), count in sorted(sent.items()):
        axes.setdefault(axis, {})[operation] = count
    return axes


def dry_run_values(run: DryRun, job: Job) -> dict[str, Any]:
    return {
        "rank": run.rank,
        "place": run.place,
        "stages": run.stages,
        "parameters": run.parameters,
        "sent": [
            {"axis": a, "operation": o, "calls": calls, "counted": counted, "formula": formula}
            for a, o, calls, counted, formula in compare(run, job)
        ],
        "build_seconds": run.build_seconds,
        "step_seconds": run.step_seconds,
    }


def compare(run: DryRun, job: Job) -> list[tuple[str, str, int, int, int]]:
    """(axis, operation, calls, bytes counted, bytes of the formula) of all that is sent."""
    formula = bytes_of_step(first_turn(job), run.rank, averages=True)
    counted = run.sent()
    keys = sorted({*counted, *(key for key, value in formula.items() if value)})
    return [
        (*key, run.counts[key].calls if key in run.counts else 0, counted.get(key, 0), formula[key])
        for key in keys
    ]


# Tables.


def print_plan(plan: Plan, console: Console) -> None:
    job, gpu = plan.configured.job, plan.gpu
    console.print(
        f"{_short(job.model.parameters())} parameters, "
        f"{round(job.trained_tokens / job.objectives):,} tokens a step, "
        f"{_objectives(job)}, {_arithmetic(job)}, on {job.gpus} {gpu.name}. "
        "Bytes are computed; seconds are modelled, not measured."
    )
    console.print(f"\nConfigured layout: {job}")
    _print_memory(plan, console)
    _print_time(plan, console)
    _print_rollouts(plan, console)
    _print_best(plan, console)


def _arithmetic(job: Job) -> str:
    products = "fp8" if job.fp8 else job.arithmetic
    return job.precision if products == job.precision else f"{job.precision}, {products} products"


def print_stages(jobs: dict[str, Job], gpu: Gpu, console: Console) -> None:
    """All stages of a configuration, one line each; the fullest is then shown whole."""
    table = _table("stage", "peak GB", "step s", "samples s", "MFU", "fits")
    for name, job in jobs.items():
        found = predict(job, gpu)
        cells = (_gb(found.memory.peak), _seconds(found.time.total))
        samples = _seconds(generation_seconds(job, gpu), found.time.total)
        fits = "yes" if found.fits(gpu) else "NO"
        table.add_row(name, *cells, samples, f"{found.mfu:.1%}", fits)
    console.print(table)


def print_whole(jobs: dict[str, Job], steps: Sequence[int], gpu: Gpu, console: Console) -> None:
    """`steps` of each stage, in the order of the jobs."""
    seconds = sum(
        count * (predict(job, gpu).time.total + generation_seconds(job, gpu))
        for job, count in zip(jobs.values(), steps, strict=True)
    )
    gpus = next(iter(jobs.values())).gpus
    hours = seconds / 3600
    console.print(
        f"\nAll {sum(steps):,} steps: {hours:,.1f} hours, {hours * gpus:,.0f} GPU-hours, without "
        "saving, evaluation and stops."
    )


def _objectives(job: Job) -> str:
    if job.others or job.name != "pretraining":
        how = ""
        if job.others:
            place = "in replicas" if job.in_replicas else "on every rank"
            how = " in turn" if job.alternates else f" averaged {place}"
            how += f" every {job.sync_every} steps" if job.sync_every > 1 else ""
        return " and ".join(one.name for one in job.all_objectives) + how
    return "1 objective" if job.objectives == 1 else f"{job.objectives} objectives"


def _print_memory(plan: Plan, console: Console) -> None:
    configured, usable = plan.configured, plan.gpu.usable_bytes
    job = configured.job
    memory = configured.memory
    table = _table("kind", f"GB on rank {configured.rank}, the fullest")
    for kind, count in memory.by_kind().items():
        if kind == "kv_cache" and not count:
            continue
        table.add_row(kind.replace("_", " "), _gb(count, memory.peak))
    table.add_row("peak of a step", _gb(memory.peak))
    room = "fits" if configured.fits(plan.gpu) else "DOES NOT FIT"
    table.add_row(f"of {plan.gpu.name}'s {_gb(usable)} usable", room)
    console.print(table)
    kept = ", ".join(f"{how} {_gb(count, memory.peak)}" for how, count in plan.activations.items())
    console.print(f"activations by recomputation (GB): {kept}")
    states = ", ".join(f"{n}: {_gb(count, memory.peak)}" for n, count in plan.optimizer.items())
    console.print(f"optimizer by number of objectives (GB): {states}")
    if (held := job.held) is not None and held != Held():
        console.print(f"of the shard's size on this rank: 1 master, {_shards(held)}")
    console.print()


def _shards(held: Held) -> str:
    names = {"states": "of update rules", "locals": "local masters", "frozen": "references"}
    names |= {"outer": "for outer steps", "masks": "masks of a byte each"}
    return ", ".join(
        f"{count} {names.get(kind, kind)}" for kind, count in asdict(held).items() if count
    ).replace("exchange", "to exchange updates")


def _print_time(plan: Plan, console: Console) -> None:
    job, time = plan.configured.job, plan.configured.time
    table = _table("part of a step (modelled)", "seconds", "share")
    for part, seconds in vars(time).items():
        if seconds:
            share = f"{seconds / time.total:.1%}"
            table.add_row(part.replace("_", " "), _seconds(seconds, time.total), share)
    table.add_row("step", _seconds(time.total), "100.0%")
    console.print(table)
    tokens = job.trained_tokens / time.total
    bubble = job.plan.bubble_fraction(job.microbatches)
    console.print(
        f"training: MFU {plan.configured.mfu:.1%}, {tokens:,.0f} tokens/s, "
        f"{job.microbatches} micro-batches, bubble {bubble:.1%}\n"
    )
    if plan.sent:
        links = _table("sent in a step", "operation", "GB")
        for (axis, operation), count in sorted(plan.sent.items()):
            links.add_row(axis, operation, f"{count / GB:.6f}")
        console.print(links)


def _print_rollouts(plan: Plan, console: Console) -> None:
    time, rollouts, job = plan.rollout_time, plan.rollouts, plan.configured.job
    console.print(
        f"rollouts (modelled): {rollouts.slots} sequences at once on each of "
        f"{job.dp * job.replica} copies, {rollouts.prompt_tokens} + "
        f"{rollouts.completion_tokens} tokens: {1e3 * time.token_seconds:.2f} ms a token, "
        f"{time.total:.{1 if time.total >= 0.1 else 6}f} s for all, "
        f"{time.tokens_per_second:,.0f} tokens/s, MFU {time.mfu:.1%}; keys and values "
        f"{_gb(plan.kv_cache, plan.configured.memory.peak)} GB a rank\n"
    )
    if plan.generate_seconds:
        samples = sum(one.samples_per_step for one in job.all_objectives)
        console.print(
            f"a step's {samples:,} samples take {_seconds(plan.generate_seconds)} s where all are "
            "of the longest (modelled; before the step, and not in its time)\n"
        )


def _print_best(plan: Plan, console: Console) -> None:
    found = plan.found
    console.print(f"best layouts of {found.tried} tried, of which {found.fitting} fit (modelled):")
    table = _table("layout", "step s", "MFU", "bubble", "peak GB")
    for best in found.best:
        bubble = best.job.plan.bubble_fraction(best.job.microbatches)
        table.add_row(
            str(best.job),
            _seconds(best.time.total),
            f"{best.mfu:.1%}",
            f"{bubble:.1%}",
            _gb(best.memory.peak),
        )
    console.print(table)


def print_dry_run(run: DryRun, job: Job, console: Console) -> None:
    place = ", ".join(f"{axis} {number}" for axis, number in run.place.items())
    layers = ", ".join(f"{first}-{last - 1}" for first, last in run.stages if last > first)
    console.print(
        f"rank {run.rank} of {job.gpus} ({place}): layers {layers or 'none'}, "
        f"{run.parameters:,} numbers; built in {run.build_seconds:.1f} s, "
        f"a step walked in {run.step_seconds:.1f} s"
    )
    table = _table("axis", "operation", "calls", "bytes counted", "bytes of the formula")
    for axis, operation, calls, counted, formula in compare(run, job):
        table.add_row(axis, operation, f"{calls:,}", f"{counted:,}", f"{formula:,}")
    console.print(table)


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="left" if name == "operation" else "right")
    return table


def _gb(count: float, of: float | None = None) -> str:
    """As fine as the table that it stands in needs, whose largest number it is a part `of`."""
    return f"{count / GB:.{2 if (count if of is None else of) >= 0.1 * GB else 6}f}"


def _seconds(value: float, of: float | None = None) -> str:
    return f"{value:.{3 if (value if of is None else of) >= 0.1 else 6}f}"


def _short(number: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.2f}{letter}"
    return str(number)


def differing(rows: Iterable[Sequence[Any]]) -> list[str]:
    """The messages whose counted bytes are not the formula's."""
    return [f"{axis} {operation}" for axis, operation, _, counted, want in rows if counted != want]
