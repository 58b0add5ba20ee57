"""A run opened at one of its checkpoints, to look at or to start from: nothing in it is written."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megarlx.checkpoint import WEIGHTS_ONLY, FlatShards, Loaded, load
from megarlx.comm import launch
from megarlx.comm.groups import Mesh
from megarlx.config import Config, load_config
from megarlx.config.objectives import PRETRAINING
from megarlx.config.trust import check_trust, names_in
from megarlx.data.conversations import Template, Turn
from megarlx.data.tokenizer import Tokenizer
from megarlx.generation.interface import generator_of
from megarlx.generation.requests import Request, SamplingSettings
from megarlx.generation.stop import text_of
from megarlx.model.build import ParallelModel, build_model
from megarlx.model.machine import this_machine
from megarlx.run.assemble import DTYPES, choose_layout, use_tf32
from megarlx.run.choose import choose
from megarlx.run.directory import RunDirectory, RunError
from megarlx.run.reference import RunReference, tokens_of
from megarlx.run.tokenizer import load_tokenizer_of, template_of


@dataclass(frozen=True)
class OpenedRun:
    reference: RunReference
    config: Config
    tokenizer: Tokenizer
    template: Template | None
    model: ParallelModel
    loaded: Loaded
    device: torch.device

    @property
    def tokens(self) -> dict[str, int]:
        """Trained on up to here, by objective, ancestors included."""
        return tokens_of(self.loaded.state)

    @property
    def trunk_tokens(self) -> int:
        return self.tokens.get(PRETRAINING, 0)

    @property
    def is_base(self) -> bool:
        """Whether the weights have seen pre-training only: such a model is shown examples."""
        return not any(count for name, count in self.tokens.items() if name != PRETRAINING)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        samples: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 128,
        seed: int = 0,
        generator: str = "engine",
    ) -> list[list[str]]:
        """Samples of each prompt, asked in the run's template, or as it stands where there is none.

        All ranks call this together, and all get the same.
        """
        sampling = SamplingSettings(temperature, stop_tokens=(self.tokenizer.eos_id,))
        requests = [
            Request(self._ids(prompt), range(at * samples, (at + 1) * samples), max_new_tokens)
            for at, prompt in enumerate(prompts)
        ]
        longest = max((len(one.prompt) for one in requests), default=0) + max_new_tokens
        slots = max(1, min(64, len(prompts) * samples))
        made = generator_of(generator, self.model, slots=slots, longest=longest).generate(
            requests, sampling, seed
        )
        decode = self.tokenizer.decode_sampled
        texts = [text_of(one.tokens.tolist(), sampling, decode) for one in made]
        return [texts[at * samples : (at + 1) * samples] for at in range(len(prompts))]

    def _ids(self, prompt: str) -> Sequence[int]:
        if self.template is None:
            return self.tokenizer.encode(prompt)
        return self.template.prompt_ids((Turn("user", prompt),), self.tokenizer)


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


def read_lineage(run: Path) -> dict[str, Any]:
    path = run / "lineage.json"
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}") from None
    return found


def open_model(
    config: Config, checkpoint: Path, mesh: Mesh, device: torch.device
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
    return model, load_weights(model, checkpoint)


@torch.no_grad()
def load_weights(model: ParallelModel, checkpoint: Path) -> Loaded:
    """Fills a model of any layout, without an optimizer; called by all ranks."""
    parallel = model.data_parallel
    shard = parallel.shard_of_weights()
    # Checkpoints hold master weights, which are wider than what a bf16 model computes with.
    masters = shard if shard.dtype == parallel.gradient_dtype else shard.to(parallel.gradient_dtype)
    shards = FlatShards(parallel.layout, parallel.layouts, parallel.group.rank, {"": masters})
    loaded = load(checkpoint, shards, model.mesh.world, ignore=WEIGHTS_ONLY)
    if shard is not masters:
        shard.copy_(masters)
    parallel.gather_weights(shard)
    return loaded


def open_run(
    reference: RunReference,
    config: Config,
    started: launch.Launch,
    device: torch.device,
) -> OpenedRun:
    """Needs `launch.start` to have been called; `config` is `open_config`'s."""
    config = choose(config, this_machine(device)).config
    use_tf32(config, device)
    tokenizer = open_tokenizer(reference.run, config)
    layout = choose_layout(config, started.world_size)
    mesh = Mesh.build(
        layout.pp,
        layout.replica,
        layout.dp,
        layout.tp,
        timeout_seconds=config.layout.time_limit_seconds,
        device=device,
    )
    model, loaded = open_model(config, reference.checkpoint, mesh, device)
    template = template_of(config.template)
    return OpenedRun(reference, config, tokenizer, template, model, loaded, device)
