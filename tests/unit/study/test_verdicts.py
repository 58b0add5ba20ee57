"""The table of claims has the report's numbers, a line a comparison."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "report"))
from fake_sweep import Sweep

from megarlx.cli import main
from megarlx.report.claims import judge_all
from megarlx.report.study import Study
from megarlx.study.verdicts import rows_of_claims


def with_lookups(root: Path) -> Path:
    """Three trunks whose knowledge is what RL adds at pass@1, in other units."""
    Sweep(root, checkpoints=(1_000_000,), seeds=(0, 1, 2), questions=40, tests=10).write(
        ["rl", "sft"]
    )
    added = one_of(root, "P2")["by_trunk"]
    for file in (f for f in root.rglob("iter_*.math.json") if "excursions" not in str(f)):
        held = json.loads(file.read_text())
        trunk = next(name for name in added if name in str(file))
        made = held | {"suite": "lookups", "kind": "lookups", "items": [], "standard_errors": {}}
        made["metrics"] = {"probability": 0.5 + added[trunk] / 200}
        (file.parent / file.name.replace("math", "lookups")).write_text(json.dumps(made))
    return root


def one_of(root: Path, claim: str) -> dict[str, dict[str, float]]:
    study = Study.of(root)
    found = judge_all(study, [claim])[claim].evidence["comparisons"][0]
    assert found["trunks"] == 3
    return dict(found)


def test_each_comparison_is_a_line_with_what_the_report_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = with_lookups(tmp_path)
    study = Study.of(root)
    rows = list(rows_of_claims(study, judge_all(study)))
    (row,) = (row for row in rows if row[0] == "P2")
    found = one_of(root, "P2")
    assert row[2:4] == ["RL − base, pass@32", f"{found['points']:+.1f}"]
    assert row[4] == "{:+.1f} to {:+.1f}".format(*found["interval"])
    assert row[6] == f"{found['signs']['above']}/{found['signs']['below']}"
    assert row[-1] == "1.00"
    assert {row[0] for row in rows if row[0]} >= {"P2", "P7", "P11"}
    assert not {"P4", "P14"} & {row[0] for row in rows}  # nothing is known of them
    assert main(["study", "claims", str(root)]) == 0
    assert found["difference"] in capsys.readouterr().out
