"""Interleaved timing, this machine's own speeds, and the tables that results are published in."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

Row = dict[str, object]
COLUMNS = ("name", "size", "ours", "baseline", "baseline_name", "ratio", "unit")


def interleaved_seconds(
    functions: dict[str, Callable[[], object]], *, pairs: int = 11, budget_seconds: float = 20.0
) -> dict[str, float]:
    """Median seconds of each function, run in turn so that drift of the machine hits all alike."""
    for function in functions.values():  # warm-up: allocator, threads, compilers
        function()
        function()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    for _ in range(pairs):
        for name, function in functions.items():
            before = time.perf_counter()
            function()
            taken[name].append(time.perf_counter() - before)
        if time.perf_counter() - start > budget_seconds and len(taken[name]) >= 3:
            break
    return {name: statistics.median(values) for name, values in taken.items()}


def row(name: str, size: str, ours: float, baseline: float, baseline_name: str, unit: str) -> Row:
    """A line of a results table; times in `unit` (smaller is better) unless it is a rate (…/s)."""
    better_is_larger = unit.endswith("/s")
    ratio = ours / baseline if better_is_larger else baseline / ours
    values = (name, size, ours, baseline, baseline_name, ratio, unit)
    return dict(zip(COLUMNS, values, strict=True))


def sgemm_flop_per_second(size: int = 1024) -> float:
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    seconds = interleaved_seconds({"mm": lambda: torch.mm(a, b, out=out)})["mm"]
    return 2 * size**3 / seconds


def copy_bytes_per_second(megabytes: int = 256) -> float:
    source = torch.randn(megabytes * 1024 * 1024 // 4)
    target = torch.empty_like(source)
    seconds = interleaved_seconds({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * source.numel() * 4 / seconds


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    """What a results file says about where it was measured."""
    facts: dict[str, object] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sgemm_gflop_per_second": round(sgemm_flop_per_second() / 1e9, 1),
        "copy_gb_per_second": round(copy_bytes_per_second() / 1e9, 1),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def markdown(title: str, facts: dict[str, object], rows: Iterable[Row], notes: str = "") -> str:
    lines = [f"# {title}", "", f"Command: `python {' '.join(sys.argv)}`", ""]
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()]
    lines += ["", "Ratios are ours against the named baseline, medians of interleaved runs; "]
    lines[-1] += "above 1 means ours is better."
    lines += ["", "| " + " | ".join(c.replace("_", " ") for c in COLUMNS) + " |"]
    lines += ["|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(number(r[c]) for c in COLUMNS) + " |" for r in rows]
    return "\n".join(lines) + "\n" + (f"\n{notes}\n" if notes else "")


def add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="the file for the rows and the machine")
    parser.add_argument("--markdown", type=Path, help="the file for the table")


def shown(found: Row) -> Row:
    """A line of the table, printed as soon as it is measured."""
    print(
        f"{found['name']!s:<32} {found['size']!s:<44} {number(found['ours']):>9} "
        f"{found['unit']!s:<8} {number(found['ratio']):>6} × {found['baseline_name']}",
        flush=True,
    )
    return found


def write_results(
    options: argparse.Namespace,
    title: str,
    facts: dict[str, object],
    rows: list[Row],
    notes: str = "",
) -> None:
    """To where `add_outputs` asked for."""
    if options.json:
        write_json(options.json, facts, rows)
    if options.markdown:
        options.markdown.write_text(markdown(title, facts, rows, notes), encoding="utf-8")


def write_json(path: Path, facts: dict[str, object], rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
