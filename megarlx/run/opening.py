"""A run of anybody's, opened to be asked or measured: its configuration, tokenizer and weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megarlx.checkpoint import WEIGHTS_ONLY, FlatShards, Loaded, load
from megarlx.comm.groups import Mesh
from megarlx.config import Config, load_config
from megarlx.config.trust import check_trust, names_in
from megarlx.data.tokenizer import Tokenizer
from megarlx.model.build import ParallelModel, build_model
from megarlx.run.assemble import DTYPES
from megarlx.run.directory import PREFIX_OF, RunDirectory, RunError, Weights
from megarlx.run.tokenizer import load_tokenizer_of


def open_config(
    run: Path,
    processes: int,
    overrides: Sequence[str] = (),
    *,
    uses: Collection[str] = (),
    trusted: Collection[str] = (),
    device: str = "auto",
) -> Config:
    """The run's configuration in a layout for so many processes.

    The run may have been made by somebody else: code that it names in [model], [data] and `uses`
    has to be `trusted`. The run's own tensor and pipeline sizes hold where they divide the
    processes, else every process holds the whole model; `layout.…` overrides replace both.
    """
    path = run / "resolved.json"
    if not path.exists():
        raise RunError(f"{run} holds no resolved.json: what its model looks like is not known")
    given = load_config(path, trusted=trusted)
    check_trust(names_in(given, {"model", "data", *uses}), str(run), trusted)
    own = given.layout
    model = own.tensor * own.pipeline
    # Whether micro-batches come out even is a question of training only, and torch's layers take
    # the weights of Transformer Engine's. What the model computes in stays.
    reset = [
        f"training.device={device}",
        f"training.sequences_per_step={processes}",
        "training.sequences_per_microbatch=1",
        *("training.layers=torch", "training.attention=auto", "training.fp8=none"),
    ]
    if any(o.startswith("layout.") for o in overrides) or processes % model:
        reset.append("layout={}")
    elif own.schedule == "zbv":  # nothing is trained here, and a V cannot generate
        sizes = f"tensor = {own.tensor}, pipeline = {own.pipeline}, data = {processes // model}"
        split = str(own.sequence_parallel).lower()
        reset.append(f"layout={{ {sizes}, sequence_parallel = {split} }}")
    else:
        reset += ["layout.replica=1", f"layout.data={processes // model}"]
    return load_config(path, [*reset, *overrides])


def open_tokenizer(run: Path, config: Config) -> Tokenizer:
    """The one kept with the run; for runs that keep none, where their data was prepared."""
    found = load_tokenizer_of(config, RunDirectory(run))
    if found is None:
        raise RunError(
            f"{run} keeps no tokenizer.json, and its configuration names no data.tokenizer: "
            "there is no way from text to tokens"
        )
    return found


def open_model(
    config: Config,
    checkpoint: Path,
    mesh: Mesh,
    device: torch.device,
    weights: Weights = "last",
) -> tuple[ParallelModel, Loaded]:
    layout = config.layout
    model = build_model(
        config.model,
        mesh,
        seed=config.training.seed,
        schedule=layout.schedule,
        virtual_stages=layout.virtual_stages,
        layers_per_stage=layout.layers_per_stage,
        sequence_parallel=layout.sequence_parallel,
        attention=config.training.attention,
        dtype=DTYPES[config.training.precision],
        device=device,
    )
    return model, load_weights(model, checkpoint, weights)


@torch.no_grad()
def load_weights(model: ParallelModel, checkpoint: Path, weights: Weights = "last") -> Loaded:
    """Fills a model of any layout, without an optimizer; called by all ranks."""
    parallel = model.data_parallel
    shard = parallel.shard_of_weights()
    # Checkpoints hold master weights, which are wider than what a bf16 model computes with.
    masters = shard if shard.dtype == parallel.gradient_dtype else shard.to(parallel.gradient_dtype)
    loaded = _fill(masters, model, checkpoint, weights)
    if shard is not masters:
        shard.copy_(masters)
    parallel.gather_weights(shard)
    return loaded


@torch.no_grad()
def masters_of(model: ParallelModel, checkpoint: Path) -> Tensor:
    """This rank's shard of a checkpoint's weights, beside the model; called by all ranks."""
    parallel = model.data_parallel
    masters = torch.zeros_like(parallel.shard_of_weights(), dtype=parallel.gradient_dtype)
    _fill(masters, model, checkpoint, "last")
    return masters


@torch.no_grad()
def put_weights(model: ParallelModel, masters: Tensor) -> None:
    """Rounded as a checkpoint of them is, then to the model's type; on every rank."""
    parallel = model.data_parallel
    shard = parallel.shard_of_weights()
    shard.copy_(masters.to(parallel.gradient_dtype))
    parallel.gather_weights(shard)


def _fill(masters: Tensor, model: ParallelModel, checkpoint: Path, weights: Weights) -> Loaded:
    parallel, prefix = model.data_parallel, PREFIX_OF[weights]
    shards = FlatShards(parallel.layout, parallel.layouts, parallel.group.rank, {prefix: masters})
    ignore = () if prefix else WEIGHTS_ONLY
    return load(checkpoint, shards, model.mesh.world, ignore=ignore, only=prefix)
