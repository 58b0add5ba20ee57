"""Everything that has to run on a GPU, in pieces, in the order of what they are worth.

    python benchmarks/gpu_suite.py [--call N | --pieces WORD …] [--seconds N] [--out DIR] [--again]
    python benchmarks/gpu_suite.py --list

A word is a piece, a piece:seconds (its limit), or piece+piece:seconds (side by side). Without words
every piece is run. After each piece DIR holds results.json, results.md and logs.tar.gz, whole. The
same command again goes on with what is not done. `--device cpu` tries the code at tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu.order import CALLS, KNOWN, everything
from gpu.pieces import ROOT, Result
from gpu.runner import Runner, turns
from timing import cpu_name


def about(device: str) -> Result:
    """The machine. This process does not touch CUDA: the driver's own program says which card."""
    found: Result = {"device": device, "torch": torch.__version__, "cpu": cpu_name()}
    if device == "cuda":
        found["gpu"] = _first_line("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    found["revision"] = _first_line("git", "-C", str(ROOT), "rev-parse", "HEAD")
    return found


def _first_line(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].strip() or "unknown"


def listed() -> str:
    calls: dict[str, list[str]] = {name: [] for name in KNOWN}
    for number, call in CALLS.items():
        for turn in turns(call.words, KNOWN):
            for piece in turn.pieces:
                calls[piece.name].append(str(number))
    lines = ["piece                    expected  calls"]
    for turn in turns(everything(), KNOWN):
        for piece in turn.pieces:
            cpu = f"not on a CPU: {piece.needs}" if piece.needs else ""
            numbers = ", ".join(calls[piece.name])
            lines.append(f"{piece.name:<24} {piece.seconds:6.0f} s  {numbers:<8} {cpu}".rstrip())
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = found.add_mutually_exclusive_group()
    what.add_argument("--call", type=int, choices=list(CALLS), help="a list made for some minutes")
    what.add_argument("--pieces", nargs="+", metavar="WORD")
    what.add_argument("--list", action="store_true", help="print the pieces and run nothing")
    found.add_argument("--seconds", type=float, help="for all; of --call: its own, else no limit")
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found.add_argument("--small", action="store_true", help="tiny sizes; on a CPU always")
    found.add_argument("--again", action="store_true", help="also what is done")
    found.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_suite", metavar="DIR")
    found.add_argument(
        "--inject",
        nargs="+",
        default=[],
        metavar="fail:PIECE",
        help="for the test of this program: fail:PIECE raises in it, hang:PIECE never ends",
    )
    return found


def main() -> int:
    begun = time.monotonic()
    options = parser().parse_args()
    if options.list:
        print(listed())
        return 0
    words, seconds = options.pieces or everything(), math.inf
    if options.call is not None:
        words, seconds = CALLS[options.call].words, CALLS[options.call].seconds
    injected = {name: what for what, _, name in (word.partition(":") for word in options.inject)}
    if not (injected.keys() <= KNOWN.keys() and set(injected.values()) <= {"fail", "hang"}):
        parser().error(f"--inject is {' '.join(options.inject)}; allowed: fail:PIECE, hang:PIECE")
    try:
        wanted = turns(words, KNOWN)
    except ValueError as error:
        parser().error(str(error))
    # Asking the driver's library, and not CUDA, which would spoil what is forked from here.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser().error("torch sees no GPU; --device cpu tries the code at tiny sizes")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the pieces first
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    machine = about(options.device)
    machine["command"] = " ".join(["python", "benchmarks/gpu_suite.py", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="megarlx-gpu-suite-") as work:
        runner = Runner(
            torch.device(options.device),
            options.small or options.device == "cpu",
            out,
            Path(work),
            machine,
            injected=injected,
            results={} if options.again else kept(out / "results.json", machine),
        )
        left = (options.seconds or seconds) - (time.monotonic() - begun)
        well = runner.run(wanted, left)
    statuses = [result["status"] for result in runner.results.values()]
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    runner.screen.tell(f"{counts}; {time.monotonic() - begun:.0f} s; {out / 'logs.tar.gz'}")
    return 0 if well else 1


def kept(path: Path, machine: Result) -> dict[str, Result]:
    """Results of the same card and revision."""
    if not path.exists():
        return {}
    held = json.loads(path.read_text())
    same = all(
        held["machine"].get(key) == machine.get(key) for key in ("device", "gpu", "revision")
    )
    return {piece["name"]: piece for piece in held["pieces"]} if same else {}


if __name__ == "__main__":
    sys.exit(main())
