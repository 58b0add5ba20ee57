"""`megarlx train`: it learns, resumes exactly, runs in any layout, and refuses what cannot work."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
from pathlib import Path

import pytest
from training_runs import (
    ROOT,
    command,
    losses,
    run,
    tensors,
    train,
    unigram_entropy,
)

from megarlx.cli import COMMANDS
from megarlx.training.metrics import read_metrics


def test_validation_loss_falls_a_nat_below_the_unigram_entropy(tmp_path: Path) -> None:
    """The demo's configuration, cut short."""
    world = tmp_path / "world"
    status = train(
        ROOT / "configs" / "demo_pretraining.toml",
        tmp_path / "run",
        "training.steps=80",
        "optimizer.warmup_steps=5",
        "data.options.documents=4000",
        f"data.folder={json.dumps(str(world))}",
    )
    assert status == 0
    last = [x for x in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval/loss/facts" in x]
    for kind in ("problems", "facts", "stories"):
        loss = last[-1][f"eval/loss/{kind}"]
        assert loss < unigram_entropy(world / f"held_out_{kind}") - 1.0, kind


def test_a_run_says_what_it_trains_how_far_it_is_and_what_can_be_typed_next(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, tmp_path / "run", "logging.log_every_steps=4") == 0
    first, *said = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path / 'run'}: olmo2, 40,344 parameters, 4 layers of 24")
    assert "trains: 12 steps of pretraining" in said
    losses = [line for line in said if ": loss " in line]
    assert [line.partition(":")[0] for line in losses] == ["step 4/12", "step 8/12", "step 12/12"]
    assert [line.endswith(" left") for line in losses] == [True, True, False]
    done, _, typed = said[-1].partition("; next: ")
    assert done.startswith("done: 12 steps in ")
    for line in typed.split(", "):
        program, name, *words = shlex.split(line)
        parser = argparse.ArgumentParser()
        importlib.import_module(COMMANDS[name].module).add_arguments(parser)
        assert program == "megarlx"
        assert str(tmp_path) in " ".join(words)
        parser.parse_args(words)  # it would exit


def test_a_run_that_is_done_says_so_and_how_it_gets_longer(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, tmp_path, "training.steps=2") == 0
    before = tensors(tmp_path, 2)
    capsys.readouterr()
    assert train(config, tmp_path, "training.steps=2") == 0
    assert "had nothing to train (longer: --set training.steps=" in capsys.readouterr().out
    assert tensors(tmp_path, 2) == before


def test_stopping_and_going_on_equals_never_stopping_bit_for_bit(
    tmp_path: Path, config: Path
) -> None:
    # 400 documents are a few dozen samples: twelve steps of eight go past an epoch's end.
    assert train(config, tmp_path / "whole") == 0
    for steps in (5, 9, 12):
        assert train(config, tmp_path / "parts", f"training.steps={steps}") == 0
    assert tensors(tmp_path / "whole", 12) == tensors(tmp_path / "parts", 12)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_micro_batches_change_losses_by_rounding_only(tmp_path: Path, config: Path) -> None:
    assert train(config, tmp_path / "one") == 0
    assert train(config, tmp_path / "four", "training.sequences_per_microbatch=8") == 0
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert one.keys() == four.keys()
    for step, loss in one.items():
        assert loss == pytest.approx(four[step], rel=1e-4)


@pytest.mark.parametrize(
    "layout",
    [
        ("layout.tensor=2", "layout.sequence_parallel=true"),
        ("layout.pipeline=2",),
        ("layout.data=2",),
    ],
    ids=lambda layout: layout[0],
)
def test_a_run_goes_on_under_torchrun_in_another_layout(
    tmp_path: Path, config: Path, layout: tuple[str, ...]
) -> None:
    assert train(config, tmp_path / "whole") == 0
    assert train(config, tmp_path / "parts", "training.steps=5") == 0
    done = run(command(config, tmp_path / "parts", *layout, processes=2))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 5" in done.stdout
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for step, loss in whole.items():
        assert loss == pytest.approx(parts[step], rel=1e-4)


def test_going_on_with_another_model_or_seed_is_refused_with_the_difference(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, tmp_path, "training.steps=2") == 0
    assert train(config, tmp_path, "training.seed=5", "model.hidden_size=32") == 1
    error = capsys.readouterr().err
    assert "training.seed: was 0, is 5" in error
    assert "model.hidden_size: was 24, is 32" in error
    assert json.loads((tmp_path / "resolved.json").read_text())["training"]["seed"] == 0


def test_a_table_that_differs_is_shown_short_and_a_longer_stage_is_shown_the_way(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    staged, text = tmp_path / "stages.toml", config.read_text().replace("steps = 12\n", "")
    staged.write_text(f"{text}[[stages]]\nsteps = 2\n[stages.objectives.pretraining]\n")
    assert train(staged, tmp_path / "run") == 0
    assert train(staged, tmp_path / "run", "stages.0.steps=4") == 1
    error = capsys.readouterr().err
    assert "stages.0.steps: was 2, is 4" in error
    assert f"for more steps give megarlx branch {tmp_path / 'run'}@latest a recipe" in error
    assert train(staged, tmp_path / "run", f'template={{user="{"{content} " + "x" * 500}"}}') == 1
    for line in capsys.readouterr().err.splitlines()[1:-1]:
        assert len(line) < 200


def test_fresh_refuses_a_folder_with_checkpoints(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, tmp_path, "training.steps=2", fresh=True) == 0
    before = tensors(tmp_path, 2)
    assert train(config, tmp_path, "training.steps=2", fresh=True) == 1
    assert "holds checkpoints, up to step 2" in capsys.readouterr().err
    assert tensors(tmp_path, 2) == before


def test_checkpoints_are_saved_at_listed_token_counts_and_kept(
    tmp_path: Path, config: Path
) -> None:
    # 256 tokens a step: 600 tokens are passed in the third step.
    overrides = ("checkpoints.save_at_tokens=[600]", "checkpoints.save_every_steps=4")
    assert train(config, tmp_path, *overrides, "checkpoints.keep_last=1") == 0
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("iter_*"))
    assert kept == ["iter_00000003", "iter_00000012"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.vocab_size=200", "vocab_size is 200"),
        ("layout.tensor=2", "needs 2 processes; there are 1"),
        ("layout.replica=2", "layout.replica is 2; replicas run one objective each"),
        ("training.device=cuda", "torch sees no GPU"),
        ('logging.trackers=["wandb"]', "logging.trackers names wandb, which is not installed"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    tmp_path: Path,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    override: str,
    said: str,
) -> None:
    assert train(config, tmp_path / "run", override) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_gradients_that_stay_non_finite_stop_the_run_and_name_the_place(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ("optimizer.lr=1e30", "logging.skipped_updates_allowed=2")
    assert train(config, tmp_path / "run", *overrides) == 1
    error = capsys.readouterr().err
    assert "the gradient of 'pretraining' is not finite, 3 steps in a row; first in " in error
