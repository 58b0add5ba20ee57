"""From a configuration to the objects of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megarlx.checkpoint import Retention, Saver
from megarlx.comm import launch
from megarlx.comm.collectives import barrier
from megarlx.comm.groups import Layout, Mesh
from megarlx.config import Config
from megarlx.config.run_sections import DataConfig, SourceConfig, WorldConfig
from megarlx.data.blend import Blend, Composition
from megarlx.data.loader import BatchLayout, Loader
from megarlx.data.samples import TokenSource
from megarlx.data.synthetic.settings import WorldSettings
from megarlx.data.synthetic.tokens import write_token_files
from megarlx.data.token_files import TokenFile, check_tokenizer
from megarlx.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from megarlx.learning_rate import learning_rate
from megarlx.model.build import build_model
from megarlx.model.check_layout import check_layout
from megarlx.objectives.supervised import Supervised
from megarlx.optimizer import AdamSettings
from megarlx.run.directory import RunDirectory, RunError
from megarlx.trainer import TrainedObjective, Trainer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Run:
    """Everything a training loop works with, on this rank."""

    config: Config
    directory: RunDirectory
    mesh: Mesh
    trainer: Trainer
    pretraining: Supervised
    blend: Blend
    validation: dict[str, Supervised]
    saver: Saver
    device: torch.device


def choose_device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RunError("training.device is 'cuda', but torch sees no GPU; see `megarlx doctor`")
    return torch.device(wanted)


def choose_layout(config: Config, world_size: int) -> Layout:
    """The configured layout; data parallelism takes the processes that are left."""
    given = config.layout
    if given.replica != 1:
        raise RunError(
            f"layout.replica is {given.replica}; replicas run one objective each, and this run has "
            "one objective: allowed is 1"
        )
    others = given.pipeline * given.replica * given.tensor
    data = given.data if given.data is not None else max(1, world_size // others)
    layout = Layout(pp=given.pipeline, replica=given.replica, dp=data, tp=given.tensor)
    check_layout(
        config.model,
        layout,
        world_size=world_size,
        sequence_length=config.training.sequence_length,
        sequence_parallel=given.sequence_parallel,
        stages_per_rank=given.virtual_stages,
        layers_per_stage=given.layers_per_stage,
    )
    return layout


def load_data_tokenizer(data: DataConfig) -> Tokenizer | None:
    if data.tokenizer is None:
        return None
    return ByteTokenizer() if data.tokenizer == "bytes" else load_tokenizer(data.tokenizer)


def assemble(config: Config, out: Path, started: launch.Launch, device: torch.device) -> Run:
    """Needs `launch.start` to have been called; bad input is found here, before any step."""
    training = config.training
    if config.data is None:
        raise RunError("the configuration has no [data]: there is nothing to train on")
    data = config.data if config.data.world is None else world_data(config.data, config.data.world)
    layout = choose_layout(config, started.world_size)
    mesh = Mesh.build(
        layout.pp,
        layout.replica,
        layout.dp,
        layout.tp,
        timeout_seconds=config.layout.time_limit_seconds,
        device=device,
    )
    if config.data.world is not None:
        # Every node writes its own copy, and nobody reads before all have written.
        if started.local_rank == 0:
            write_world(config.data.world)
        barrier(mesh.world)
    blend = _blend(config, data)
    batches = BatchLayout(
        training.sequences_per_step, training.sequences_per_microbatch, mesh.dp.rank, mesh.dp.size
    )
    pretraining = Supervised(
        "pretraining",
        Loader(
            blend,
            batches,
            with_documents=data.documents_apart,
            documents_at_most=_most_documents(config) if layout.pp > 1 else None,
        ),
        device=device,
    )
    model = build_model(
        config.model,
        mesh,
        seed=training.seed,
        schedule=config.layout.schedule,
        virtual_stages=config.layout.virtual_stages,
        layers_per_stage=config.layout.layers_per_stage,
        sequence_parallel=config.layout.sequence_parallel,
        recompute=training.recompute,
        dtype=DTYPES[training.precision],
        device=device,
    )
    model.pipeline.plan.check_microbatches(batches.microbatches)
    optimizer = config.optimizer
    adam = AdamSettings(
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        clip_norm=optimizer.clip_norm or None,
    )
    rate = learning_rate(optimizer, training.steps)
    directory = RunDirectory(out)
    keep = config.checkpoints
    retention = Retention(
        last=keep.keep_last,
        every=keep.keep_every_steps,
        listed=frozenset(steps_at_tokens(config)),
    )
    return Run(
        config,
        directory,
        mesh,
        Trainer(model, [TrainedObjective(pretraining, adam, rate)]),
        pretraining,
        blend,
        _validation(config, data, mesh, device),
        Saver(directory.checkpoints, mesh.world, retention),
        device,
    )


def world_shares(world: WorldConfig) -> dict[str, float]:
    return {
        "problems": world.problems_share,
        "facts": world.facts_share,
        "stories": world.stories_share,
    }


def world_data(data: DataConfig, world: WorldConfig) -> DataConfig:
    """The same configuration with the world's files in place of the world."""
    folder = Path(world.folder)
    shares = world_shares(world)
    changes = {
        "world": None,
        "tokenizer": str(folder / "tokenizer.json"),
        "sources": [
            {"name": kind, "prefix": str(folder / f"documents_{kind}"), "weight": share}
            for kind, share in shares.items()
            if share > 0
        ],
        "validation": [
            {"name": kind, "prefix": str(folder / f"held_out_{kind}")} for kind in shares
        ],
    }
    return DataConfig.model_validate({**data.model_dump(), **changes})


def write_world(world: WorldConfig) -> None:
    shares = world_shares(world)
    total = sum(shares.values())
    documents = {k: max(1, round(world.documents * s / total)) for k, s in shares.items() if s > 0}
    write_token_files(
        WorldSettings(seed=world.seed), Path(world.folder), documents, world.held_out_documents
    )


def steps_at_tokens(config: Config) -> list[int]:
    """The first step at or past each listed token count."""
    per_step = config.training.sequences_per_step * config.training.sequence_length
    return [-(-tokens // per_step) for tokens in config.checkpoints.save_at_tokens]


def _source(source: SourceConfig, config: Config, tokenizer: Tokenizer | None) -> TokenSource:
    if tokenizer is not None:
        check_tokenizer(source.prefix, tokenizer.fingerprint)
    file = TokenFile(source.prefix, config.model.vocab_size)
    return TokenSource(source.name, file, config.training.sequence_length, config.training.seed)


def _blend(config: Config, data: DataConfig) -> Blend:
    tokenizer = load_data_tokenizer(data)
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise RunError(
            f"model.vocab_size is {config.model.vocab_size}; the tokenizer {data.tokenizer} has "
            f"{tokenizer.vocab_size} ids"
        )
    sources = [_source(source, config, tokenizer) for source in data.sources]
    own = Composition(0, {source.name: source.weight for source in data.sources})
    schedule = [Composition(part.from_tokens, part.weights) for part in data.composition]
    return Blend(sources, schedule or [own], config.training.seed)


def _validation(
    config: Config, data: DataConfig, mesh: Mesh, device: torch.device
) -> dict[str, Supervised]:
    """One small dataset a source; its first sequences, the same at every validation."""
    tokenizer = load_data_tokenizer(data)
    found = {}
    unit = config.training.sequences_per_microbatch * mesh.dp.size
    count = -(-config.logging.validation_sequences // unit) * unit
    for source in data.validation:
        dataset = Blend(
            [_source(source, config, tokenizer)], [Composition(0, {source.name: 1.0})], seed=0
        )
        layout = BatchLayout(
            count, config.training.sequences_per_microbatch, mesh.dp.rank, mesh.dp.size
        )
        loader = Loader(
            dataset,
            layout,
            with_documents=data.documents_apart,
            documents_at_most=_most_documents(config) if mesh.pp.size > 1 else None,
            prefetch_steps=0,
        )
        found[source.name] = Supervised(source.name, loader, device=device)
    return found


def _most_documents(config: Config) -> int:
    """In one micro-batch: every document has at least one token."""
    return config.training.sequences_per_microbatch * config.training.sequence_length
