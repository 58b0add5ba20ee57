"""Hardware counters of our kernels, read by ncu: what each of them waits for."""

from __future__ import annotations

import re
import shutil

from gpu.pieces import ROOT, Absent, Context, Failed, Piece, Result, call, note, python

SECTIONS = (
    *("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "SchedulerStats"),
    *("LaunchStats", "Occupancy", "InstructionStats"),
)
# A line of ncu's report, and what it is called here.
COUNTERS = {
    "Duration": "duration",
    "DRAM Throughput": "DRAM",
    "L2 Cache Throughput": "L2",
    "One or More Eligible": "issue",
    "Achieved Occupancy": "warps resident",
    "Registers Per Thread": "registers",
}
KERNEL = re.compile(r"^  (?:void )?(?:\S*>::)?(\w+(?:<[^(]*>)?)\(.*\) \(\d+, \d+, \d+\)x\(")
LINE = re.compile(r"^    (" + "|".join(COUNTERS) + r")\s+(\S+)\s+([\d.,]+)$")
MOST_KERNELS = 48


def parsed(report: str) -> list[dict[str, str]]:
    """One entry a kernel: its name, and the counters with their units."""
    found: list[dict[str, str]] = []
    for text in report.splitlines():
        if kernel := KERNEL.match(text):
            found.append({"kernel": kernel[1]})
        elif found and (line := LINE.match(text)):
            unit = "" if "/" in line[2] else f" {line[2]}"
            found[-1].setdefault(COUNTERS[line[1]], line[3] + unit)
    return found


def kernel_names() -> list[str]:
    """Of every kernel in csrc/cuda: the first name with arguments behind __global__."""
    found = set()
    for path in (ROOT / "csrc" / "cuda").glob("*.*"):
        for head in re.findall(r"__global__([^{;]*)", path.read_text()):
            names = re.findall(r"(\w+)\(", head)
            found.add(next(n for n in names if n not in ("__launch_bounds__", "sizeof")))
    return sorted(found)


def counters(context: Context) -> Result:
    program = shutil.which("ncu")
    if program is None:
        raise Absent("ncu is not on PATH")
    # The clocks are left as they are: the card may be somebody else's next.
    words = [program, "--clock-control", "none"]
    words += [word for section in SECTIONS for word in ("--section", section)]
    words += ["-k", f"regex:{'|'.join(kernel_names())}", "-c", str(MOST_KERNELS)]
    script = ROOT / "benchmarks" / "gpu" / "kernels_at_size.py"
    code, report = call([*words, *python(script)], context.seconds_left())
    found = parsed(report)
    for kernel in found:
        note(", ".join(f"{k} {v}" if k != "kernel" else v for k, v in kernel.items()))
    if code != 0 or not found:
        raise Failed(f"ncu ended with {code}, {len(found)} kernels", {"tail": report[-2000:]})
    return {"rows": [], "kernels": found}


PIECES = [Piece("counters", 75, counters, needs="ncu")]
