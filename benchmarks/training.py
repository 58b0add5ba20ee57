"""A whole training step on a CPU: ours, a plain torch loop and transformers' Trainer, in one run.

Every round times one step of each and a 1024³ product, so that all meet the same machine.

    python benchmarks/training.py [--sizes 2M 10M 60M] [--rounds 12] [--json PATH] [--markdown PATH]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peers import olmo2_of_transformers
from plain_model import PlainLoop
from timing import Row, add_outputs, machine, row, shown, write_results
from torch import Tensor

from megarlx.comm.groups import Mesh
from megarlx.config.model import ModelConfig, family_config
from megarlx.data.loader import BatchLayout, Loader
from megarlx.data.samples import Sample
from megarlx.model.build import build_model
from megarlx.objectives.supervised import Supervised
from megarlx.training.parts import UpdateSettings
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage


@dataclass(frozen=True)
class Size:
    model: ModelConfig
    sequences: int
    sequence_length: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length

    @property
    def flop_per_step(self) -> float:
        """6 · non-embedding parameters · tokens + causal attention; the head is not counted."""
        c, seen = self.model, (self.sequence_length + 1) / 2
        attention = 3 * c.layers * 4 * c.heads * c.head_dim * seen
        return self.tokens * (6.0 * c.non_embedding_parameters() + attention)


def olmo2(vocabulary: int, hidden: int, layers: int, heads: int, inner: int) -> ModelConfig:
    return family_config(
        "olmo2",
        vocab_size=vocabulary,
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=inner,
    )


SIZES = {
    "0.2M": Size(olmo2(330, 64, 3, 2, 160), 16, 128),
    "2M": Size(olmo2(97, 192, 4, 4, 512), 16, 128),
    "10M": Size(olmo2(1024, 320, 8, 5, 864), 8, 256),
    "60M": Size(olmo2(4096, 640, 12, 10, 1728), 4, 512),
}


class SameBatch:
    """A dataset that is one batch over and over."""

    def __init__(self, samples: Tensor) -> None:
        self.samples = samples.numpy()
        self.sequence_length = samples.shape[1] - 1

    def sample(self, index: int) -> Sample:
        row = self.samples[index % len(self.samples)]
        return Sample(row[:-1], row[1:], None, (self.sequence_length,), 0)

    def fingerprint(self) -> dict[str, object]:
        return {}

    def tokens_by_source(self, consumed_sequences: int) -> dict[str, int]:
        return {"same": consumed_sequences * self.sequence_length}


def our_step(
    size: Size,
    samples: Tensor,
    *,
    sequences_per_microbatch: int | None = None,
    device: torch.device | str = "cpu",
    capture_below_parameters: int = 0,
    **options: Any,
) -> Callable[[], object]:
    """`options` are those of `build_model`."""
    layout = BatchLayout(size.sequences, sequences_per_microbatch or size.sequences)
    loader = Loader(SameBatch(samples), layout, prefetch_steps=0)
    objective = Supervised("pretraining", loader, device=device)
    trained = TrainedObjective(objective, UpdateSettings(), lambda step: 1e-3)
    model = build_model(size.model, Mesh.alone(), seed=0, device=device, **options)
    stages, below = [TrainingStage([trained])], capture_below_parameters
    return Trainer(model, stages, capture_below_parameters=below).step


def with_transformers(size: Size, samples: Tensor, rounds: int, each: Callable[[], None]) -> list:
    """Runs `each` after every step of transformers' Trainer; returns the seconds of its steps."""
    from transformers import Trainer, TrainerCallback
    from transformers import TrainingArguments as Arguments

    model = olmo2_of_transformers(size.model)
    taken: list[float] = []

    class Timed(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            taken.append(time.perf_counter() - self.start)
            each()

    rows = [{"input_ids": s[:-1], "labels": s[:-1]} for s in samples.repeat(rounds, 1)]
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model,
            Arguments(
                folder,
                max_steps=rounds,
                per_device_train_batch_size=size.sequences,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                weight_decay=0.1,
            ),
            train_dataset=rows,
            callbacks=[Timed()],
        ).train()
    return taken


def measure(name: str, size: Size, rounds: int) -> list[Row]:
    torch.manual_seed(0)
    samples = torch.randint(size.model.vocab_size, (size.sequences, size.sequence_length + 1))
    a, b, out = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.empty(1024, 1024)
    functions: dict[str, Callable[[], object]] = {
        "ours": our_step(size, samples),
        "plain": PlainLoop(size.model, samples).step,
        "sgemm": lambda: torch.mm(a, b, out=out),
    }
    taken: dict[str, list[float]] = {key: [] for key in functions}

    def each() -> None:
        for key, function in functions.items():
            start = time.perf_counter()
            function()
            taken[key].append(time.perf_counter() - start)

    warm_up = 2
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("accelerate"):
        taken["transformers"] = with_transformers(size, samples, rounds + warm_up, each)
    else:
        print("transformers and accelerate are not installed: their row is left out")
        for _ in range(rounds + warm_up):
            each()
    seconds = {key: values[warm_up:] for key, values in taken.items()}
    label = (
        f"{name} ({size.model.parameters() / 1e6:.2f}M), {size.sequences}×{size.sequence_length}"
    )
    ours = size.tokens / statistics.median(seconds["ours"])
    rows = [
        row(
            "training step",
            label,
            ours,
            ours
            / statistics.median(x / y for x, y in zip(seconds[k], seconds["ours"], strict=True)),
            {"plain": "plain torch loop", "transformers": "transformers Trainer"}[k],
            "tokens/s",
        )
        for k in ("plain", "transformers")
        if k in seconds
    ]
    for key in ("ours", "plain"):
        share = statistics.median(
            (size.flop_per_step / s) / (2 * 1024**3 / g)
            for s, g in zip(seconds[key], seconds["sgemm"], strict=True)
        )
        rate = size.flop_per_step / statistics.median(seconds[key]) / 1e9
        what = "share of sgemm" if key == "ours" else "share of sgemm, plain torch loop"
        rows.append(row(what, label, rate, rate / share, "1024³ sgemm", "GFLOP/s"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds a size")
    add_outputs(parser)
    options = parser.parse_args()
    facts = machine()
    rows: list[Row] = []
    for name in options.sizes:
        for found in measure(name, SIZES[name], options.rounds):
            rows.append(shown(found))
    write_results(options, "A training step on a CPU", facts, rows)


if __name__ == "__main__":
    main()
