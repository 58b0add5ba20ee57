"""What the figures draw: scales, curves of training, the sentence, units."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from fake_sweep import AS_IN_THE_PAPER, SMALL_MODEL, Outcome, Sweep

from megarlx.cli import main
from megarlx.evaluation.bootstrap import Interval
from megarlx.evaluation.readiness import PROBE
from megarlx.report import figures, figures_of_runs, figures_of_training
from megarlx.report.drawing import (
    Figure,
    draw_dots,
    height_of_rows,
    in_the_dark,
    legend,
    panels,
    save,
)
from megarlx.report.headline import said
from megarlx.report.study import Study
from megarlx.report.style import DARK
from megarlx.units import duration, flop


def sweep(root: Path, **settings: object) -> Sweep:
    made = Sweep(root, questions=40, tests=20, **settings)  # type: ignore[arg-type]
    made.checkpoints = (1_000_000, 2_000_000)
    return made


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = sweep(tmp_path_factory.mktemp("figures")).write(["rl", "sft", "sft_then_rl", "parallel"])
    return Study.of(root)


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    assert figure.draw is not None
    return figure


@pytest.mark.parametrize("draw", [figures.pass_at_k, figures.gains])
@pytest.mark.parametrize("wide", [True, False])
def test_all_k_have_one_axis_and_every_recipe_its_colour(
    study: Study, draw: object, wide: bool
) -> None:
    figure = drawn(draw(study, ""))  # type: ignore[operator]
    canvas = figure.wide if wide else figure.narrow
    assert len(canvas.axes) == 3
    assert len({ax.get_ylim() for ax in canvas.axes}) == 1
    assert len({ax.get_xlim() for ax in canvas.axes}) == 1
    tops = {round(ax.get_position().y1, 2) for ax in canvas.axes}
    assert len(tops) == (1 if wide else 3)
    colours = [[line.get_color() for line in ax.lines[:4]] for ax in canvas.axes]
    assert colours[0] == colours[1] == colours[2]
    assert len(set(colours[0])) >= 3


def test_one_checkpoint_gives_rows_on_one_axis(tmp_path: Path) -> None:
    made = sweep(tmp_path)
    made.checkpoints = (2_000_000,)
    figure = drawn(figures.pass_at_k(Study.of(made.write(["rl", "sft"])), ""))
    assert len({ax.get_xlim() for ax in figure.wide.axes}) == 1
    names = [[label.get_text() for label in ax.get_yticklabels()] for ax in figure.wide.axes]
    assert names == [["base", "RL", "SFT"], [""] * 3, [""] * 3]
    assert [label.get_text() for label in figure.narrow.axes[2].get_yticklabels()] == names[0]


def test_where_all_start_is_said_of_each_kind_of_trunk(tmp_path: Path) -> None:
    for name, size, checkpoints in (("small", 32, (1_000_000,)), ("large", 128, (2_000_000,))):
        made = sweep(tmp_path, prefix=f"{name}-", model=SMALL_MODEL | {"hidden_size": size})
        made.checkpoints = checkpoints
        made.write(["rl"])
    study = Study.of(tmp_path)
    found = [drawn(figures.pass_at_k(study, variant)) for variant in study.variants]
    assert len({figure.caption for figure in found}) == 1
    notes = {f"All start from one checkpoint, at {tokens} tokens." for tokens in ("1M", "2M")}
    assert {figure.note for figure in found} == notes


def test_every_recipe_is_compared_with_where_it_starts(study: Study) -> None:
    table = drawn(figures.gains(study, "")).table
    assert table[0] == ["from tokens", "recipe", *(f"pass@{k}, points gained" for k in (1, 8, 32))]
    assert {row[1] for row in table[1:]} == {
        *("RL", "SFT", "SFT→RL", "SFT→RL over SFT", "parallel")
    }
    over = next(row for row in table[1:] if row[1] == "SFT→RL over SFT")
    assert float(over[4].split()[0]) == pytest.approx(-15, abs=3)


def test_recipes_share_the_axis_of_what_happens_inside_runs(study: Study) -> None:
    figure = drawn(figures_of_training.dynamics(study))
    assert [ax.get_title() for ax in figure.wide.axes] == ["pass@1, %", "pass@8, %", "pass@32, %"]
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in figure.wide.axes}) == 1
    assert {row[0] for row in figure.table[1:]} == {"RL", "SFT→RL"}
    starts = [line for line in figure.wide.axes[0].lines if list(line.get_xdata()) == [20.0, 20.0]]
    assert len(starts) == 1  # of SFT→RL; RL begins with its run


def test_capability_is_drawn_against_tokens_mean_first(study: Study) -> None:
    figure = drawn(figures.capability(study, ""))
    assert figure.table[0][2] == "mean of the 2 suites, %"
    rows = {(row[0], row[1]): row[2:] for row in figure.table[1:]}
    for values in rows.values():
        mean, *single = (float(value.split()[0]) for value in values)
        assert mean == pytest.approx(sum(single) / 2, abs=0.11)
    assert figure.wide.axes[0].get_xlabel() == "pre-training tokens"


def test_training_is_drawn_a_line_a_run_with_what_was_logged(tmp_path: Path) -> None:
    made = sweep(tmp_path, seeds=(0,))
    made.checkpoints = (2_000_000,)
    run = made.excursion(made.trunk(0), "rl", 2_000_000, 0)
    lines = [
        {
            "step": step,
            "loss/rl": 0.0,
            "grad_norm/rl": 2.0,
            "rl/reward": step / 200,
            "rl/kl": 0.0,
            "rl/informative_groups": 0.25,
            "rl/response_length": "nan" if step == 200 else 30,
        }
        for step in range(1, 201)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = drawn(figures_of_training.training(Study.of(tmp_path)))
    reward, length, informative, norm = figure.wide.axes
    titles = [ax.get_title() for ax in figure.wide.axes]
    assert titles == [
        *("reward", "length of answers, tokens", "informative groups, %", "gradient norm of rl")
    ]  # no policy loss, which is no measure, and no KL where none was computed
    (line,) = reward.lines
    assert 40 <= len(line.get_xdata()) <= figures_of_training.POINTS
    assert line.get_ydata()[0] == pytest.approx(0.0125)  # of steps 1 to 4
    assert set(informative.lines[0].get_ydata()) == {25.0}
    assert set(length.lines[0].get_ydata()) == {30.0}
    assert norm.get_xlim() == reward.get_xlim()
    assert figure.table[1][:3] == ["excursions/rl-2000000-seed0", "RL", "200"]
    assert figure.table[1][3] == "0.9925"


def test_the_sentence_names_the_best_recipe_of_the_latest_checkpoint(study: Study) -> None:
    sentence = said(study)
    made = re.fullmatch(
        r"From 2M tokens of pre-training, SFT→RL takes pass@1 of math from (\S+)% to (\S+)%: "
        r"\+(\S+) points \[\S+, \S+\], the most of 4 recipes\. At pass@32 parallel gains most, "
        r"\+(\S+) points \[\S+, \S+\]\.",
        sentence,
    )
    assert made is not None, sentence
    before, after, gain, widest = map(float, made.groups())
    assert after - before == pytest.approx(gain, abs=0.11)
    assert gain == pytest.approx(43, abs=4)
    assert widest == pytest.approx(48, abs=6)


def test_the_sentence_says_where_a_gain_may_be_nothing(tmp_path: Path) -> None:
    made = sweep(tmp_path, outcomes={"base": Outcome(0.2, 0.5), "rl": Outcome(0.2, 0.5)})
    assert "(perhaps nothing: the interval covers 0)" in said(Study.of(made.write(["rl"])))


def test_without_recipes_the_sentence_tells_of_pretraining(tmp_path: Path) -> None:
    made = sweep(tmp_path, seeds=(0,))
    trunk = made.trunk(0)
    assert said(Study.of(tmp_path)).startswith("After 2M tokens of pre-training, pass@1 of math is")
    for file in (trunk / "evaluations").iterdir():
        file.unlink()
    assert said(Study.of(tmp_path)).endswith(
        "has reached a loss of 2.000 nats a token; nothing is evaluated yet."
    )
    (trunk / "metrics.jsonl").unlink()
    assert said(Study.of(tmp_path)) == ""


def test_claims_of_the_paper_are_absent_where_the_study_is_not_the_papers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a converted model, whose trunk has read no tokens of pre-training here."""
    made = sweep(tmp_path, outcomes={**AS_IN_THE_PAPER})
    made.checkpoints = (0,)
    for seed in (0, 1):
        made.excursion(made.trunk(seed), "rl", 0, seed)
        made.excursion(tmp_path / "trunks" / f"seed{seed}", "sft", 0, seed)
    assert main(["report", str(tmp_path)]) == 0
    assert "P3" not in capsys.readouterr().out
    page = tmp_path / "report" / "index.html"
    assert 'id="predicates"' not in page.read_text()
    assert "From its checkpoint, RL takes" in page.read_text()
    assert json.loads((tmp_path / "report" / "summary.json").read_text())["predicates"]
    assert main(["report", str(tmp_path), "--claim", "P3"]) == 0
    assert 'id="predicates"' in page.read_text()


def test_claims_without_data_are_told_in_a_line(study: Study) -> None:
    assert main(["report", str(study.root)]) == 0
    page = (study.root / "report" / "index.html").read_text()
    claims = page[page.index('id="predicates"') : page.index('id="dynamics"')]
    assert "Nothing here speaks of P8, P14, P15." in claims
    assert 'data-label="">' not in claims.replace('data-label="" class=""', "")
    assert re.findall(r"<div>(P\d+)</div>", claims) == [f"P{n}" for n in range(1, 14) if n != 8]


def test_too_few_probes_make_a_table_and_no_picture(tmp_path: Path) -> None:
    made = sweep(tmp_path, seeds=(0,))
    trunk = made.trunk(0)
    for tokens in made.checkpoints:
        run = made.excursion(trunk, "rl", tokens, 0)
        file = next((run / "evaluations").glob("iter_00000030.math.json"))
        probe = json.loads(file.read_text()) | {"suite": f"rl{PROBE}", "iteration": 0}
        probe["metrics"] = {"informative_groups": 0.5, "pass_at_1": 0.1}
        (run / "evaluations" / "iter_00000000.probe.json").write_text(json.dumps(probe))
    figure = figures_of_runs.readiness(Study.of(tmp_path))
    assert figure is not None
    assert figure.draw is None
    assert len(figure.table) == 3


def test_dark_colours_replace_light_ones_and_nothing_else(study: Study, tmp_path: Path) -> None:
    figure = drawn(figures.pass_at_k(study, ""))
    save(figure, tmp_path)
    text = (tmp_path / "pass_at_k.svg").read_text()
    style = ElementTree.fromstring(text).find("{http://www.w3.org/2000/svg}style")
    assert style is not None
    assert style.text is not None
    for light, dark in DARK.items():
        assert f"fill: {light}" in style.text
        assert dark in style.text
    assert in_the_dark("<svg><defs></defs></svg>").count("<style>") == 1
    assert "url(" not in text.replace("url(#", "")


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 FLOP"), (1.4e12, "1.4 TFLOP"), (2.5e19, "25 EFLOP"), (9.99e8, "999 MFLOP")],
)
def test_arithmetic_is_told_with_its_unit(count: float, said: str) -> None:
    assert flop(count) == said


@pytest.mark.parametrize("seconds", [0.1, 5, 99, 100, 5999, 6000, 200_000])
def test_times_have_a_unit(seconds: float) -> None:
    assert re.fullmatch(r"\d+(\.\d)? (s|min|h|days)", duration(seconds))


def test_long_names_are_beside_their_rows_and_in_the_legend_whole() -> None:
    names = [
        f"sft + own (after cpt, advantage my_advantages:best_{n}, steps {n})" for n in range(9)
    ]
    canvas, (ax, *_) = panels(["points"] * 2, height_of_rows(names) + 0.6, wide=True)
    draw_dots(ax, {name: Interval(n, n - 1, n + 1, 9) for n, name in enumerate(names)}, names)
    legend(canvas, names)
    canvas.draw_without_rendering()
    rows = sorted((label.get_window_extent() for label in ax.get_yticklabels()), key=lambda b: b.y0)
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(rows))
    shown = canvas.legends[0].get_window_extent()
    assert shown.x0 >= 0
    assert shown.x1 <= canvas.bbox.x1
    assert shown.y0 >= 0
