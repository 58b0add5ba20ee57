"""A run opened at one of its checkpoints, to look at or to start from: nothing in it is written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

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
from megarlx.generation.text import TextPiece, stream_text
from megarlx.model.build import ParallelModel, build_model
from megarlx.model.machine import this_machine
from megarlx.run.assemble import DTYPES, choose_layout, use_tf32
from megarlx.run.begin import start_excursion
from megarlx.run.branch import excursion_config
from megarlx.run.choose import choose
from megarlx.run.directory import PREFIX_OF, RunDirectory, RunError, Weights
from megarlx.run.learner import Learner, Samples
from megarlx.run.reference import RunReference, tokens_of
from megarlx.run.stopped import done
from megarlx.run.suites import chosen, made_suites, measured
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
    trusted: Collection[str] = ()  # names of code in the run's configuration
    weights: Weights = "last"
    closing: ExitStack = field(default_factory=ExitStack, repr=False)  # what ends with the run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the communication with other processes. `with megarlx.open(…) as run` does it."""
        self.closing.close()

    @property
    def tokens(self) -> dict[str, int]:
        """Trained on up to here, by objective, ancestors included."""
        return tokens_of(self.loaded.state)

    @property
    def trunk_tokens(self) -> int:
        """Of pre-training among them."""
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
        return self.sample(
            prompts,
            samples=samples,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            generator=generator,
        ).texts

    def sample(
        self,
        prompts: Sequence[str],
        *,
        samples: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 128,
        seed: int = 0,
        generator: str = "engine",
    ) -> Samples:
        """As `generate`, with the tokens and their log-probabilities: what a learner's step takes.

        Another seed gives other samples.
        """
        sampling = SamplingSettings(temperature, stop_tokens=self._ends)
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
        by_prompt = [texts[at * samples : (at + 1) * samples] for at in range(len(prompts))]
        return Samples(by_prompt, tuple(made), sampling.temperature)

    def learner(
        self,
        lr: float,
        *,
        policy: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
        weight_decay: float = 0.0,
        tokens_per_microbatch: int = 4096,
    ) -> Learner:
        """For a loop of RL of one's own: `step(samples, rewards)` changes the opened run's weights,
        and no file.

        policy   keys of [rl.policy], as {"preset": "dr_grpo"}
        """
        return Learner(
            self,
            lr,
            policy=policy,
            temperature=temperature,
            weight_decay=weight_decay,
            tokens_per_microbatch=tokens_per_microbatch,
        )

    def stream(
        self,
        prompt: str,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int | None = None,
        seed: int = 0,
        number: int = 0,
        raw: bool = False,
        generator: str = "engine",
    ) -> Iterator[TextPiece]:
        """One sample, token by token as they are drawn, on the ranks that hold the last stage.

        All ranks call this together. A piece has the token, its log-probability and the text that
        is certain with it; the token that ends a document has none.

        max_new_tokens   absent: as many as the model can take
        number           of the sample: each is another one
        raw              give the prompt as it stands, without the run's template
        """
        ids = self.tokenizer.encode(prompt) if raw else self._ids(prompt)
        new = self._new_tokens(len(ids), max_new_tokens)
        made = generator_of(generator, self.model, slots=1, longest=len(ids) + new)
        pieces = stream_text(
            made,
            prompt,
            encode=lambda _: ids,
            decode=self.tokenizer.decode_sampled,
            sampling=SamplingSettings(temperature, top_p=top_p, stop_tokens=self._ends),
            max_new_tokens=new,
            seed=seed,
            sequence_id=number,
        )
        for piece in pieces:
            yield replace(piece, text="") if piece.finish_reason == "stop" else piece

    def evaluate(
        self,
        suites: str | Path | None = None,
        *,
        names: Collection[str] = (),
        samples: int | None = None,
        temperature: float | None = None,
        keep: bool = False,
    ) -> dict[str, dict[str, Any]]:
        """The result of each suite by its name: "metrics", "standard_errors", "items" and more.

        All ranks call this together, and all get the same.

        suites                 a TOML file of [[suites]], and a [template] if the run has none or
                               another; absent: the run's own [evaluation]
        names                  only these of them
        samples, temperature   in place of the suites' own
        keep                   write results into the run's folder, as `megarlx evaluate` does, and
                               take those that are there
        """
        run = self.reference.run
        if suites is None:
            check_trust(names_in(self.config, {"evaluation"}), str(run), self.trusted)
        evaluation, template = chosen(
            *(self.config, str(run)),
            file=suites,
            names=names,
            samples=samples,
            temperature=temperature,
        )
        made = made_suites(self, evaluation)
        results = measured(self, evaluation, template, made, keep=keep)
        return {result["suite"]: result for result in results}

    def branch(
        self,
        recipe: str | Path,
        out: str | Path,
        overrides: Sequence[str] = (),
        *,
        fresh: bool = False,
    ) -> bool:
        """An excursion from the checkpoint as it lies on the disk; returns and raises what
        `megarlx.branch` does. Both models are in memory meanwhile.

        overrides   as behind --set: "stages.0.steps=100"
        fresh       refuse a folder that already holds checkpoints
        """
        path, started = Path(recipe), launch.read()
        config = excursion_config(self.reference.run, path, overrides, self.trusted)
        choose_layout(config, started.world_size)
        whole = self.reference, config, path, Path(out)
        return done(
            start_excursion(*whole, started, self.device, fresh=fresh, weights=self.weights)
        )

    def report(self, folder: str | Path | None = None) -> Path:
        """The page about all runs in a folder; absent: the one that this run lies in."""
        import megarlx

        page: Path = megarlx.report_on(folder or self.reference.run.parent)
        return page

    @property
    def _ends(self) -> tuple[int, ...]:
        return (self.tokenizer.eos_id,)

    def _ids(self, prompt: str) -> Sequence[int]:
        if self.template is None:
            return self.tokenizer.encode(prompt)
        return self.template.prompt_ids((Turn("user", prompt),), self.tokenizer)

    def _new_tokens(self, prompt: int, wanted: int | None) -> int:
        """Behind a prompt of so many tokens."""
        longest = self.config.model.max_sequence_length
        room = longest - prompt
        if room < 1:
            raise RunError(
                f"the prompt has {prompt} tokens; model.max_sequence_length is {longest}, which "
                f"leaves no room for an answer: it may have {longest - 1}"
            )
        new = room if wanted is None else wanted
        if not 1 <= new <= room:
            raise RunError(
                f"max_new_tokens is {new} behind a prompt of {prompt} tokens; "
                f"model.max_sequence_length allows 1 to {room}"
            )
        return new


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


def open_run(
    reference: RunReference,
    config: Config,
    started: launch.Launch,
    device: torch.device,
    trusted: Collection[str] = (),
    weights: Weights = "last",
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
    model, loaded = open_model(config, reference.checkpoint, mesh, device, weights)
    template = template_of(config.template)
    return OpenedRun(
        *(reference, config, tokenizer, template, model, loaded, device, trusted, weights)
    )
