"""Metrics: one set of keys, in TensorBoard and in metrics.jsonl, also through a resume."""

import json
from pathlib import Path

import pytest

from megarlx.training.metrics import MetricsWriter, board_tag, read_metrics


def board_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds in a run: one run, whatever is in it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = {path.parent for path in run.rglob("events.out.tfevents.*")}
    assert folders == {run / "tensorboard"}
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    tags = board.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags}


def test_tensorboard_and_jsonl_hold_the_same_numbers(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(3):
            writer.scalars(step, {"loss/pretraining": 3.0 - step, "perf/mfu": 0.25, "rl/kl": 0.5})
    lines = list(read_metrics(tmp_path / "metrics.jsonl"))
    found = board_of(tmp_path)
    assert set(found) == {"loss/pretraining", "speed/mfu", "rl/kl"}
    expected = [(line["step"], line["loss/pretraining"]) for line in lines]
    assert found["loss/pretraining"] == expected


def test_what_is_learned_sorts_before_what_is_spent() -> None:
    keys = [
        *("cost/seconds", "data/web_tokens", "eval/math/pass_at_1", "grad_norm/rl", "loss/rl"),
        *("lr/rl", "perf/mfu", "rl/reward", "share/rl", "weight_norm/model"),
    ]
    groups = sorted({board_tag(key).split("/")[0] for key in keys})
    assert groups == ["eval", "loss", "optimizer", "rl", "sources", "speed", "spent"]
    tags = [board_tag(key) for key in keys]
    assert len(set(tags)) == len(tags)
    assert board_tag("optimizer/lr/rl") == board_tag("lr/rl")


def test_tensorboard_shows_a_trunk_and_what_its_excursions_reached_over_tokens(
    tmp_path: Path,
) -> None:
    def over_tokens(run: str) -> dict[str, list[tuple[int, float]]]:
        found = board_of(tmp_path / run)
        return {t[10:]: course for t, course in found.items() if t.startswith("by_tokens/")}

    with MetricsWriter(tmp_path / "trunk") as writer:
        for step in (1, 2, 3):
            values = {"loss/pretraining": 4.0 - step, "lr/pretraining": 0.5, "perf/mfu": 0.5}
            writer.scalars(step, values, 100 * step)
    with MetricsWriter(tmp_path / "trunk", resume_at=3, trunk_tokens=200) as writer:
        writer.scalars(3, {"loss/pretraining": 0.5}, 300)
        writer.scalars(3, {"eval/math/pass_at_1": 0.25, "eval/perplexity/web": 3.0}, 300)
    assert over_tokens("trunk") == {
        "loss/pretraining": [(100, 3.0), (200, 2.0), (300, 0.5)],
        "eval/math/pass_at_1": [(300, 0.25)],
    }
    assert board_of(tmp_path / "trunk")["loss/pretraining"] == [(1, 3.0), (2, 2.0), (3, 0.5)]
    with MetricsWriter(tmp_path / "rl", trunk_tokens=300) as writer:
        writer.scalars(1, {"loss/rl": 1.0, "eval/math/pass_at_1": 0.75}, 300)
        writer.scalars(1, {"perf/save_pause_seconds": 0.1})  # of no number of tokens
        writer.scalars(2, {"rl/reward": 0.5, "loss/rl": 0.5}, 300)
    assert over_tokens("rl") == {"eval/math/pass_at_1": [(300, 0.75)]}


@pytest.mark.parametrize("tokens", [0, 1, 7, 1000])
@pytest.mark.parametrize("stops", [(2,), (5, 3), (9, 9, 1), (4, 8, 8)])
def test_however_often_a_run_goes_on_each_point_is_there_once(
    tmp_path: Path, tokens: int, stops: tuple[int, ...]
) -> None:
    """`tokens` of pre-training a step; each stop is where a killed run begins again."""
    begin = 1
    for number, end in enumerate((*stops, 10)):
        resume = begin if number else 0
        with MetricsWriter(tmp_path, resume_at=resume, trunk_tokens=tokens * (begin - 1)) as writer:
            for step in range(begin, 12):
                writer.scalars(step, {"loss/pretraining": step + number / 8}, tokens * step)
        begin = end
    found = board_of(tmp_path)
    lines = {x["step"]: x["loss/pretraining"] for x in read_metrics(tmp_path / "metrics.jsonl")}
    assert sorted(lines) == list(range(1, 12))
    assert found["loss/pretraining"] == sorted(lines.items())
    over_tokens = [(tokens * step, value) for step, value in sorted(lines.items())]
    assert found.get("by_tokens/loss/pretraining", []) == (over_tokens if tokens else [])


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
    folders = [tmp_path / "tensorboard"]
    before: list[list[str]] = [[]]
    for step in (1, 2, 3):
        with MetricsWriter(tmp_path, resume_at=step) as writer:
            writer.scalars(step, {"loss": 1.0 / step}, step)
        after = [sorted(path.name for path in one.glob("events.out.*")) for one in folders]
        for old, new in zip(before, after, strict=True):
            assert new[:-1] == old
            assert not old or new[-1].split(".")[3] > old[-1].split(".")[3]
        before = after
