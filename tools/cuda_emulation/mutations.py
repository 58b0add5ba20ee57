"""Is every __syncthreads needed, and would its loss be seen?

Each is taken out in turn; the directed cases must then go wrong, or the thread sanitizer must
report a race. One that may go unseen stands in SUPERFLUOUS with the reason.

    python -m cuda_emulation.mutations     prints the table
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .build import CSRC, KINDS, build, environment

BARRIER = "__syncthreads();"
STOPPING = "ignore_noninstrumented_modules=1:exitcode=66:halt_on_error=1"  # at the first race
# (file, number of the barrier in it, from 1): why nothing needs it
SUPERFLUOUS: dict[tuple[str, int], str] = {
    (
        "sample_filters.cu",
        1,
    ): "add_over_block ends with one, so nobody reads the last sums any more",
    ("sample_threshold.h", 5): (
        "the start of a descent's round: the last round's bins were read before find_place's second"
    ),
    ("sample_threshold.h", 8): "the start of by_numbers: nothing has used the bins since a barrier",
}


@dataclass(frozen=True)
class Mutation:
    file: str
    number: int
    line: int

    def apply(self, csrc: Path) -> None:
        path = csrc / "cuda" / self.file
        *before, after = path.read_text().split(BARRIER, self.number)
        path.write_text(BARRIER.join(before) + ";" + after)


def mutations(csrc: Path = CSRC) -> Iterator[Mutation]:
    for path in sorted((csrc / "cuda").iterdir()):
        text = path.read_text()
        for number, found in enumerate(re.finditer(re.escape(BARRIER), text), 1):
            yield Mutation(path.name, number, text.count("\n", 0, found.start()) + 1)


def seen_by(mutation: Mutation) -> str:
    """What sees that the barrier is gone: "race", "result", "hang", or "" for nothing."""
    kind = KINDS["thread"]
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(CSRC, csrc)
        mutation.apply(csrc)
        library = build(kind, csrc, Path(folder) / "rewritten")
        try:
            done = subprocess.run(
                [sys.executable, "-m", "cuda_emulation.cases", str(library)],
                env=environment(kind) | {"TSAN_OPTIONS": STOPPING},
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
        except subprocess.TimeoutExpired:
            return "hang"
        finally:
            library.unlink()
    if "ThreadSanitizer: data race" in done.stderr:
        return "race"
    return "result" if done.returncode != 0 else ""


def main() -> int:
    unseen = 0
    for mutation in mutations():
        seen = seen_by(mutation)
        reason = SUPERFLUOUS.get((mutation.file, mutation.number))
        wrong = bool(seen) == (reason is not None)
        unseen += wrong
        verdict = f"seen by {seen}" if seen else f"not seen: {reason or 'NO REASON GIVEN'}"
        print(f"{mutation.file}:{mutation.line} (barrier {mutation.number}) {verdict}", flush=True)
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
