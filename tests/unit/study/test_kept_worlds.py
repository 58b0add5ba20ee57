"""The kept study's worlds: trunks and runs of any names, facts that text tells wrongly, FLOP."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from kept_runs import END, MIDDLE, evaluation, flat, lookups, made_run

from megarlx.config import load_config
from megarlx.config.sweep import SweepConfig
from megarlx.report.runs import Parent, Part, Run
from megarlx.report.study import Study
from megarlx.study.claims import kept as claims
from megarlx.study.kept.arms import Arms, worlds_of
from megarlx.study.kept.chosen import alphas, best, frozen_rates, key, rates
from megarlx.study.kept.facts import checks, contradicted, transfer
from megarlx.study.kept.shown import sections
from megarlx.study.kept.table import STARTS, Table

ROOT = Path(__file__).resolve().parents[3]
AT_MIDDLE, AT_END = ("trunk", MIDDLE), ("trunk", END)
SWEEPS = ("kept", "kept_arithmetic", "kept_facts")


def facts_of(seed: int, jitter: float) -> list[Run]:
    """RL teaches both kinds from 9 to 49 and 59; trained through, 29 and 19 are left."""
    trunk = flat(
        evaluation(END, 20, 60),
        *(
            lookups(at, p, suite)
            for at in (MIDDLE, END)
            for suite, p in (("withheld", 9), ("told_wrongly", 9), ("beside", 91 + jitter))
        ),
    )
    runs = [made_run("trunk", seed, trunk, flop=1e12)]
    rl = flat(lookups(320, 49 + jitter))
    runs.append(made_run(f"rl-withheld-at-{MIDDLE}", seed, rl, AT_MIDDLE, flop=3e11))
    part = (Part(f"rl-withheld-at-{MIDDLE}-seed-{seed}", "rl", 1.0),)
    put = flat(lookups(END, 19 + jitter), evaluation(END, 50, 60))
    runs.append(made_run("vector-rl", seed, put, AT_END, part))
    wrong = [lookups(80, 59 + jitter, "told_wrongly"), lookups(830, 19 + jitter, "told_wrongly")]
    runs.append(made_run(f"rl_early-told-wrongly-at-{MIDDLE}", seed, wrong, AT_MIDDLE))
    through = flat(lookups(830, 29 + jitter))
    return [*runs, made_run(f"rl_early-withheld-at-{MIDDLE}", seed, through, AT_MIDDLE)]


def trunks_of(runs: list[Run], root: str = "kept") -> dict[str, list[Arms]]:
    return worlds_of(Study(Path(root), runs))


def test_facts_told_wrongly_have_a_table_of_what_is_left_of_what_rl_taught() -> None:
    runs = [run for n in range(3) for run in facts_of(140 + n, float(n))]
    (trunks,) = trunks_of(runs).values()
    wrong, silent = contradicted(trunks), transfer(trunks)
    assert wrong is not None
    assert silent is not None
    assert [*wrong.known] == ["trunk, middle", "RL in the middle", "trunk's end", "through"]
    for found, learned, left in ((wrong, 51, 11), (silent, 41, 21)):
        share = found.shares["through"]
        assert share is not None
        assert share.estimate == pytest.approx(left / learned)
    titles = [title for title, _, _ in sections(Table(trunks, {}))]
    assert sum("text tells wrongly" in title for title in titles) == 1


def test_the_manipulation_is_checked_in_every_trunk() -> None:
    runs = [run for n in range(2) for run in facts_of(100 + n, -float(2 * n))]
    (trunks,) = trunks_of(runs).values()
    learned, beside = checks(trunks)
    assert (learned.found, learned.held) == ((pytest.approx(40), pytest.approx(38)), True)
    assert (beside.found, beside.held) == ((pytest.approx(91), pytest.approx(89)), False)


def test_what_an_arm_costs_is_what_its_runs_did_before_and_behind_the_trunks_end() -> None:
    def cost(name: str, parent: tuple[str, int], flop: float, *parts: str) -> Run:
        made = tuple(Part(f"{part}-seed-7", "rl", 1.0) for part in parts)
        return made_run(name, 7, flat(evaluation(80, 20, 60)), parent, made, flop)

    through = made_run(f"rl_early-at-{MIDDLE}", 7, flat(evaluation(830, 20, 60)), AT_MIDDLE)
    lines = ({"step": 80.0, "cost/flop": 5.0}, {"step": 830.0, "cost/flop": 500.0})
    trunk = made_run("trunk", 7, flat(evaluation(END, 20, 60)))
    flop = {float(MIDDLE): 1000.0, float(END): 1495.0}  # the rest of it is what through has too
    trunk_lines = tuple({"step": step, "cost/flop": spent} for step, spent in flop.items())
    runs = [
        replace(trunk, metrics=trunk_lines),
        made_run("partner", 7, flat(evaluation(MIDDLE, 20, 60)), flop=1000.0),
        cost(f"rl-at-{MIDDLE}", AT_MIDDLE, 3.0),
        cost("rl-from-partner", ("partner", MIDDLE), 3.0),
        cost(f"rl-own-at-{MIDDLE}", AT_MIDDLE, 2.0),
        cost(f"sft-verified-at-{MIDDLE}", AT_MIDDLE, 1.0),
        cost("vector-rl", AT_END, 0.0, f"rl-at-{MIDDLE}"),
        cost("vector-sft-verified", AT_END, 0.0, f"sft-verified-at-{MIDDLE}"),
        cost("vector-partner", AT_END, 0.0, "rl-from-partner"),
        cost("rl-late-from-vector-rl-lr-0.0001", ("vector-rl", END), 7.0),
        cost(f"corpus-at-{END}", AT_END, 3.0),
        cost(f"rl-late-from-corpus-at-{END}-lr-0.0001", (f"corpus-at-{END}", 600), 7.0),
        cost(f"rl-late-at-{END}-lr-0.0001", AT_END, 7.0),
        replace(through, metrics=lines),
    ]
    ((arms,),) = trunks_of(runs).values()
    assert arms.trunk.name == "trunk-seed-7"
    chosen = {key(start, 80): "0.0001" for start in STARTS}
    spent = {r.label: (r.early_flop, r.late_flop) for r in Table([arms], chosen).rows()}
    assert spent == {
        "trunk's end": (0, 0),
        "RL in the middle": (3, 0),
        "through early RL": (5, 0),
        f"rl-own-at-{MIDDLE}": (2, 0),
        f"sft-verified-at-{MIDDLE}": (3, 0),
        "vector-rl": (3, 0),
        "vector-sft-verified": (3, 0),
        "vector-partner": (1003, 0),
        "corpus of equal FLOP": (0, 3),
        "late-only + 80": (0, 7),
        "vector-rl + 80": (3, 7),
        "corpus + 80": (0, 10),
    }


def test_a_trunk_of_any_name_and_checkpoints_named_by_tokens_are_read() -> None:
    """As of configs/paper_1b/kept.toml: converted revisions are the trunk, and lie elsewhere."""
    trunk = made_run("trunk", 0, flat(evaluation(500, 20, 60), evaluation(900, 20, 60)))
    trunk = replace(trunk, path=Path("runs/olmo2_1b"), name="../olmo2_1b", settings={})

    def excursion(name: str, at: int, m: float, *parts: str) -> Run:
        made = tuple(Part(f"{part}-seed-0", "rl", 1.0) for part in parts)
        run = made_run(name, 0, flat(evaluation(at if parts else 125, m, 60)), AT_END, made)
        return replace(run, parent=Parent("runs/olmo2_1b", at, 1000, True))

    runs = [
        trunk,
        excursion("rl-at-tokens-2100B", 500, 90),
        excursion("rl-mark-at-tokens-4000B", 900, 70),
        excursion("vector-rl", 900, 80, "rl-at-tokens-2100B"),
        excursion("rl-late-at-tokens-4000B-lr-1e-06", 900, 85),
    ]
    ((arms,),) = trunks_of(runs, "runs/paper_1b_kept").values()
    assert (arms.trunk, arms.middle, arms.end) == (trunk, 500, 900)
    assert (arms.world, arms.seed) == ("paper_1b_kept", 0)
    rows = {row.label: row.mean("m") for row in Table([arms], {key("", 125): "1e-06"}).rows()}
    assert rows == {
        "trunk's end": 20,
        "RL in the middle": 90,
        "vector-rl": 80,
        "late mark-only + 125": 70,
        "late-only + 125": 85,
    }


def test_worlds_of_one_folder_are_told_apart_and_a_claim_asks_each_that_has_its_arms() -> None:
    runs = []
    for world in ("one", "two"):
        for n in range(3):
            for run in facts_of(140 + n, float(n)):
                path = Path("kept") / world / run.path.name
                parent = run.parent and replace(
                    run.parent, run=f"kept/{world}/trunk-seed-{140 + n}"
                )
                runs.append(replace(run, path=path, name=f"{world}/{run.name}", parent=parent))
    study = Study(Path("kept"), runs)
    assert {world: len(trunks) for world, trunks in worlds_of(study).items()} == {
        "one": 3,
        "two": 3,
    }
    finding = claims.c(study)
    assert finding.verdict == "held"
    assert [c["difference"][:4] for c in finding.evidence["comparisons"]] == ["one:", "two:"]
    assert claims.a(study).evidence["reason"] == "no data"


def sweep_of(name: str) -> SweepConfig:
    return load_config(ROOT / "configs" / f"{name}.toml", (), SweepConfig)


def alphas_of(sweep: SweepConfig) -> dict[str, tuple[float, ...]]:
    plain = (one for one in sweep.transplants if not (one.each_alpha or one.match))
    return {one.name: one.alpha for one in plain}


def test_a_vector_has_one_alpha_wherever_it_is_put() -> None:
    """Controls that are made of RL's vector have its own."""
    for world, name in (("tables", "kept"), ("arithmetic", "kept_arithmetic")):
        study, tuning = (alphas_of(sweep_of(n)) for n in (name, f"tuning/kept_{world}_2_rates"))
        assert {vector: study[vector] for vector in tuning} == tuning
        like = ("earlier", "later", "permuted", *(f"random-{n}" for n in range(3)))
        assert {study[f"vector-{end}"] for end in like} == {study["vector-rl"]}
    assert {*alphas_of(sweep_of("kept_matrix")).values()} == {
        alphas_of(sweep_of("kept"))["vector-rl"]
    }


def test_tuning_of_facts_is_of_the_worlds_that_the_study_asks() -> None:
    study, tuning = sweep_of("kept_facts"), sweep_of("tuning/kept_facts_1_alpha")
    settings = "data.options.settings."
    assert {k: v for k, v in study.set.items() if k.startswith(settings)} == {
        k: v for k, v in tuning.set.items() if k.startswith(settings)
    }
    assert not {*study.seeds} & {*tuning.seeds}
    assert {one.name for one in study.transplants} == {one.name for one in tuning.transplants}


@pytest.mark.parametrize("world", SWEEPS)
def test_the_study_has_what_the_tuning_seeds_chose(
    world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until there are records of it nothing is chosen, and the page says so."""
    monkeypatch.chdir(ROOT)
    records = ROOT / "benchmarks/results/kept_tuning" / world
    if not records.exists():
        assert frozen_rates(world) == {}
        return
    ((_, trunks),) = worlds_of(Study.of(records)).items()
    given = alphas_of(sweep_of(world))
    for vector, by in alphas(trunks).items():
        assert given[vector] == (float(best(by)),), vector
    chosen = {what: best(by) for what, by in rates(trunks, STARTS).items()}
    assert frozen_rates(world) == {what: f"{float(rate):g}" for what, rate in chosen.items()}


def test_the_matrix_is_by_a_vectors_step_and_where_it_is_put_and_no_row_compares_it_elsewhere() -> (
    None
):
    ends = {500: 10, MIDDLE: 20, END: 20}
    runs = [made_run("trunk", 130, flat(*(evaluation(at, m, 50) for at, m in ends.items())))]
    for at in ends:
        runs.append(made_run(f"rl-at-{at}", 130, flat(evaluation(80, 100, 50)), ("trunk", at)))
    put = {(500, MIDDLE): 40, (500, END): 60, (MIDDLE, END): 80}  # m; late RL brings 20 to 100
    for (step, onto), m in put.items():
        part = (Part(f"rl-at-{step}-seed-130", "rl", 1.0),)
        name = f"vector-{step}-onto-{onto}"
        runs.append(made_run(name, 130, flat(evaluation(onto, m, 50)), ("trunk", onto), part))
    (trunks,) = trunks_of(runs).values()
    table = {title: (head, rows) for title, head, rows in sections(Table(trunks, {}))}
    (title,) = [title for title in table if title.startswith("Transfer matrix")]
    head, rows = table[title]
    assert head == ["vector's step", "onto 1,750", "onto 2,500"]
    assert rows == [["500", "25%", "50%"], ["1,750", "–", "75%"]]
    assert not [t for t, (_, lines) in table.items() if any("onto" in line[0] for line in lines)]
