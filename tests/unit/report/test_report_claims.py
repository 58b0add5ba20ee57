from dataclasses import replace
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from fake_sweep import AS_IN_THE_PAPER, SMALL_MODEL, Outcome, Sweep

from megarlx import plug
from megarlx.report.claims import Finding, judge_all
from megarlx.report.study import Study

FIRST_THIRTEEN = [f"P{n}" for n in range(1, 14)]
ONE_CHECKPOINT = (2_000_000,)


def trunks(root: Path, outcomes: dict[str, Outcome] | None = None, **given: Any) -> Sweep:
    """Three: of two even large differences are open."""
    return Sweep(root, outcomes or dict(AS_IN_THE_PAPER), **{"seeds": (0, 1, 2), **given})


def judged(root: Path) -> dict[str, Finding]:
    return judge_all(Study.of(root))


def verdicts(root: Path) -> dict[str, str]:
    return {name: finding.verdict for name, finding in judged(root).items()}


def changed(**outcomes: Outcome) -> dict[str, Outcome]:
    return AS_IN_THE_PAPER | outcomes


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finding]:
    return judged(trunks(tmp_path_factory.mktemp("paper")).write())


def test_every_claim_of_the_paper_has_a_predicate() -> None:
    assert list(plug.ours("claim")) == [f"P{n}" for n in range(1, 16)]


def test_data_made_after_the_paper_hold_its_claims(paper: dict[str, Finding]) -> None:
    assert {name: paper[name].verdict for name in FIRST_THIRTEEN} == dict.fromkeys(
        FIRST_THIRTEEN, "held"
    )


def test_evidence_has_the_numbers_that_the_verdict_comes_from(paper: dict[str, Finding]) -> None:
    found = paper["P3"].evidence["comparisons"][0]
    assert found["difference"] == "RL − SFT, pass@1"
    assert found["points"] == pytest.approx(15.0, abs=1.0)
    assert found["interval"][0] < found["points"] < found["interval"][1]
    assert (found["trunks"], found["cells"], found["seeds"]) == (3, 9, [0, 1, 2])
    own = [*found["by_trunk"].values()]
    assert sum(own) / 3 == pytest.approx(found["points"], abs=2e-3)
    half = 4.3027 * stdev(own) / 3**0.5  # t of two degrees of freedom
    assert found["interval"][1] - found["points"] == pytest.approx(half, abs=5e-3)
    assert found["signs"] == {"above": 3, "below": 0}
    assert found["these_trunks"]["questions"] == 200
    low, high = found["these_trunks"]["interval_over_questions"]
    assert low < found["points"] < high
    assert list(found["by_checkpoint"]) == ["1000000", "2000000", "4000000"]
    assert paper["P12"].evidence["nll_change"] == {"general-text": 0.07}
    direction = {"claim": "SFT lowers general capability", "verdict": "held"}
    assert paper["P12"].evidence["direction"] == direction


def test_a_trunks_questions_and_checkpoints_are_one_number(tmp_path: Path) -> None:
    """However many they are, three trunks that differ leave a claim open."""
    sweep = trunks(tmp_path, checkpoints=ONE_CHECKPOINT, questions=400)
    for seed, mean in zip(sweep.seeds, (0.30, 0.40, 0.22), strict=True):
        trunk = sweep.trunk(seed)
        sweep.outcomes["rl"] = replace(rl, mean=mean)
        for recipe in ("rl", "sft"):
            sweep.excursion(trunk, recipe, 2_000_000, seed)
    found = judged(tmp_path)["P3"]
    assert found.verdict == "undetermined"
    evidence = found.evidence["comparisons"][0]
    assert evidence["these_trunks"]["interval_over_questions"][0] > 0
    assert evidence["signs"] == {"above": 2, "below": 1}


def test_p12_tells_the_direction_beside_the_band(tmp_path: Path) -> None:
    outcomes = changed(sft=replace(sft, accuracy=0.58))
    trunks(tmp_path, outcomes, checkpoints=ONE_CHECKPOINT).write(["rl", "sft"])
    found = judged(tmp_path)["P12"]
    assert found.verdict == "not held"
    assert found.evidence["direction"]["verdict"] == "held"


rl, sft = AS_IN_THE_PAPER["rl"], AS_IN_THE_PAPER["sft"]
sft_then_rl, parallel = AS_IN_THE_PAPER["sft_then_rl"], AS_IN_THE_PAPER["parallel"]


@pytest.mark.parametrize(
    ("name", "outcomes"),
    [
        ("P1", {"rl": replace(rl, mean=0.01)}),
        ("P2", {"rl": replace(rl, coverage=0.30, mean=0.25)}),
        ("P3", {"rl": replace(rl, mean=0.10)}),
        ("P4", {"sft_then_rl": replace(sft_then_rl, mean=0.15)}),
        ("P5", {"sft_then_rl": replace(sft_then_rl, coverage=0.95)}),
        ("P6", {"sft_then_rl": replace(sft_then_rl, coverage=0.95)}),
        ("P6", {"sft_then_rl": replace(sft_then_rl, mean=0.10)}),
        ("P7", {"rl": replace(rl, coverage=0.25, mean=0.2)}),
        ("P8", {"sft_gold": Outcome(0.30, 0.50)}),
        ("P9", {"parallel": replace(parallel, coverage=0.65)}),
        ("P10", {"parallel": replace(parallel, mean=0.55)}),
        ("P11", {"rl": replace(rl, accuracy=0.56)}),
        ("P11", {"rl": replace(rl, accuracy=0.65)}),
        ("P12", {"sft": replace(sft, accuracy=0.60)}),
        ("P12", {"sft": replace(sft, accuracy=0.45)}),
        ("P13", {"parallel": replace(parallel, accuracy=0.55)}),
    ],
)
def test_data_made_against_a_claim_do_not_hold_it(
    tmp_path: Path, name: str, outcomes: dict[str, Outcome]
) -> None:
    trunks(tmp_path, changed(**outcomes), checkpoints=ONE_CHECKPOINT).write()
    assert verdicts(tmp_path)[name] == "not held"


def test_recipes_that_do_the_same_leave_it_undetermined(tmp_path: Path) -> None:
    outcomes = changed(rl=replace(sft, mean=0.25, accuracy=0.595))
    trunks(tmp_path, outcomes, checkpoints=ONE_CHECKPOINT).write(["rl", "sft"])
    found = judged(tmp_path)
    for name in ("P3", "P11"):
        assert found[name].verdict == "undetermined"
        assert found[name].evidence["reason"] == "the interval covers a boundary of the claim"


def test_every_checkpoint_but_the_very_first_must_hold_p1(tmp_path: Path) -> None:
    worse = replace(rl, mean=0.001)
    sweep = trunks(tmp_path / "first", changed(**{"rl@1000000": worse}), grows=0.0)
    assert verdicts(sweep.write(["rl", "sft"]))["P1"] == "held"
    sweep = trunks(tmp_path / "second", changed(**{"rl@2000000": worse}), grows=0.0)
    found = judged(sweep.write(["rl", "sft"]))["P1"]
    assert found.verdict == "not held"
    assert found.evidence["against"] == ["RL − base, pass@1 at 2,000,000 tokens"]
    assert found.evidence["comparisons"][0]["interval"][0] > 0  # pooled it would hold


def test_a_later_checkpoint_that_is_open_by_itself_leaves_p1_undetermined(tmp_path: Path) -> None:
    same = replace(rl, mean=AS_IN_THE_PAPER["base"].mean - 0.003, coverage=0.45)
    sweep = trunks(tmp_path, changed(**{"rl@4000000": same}))
    found = judged(sweep.write(["rl", "sft"]))["P1"]
    assert found.evidence["comparisons"][0]["interval"][0] > 0  # pooled it would hold
    assert found.verdict == "undetermined"
    assert found.evidence["reason"].endswith("covers a boundary of the claim at 4,000,000 tokens")


def test_p7_tells_the_whole_way_beside_that_from_its_first_evaluation(tmp_path: Path) -> None:
    sweep = trunks(tmp_path, checkpoints=ONE_CHECKPOINT, halfway=1.2)
    found = judged(sweep.write(["rl", "sft"]))["P7"]
    assert found.verdict == "not held"
    assert found.evidence["comparisons"][0]["points"] < 0
    assert found.evidence["since_the_checkpoint"]["pass@1"] == pytest.approx(35, abs=2)
    assert set(found.evidence["rl_began_with"].values()) == {"math of step 30"}


def test_one_trunk_claims_nothing(tmp_path: Path) -> None:
    trunks(tmp_path, checkpoints=ONE_CHECKPOINT, seeds=(3,)).write()
    found = judged(tmp_path)
    assert {f.verdict for f in found.values()} == {"undetermined"}
    assert found["P3"].evidence["reason"] == "one trunk (trunks/seed3): no verdict is claimed"
    assert found["P3"].evidence["comparisons"][0]["points"] > 10


def test_cells_beside_an_sft_that_guesses_do_not_count(tmp_path: Path) -> None:
    guessing = replace(sft, mean=0.003, coverage=0.2)  # less than twice 0.4%
    outcomes = changed(**{"sft@1000000": guessing})
    trunks(tmp_path, outcomes, checkpoints=(1_000_000, 2_000_000), grows=0.0).write(["rl", "sft"])
    found = judged(tmp_path)["P3"].evidence["comparisons"][0]
    assert (found["cells"], list(found["by_checkpoint"])) == (3, ["2000000"])
    assert len(found["left_out"]) == 3
    assert "SFT's pass@1 is 0." in found["left_out"][0]


def test_without_an_sft_there_is_nothing_to_judge_a_cell_by(tmp_path: Path) -> None:
    trunks(tmp_path, checkpoints=ONE_CHECKPOINT).write(["rl"])
    found = judged(tmp_path)["P1"]
    assert found.verdict == "undetermined"
    assert "no evaluated SFT beside it" in found.evidence["comparisons"][0]["left_out"][0]


def test_a_recipe_that_was_not_run_is_named_and_the_claim_undetermined(tmp_path: Path) -> None:
    trunks(tmp_path, checkpoints=ONE_CHECKPOINT).write(["rl", "sft", "parallel"])
    found = judged(tmp_path)
    assert found["P9"].verdict == "undetermined"
    assert found["P9"].evidence["reason"] == "no data for parallel − SFT→RL, pass@32"
    assert found["P3"].verdict == "held"


def composition(root: Path, *, by_data: float, by_size: float) -> Path:
    large = SMALL_MODEL | {"hidden_size": 128, "intermediate_size": 256}
    for prefix, model, share, mean in (
        ("small-less-", SMALL_MODEL, 0.3, 0.2),
        ("small-more-", SMALL_MODEL, 0.6, 0.2 + by_data),
        ("large-less-", large, 0.3, 0.2 + by_size),
        ("large-more-", large, 0.6, 0.2 + by_data + by_size),
    ):
        trunks(
            root,
            changed(rl=Outcome(mean, 0.7)),
            checkpoints=ONE_CHECKPOINT,
            model=model,
            problems_share=share,
            prefix=prefix,
            tests=20,
        ).write(["rl"])
    return root


@pytest.mark.parametrize(
    ("by_data", "by_size", "verdict"),
    [(0.25, 0.10, "held"), (0.10, 0.25, "not held"), (0.15, 0.15, "undetermined")],
)
def test_p14_compares_what_data_and_what_size_add_to_the_gain(
    tmp_path: Path, by_data: float, by_size: float, verdict: str
) -> None:
    found = judged(composition(tmp_path, by_data=by_data, by_size=by_size))["P14"]
    assert found.verdict == verdict
    points = found.evidence["comparisons"][0]["points"]
    assert points == pytest.approx(100 * (by_data - by_size), abs=2.0)


def test_p14_leaves_out_what_has_learned_no_more_than_to_guess(tmp_path: Path) -> None:
    found = judged(composition(tmp_path, by_data=-0.195, by_size=0.2))["P14"]
    left_out = found.evidence["comparisons"][0]["left_out"]
    assert any("its pass@1 is 0." in reason for reason in left_out)
    assert found.evidence["comparisons"][0]["cells"] == 0


@pytest.mark.parametrize(
    ("small_halfway", "large_halfway", "large_end", "verdict"),
    [
        (0.4, 0.9, 0.40, "held"),
        (0.9, 0.4, 0.40, "not held"),  # large groups do not win per example
        (0.4, 0.9, 0.55, "not held"),  # their ends differ
    ],
)
def test_p15_compares_group_sizes_at_equal_early_budgets(
    tmp_path: Path, small_halfway: float, large_halfway: float, large_end: float, verdict: str
) -> None:
    for size, halfway, end in ((5, small_halfway, 0.40), (64, large_halfway, large_end)):
        trunks(
            tmp_path,
            changed(rl=Outcome(end, 0.6)),
            checkpoints=ONE_CHECKPOINT,
            halfway=halfway,
            rl_settings={"samples_per_prompt": size},
            prefix=f"g{size}-",
            tests=20,
        ).write(["rl"])
    found = judged(tmp_path)["P15"]
    assert found.verdict == "undetermined"  # two trunks of one seed are two places
    for run in (tmp_path / "excursions").glob("g64-*"):
        lineage = run / "lineage.json"
        lineage.write_text(lineage.read_text().replace("trunks/g64-", "trunks/g5-"))
    found = judged(tmp_path)["P15"]
    assert found.verdict == verdict, found.evidence
