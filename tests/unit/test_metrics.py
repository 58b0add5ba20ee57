"""Metrics: one set of keys, in TensorBoard and in metrics.jsonl, also through a resume."""

import json
from pathlib import Path

import pytest

from megarlx.training.metrics import MetricsWriter, read_metrics


def test_tensorboard_and_jsonl_hold_the_same_keys_and_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as writer:
        for step in range(3):
            writer.scalars(step, {"loss/pretraining": 3.0 - step, "perf/mfu": 0.25})
    lines = list(read_metrics(tmp_path / "metrics.jsonl"))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"loss/pretraining", "perf/mfu"}
    events = [(e.step, e.value) for e in board.Scalars("loss/pretraining")]
    assert events == [(line["step"], line["loss/pretraining"]) for line in lines]


def test_tensorboard_shows_a_trunk_and_what_its_excursions_reached_over_tokens(
    tmp_path: Path,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def over_tokens(run: str) -> dict[str, list[tuple[int, float]]]:
        board = EventAccumulator(str(tmp_path / run / "tensorboard" / "tokens"))
        board.Reload()
        scalars = board.Tags()["scalars"]
        return {key: [(e.step, e.value) for e in board.Scalars(key)] for key in scalars}

    with MetricsWriter(tmp_path / "trunk") as writer:
        for step in (1, 2, 3):
            writer.scalars(step, {"loss/pretraining": 4.0 - step}, 100 * step)
    with MetricsWriter(tmp_path / "trunk", resume_at=3, trunk_tokens=200) as writer:
        writer.scalars(3, {"loss/pretraining": 0.5}, 300)
        writer.scalars(3, {"eval/math/pass_at_1": 0.25}, 300)
    assert over_tokens("trunk") == {
        "loss/pretraining": [(100, 3.0), (200, 2.0), (300, 0.5)],
        "eval/math/pass_at_1": [(300, 0.25)],
    }
    with MetricsWriter(tmp_path / "rl", trunk_tokens=300) as writer:
        writer.scalars(1, {"loss/rl": 1.0, "eval/math/pass_at_1": 0.75}, 300)
    assert over_tokens("rl") == {"eval/math/pass_at_1": [(300, 0.75)]}


def test_a_resume_drops_what_was_written_after_its_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(5):
            writer.scalars(step, {"loss": 1.0})
    with MetricsWriter(tmp_path, resume_at=3) as writer:
        writer.scalars(3, {"loss": 2.0})
    found = [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert found == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    assert [line["step"] for line in read_metrics(path)] == [0]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a line of metrics"):
        list(read_metrics(path))


def test_infinities_are_words_so_every_line_is_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.scalars(0, {"loss": float("nan"), "grad_norm/rl": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"not JSON: {word}"))
    assert found == {"step": 0, "loss": "nan", "grad_norm/rl": "inf"}


def test_files_of_a_run_that_goes_on_at_once_are_read_in_its_order(tmp_path: Path) -> None:
    folders = [tmp_path / "tensorboard", tmp_path / "tensorboard" / "tokens"]
    before: list[list[str]] = [[], []]
    for step in (1, 2, 3):
        with MetricsWriter(tmp_path, resume_at=step) as writer:
            writer.scalars(step, {"loss": 1.0 / step}, step)
        after = [sorted(path.name for path in one.glob("events.out.*")) for one in folders]
        for old, new in zip(before, after, strict=True):
            assert new[:-1] == old
            assert not old or new[-1].split(".")[3] > old[-1].split(".")[3]
        before = after
