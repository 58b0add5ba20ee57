"""configs/study_h100.toml, its smaller model, as far as the time goes, and the claims it can judge.

A run that is stopped saves what it has and resumes; a run that is finished is not run again.
"""

from __future__ import annotations

import json
import tomllib

from gpu.pieces import ROOT, Context, Failed, Piece, Result, call, note, python

CONFIG = ROOT / "configs" / "study_h100.toml"
SETTINGS = ("--jobs", "8", "--set", 'axes={"model.layers"=[3]}')


def sweep(context: Context) -> Result:
    """A CPU looks at the plan alone."""
    listed, commands = call(python("-m", "megarlx", "sweep", CONFIG, *SETTINGS, "--list"), 60)
    if listed != 0:
        raise Failed(f"megarlx sweep --list ended with {listed}", {"output": commands[-3000:]})
    found: Result = {"rows": [], "runs": commands.splitlines()}
    if context.device.type == "cpu":
        note(f"study: {len(found['runs'])} runs are planned")
        return found
    code, output = call(
        python("-m", "megarlx", "sweep", CONFIG, *SETTINGS), context.seconds_left() - 15
    )
    out = ROOT / tomllib.loads(CONFIG.read_text())["out"]
    done = len(list(out.rglob("lineage.json")))
    found |= {"ended_with": code, "begun": done, "tail": output[-3000:].splitlines()}
    note(f"study: {done} of {len(found['runs'])} runs begun or done, the sweep ended with {code}")
    if code not in (0, None):
        raise Failed(f"megarlx sweep ended with {code}", found)
    if done:
        reported, output = call(python("-m", "megarlx", "report", out), context.seconds_left())
        summary = out / "report" / "summary.json"
        if reported != 0 or not summary.exists():
            raise Failed(f"megarlx report ended with {reported}", {"output": output[-3000:]})
        found["summary"] = json.loads(summary.read_text())
        verdicts = {
            name: claim["verdict"] for name, claim in found["summary"]["predicates"].items()
        }
        note(f"study, claims: {verdicts}")
    return found


PIECES = [Piece("study", 30, sweep)]
