"""Training whose micro-batches are graphs equals training without them, step by step.

On a CPU a graph is what one run of a step asked of torch, kept with the very tensors that it read
and wrote, and asked for again: whatever the host decided is fixed, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stage_cases import ADAMS, LENGTH, VOCABULARY, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megarlx.checkpoint import Saver
from megarlx.comm.groups import Group, Layout
from megarlx.data.loader import BatchLayout, Loader
from megarlx.data.samples import Sample
from megarlx.objectives.interface import Batch
from megarlx.objectives.supervised import Supervised
from megarlx.training import captured
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage

BELOW = 1_000_000
SAID = "a: a micro-batch is one CUDA graph"


class Recorded(TorchDispatchMode):
    """The operators of a step, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for before, now in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if before.data_ptr() != now.data_ptr():
                    before.copy_(now)


def tensors(made: Any) -> list[Tensor]:
    """Of what an operator gives: a tensor, or several."""
    several = made if isinstance(made, tuple | list) else (made,)
    return [one for one in several if isinstance(one, Tensor)]


class Graph:
    def __init__(self, of: Graphs, recorded: Recorded) -> None:
        self.of, self.recorded = of, recorded

    def replay(self) -> None:
        self.of.replays += 1
        self.recorded.replay()


class Graphs:
    """Made as on CUDA, and how often they ran."""

    def __init__(self) -> None:
        self.made, self.replays = 0, 0

    def __call__(self, step: Callable[[], Any]) -> tuple[Graph, Any]:
        for _ in range(2):
            step()
        with Recorded() as recorded:
            out = step()
        self.made += 1
        return Graph(self, recorded), out


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    made = Graphs()
    monkeypatch.setattr(captured, "captured", made)
    monkeypatch.setattr(captured, "DEVICES", {"cpu"})
    return made


class Texts:
    """Sample i is a function of i: rows, or documents of changing lengths; with a mask or none."""

    sequence_length = LENGTH

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def sample(self, index: int) -> Sample:
        random = np.random.default_rng(index)
        tokens = random.integers(0, VOCABULARY, LENGTH + 1)
        mask = np.arange(LENGTH) > random.integers(LENGTH - 2) if self.kind == "masked" else None
        lengths = (LENGTH,)
        if self.kind != "rows":
            cut = int(random.integers(1, LENGTH))
            lengths = (cut, LENGTH - cut) if index % 3 else (1, cut, LENGTH - cut - 1)
        return Sample(tokens[:-1], tokens[1:], mask, tuple(n for n in lengths if n), 0)

    def fingerprint(self) -> dict[str, object]:
        return {"kind": self.kind}

    def tokens_by_source(self, consumed_sequences: int) -> dict[str, int]:
        return {self.kind: consumed_sequences * LENGTH}


def trainer_of(
    kind: str = "rows", *, below: int = BELOW, seed: int = 1, dtype: Any = torch.float32
) -> Trainer:
    layout = BatchLayout(6, 2, 0, 1)
    loader = Loader(Texts(kind), layout, prefetch_steps=0, with_documents=kind != "rows")
    member = TrainedObjective(Supervised("a", loader), ADAMS["a"], lambda step: 1e-2 / (1 + step))
    stage = TrainingStage([member], combine="single")
    return Trainer(small_model(seed, dtype), [stage], capture_below_parameters=below)


def run(trainer: Trainer, steps: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each."""
    found = []
    for _ in range(steps):
        losses, report = trainer.step()
        found.append((float(losses["a"]), float(report.gradient_norms["a"])))
    return found


def state_of(trainer: Trainer) -> list[Tensor]:
    optimizer = trainer.optimizer
    return [*optimizer.shards.shards.values(), optimizer.steps, trainer.model.data_parallel.weights]


def assert_same_state(one: Trainer, other: Trainer) -> None:
    for a, b in zip(state_of(one), state_of(other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_graphs_train_to_the_same_bits_as_no_graphs(graphs: Graphs, dtype: torch.dtype) -> None:
    with_graphs, without = trainer_of(dtype=dtype), trainer_of(below=0, dtype=dtype)
    assert run(with_graphs, 4) == run(without, 4)
    assert_same_state(with_graphs, without)
    assert (graphs.made, graphs.replays) == (1, 4 * 3)
    assert with_graphs.notices == [SAID]
    assert without.notices == []


def attend_by_offsets(
    q: Tensor, k: Tensor, v: Tensor, *, documents: Any, form: Any, **_: Any
) -> Any:
    """Reads where documents begin from the device alone, as flash-attn and cuDNN do."""
    document = documents.document_of_token
    place = torch.arange(len(q))
    seen = (document[:, None] == document) & (place[:, None] >= place)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * form.scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.mark.parametrize("kind", ["packed", "masked"])
def test_documents_of_any_number_and_masks_go_through_few_graphs(graphs: Graphs, kind: str) -> None:
    """A graph computes masked rows too, which changes the last bits."""
    with_graphs, without = (
        trainer_of(kind, below=below, dtype=torch.float64) for below in (BELOW, 0)
    )
    for trainer in (with_graphs, without):
        for layer in trainer.model.stages[0].layers.values():
            layer.attention.core.attend = attend_by_offsets  # type: ignore[union-attr]
    for one, other in zip(run(with_graphs, 5), run(without, 5), strict=True):
        assert one == pytest.approx(other, rel=1e-12)
    for a, b in zip(state_of(with_graphs), state_of(without), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert graphs.replays == 5 * 3
    assert graphs.made <= captured.MOST_GRAPHS


def test_a_skipped_step_leaves_graphs_and_weights_as_they_were(graphs: Graphs) -> None:
    with_graphs, without = trainer_of(), trainer_of(below=0)
    for trainer in (with_graphs, without):
        run(trainer, 1)
        before = trainer.model.data_parallel.weights.clone()
        step = trainer.optimizer.step
        poisoned = trainer.optimizer.gradient_shard("a")

        def broken(*args: Any, poisoned: Any = poisoned, step: Any = step, **kwargs: Any) -> Any:
            poisoned[3] = torch.nan
            return step(*args, **kwargs)

        trainer.optimizer.step = broken  # type: ignore[method-assign]
        _, report = trainer.step()
        assert bool(report.found_inf["a"])
        assert torch.equal(before, trainer.model.data_parallel.weights)
        trainer.optimizer.step = step  # type: ignore[method-assign]
    assert run(with_graphs, 2) == run(without, 2)
    assert_same_state(with_graphs, without)


def test_graphs_read_the_weights_that_a_checkpoint_brings(graphs: Graphs, tmp_path: Path) -> None:
    whole, other = trainer_of(), trainer_of(seed=9)
    run(whole, 2)
    whole.save(Saver(tmp_path, Group.alone("world")), {}, blocking=True)
    run(other, 1)  # its graph was captured with other weights
    other.resume(tmp_path / "iter_00000002")
    assert run(other, 2) == run(whole, 2)
    assert_same_state(other, whole)
    assert graphs.made == 2


class Changing(Supervised):
    """Every batch has rows of another length."""

    at = 0

    def next_batch(self) -> Batch:
        batch = super().next_batch()
        self.at += 1
        for part in batch.microbatches:
            rows, length = len(part.tokens), LENGTH - self.at
            cut = {"targets": part.inputs.targets[:, :length].contiguous()}
            part.inputs.__dict__.update(cut)
            offsets = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32)
            shorter = {"tokens": part.tokens[:, :length], "documents": offsets, "longest": length}
            part.__dict__.update(shorter)
        return batch


def of_changing(below: int) -> Trainer:
    loader = Loader(Texts("rows"), BatchLayout(4, 2, 0, 1), prefetch_steps=0)
    member = TrainedObjective(Changing("a", loader), ADAMS["a"], lambda step: 1e-2)
    stage = TrainingStage([member], combine="single")
    return Trainer(small_model(dtype=torch.float32), [stage], capture_below_parameters=below)


def test_more_shapes_than_graphs_are_held_run_without(graphs: Graphs) -> None:
    steps = captured.MOST_GRAPHS + 2
    with_graphs, without = of_changing(BELOW), of_changing(0)
    assert run(with_graphs, steps) == run(without, steps)
    assert_same_state(with_graphs, without)
    assert (graphs.made, graphs.replays) == (captured.MOST_GRAPHS, captured.MOST_GRAPHS * 2)
    limit = f"its micro-batches have more than {captured.MOST_GRAPHS} shapes"
    assert with_graphs.notices == [SAID, f"a: no more CUDA graphs, since {limit}"]


def test_a_step_that_cannot_be_captured_runs_as_ever_and_says_why(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(step: Callable[[], Any]) -> Any:
        step()
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(captured, "captured", refusing)
    refused, without = trainer_of(), trainer_of(below=0)
    assert run(refused, 3) == run(without, 3)
    assert_same_state(refused, without)
    why = "capturing failed: operation not permitted when stream is capturing"
    assert refused.notices == [f"a: no more CUDA graphs, since {why}"]


def test_a_step_that_waits_for_the_device_is_found_before_it_is_captured(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = ["as it was"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with captured.waits_refused(torch.device("cpu")):
        assert modes == ["as it was"]

    def waiting() -> None:
        with captured.waits_refused(torch.device("cuda")):
            assert modes[-1] == "error"
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError):
        waiting()
    assert modes[-1] == "as it was"

    @contextmanager
    def refusing(device: torch.device) -> Iterator[None]:
        raise RuntimeError("called a synchronizing CUDA operation")
        yield

    monkeypatch.setattr(captured, "waits_refused", refusing)
    refused, without = trainer_of(), trainer_of(below=0)
    assert run(refused, 2) == run(without, 2)
    assert graphs.made == 0
    assert "called a synchronizing CUDA operation" in refused.notices[0]


class OfItsOwn(Supervised):
    def loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().loss(*args, **kwargs)


def why(
    objective: Any = Supervised, layout: dict[str, int] | None = None, fp8: str | None = None
) -> str | None:
    loader = Loader(Texts("rows"), BatchLayout(2, 2, 0, 1), prefetch_steps=0)
    mesh = SimpleNamespace(layout=Layout(**(layout or {})))
    model: Any = SimpleNamespace(mesh=mesh, stages=[SimpleNamespace(fp8=fp8)])
    return captured.why_eager(model, objective("a", loader))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, None),
        ({"layout": {"pp": 2}}, "layout.pipeline is 2"),
        ({"layout": {"tp": 4}}, "layout.tensor is 4"),
        ({"layout": {"dp": 8}}, None),
        ({"fp8": "delayed"}, "training.fp8 is 'delayed'"),
        ({"objective": OfItsOwn}, "shapes that depend on their data"),
    ],
)
def test_what_no_graph_can_hold_is_named(given: dict[str, Any], said: str | None) -> None:
    found = why(**given)
    assert found is None if said is None else said in str(found)


def test_an_objective_that_cannot_be_captured_is_named_once(graphs: Graphs) -> None:
    loader = Loader(Texts("rows"), BatchLayout(4, 2, 0, 1), prefetch_steps=0)
    member = TrainedObjective(OfItsOwn("a", loader), ADAMS["a"], lambda step: 1e-2)
    stage = TrainingStage([member], combine="single")
    trainer = Trainer(small_model(), [stage], capture_below_parameters=BELOW)
    run(trainer, 2)
    assert graphs.made == 0
    (said,) = trainer.notices
    assert said.startswith("a: no CUDA graphs, since its batches or its loss")


def test_models_that_are_not_small_say_and_capture_nothing(graphs: Graphs) -> None:
    trainer = trainer_of(below=small_model().config.parameters())
    run(trainer, 1)
    assert (graphs.made, trainer.notices) == (0, [])
