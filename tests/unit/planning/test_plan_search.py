"""The search finds what is best of what it may choose from."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planned_jobs import llama3, seventy_billion

from megarlx.comm.hardware import GPUS
from megarlx.config import Config
from megarlx.model.check_layout import LayoutError
from megarlx.planning.job import Job
from megarlx.planning.memory import Rollouts, worst_rank
from megarlx.planning.search import layouts, predict, search

H100 = GPUS["h100"]


def small() -> Job:
    return Job(llama3(), 64, 1, 512)


def test_every_layout_it_tries_is_valid_different_and_uses_all_gpus() -> None:
    tried = list(layouts(small(), 8, H100))
    for job in tried:
        job.check(8)
        assert llama3().heads % job.tp == 0
    assert len(set(map(str, tried))) == len(tried)
    assert {job.pp for job in tried} == {1, 2, 4}  # 8 stages are more than 4 layers
    assert {job.tp for job in tried} == {1, 2}  # 4 and 8 do not divide 6 heads


def test_nothing_that_fits_is_faster_than_the_best() -> None:
    found = search(small(), 8, H100, count=3)
    everything = [predict(job, H100) for job in layouts(small(), 8, H100)]
    fitting = sorted(p.time.total for p in everything if p.fits(H100))
    assert [p.time.total for p in found.best] == fitting[:3]
    assert (found.tried, found.fitting) == (len(everything), len(fitting))


def test_what_does_not_fit_is_not_shown() -> None:
    fullest = max(worst_rank(job)[1].peak for job in layouts(small(), 8, H100))
    least = min(worst_rank(job)[1].peak for job in layouts(small(), 8, H100))
    card = replace(H100, memory_bytes=(fullest + least) / 2 / 0.92)
    found = search(small(), 8, card, count=10_000)
    assert 0 < found.fitting < found.tried
    assert all(p.memory.peak <= (fullest + least) / 2 for p in found.best)
    assert len(found.best) == found.fitting
    assert search(small(), 8, replace(H100, memory_bytes=least / 2)).best == []


def test_a_cache_of_rollouts_takes_the_room_of_layouts() -> None:
    card = replace(H100, memory_bytes=1e9)
    without = search(small(), 4, card)
    beside = search(small(), 4, card, rollouts=Rollouts(2048, 512, 512))
    assert beside.fitting < without.fitting


def test_70b_on_eight_gpus_fits_in_no_layout_and_on_64_it_is_split() -> None:
    job = Job(seventy_billion(), 64, 1, 4096)
    assert search(job, 8, H100).best == []
    found = search(job, 64, H100, count=1)
    assert found.best[0].job.tp * found.best[0].job.pp >= 8


def config(**layout: object) -> Config:
    model = {"vocab_size": 1000, "hidden_size": 96, "layers": 4, "heads": 6}
    return Config.model_validate(
        {
            "model": {**model, "intermediate_size": 256},
            "training": {"steps": 1, "sequences_per_step": 24, "sequence_length": 128},
            "layout": layout,
        }
    )


def test_data_parallelism_takes_the_gpus_that_are_left() -> None:
    job = Job.of(config(tensor=2, pipeline=2), 24)
    assert (job.dp, job.microbatches) == (6, 4)


@pytest.mark.parametrize(
    ("layout", "gpus", "message"),
    [
        ({"tensor": 4}, 8, "6 heads cannot be split over tp=4"),
        ({"tensor": 2}, 7, "needs 6 processes; there are 7"),
        ({"data": 4}, 8, "needs 4 processes; there are 8"),
        (
            {},
            7,
            "training.sequences_per_step is 24; sequences_per_microbatch x dp = 7 must divide it",
        ),
        ({"replica": 2}, 3, "needs 2 processes; there are 3"),
        ({"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2}, 0, "gpus is 0"),
    ],
)
def test_layouts_that_cannot_work_are_refused_with_the_numbers(
    layout: dict[str, object], gpus: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Job.of(config(**layout), gpus)


def test_a_schedule_that_cannot_run_the_micro_batches_is_refused() -> None:
    job = Job(llama3(), 5, 1, 128, pp=2, schedule="interleaved", virtual_stages=2)
    with pytest.raises(ValueError, match="cannot run 5 micro-batches"):
        job.check()
    with pytest.raises(LayoutError, match="4 layers are fewer than 8 pipeline stages"):
        job.changed(pp=4).check()
