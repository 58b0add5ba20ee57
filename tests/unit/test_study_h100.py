"""configs/study_h100.toml: sizes as its comments say, and every excursion of it validates."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from megarlx.config import Config, load_config
from megarlx.config.sweep import SweepConfig
from megarlx.run.branch import excursion_config
from megarlx.sweeps.plan import Job, jobs_of

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "configs" / "study_h100.toml"


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    monkeypatch.chdir(ROOT)  # a sweep names its files from the repository's folder
    return jobs_of(load_config(STUDY, (), SweepConfig))


def overrides(job: Job) -> list[str]:
    words = job.arguments
    return [value for key, value in pairwise(words) if key == "--set"]


def trunks(jobs: list[Job]) -> dict[str, Config]:
    return {
        str(job.out): load_config(job.arguments[1], overrides(job))
        for job in jobs
        if job.arguments[0] == "train"
    }


def test_the_sizes_are_those_of_the_comment_and_the_weights_bf16(jobs: list[Job]) -> None:
    found = trunks(jobs).values()
    sizes = sorted({round(config.model.parameters() / 1e6) for config in found})
    assert sizes == [25, 145]
    assert f"{sizes[0]}M and {sizes[1]}M parameters" in STUDY.read_text()
    assert {config.training.precision for config in found} == {"bf16"}
    assert {config.training.seed for config in found} == {1, 2}


def test_every_excursion_validates_and_starts_where_the_trunk_is_saved(
    jobs: list[Job], tmp_path: Path
) -> None:
    configs = trunks(jobs)
    branches = [job for job in jobs if job.arguments[0] == "branch"]
    assert len({job.out for job in branches}) == len(branches) == 2 * 2 * 2 * 5
    for job in branches:
        trunk, _, step = job.arguments[1].partition("@")
        parent = configs[trunk]
        assert int(step) % (parent.checkpoints.save_every_steps or 0) == 0
        assert int(step) <= parent.steps
        (tmp_path / "resolved.json").write_text(parent.to_json())
        config = excursion_config(tmp_path, ROOT / job.arguments[2], overrides(job))
        assert config.model == parent.model
        assert config.evaluation.at_end
        assert config.training.precision == "bf16"
        suites = {suite.name for suite in config.evaluation.suites}
        assert {"math", "facts_choice", "facts_cloze", "stories", "lookups"} == suites
        if config.rl is not None:
            assert config.rl.max_completion_tokens == 120
