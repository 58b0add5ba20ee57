"""What the doctor finds, and how it is told."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

# ok; absent: optional and not there; missing: needed and not there; broken: there, but does not
# work; mismatched: works, but not with the other parts.
State = Literal["ok", "absent", "missing", "broken", "mismatched"]
WELL: tuple[State, ...] = ("ok", "absent")

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One part, how it is, and the command that mends or brings it."""

    part: str
    state: State
    detail: str
    mend: str | None = None

    @property
    def well(self) -> bool:
        return self.state in WELL


def python_command() -> str:
    """How this very interpreter is called from a shell."""
    on_path = shutil.which("python")
    same = on_path is not None and Path(on_path).resolve() == Path(sys.executable).resolve()
    ours = same and Path(sys.prefix) in Path(str(on_path)).parents
    return "python" if ours else shlex.quote(sys.executable)


def pip_install(what: str, *, before: str = "") -> str:
    return f"{before}{python_command()} -m pip install {what}"


def pip_uninstall(what: str) -> str:
    return f"{python_command()} -m pip uninstall -y {what}"


def rebuild(*, before: str = "") -> str:
    """The command that builds the native code again where this megarlx lies."""
    if (ROOT / "setup.py").exists():
        build = f"{python_command()} setup.py build_ext --inplace"
        return f"cd {shlex.quote(str(ROOT))} && {before}{build}"
    return pip_install(
        "--no-build-isolation --no-cache-dir --force-reinstall --no-deps megarlx", before=before
    )


def as_text(findings: Sequence[Finding]) -> str:
    width = max(len(f.part) for f in findings)
    lines = []
    for f in findings:
        state = f.state if f.well else f.state.upper()
        lines.append(f"{state:<10}  {f.part:<{width}}  {f.detail}")
        if f.mend:
            indent = " " * (width + 14)
            lines.append(f"{indent}{'brings it' if f.well else 'mends it'}: {f.mend}")
    ill = [f.part for f in findings if not f.well]
    lines.append("")
    lines.append(
        f"To be mended: {', '.join(ill)}." if ill else "All that is needed is here and works."
    )
    return "\n".join(lines) + "\n"


def as_json(findings: Sequence[Finding]) -> str:
    data = {
        "ok": all(f.well for f in findings),
        "findings": [dataclasses.asdict(f) for f in findings],
    }
    return json.dumps(data, indent=2) + "\n"
