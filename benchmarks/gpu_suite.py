"""Everything that has to run on a GPU, in stages of at most eight minutes, in any order.

    python benchmarks/gpu_suite.py --stage build|correct|ops|model|study [--out DIR] [--again]
    python benchmarks/gpu_suite.py --list

A stage writes DIR/STAGE.json, .md and .log after every piece. Pieces that are done are not run
again (--again: they are); one that the time left is too short for is written down as not run, and
the same command goes on with it. `--device cpu` tries the code of every piece at tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu.pieces import ROOT, Absent, Context, Failed, Piece, Result, environment, python, write_json
from timing import cpu_name, number

# In the order in which a machine that is lent for a short time is best used.
STAGES = {
    "build": ("gpu.build",),
    "correct": ("gpu.correct",),
    "ops": ("gpu.sampling", "gpu.losses", "gpu.updates"),
    "model": ("gpu.training", "gpu.decoding"),
    "study": ("gpu.study",),
}
BUDGET_SECONDS = 465.0
# A piece that was started at the last moment may still use what is left; nothing uses more.
OVERTIME = 2.0


def pieces_of(stage: str) -> list[Piece]:
    return [piece for module in STAGES[stage] for piece in importlib.import_module(module).PIECES]


def facts(device: torch.device) -> Result:
    found: Result = {"device": str(device), "torch": torch.__version__, "cpu": cpu_name()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    git = shutil.which("git")
    if git is not None:
        done = subprocess.run(
            [git, "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        found["revision"] = done.stdout.strip() or "unknown"
    return found


def run_pieces(
    pieces: Sequence[Piece],
    before: dict[str, Result],
    start: Callable[[Piece, float], Result],
    save: Callable[[list[Result]], None],
    *,
    budget_seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Result]:
    """Begins pieces while there is time; what is `before` and done stays. `save` after each."""
    deadline = clock() + budget_seconds
    found = {
        piece.name: before.get(piece.name, {"name": piece.name, "status": "not run"})
        for piece in pieces
    }
    for piece in pieces:
        if found[piece.name]["status"] == "done":
            continue
        left = deadline - clock()
        if left < piece.seconds:
            reason = f"{max(left, 0):.0f} s left, it may need {piece.seconds:.0f} s"
            if found[piece.name]["status"] == "not run":
                found[piece.name]["reason"] = reason
        else:
            limit = min(left, OVERTIME * piece.seconds)
            found[piece.name] = {"name": piece.name, **start(piece, limit)}
        save(list(found.values()))
    return list(found.values())


def in_a_process(
    stage: str, options: argparse.Namespace, log: Path
) -> Callable[[Piece, float], Result]:
    def start(piece: Piece, limit: float) -> Result:
        print(f"{stage} {piece.name}: begun, at most {limit:.0f} s", flush=True)
        target = options.out / "pieces" / f"{stage}.{piece.name}.json"
        target.unlink(missing_ok=True)
        begun = time.monotonic()
        words = ["--stage", stage, "--piece", piece.name, "--device", options.device]
        words += ["--out", str(options.out), "--limit", str(limit), "--result", str(target)]
        words += ["--small"] if options.small else []
        with log.open("a") as file:
            file.write(f"\n==== {stage} {piece.name}\n")
            file.flush()
            code = _logged(python(Path(__file__).resolve(), *words), limit, file)
        seconds = round(time.monotonic() - begun, 1)
        if target.exists():
            result = {**json.loads(target.read_text()), "seconds": seconds}
        elif code is None:
            result = {"status": "timed out", "reason": f"ended after {limit:.0f} s"}
        else:
            result = {"status": "failed", "reason": f"the process ended with {code}; see {log}"}
        result["seconds"] = seconds
        print(f"{stage} {piece.name}: {result['status']}, {seconds} s", flush=True)
        return result

    return start


def _logged(command: Sequence[str | Path], limit: float, file: Any) -> int | None:
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment(),
        stdout=file,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        # The piece has its own deadline and ends its children before it; this is the last resort.
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return None


def run_piece(options: argparse.Namespace) -> int:
    """The child: one piece, its result to a file."""
    device = torch.device(options.device)
    piece = next(p for p in pieces_of(options.stage) if p.name == options.piece)
    # Nothing in it is kept; what comes back from a lent machine is `out`.
    work = Path(tempfile.gettempdir()) / "megarlx-gpu-suite"
    work.mkdir(parents=True, exist_ok=True)
    # Less than the parent waits, so that a command of this piece is ended by the piece.
    context = Context(device, options.small, work, time.monotonic() + 0.9 * options.limit)
    result: Result
    try:
        result = {"status": "done", "result": piece.run(context)}
        if options.small:  # a tiny size passes and misses nothing
            for row in result["result"].get("rows", []):
                row.pop("needed", None)
                row.pop("met", None)
    except Absent as absent:
        result = {"status": "absent", "reason": str(absent)}
    except Failed as failed:
        result = {"status": "failed", "reason": str(failed), "result": failed.result}
    except Exception as error:  # noqa: BLE001 - written down, and the status says so
        traceback.print_exc()
        result = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:2000]}
    write_json(options.result, result)
    return 0 if result["status"] in ("done", "absent") else 1


def table(found: list[Result], about: Result) -> str:
    """The stage as Markdown: its rows with their gates, and what did not come to an end."""
    lines = [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", "| piece | status | seconds | reason |", "|---|---|---|---|"]
    lines += [
        f"| {p['name']} | {p['status']} | {p.get('seconds', '')} | {_line(p.get('reason', ''))} |"
        for p in found
    ]
    rows = [row for p in found for row in (p.get("result") or {}).get("rows", [])]
    if rows:
        lines += ["", "| name | size | ours | baseline | | unit | ratio | needed | |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        gate = "" if "met" not in row else ("met" if row["met"] else "missed")
        cells = [row[k] for k in ("name", "size", "ours", "baseline", "baseline_name", "unit")]
        cells += [row["ratio"], row.get("needed", ""), gate]
        lines.append("| " + " | ".join(number(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _line(text: object) -> str:
    return str(text).replace("\n", " ").replace("|", "/")[:300]


def run_stage(options: argparse.Namespace) -> int:
    stage, out = options.stage, options.out
    device = torch.device(options.device)
    path, log = out / f"{stage}.json", out / f"{stage}.log"
    out.mkdir(parents=True, exist_ok=True)
    about = facts(device)
    about["command"] = " ".join(["python", "benchmarks/gpu_suite.py", *sys.argv[1:]])
    pieces = [p for p in pieces_of(stage) if not options.only or p.name in options.only]
    names = {piece.name for piece in pieces}
    kept: dict[str, Result] = {}
    if path.exists():
        held = json.loads(path.read_text())
        if held["machine"].get("gpu") == about.get("gpu"):
            kept = {piece["name"]: piece for piece in held["pieces"]}
    others = [piece for name, piece in kept.items() if name not in names]
    before = {} if options.again else kept

    def save(found: list[Result]) -> None:
        write_json(path, {"stage": stage, "machine": about, "pieces": found})
        (out / f"{stage}.md").write_text(table(found, about))

    found = run_pieces(
        pieces,
        before,
        in_a_process(stage, options, log),
        lambda found: save([*others, *found]),
        budget_seconds=options.seconds,
    )
    print(table(found, about))
    return 0 if all(piece["status"] in ("done", "absent") for piece in found) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stage", choices=list(STAGES))
    parser.add_argument("--list", action="store_true", help="print the pieces and run nothing")
    parser.add_argument("--only", nargs="+", metavar="PIECE", help="of the stage, these alone")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "h100")
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS, help="of the stage")
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes; on a CPU always")
    for name, kind in (("--piece", str), ("--limit", float), ("--result", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        for stage in [options.stage] if options.stage else STAGES:
            for piece in pieces_of(stage):
                print(f"{stage:<8} {piece.name:<28} up to {piece.seconds:.0f} s")
        return 0
    if options.stage is None:
        parser.error("--stage is missing; --list shows what there is")
    known = [piece.name for piece in pieces_of(options.stage)]
    if unknown := sorted(set(options.only or []) - set(known)):
        parser.error(f"--only names {', '.join(unknown)}; {options.stage} has {', '.join(known)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu tries the code at tiny sizes")
    options.small = options.small or options.device == "cpu"
    options.out = options.out.resolve()
    return run_piece(options) if options.piece else run_stage(options)


if __name__ == "__main__":
    sys.exit(main())
