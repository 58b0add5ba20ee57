import json
import re
import shutil
from pathlib import Path

import pytest
from fake_sweep import Sweep

from megarlx import plug
from megarlx.cli import main


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sweep = Sweep(tmp_path_factory.mktemp("runs") / "sweep", questions=40, tests=20)
    sweep.checkpoints = (2_000_000,)
    return sweep.write(["rl", "sft", "parallel"])


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "sweep"))


def test_two_seeds_give_numbers_verdicts_and_the_agreed_summary(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(root)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("From 2M tokens of pre-training, RL takes pass@1 of math from")
    assert "pass@32, % (guessing)" in said
    assert "(9.0)" in said
    assert "P3 " in said
    assert "P15" not in said  # nothing here speaks of it
    assert said.splitlines()[-1] == str(root / "report" / "index.html")
    found = json.loads((root / "report" / "summary.json").read_text())
    assert list(found) == ["predicates", "results", "settings_hash"]
    assert list(found["predicates"]) == list(plug.ours("claim"))
    for judged in found["predicates"].values():
        assert list(judged) == ["verdict", "held", "evidence"]
        assert judged["verdict"] in ("held", "not held", "undetermined")
        assert judged["held"] is (judged["verdict"] == "held")
    assert found["predicates"]["P3"]["held"]
    assert len(found["results"]) == 8


CLAIM = """
from megarlx.report.claims import Finding


def seeds(study):
    return Finding("held" if len(study.seeds) == 2 else "not held", {"claim": "two <seeds>"})
"""


def test_a_claim_of_ones_own_is_judged_beside_ours(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(CLAIM)
    name = f"{tmp_path / 'mine.py'}:seeds"
    assert main(["report", str(root), "--claim", name, "--claim", "P3"]) == 0
    assert "two <seeds>" in capsys.readouterr().out
    found = json.loads((root / "report" / "summary.json").read_text())
    assert {name: one["held"] for name, one in found["predicates"].items()} == {
        name: True,
        "P3": True,
    }
    assert "two &lt;seeds&gt;" in (root / "report" / "index.html").read_text()
    assert main(["report", str(root), "--claim", "P99"]) == 1
    assert "megarlx report: claim is 'P99'; allowed are" in capsys.readouterr().err


def test_one_seed_prints_numbers_and_no_verdicts(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in [*(root / "trunks").glob("*seed1"), *(root / "excursions").glob("*seed1")]:
        shutil.rmtree(run)
    assert main(["report", str(root)]) == 0
    said, before = capsys.readouterr()
    assert before == "4 runs: drawing the figures, the page and the viewer …\n"
    assert "One trunk: no verdict" in said
    assert "P3 " not in said
    page = (root / "report" / "index.html").read_text()
    assert "One trunk: numbers are shown, no verdict is claimed." in page
    assert page.index('id="pass_at_k"') < page.index('id="predicates"')


def test_a_sweep_that_has_only_begun_gives_a_report(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(root / "excursions")
    for folder in (root / "trunks").glob("*/evaluations"):
        shutil.rmtree(folder)
    (root / "trunks" / "seed1" / "metrics.jsonl").unlink()
    (root / "trunks" / "seed0" / "resolved.json").unlink()
    assert main(["report", str(root)]) == 0
    assert "missing: no pass@k evaluation of any run" in capsys.readouterr().out
    assert "of any run" in (root / "report" / "index.html").read_text()


def test_out_takes_the_report_and_the_runs_stay_as_they_are(root: Path, tmp_path: Path) -> None:
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    for folder in root.glob("*/*/evaluations"):  # nothing to draw: quick
        shutil.rmtree(folder)
    before = files()
    assert main(["report", str(root), "--out", str(tmp_path / "out")]) == 0
    assert files() == before
    assert (tmp_path / "out" / "index.html").is_file()


@pytest.mark.parametrize("command", ["report", "tree"])
def test_a_folder_without_runs_is_an_error_in_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"megarlx {command}: {tmp_path} holds no run")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_tree_shows_who_came_from_whom(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep(root, checkpoints=(2_000_000,), questions=40, tests=20)
    sweep.outcomes["[rl]"] = sweep.outcomes["rl"]
    sweep.excursion(root / "excursions" / "sft-2000000-seed0", "[rl]", 2_000_000, 0, name="on")
    shutil.rmtree(root / "trunks" / "seed1")
    for lineage in root.glob("excursions/*-seed1/lineage.json"):
        lineage.write_text(
            re.sub(r'"[^"]*/trunks/seed1"', '"gone/trunks/seed1"', lineage.read_text())
        )
    assert main(["tree", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    guides = "│├└─ \xa0"
    depth = {
        line.lstrip(guides).split("  ")[0]: len(line) - len(line.lstrip(guides)) for line in lines
    }
    assert depth["trunks/seed0"] < depth["excursions/sft-2000000-seed0"] < depth["excursions/on"]
    assert any("[rl]" in line for line in lines)
    rl = next(line for line in lines if "excursions/rl-2000000-seed0" in line)
    assert "seed 0  from 2M tokens  math pass@1/8/32 39.4/60.0/60.0% at step 60" in rl
    assert "trunks/seed1 (not found)" in "".join(lines)


def test_the_terminals_table_marks_the_highest_value_of_every_column(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("tokens"))
    rows = [line.split() for line in lines[start + 1 : start + 5]]  # the base and three recipes
    assert lines[start + 5].strip() == "* the highest of its checkpoint"
    values = [re.findall(r"(\*?)(\d+\.\d)(?= \()", " ".join(row[2:])) for row in rows]
    assert {len(row) for row in values} == {3}  # pass@1, pass@8, pass@32
    for column in zip(*values, strict=True):
        highest = max(float(value) for _, value in column)
        assert [mark == "*" for mark, _ in column] == [float(v) == highest for _, v in column]
