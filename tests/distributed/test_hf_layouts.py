"""A converted checkpoint loads into every layout with every bit in its place and the same loss;
files laid out anew for other ranks are those that these ranks would have written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grid import Case, RandomSequences, assemble, chunks, model
from harness import Pool

from megarlx.checkpoint import Saver
from megarlx.comm.groups import Mesh
from megarlx.comm.share import Share
from megarlx.config.model import ModelConfig
from megarlx.config.parameters import published_names
from megarlx.data.loader import BatchLayout, Loader
from megarlx.hf.command import Asked, Converter
from megarlx.hf.config_map import hugging_face_config
from megarlx.hf.trunk import find_checkpoint
from megarlx.model.build import build_model
from megarlx.objectives.supervised import Supervised
from megarlx.training.parts import UpdateSettings
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage

transformers = pytest.importorskip("transformers")

SEQUENCES = 8


def nothing() -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def started(pool: Pool) -> None:
    """A few at a time: eight processes that import all of this at once on a busy machine of two
    cores can take longer than a process group waits for its members."""
    for count in (2, 4, 6, 8):
        pool.run(count, nothing)


def case(family: str, **sizes: Any) -> Case:
    return Case(family, precision="fp32", microbatches=2, **sizes)


def trainer_of(config: ModelConfig, place: Case) -> Trainer:
    mesh = Mesh.build(pp=place.pp, dp=place.dp, tp=place.tp, timeout_seconds=30, backend="gloo")
    built = build_model(config, mesh, seed=7)
    per_microbatch = SEQUENCES // place.dp // place.microbatches
    layout = BatchLayout(SEQUENCES, per_microbatch, mesh.dp.rank, mesh.dp.size)
    data = Loader(RandomSequences(), layout, prefetch_steps=0)
    objective = Supervised("pretraining", data)
    member = TrainedObjective(objective, UpdateSettings(), lambda step: 1e-2)
    return Trainer(built, [TrainingStage([member], combine="single")])


def loaded(config: ModelConfig, place: Case, checkpoint: Path) -> tuple[Any, float]:
    """Runs on every rank: the weights it holds, and the loss of the first batch."""
    trainer = trainer_of(config, place)
    trainer.start_from(checkpoint)
    loss = trainer.evaluate(trainer.objectives["pretraining"])
    return chunks(trainer, trainer.optimizer.master), loss


def convert(source: Path, target: Path, way: str, **options: Any) -> None:
    kind_from, kind_to = way.split(">")
    asked = Asked(kind_from, kind_to, str(source), target, quiet=True, **options)
    assert Converter(asked, Share()).run() == 0


LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]  # tp, pp


@pytest.mark.parametrize(
    ("family", "tied"), [("olmo2", False), ("llama3", True), ("qwen2", True), ("qwen3", False)]
)
def test_a_converted_model_is_itself_in_every_layout(
    run: Callable[..., list[Any]], tmp_path: Path, family: str, tied: bool
) -> None:
    config = model(family, tied)
    there = tmp_path / "hf"
    there.mkdir()
    (there / "config.json").write_text(json.dumps(hugging_face_config(config, "float32")))
    settings = transformers.AutoConfig.from_pretrained(there, attn_implementation="eager")
    torch.manual_seed(5)
    theirs = transformers.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    theirs.save_pretrained(there)
    convert(there, tmp_path / "run", "hf>megarlx", file_bytes=9000)

    samples = [RandomSequences().sample(index) for index in range(SEQUENCES)]
    tokens = torch.stack([torch.as_tensor(sample.inputs) for sample in samples])
    targets = torch.stack([torch.as_tensor(sample.targets) for sample in samples])
    with torch.no_grad():
        logits = theirs(input_ids=tokens).logits
    expected = F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten()).item()
    state = theirs.state_dict()
    names = published_names(config)
    checkpoint = find_checkpoint(str(tmp_path / "run"))
    for tp, pp in LAYOUTS:
        results = run(tp * pp, loaded, config, case(family, tp=tp, pp=pp, tied=tied), checkpoint)
        weights = assemble(config, [held for held, _ in results])
        for ours, name in names.items():
            assert torch.equal(torch.from_numpy(weights[ours]).float(), state[name]), ours
        for _, loss in results:
            assert loss == pytest.approx(expected, rel=1e-5)


def saved(config: ModelConfig, place: Case, folder: Path, begun: Path | None) -> None:
    """Runs on every rank: one step and a save, or what was saved before, saved again."""
    trainer = trainer_of(config, place)
    if begun is None:
        trainer.step()
    else:
        trainer.resume(begun)
    trainer.save(Saver(folder, trainer.mesh.world), {"tokens": {"pretraining": 8}}, blocking=True)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (case("llama3"), case("llama3", tp=2, pp=2, dp=2)),
        (case("qwen2", dp=2, tied=True), case("qwen2", tp=4, pp=2, tied=True)),
        (case("olmo2", tp=2, pp=2), case("olmo2", dp=4)),
    ],
    ids=str,
)
def test_files_laid_out_anew_are_those_that_the_ranks_would_have_written(
    run: Callable[..., list[Any]], tmp_path: Path, before: Case, after: Case
) -> None:
    config = model(before.family, before.tied)
    first, native, made = (tmp_path / name for name in ("first", "native", "made"))
    run(before.world_size, saved, config, before, first / "checkpoints", None)
    begun = first / "checkpoints" / "iter_00000001"
    run(after.world_size, saved, config, after, native / "checkpoints", begun)
    resolved = json.dumps({"model": config.model_dump()})
    (first / "resolved.json").write_text(resolved)
    layout = f"{after.tp},{after.pp},{after.dp}"
    convert(first, made, "megarlx>megarlx", layout=layout, iteration=0)
    assert bytes_of(made) == bytes_of(native)


def bytes_of(run: Path) -> dict[str, bytes]:
    folder = run / "checkpoints"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
