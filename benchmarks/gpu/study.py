"""Stage study: configs/study_h100.toml, as far as the time goes; the same command goes on with it.

A run that is stopped saves what it has and resumes; a run that is finished is not run again.
"""

from __future__ import annotations

import tomllib

from gpu.pieces import ROOT, Absent, Context, Failed, Piece, Result, call, python

CONFIG = ROOT / "configs" / "study_h100.toml"


def sweep(context: Context) -> Result:
    if not CONFIG.exists():
        raise Absent("configs/study_h100.toml does not exist")
    listed, commands = call(python("-m", "megarlx", "sweep", CONFIG, "--list"), 60)
    if listed != 0:
        raise Failed(f"megarlx sweep --list ended with {listed}", {"output": commands[-3000:]})
    found: Result = {"runs": commands.splitlines()}
    if context.device.type == "cpu":
        return found  # its size is a GPU's: a CPU looks at the plan alone
    limit = context.seconds_left() - 20
    code, output = call(python("-m", "megarlx", "sweep", CONFIG), limit)
    found["tail"] = output[-3000:].splitlines()
    if code is None:
        raise Failed("unfinished: the same command goes on with it", found)
    if code != 0:
        raise Failed(f"megarlx sweep ended with {code}", found)
    return found


def report(context: Context) -> Result:
    if not CONFIG.exists():
        raise Absent("configs/study_h100.toml does not exist")
    out = ROOT / tomllib.loads(CONFIG.read_text())["out"]
    if not list(out.rglob("lineage.json")):
        raise Absent(f"{out} holds no runs yet")
    code, output = call(python("-m", "megarlx", "report", out), context.seconds_left())
    if code != 0:
        raise Failed(f"megarlx report ended with {code}", {"output": output[-3000:]})
    summary = out / "report" / "summary.json"
    return {"summary": summary.read_text() if summary.exists() else output[-3000:]}


PIECES = [
    # Begun with whatever is left of the stage, less what the report takes.
    Piece("sweep", 200, sweep),
    Piece("report", 45, report),
]
