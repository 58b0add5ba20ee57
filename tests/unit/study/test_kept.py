"""The kept study's table, choices and claims, on runs whose outcomes are known."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from kept_runs import END, MIDDLE, evaluation, flat, lookups, made_run

from megarlx.cli import main
from megarlx.config import load_config
from megarlx.config.sweep import SweepConfig
from megarlx.report.runs import Part, Run
from megarlx.report.study import Study
from megarlx.study.claims import kept as claims
from megarlx.study.expected import KEPT_CHOSEN, KEPT_PAGE, STATED, kept_hash, stated_hash
from megarlx.study.kept import arms as arms_module
from megarlx.study.kept.arms import Arms, worlds_of
from megarlx.study.kept.chosen import alphas, best, key, rates
from megarlx.study.kept.facts import transfer
from megarlx.study.kept.figure import draw
from megarlx.study.kept.shown import sections
from megarlx.study.kept.table import STARTS, Table

ROOT = Path(__file__).resolve().parents[3]
SEEDS = (130, 131, 132, 133)
RATES = {key(start, k): "0.0002" for start in STARTS for k in (10, 20, 40, 80)}
KEPT_RATES = {**RATES, key("", 10): "0.0004"}


def of_seed(seed: int, jitter: float) -> list[Run]:
    """RL brings m from 20 to 90 and a from 50 to 60; mark-only RL m alone. `jitter`: of a."""
    after = {5: 80.0, 10: 70.0, 20: 60.0, 40: 40.0, 80: 25.0, 160: 20.0}
    end = 60 + jitter
    trunk = flat(
        evaluation(MIDDLE, 20, 50 + jitter, capability=60),
        *(evaluation(MIDDLE + t, 20, 50 + jitter) for t in after),
        evaluation(END, 20, end, capability=60),
        lookups(MIDDLE, 9),
        lookups(END, 9 + jitter / 10),
    )
    runs = [made_run("trunk", seed, trunk, flop=1e12)]
    at_middle, at_end = ("trunk", MIDDLE), ("trunk", END)
    rl = flat(evaluation(80, 90, 60 + jitter), lookups(80, 49))
    runs.append(made_run(f"rl-at-{MIDDLE}", seed, rl, at_middle, flop=3e11))
    runs.append(made_run(f"rl-withheld-at-{MIDDLE}", seed, flat(lookups(320, 49)), at_middle))
    through = flat(
        evaluation(80, 90, 60 + jitter),
        *(evaluation(80 + t, m, 50 + jitter) for t, m in after.items()),
        evaluation(830, 20, end),
        lookups(830, 10),
    )
    runs.append(made_run(f"rl_early-at-{MIDDLE}", seed, through, at_middle))
    vectors = {"vector-rl": (86, end, 29), "vector-mark": (95, end - 10, 9 + jitter / 10)}
    vectors |= {"vector-mark-matched": (85 if jitter < 3 else 80, end - 10, 9)}
    part = (Part(f"rl-at-{MIDDLE}-seed-{seed}", "rl", 1.0),)
    for name, (m, a, p) in vectors.items():
        own = flat(evaluation(END, m, a), lookups(END, p))
        runs.append(made_run(name, seed, own, at_end, part))
    late = {10: 0.5, 20: 0.7, 40: 0.9, 80: 1.0}
    for rate, better in (("0.0001", 0.8), ("0.0002", 1.0), ("0.0004", 0.9)):
        alone = flat(
            *(evaluation(k, 20 + 75 * s * better, end, capability=60) for k, s in late.items())
        )
        name = f"rl-late-at-{END}-lr-{rate}"
        runs.append(made_run(name, seed, alone, at_end, flop=2e11))
        more = flat(*(evaluation(k, 95 * better, end + 5, capability=60.3) for k in late))
        name = f"rl-late-from-vector-rl-lr-{rate}"
        runs.append(made_run(name, seed, more, ("vector-rl", END), flop=2e11))
    return runs


def arms_of(study: Study) -> list[Arms]:
    """Of the one world that is there."""
    (found,) = worlds_of(study).values()
    return found


@pytest.fixture
def study() -> Study:
    runs = [run for n, seed in enumerate(SEEDS) for run in of_seed(seed, float(n))]
    return Study(Path("kept"), runs)


@pytest.fixture
def table(study: Study) -> Table:
    return Table(arms_of(study), RATES)


def test_an_arm_is_compared_with_its_own_trunk_and_costs_what_its_runs_did(table: Table) -> None:
    rows = {row.label: row for row in table.rows()}
    rl = rows["vector-rl"]
    assert rl.gain.trunks == len(SEEDS)
    gains = [round(0.86 * (60 + n)) - round(0.2 * (60 + n)) for n in range(4)]
    assert rl.gain.estimate == pytest.approx(sum(gains) / 4, abs=0.7)
    assert rl.gain.low < rl.gain.estimate < rl.gain.high
    assert rl.form is not None
    assert rl.form.skill == pytest.approx(0)
    assert rl.form.form == pytest.approx(rl.gain.estimate)
    assert (rl.early_flop, rl.late_flop) == (3e11, 0.0)
    late = rows["late-only + 80"]
    assert (late.early_flop, late.late_flop) == (0.0, 2e11)
    assert (late.share.estimate, late.share.low, late.share.high) == pytest.approx((1, 1, 1))  # type: ignore[union-attr]
    assert table.dose() == pytest.approx(0.3)


def test_a_late_run_is_shown_at_the_rate_that_was_chosen_and_not_at_its_best(study: Study) -> None:
    chosen = Table(arms_of(study), KEPT_RATES)
    at = {row.label: row.mean("m") for row in chosen.rows()}
    assert at["late-only + 10"] == pytest.approx(20 + 75 * 0.5 * 0.9)
    assert at["late-only + 20"] == pytest.approx(20 + 75 * 0.7)
    assert not any("+" in row.label for row in Table(arms_of(study), {}).rows())


def test_steps_to_90_percent_and_steps_saved_are_of_the_means_over_trunks(table: Table) -> None:
    found = table.steps()
    after, every, saved = found["vector-rl"]
    assert (str(after), str(every)) == ("≤ 10", "80 to 90")
    alone, _, none = found["late-only"]
    assert none is None
    assert 35 < alone.low == alone.high < 45
    assert saved is not None
    assert str(saved) == f"{alone.low - 10:.3g} to {alone.low:.3g}"


def test_retention_is_of_arms_that_are_trained_through_and_halves_where_it_crosses(
    table: Table,
) -> None:
    left, half = table.retention()
    assert [*left] == list(arms_module.AFTER)
    assert left[160].estimate == pytest.approx(0, abs=0.01)
    shares = [left[t].estimate for t in arms_module.AFTER]
    assert shares == sorted(shares, reverse=True)
    assert half is not None
    assert 10 < half.low == half.high < 20


def test_carry_is_at_an_equal_m_and_counts_whom_it_leaves_out(table: Table, study: Study) -> None:
    carry = table.carry()
    assert set(carry.by_trunk) == {"130", "131", "132"}
    assert carry.left_out == ("133",)
    assert all(points > 0 for points in carry.by_trunk.values())
    finding = claims.b(study)
    assert finding.verdict == "held"
    (comparison,) = finding.evidence["comparisons"]
    assert comparison["trunks"] == 3
    assert "within 2 points" in comparison["left_out"][0]


def test_transfer_is_the_share_of_what_rl_taught_that_the_transplant_knows(
    table: Table, study: Study
) -> None:
    found = transfer(table.trunks)
    assert found is not None
    share = found.shares["transplant"]
    assert share is not None
    assert share.estimate == pytest.approx((29 - 9.15) / 40, abs=0.001)
    assert found.gains["mark-only vector"].estimate == pytest.approx(0)
    assert "partner's vector" not in found.known
    assert claims.c(study).verdict == "held"


def test_the_first_claim_needs_all_three_of_its_parts(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "frozen_rates", lambda world: RATES)
    finding = claims.a(study)
    assert finding.verdict == "held"
    assert [c["trunks"] for c in finding.evidence["comparisons"]] == [4, 4, 4]
    monkeypatch.setattr(claims, "frozen_rates", lambda world: {})
    assert claims.a(study).verdict == "undetermined"


def test_every_section_is_printed_and_the_figure_drawn(table: Table, tmp_path: Path) -> None:
    titles = [title for title, head, rows in sections(table) if rows and head]
    said = ("Arms over 4", "Steps to 90%", "Trained through; half-life", "Answer-specific carry")
    for title in (*said, "Dose", "Facts that only"):
        assert any(one.startswith(title) for one in titles), title
    assert all(len(row) == len(head) for _, head, rows in sections(table) for row in rows)
    draw({"kept": table}, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").stat().st_size > 10_000


def test_runs_that_are_a_step_to_others_are_not_told_as_missing(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = made_run(f"rl-own-at-{MIDDLE}", 130, [], ("trunk", MIDDLE))
    partner = made_run("rl-from-partner", 130, [], ("partner", MIDDLE))
    study = Study(Path("kept"), [*study.runs, own, partner])
    monkeypatch.setattr(Study, "of", classmethod(lambda cls, *args: study))
    assert main(["study", "kept", "anywhere"]) == 0
    assert "missing" not in capsys.readouterr().out
    half = replace(own, settings={"stages": [{"steps": 40, "objectives": {"rl": {}}}]})
    study = Study(Path("kept"), [*study.runs[:-2], half])
    assert main(["study", "kept", "anywhere"]) == 0
    assert f"missing: {half.name}: stands at step 0 of 40" in capsys.readouterr().out


def test_a_difference_of_two_rows_is_paired_by_trunk(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table(arms_of(study), RATES)
    rows = {row.label: row for row in table.rows()}
    found = table.difference(rows["vector-rl"], rows["vector-mark"])
    # Of m 86 and 95, and a that is 10 less: all trunks alike, whatever they differ in themselves.
    assert found["m"].estimate == found["m"].low == found["m"].high == -9
    by_trunk = [rows[n].points for n in ("vector-rl", "vector-mark")]
    gaps = [by_trunk[0][s].y - by_trunk[1][s].y for s in SEEDS]
    assert found["y"].estimate == pytest.approx(sum(gaps) / 4)
    wide = rows["vector-rl"].gain
    assert found["y"].high - found["y"].low < wide.high - wide.low
    monkeypatch.setattr(Study, "of", classmethod(lambda cls, *args: study))
    assert main(["study", "kept", "x", "--difference", "vector-rl", "vector-mark"]) == 0
    assert "vector-rl − vector-mark, paired by trunk" in capsys.readouterr().out
    assert main(["study", "kept", "x", "--difference", "vector-rl", "vector-none"]) == 2
    told = capsys.readouterr().err
    assert "'vector-none'" in told
    assert "vector-mark-matched" in told  # what there is


def test_a_small_late_gain_prints_no_share(study: Study) -> None:
    few = [run for run in study.runs if not run.name.startswith("rl-late-at")]
    for seed in SEEDS:
        name = f"rl-late-at-{END}-lr-0.0002"
        few.append(made_run(name, seed, flat(evaluation(80, 22, 60)), ("trunk", END)))
    rows = Table(arms_of(Study(Path("kept"), few)), RATES).rows()
    assert {row.share for row in rows} == {None}


def test_tuning_asks_validation_questions_and_ties_go_to_the_smaller() -> None:
    runs = []
    for seed in (100, 101):
        runs.append(made_run("trunk", seed, flat(evaluation(END, 20, 60))))
        for alpha, m in (("0.5", 60), ("1", 80), ("1.5", 80), ("2", 90)):
            if alpha == "2" and seed == 101:
                continue  # one seed alone chooses nothing
            own = flat(evaluation(END, m, 60, "validation"), evaluation(END, 100 - m, 60))
            name = f"vector-rl-alpha-{alpha}"
            runs.append(made_run(name, seed, own, ("trunk", END), (Part("x", "rl", 1.0),)))
        for rate, m in (("0.0001", 60), ("0.0004", 70)):
            late = flat(*(evaluation(k, m - k / 10, 60, "validation") for k in (10, 20)))
            name = f"rl-late-at-{END}-lr-{rate}"
            runs.append(made_run(name, seed, late, ("trunk", END)))
    found = arms_of(Study(Path("tuning"), runs))
    chosen = alphas(found)
    assert set(chosen["vector-rl"]) == {"0.5", "1", "1.5"}
    assert best(chosen["vector-rl"]) == "1"
    of_rates = rates(found, STARTS)
    assert {what: best(by) for what, by in of_rates.items()} == {
        "late-only at 10": "0.0004",
        "late-only at 20": "0.0004",
    }


SHARED = ("seeds", "seed_keys", "jobs", "threads_per_job")


def test_both_worlds_have_the_same_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    """At as many steps before the end, or at the world's own middle; but for what tuning chose:
    alphas, rates of late RL, and the steps of the corpus control."""
    monkeypatch.chdir(ROOT)
    tables, arithmetic = (
        load_config(f"configs/{name}.toml", (), SweepConfig).model_dump(mode="json")
        for name in ("kept", "kept_arithmetic")
    )
    steps = {1250: 500, 1750: 1000, 2125: 1500, 2500: 2000, 750: 1000, 125: 250}
    for t in (5, 10, 20, 40, 80, 160):
        steps[1750 + t] = 1000 + t

    def moved(value: object) -> object:
        if isinstance(value, Mapping):
            return {k: moved(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [moved(v) for v in value]
        if isinstance(value, str):
            for before, after in steps.items():
                value = value.replace(str(before), f"<{after}>")
            return value.replace("<", "").replace(">", "")
        return steps.get(value, value) if type(value) is int else value  # type: ignore[call-overload]

    for world in (tables, arithmetic):
        for one in world["transplants"]:
            assert one.pop("alpha")
        for one in world["excursions"]:
            if one["recipes"] == ["configs/recipes/kept/corpus.toml"]:
                one["set"].pop("stages.0.steps", None)
            if one["name"] == "late" and one["runs"]:
                assert set(one.pop("axes")) == {"stages.0.objectives.rl.lr"}
    for part in ("partners", "excursions", "transplants", *SHARED):
        assert moved(tables[part]) == arithmetic[part], part


def test_the_kept_page_states_the_hash_of_its_sweeps_and_of_the_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As soon as tuning has chosen rates; until then no hash may stand there."""
    monkeypatch.chdir(ROOT)
    current = kept_hash()
    assert main(["study", "kept-hash"]) == 0
    assert capsys.readouterr().out.strip() == current
    if KEPT_CHOSEN.exists():
        assert stated_hash(KEPT_PAGE.read_text(), KEPT_PAGE) == current
    else:
        assert not STATED.findall(KEPT_PAGE.read_text())
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    assert kept_hash() == current
    changes = {
        "kept.toml": ("alpha = [1.5]", "alpha = [1.0]"),
        "kept_arithmetic.toml": ("permuted:0", "permuted:1"),
        "kept_facts.toml": ('"stages.0.steps" = 320', '"stages.0.steps" = 640'),
        "recipes/kept/corpus.toml": ("steps = 390", "steps = 400"),
    }
    for name, (before, after) in changes.items():
        path = tmp_path / "configs" / name
        original = path.read_text()
        assert before in original
        path.write_text(original.replace(before, after))
        assert kept_hash() != current, name
        path.write_text(original)
    chosen = tmp_path / "configs" / "kept_chosen.toml"
    chosen.write_text('[kept.rates]\n"late-only at 7" = 3e-4\n')
    assert kept_hash() != current


def test_a_seed_more_or_less_is_the_same_study(study: Study) -> None:
    fewer = [run for run in study.runs if run.seed != SEEDS[-1]]
    table = Table(arms_of(Study(Path("kept"), fewer)), RATES)
    assert {len(row.points) for row in table.rows()} == {3}
    gone = [r if r.name != "vector-rl-seed-130" else replace(r, evaluations=()) for r in study.runs]
    rows = {row.label: row for row in Table(arms_of(Study(Path("kept"), gone)), RATES).rows()}
    assert len(rows["vector-rl"].points) == 3
