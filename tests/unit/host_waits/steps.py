"""Run as a script: steps of a small model on the device that is not there, told as JSON.

python steps.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import watch

watch.load_device(Path(sys.argv[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import DynamicOutputShapeException  # noqa: E402

from megarlx.comm.groups import Mesh  # noqa: E402
from megarlx.config.model import family_config  # noqa: E402
from megarlx.data.loader import BatchLayout, Loader, Sample  # noqa: E402
from megarlx.generation import engine as engines  # noqa: E402
from megarlx.generation import run as runs  # noqa: E402
from megarlx.generation.decoders import stage as stage_decode  # noqa: E402
from megarlx.generation.requests import Request, SamplingSettings  # noqa: E402
from megarlx.model import attention, attention_flash  # noqa: E402
from megarlx.model.build import ParallelModel, build_model  # noqa: E402
from megarlx.objectives.supervised import Supervised  # noqa: E402
from megarlx.planning.dry_run import fake_world  # noqa: E402
from megarlx.run.finite import FoundInf  # noqa: E402
from megarlx.training.combine import projection, weighted_sum  # noqa: E402
from megarlx.training.parts import UpdateSettings  # noqa: E402
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage  # noqa: E402

LENGTH, DOCUMENTS = 24, (17, 7)
CONFIG = family_config(
    "olmo2", vocab_size=300, hidden_size=40, layers=3, heads=4, intermediate_size=72
)
bounds: list[int] = []  # of the longest document, as attention was told


class Documents:
    """Every sample holds two documents; `masked` ones count only the second."""

    sequence_length = LENGTH

    def __init__(self, masked: bool) -> None:
        self.mask = np.arange(LENGTH) >= DOCUMENTS[0] if masked else None

    def sample(self, index: int) -> Sample:
        tokens = np.random.default_rng(index).integers(0, 300, LENGTH + 1)
        return Sample(tokens[:-1], tokens[1:], self.mask, DOCUMENTS, 0)

    def fingerprint(self) -> dict[str, object]:
        return {}

    def tokens_by_source(self, consumed_sequences: int) -> dict[str, int]:
        return {}


class Attended(torch.autograd.Function):
    """Stands for flash-attn's kernels: the right shapes, and what it was told."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def varlen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    bounds.append(options["max_seqlen_q"])
    return Attended.apply(q, k, v)


def with_pages(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    if "block_table" not in options:
        return varlen(q, k, v, **options)
    return torch.empty_like(q), q.new_empty(q.shape[1::-1], dtype=torch.float32)


def with_cache(q: Tensor, keys: Tensor, values: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    rows, heads = q.shape[0], q.shape[2]
    return torch.empty_like(q), q.new_empty((rows, heads, 1), dtype=torch.float32)


def model(mesh: Mesh, **options: Any) -> ParallelModel:
    return build_model(CONFIG, mesh, seed=0, dtype=torch.bfloat16, device="cuda", **options)


def train(
    found: watch.Watched,
    mesh: Mesh,
    *masked: bool,
    rule: str = "adamw",
    combination: Any = weighted_sum,
    **options: Any,
) -> None:
    """The second step: the first one makes what is kept."""
    objectives = [
        Supervised(
            f"o{i}",
            Loader(Documents(one), BatchLayout(4, 2), with_documents=True, prefetch_steps=0),
            device="cuda",
        )
        for i, one in enumerate(masked)
    ]
    settings = UpdateSettings(rule=rule)
    stage = TrainingStage(
        [TrainedObjective(one, settings, lambda step: 1e-3) for one in objectives],
        combination=combination,
    )
    trainer = Trainer(model(mesh, **options), [stage])
    trainer.step()
    found.forget()
    bounds.clear()
    trainer.step()


def training(found: watch.Watched) -> None:
    train(found, Mesh.alone(), False)


def recomputing(found: watch.Watched) -> None:
    train(found, Mesh.alone(), False, recompute="selective")


def averaging(found: watch.Watched) -> None:
    """Of pre-training and SFT, whose mask is not full."""
    train(found, Mesh.alone(), False, True)


def muon(found: watch.Watched) -> None:
    train(found, Mesh.alone(), False, rule="muon")


def projecting(found: watch.Watched) -> None:
    train(found, Mesh.alone(), False, False, combination=projection)


def muon_in_a_layout(found: watch.Watched) -> None:
    with fake_world(1, 4):
        mesh = Mesh.build(1, 1, 2, 2, backend="fake", device="cuda")
        train(found, mesh, False, rule="muon")


def in_a_layout(found: watch.Watched) -> None:
    """Rank 1 of tensor parallelism of 2 and data parallelism of 2."""
    with fake_world(1, 4):
        mesh = Mesh.build(1, 1, 2, 2, backend="fake", device="cuda")
        train(found, mesh, False, sequence_parallel=True)


def first_of_a_pipeline(found: watch.Watched) -> None:
    with fake_world(0, 2):
        mesh = Mesh.build(2, 1, 1, 1, backend="fake", device="cuda")
        train(found, mesh, False)


def last_of_a_pipeline(found: watch.Watched) -> None:
    with fake_world(1, 2):
        mesh = Mesh.build(2, 1, 1, 1, backend="fake", device="cuda")
        train(found, mesh, False, schedule="zero_bubble")


def generating(found: watch.Watched, steps_before: int) -> None:
    """Eight samples of two prompts in four slots, each of six tokens: the seventh step takes in the
    samples that waited."""
    stage = model(Mesh.alone()).stages[0]
    # Whether rows agree is asked when an engine is made; a device that does nothing cannot say.
    engine = engines.Engine([stage], slots=4, longest=48, one_width=False)
    # the second prompt has other samples in the first steps and in the later ones
    requests = [
        Request(tuple(range(1, 12)), (0, 1, 2), 6),
        Request(tuple(range(20)), (3, 4, 5, 6), 6),
        Request(tuple(range(30)), (7,), 6),
    ]
    run = runs.Run(engine, requests, SamplingSettings(temperature=0.7), seed=3)
    steps = run.finished()
    for _ in range(steps_before):
        next(steps)
    found.forget()
    bounds.clear()
    next(steps)


def prefill(found: watch.Watched) -> None:
    generating(found, 0)


def decode(found: watch.Watched) -> None:
    generating(found, 2)


def admission(found: watch.Watched) -> None:
    generating(found, 6)


def flags(found: watch.Watched) -> list[Any]:
    """Whether gradients were finite, asked after each of three steps."""
    asked = FoundInf(torch.device("cuda"))
    return [asked.put(step, {"o0": torch.zeros((), device="cuda")}) for step in range(3)] + [
        asked.last(),
        asked.last(),
    ]


def mistakes(found: watch.Watched) -> None:
    """One of every kind."""
    x = torch.zeros(3, 5, device="cuda")
    for mistake in (
        lambda: x[0, 0].item(),
        lambda: x[0].tolist(),
        lambda: x.cpu(),
        lambda: x.to("cpu", non_blocking=True),
        lambda: bool((x > 0).any()),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: torch.tensor([1, 2], device="cuda"),
        lambda: torch.zeros(3).to("cuda"),
        lambda: x[:, [0, 2]],
    ):
        with suppress(DynamicOutputShapeException):
            mistake()


def no_mistakes(found: watch.Watched) -> None:
    x = torch.zeros(3, 5, device="cuda")
    torch.zeros(3).to("cuda", non_blocking=True)
    torch.full((), 3.0, device="cuda")
    assert torch.tensor([1, 2]).tolist() == [1, 2]
    x[:, 1:3].sum()
    torch.zeros(3, 5).copy_(x, non_blocking=True)


class Event:
    """In place of a device's: it has always happened."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def captured(step: Callable[[], Tensor]) -> tuple[Any, Tensor]:
    """In place of a graph, which only a device has: the step itself."""
    return SimpleNamespace(replay=step), step()


SCENARIOS = (
    *(
        training,
        recomputing,
        averaging,
        muon,
        muon_in_a_layout,
        projecting,
        in_a_layout,
        first_of_a_pipeline,
        last_of_a_pipeline,
        prefill,
        decode,
        admission,
        flags,
    ),
    *(mistakes, no_mistakes),
)


def main() -> None:
    attention.flash = lambda: attention_flash.Flash(  # type: ignore[assignment]
        2, with_pages, attention_flash.CachedTwo(with_cache, with_pages)
    )
    stage_decode.captured = captured  # type: ignore[assignment]
    torch.cuda.Event = Event  # type: ignore[misc, assignment]
    told = {}
    for scenario in SCENARIOS:
        result: list[Any] | None = None
        # no shape is known behind a nonzero: its place is noted, and the scenario ends there
        with watch.watched() as found, suppress(DynamicOutputShapeException):
            result = scenario(found)
        told[scenario.__name__] = {
            "operators": dict(found.operators),
            "waits": [[place, what, count] for (place, what), count in found.waits.items()],
            "bounds": list(bounds),
            "result": [None if one is None else vars(one) for one in result or ()],
        }
    print(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)  # the device's threads have nothing to be joined with


if __name__ == "__main__":
    main()
