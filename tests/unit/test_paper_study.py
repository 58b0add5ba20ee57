"""configs/paper_1b is the paper's study: what is known of it stands in the files, and all of it
loads, without data and without a GPU."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from megarlx.cli import main
from megarlx.config import load_config
from megarlx.config.evaluation import SuitesConfig
from megarlx.config.sweep import SweepConfig
from megarlx.run.branch import excursion_config, recipe_config
from megarlx.sweeps.plan import jobs_of

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "configs" / "paper_1b"
RECIPES = sorted((STUDY / "recipes").glob("*.toml"))
PLACEMENTS = {
    folder: sorted((folder / "recipes" / "placement").glob("*.toml"))
    for folder in (STUDY, ROOT / "configs")
}
STUDIED = [2, 4, 6, 10, 12, 14, 20, 28, 44]  # billions of tokens


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # a sweep names its files from the repository's folder


def test_the_trunk_has_the_papers_setup() -> None:
    config = load_config(STUDY / "trunk.toml")
    tokens_per_step = config.training.sequences_per_step * config.training.sequence_length
    assert (config.training.sequences_per_step, config.training.sequence_length) == (512, 4096)
    assert math.isclose(config.steps * tokens_per_step, 50e9, rel_tol=1e-4)
    assert config.optimizer is not None
    assert (config.optimizer.lr, config.optimizer.schedule) == (4e-4, "cosine")
    assert config.data is not None
    shares = {source.name: source.weight for source in config.data.sources}
    assert shares == {
        "web": 60,
        "math": 20,
        "wikipedia": 7,
        "stem_papers": 5,
        "stackexchange": 2,
    }
    assert list(config.checkpoints.save_at_tokens) == [n * 10**9 for n in STUDIED]
    sampled = [suite for suite in config.evaluation.suites if suite.kind == "pass_at_k"]
    for suite in sampled:
        assert (suite.ks, suite.temperature, suite.few_shot) == ((1, 8, 32), 0.6, 8)
        assert suite.few_shot_trained == 0
    capability = {suite.name for suite in config.evaluation.suites} - {s.name for s in sampled}
    assert len(capability) == 6


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_branches_from_the_trunk(tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "resolved.json").write_text(load_config(STUDY / "trunk.toml").to_json())
    config = excursion_config(tmp_path, recipe)
    assert config.model.layers == 16
    kinds = [sorted(stage.objectives) for stage in config.stages]
    assert (
        kinds
        == {
            "rl": [["rl"]],
            "sft": [["sft"]],
            "sft_gold": [["sft"]],
            "sft_then_rl": [["sft"], ["rl"]],
            "sft_gold_then_rl": [["sft"], ["rl"]],
            "parallel": [["rl", "sft"]],
        }[recipe.stem]
    )
    if "sft" in recipe.stem or recipe.stem == "parallel":
        assert config.sft is not None
        assert config.sft.demonstrations == ("all" if "gold" in recipe.stem else "one")
    for stage in config.stages:
        if "rl" in stage.objectives:
            assert 600 <= stage.steps <= 1560
        if stage.combine == "average":
            assert stage.of == "updates"
            assert {one.weight.first for one in stage.objectives.values()} == {0.5}


@pytest.mark.parametrize("folder", PLACEMENTS, ids=lambda folder: folder.name)
def test_rl_has_the_same_work_and_reach_wherever_it_is_placed(tmp_path: Path, folder: Path) -> None:
    trunk = load_config(STUDY / "trunk.toml")
    (tmp_path / "resolved.json").write_text(trunk.to_json())
    placed = {path.stem: excursion_config(tmp_path, path) for path in PLACEMENTS[folder]}
    ways = ("late", "early", "early_and_late", "in_turns", "woven")
    assert set(placed) == {f"rl_{way}" for way in ways}
    work = set()
    for config in placed.values():
        steps: Counter[str] = Counter()
        rates = set()
        for stage in config.stages:
            turns = sum(one.turns for one in stage.objectives.values())
            for name, one in stage.objectives.items():
                alternates = stage.combine == "alternate"
                assert not alternates or stage.steps % turns == 0
                steps[name] += stage.steps * one.turns // turns if alternates else stage.steps
                assert one.inherit == (name == "pretraining")
                if name == "rl":
                    rates.add(one.lr * one.weight.first)
        assert len(rates) == 1
        work.add((steps["pretraining"], steps["rl"], rates.pop(), repr(config.rl)))
    assert len(work) == 1


@pytest.mark.parametrize("name", ["placement", "composition"])
def test_a_sweep_beside_the_study_names_files_that_are_there(here: None, name: str) -> None:
    jobs = jobs_of(load_config(STUDY / f"{name}.toml", (), SweepConfig))
    assert {job.arguments[0] for job in jobs} == {"train", "evaluate", "branch"}
    for job in jobs:
        assert all((ROOT / a).is_file() for a in job.arguments if a.endswith(".toml"))
        if job.arguments[0] == "train":
            settings = [
                a
                for a, flag in zip(job.arguments[1:], job.arguments, strict=False)
                if flag == "--set"
            ]
            tokens = load_config(ROOT / job.arguments[1], settings).checkpoints.save_at_tokens
    wanted = {a.partition("@tokens:")[2] for job in jobs for a in job.arguments if "@" in a}
    assert wanted <= {f"{n // 10**9}B" for n in tokens}


def test_what_early_rl_leaves_is_asked_of_public_revisions_and_fits_one_node(
    here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The revisions are no part of the repository: any folder stands for their run."""
    sweep = load_config(STUDY / "kept.toml", (), SweepConfig)
    jobs = jobs_of(sweep.model_copy(update={"trunk": str(STUDY)}))
    made = {job.out.name for job in jobs if job.out is not None}
    arms = {one.name for one in load_config(ROOT / "configs/kept.toml", (), SweepConfig).transplants}
    assert {f"{arm}-seed-0" for arm in arms - {"vector-partner"}} <= made  # no second trunk is public
    suites = load_config(str(sweep.suites), (), SuitesConfig)
    assert [s.split for s in suites.suites if s.kind == "pass_at_k"] == ["test", "validation"]
    planned = set()
    for job in (job for job in jobs if job.arguments[0] == "branch"):
        assert (ROOT / job.arguments[2]).is_file()
        settings = [
            word
            for word, flag in zip(job.arguments[1:], job.arguments, strict=False)
            if flag == "--set"
        ]
        excursion_config_of(job.arguments[2], settings)
        planned.add(job.arguments[2])
    for recipe in planned:
        words = ["plan", recipe, "--trunk", str(STUDY / "trunk.toml"), "--gpus", "8"]
        assert main(words) == 0
        assert "fits" in capsys.readouterr().out


def excursion_config_of(recipe: str, settings: list[str]) -> None:
    before = load_config(ROOT / "configs" / "olmo2_1b.toml")
    recipe_config(before, ROOT / recipe, settings, "olmo2_1b")


def test_the_sweep_starts_every_recipe_from_every_studied_checkpoint_once(here: None) -> None:
    sweep = load_config(STUDY / "sweep.toml", (), SweepConfig)
    jobs = jobs_of(sweep)
    outs = [job.out for job in jobs if job.out is not None]
    assert len(set(outs)) == len(outs)
    plain = {
        (Path(job.arguments[2]).stem, job.arguments[1].partition("@tokens:")[2])
        for job in jobs
        if job.arguments[0] == "branch" and "rl.samples_per_prompt" not in str(job.arguments)
    }
    assert plain == {(recipe.stem, f"{n}B") for recipe in RECIPES for n in STUDIED}
    measured = [job.arguments[1] for job in jobs if job.arguments[0] == "evaluate"]
    assert [where.partition("@tokens:")[2] for where in measured] == [f"{n}B" for n in STUDIED]
    groups = [a for job in jobs for a in job.arguments if a.startswith("rl.samples_per_prompt=")]
    assert groups == ["rl.samples_per_prompt=5", "rl.samples_per_prompt=64"]
    for job in jobs:
        assert all((ROOT / a).is_file() for a in job.arguments if a.endswith(".toml"))


def test_what_the_paper_does_not_say_is_marked() -> None:
    for recipe in RECIPES:
        text = recipe.read_text()
        for line in text.splitlines():
            if line.startswith(("lr ", "schedule ", "prompts_per_step ", "temperature ")):
                assert "not known" in line, f"{recipe}: {line}"
