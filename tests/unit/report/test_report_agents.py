"""What the report says of agents: success of each environment, and episodes to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_sweep import Sweep

from megarlx.cli import main
from megarlx.report.figures_of_agents import success
from megarlx.report.study import Study

TASKS = 8
SOLVED = {  # run -> iteration -> suite -> tasks of TASKS
    "trunk": {300: {"rooms": 2, "sums": 1}, 700: {"rooms": 6, "sums": 4}},
    "excursion": {100: {"rooms": 8, "sums": 5}},
}


def play(run: Path, label: str) -> None:
    for iteration, solved in SOLVED[label].items():
        for suite, count in solved.items():
            right = [float(at < count) for at in range(TASKS)]
            items = [
                {"id": f"test/{i}", "samples": 2, "correct": int(2 * r), "success": r}
                for i, r in enumerate(right)
            ]
            write(run / "evaluations" / f"iter_{iteration:08d}.{suite}.json", {
                "format": 1, "suite": suite, "kind": "agent", "iteration": iteration,
                "trunk_tokens": 0, "metrics": {"success": count / TASKS, "turns": 3.5},
                "guessing": {"success": 0.125} if suite == "rooms" else {}, "items": items,
            })  # fmt: skip
            lines = [
                {"prompt": f"{label} {suite} at {iteration}", "completion": f"did: {word}",
                 "reference": None, "reward": reward, "finish_reason": end, "turns": 1}
                for word, reward, end in (("left", 0.0, "stop"), ("go", 1.0, "success"))
            ]  # fmt: skip
            write(run / "samples" / f"iter_{iteration:08d}.{suite}.jsonl", *lines)
    keys = ("rl/success_rooms",) if label == "excursion" else ("rl/r/success_rooms",)
    course = [{"step": s, **dict.fromkeys(keys, s / 100)} for s in range(10, 101, 10)]
    write(run / "metrics.jsonl", *course)


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A trunk without any pre-training, and an excursion from its last checkpoint."""
    for label in SOLVED:
        parent = {"run": str(tmp_path / "trunk"), "iteration": 700, "trunk_tokens": 0}
        away = label == "excursion"
        lineage = {"recipe": "sampo" if away else None, "parent": parent if away else None}
        (tmp_path / label).mkdir()
        write(tmp_path / label / "lineage.json", {"seed": 3, "trunk_tokens": 0, **lineage})
        stages = [{"steps": 100 if away else 700}]
        write(tmp_path / label / "resolved.json", {"stages": stages})
        play(tmp_path / label, label)
    return tmp_path


def test_success_of_each_environment_stands_with_its_steps_and_acting_at_random(
    root: Path,
) -> None:
    figure = success(Study.of(root))
    assert figure is not None
    found = [[row[0], row[1], row[2], row[3].split()[0], *row[4:]] for row in figure.table[1:]]
    assert found == [
        ["rooms", "base", "300", "25.0", "12.5", "3.5"],
        ["rooms", "base", "700", "75.0", "12.5", "3.5"],
        ["rooms", "sampo", "0", "75.0", "12.5", "3.5"],
        ["rooms", "sampo", "100", "100.0", "12.5", "3.5"],
        ["sums", "base", "300", "12.5", "–", "3.5"],
        ["sums", "base", "700", "50.0", "–", "3.5"],
        ["sums", "sampo", "0", "50.0", "–", "3.5"],
        ["sums", "sampo", "100", "62.5", "–", "3.5"],
    ]
    titles = [ax.get_title() for ax in figure.wide.axes]
    assert [title.partition(":")[0] for title in titles] == ["rooms", "sums", "rooms"]
    drawn = [[round(y) for y in line.get_ydata()] for line in figure.wide.axes[2].lines]
    assert drawn == [[30, 80], [30, 80]], "in training, five logged steps each"


def test_a_line_has_the_colour_that_the_legend_gives_it(root: Path) -> None:
    """Also where a recipe without an environment stands before it."""
    other = root / "other"
    other.mkdir()
    parent = {"run": str(root / "trunk"), "iteration": 700, "trunk_tokens": 0}
    write(other / "lineage.json", {"seed": 3, "trunk_tokens": 0, "recipe": "a", "parent": parent})
    write(other / "resolved.json", {"stages": [{"steps": 5}]})
    figure = success(Study.of(root))
    assert figure is not None
    told = figure.wide.legends[0].legend_handles[:2]
    lines = figure.wide.axes[0].lines[:2]
    for ours, named in zip(lines, told, strict=True):
        assert (ours.get_color(), ours.get_marker()) == (named.get_color(), named.get_marker())


def test_the_page_shows_the_newest_episodes_of_each_environment_and_run(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(root)]) == 0
    said = capsys.readouterr().out
    assert "rooms, % (at random)" in said
    assert "pass@" not in said
    assert "75.0 (12.5)" in said, "an excursion's base is the checkpoint that it starts from"
    page = (root / "report" / "index.html").read_text()
    assert page.count('id="agents"') == 1
    for label, suite, iteration in (
        ("trunk", "rooms", 700),
        ("trunk", "sums", 700),
        ("excursion", "rooms", 100),
        ("excursion", "sums", 100),
    ):
        for action in ("left", "go"):
            episode = f"<pre>{label} {suite} at {iteration}\n<b>did: {action}</b></pre>"
            assert page.count(episode) == 1
    assert "at 300" not in page
    rows = json.loads((root / "report" / "summary.json").read_text())["results"]
    assert [row["success"] for row in rows] == [
        {"rooms": 0.75, "sums": 0.5},
        {"rooms": 1.0, "sums": 0.625},
    ]
    assert main(["tree", str(root)]) == 0
    assert "rooms 75.0%, sums 50.0% at step 700" in capsys.readouterr().out


def test_runs_without_an_environment_have_no_such_figure(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, questions=4, tests=4)
    sweep.trunk(0)
    assert success(Study.of(tmp_path)) is None
