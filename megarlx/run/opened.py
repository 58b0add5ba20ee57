"""A run opened at one of its checkpoints, to look at or to start from: nothing in it is written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from megarlx.checkpoint import Loaded
from megarlx.comm import launch
from megarlx.comm.groups import Mesh
from megarlx.config import Config
from megarlx.config.objectives import PRETRAINING, WRITE_TEMPLATE, unknown_template
from megarlx.config.trust import check_trust, names_in
from megarlx.data.conversations import Messages, Template, turns_of
from megarlx.data.tokenizer import Tokenizer
from megarlx.generation.interface import generator_of
from megarlx.generation.requests import Request, SamplingSettings
from megarlx.generation.stop import text_of
from megarlx.generation.text import TextPiece, stream_texts
from megarlx.model.build import ParallelModel
from megarlx.model.machine import this_machine
from megarlx.run.assemble import choose_layout, use_tf32
from megarlx.run.begin import start_excursion
from megarlx.run.branch import excursion_config
from megarlx.run.choose import choose
from megarlx.run.directory import RunError, Weights
from megarlx.run.learner import Learner, Samples
from megarlx.run.opening import open_model, open_tokenizer
from megarlx.run.reference import RunReference, tokens_of
from megarlx.run.stopped import done
from megarlx.run.suites import chosen, made_suites, measured
from megarlx.run.tokenizer import template_of, templates_of


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
    learners: list[Learner] = field(default_factory=list, repr=False)  # that change the weights

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        name, family = str(self.reference.run), self.config.model.family
        return f"OpenedRun({name!r} at step {self.reference.iteration:,}: {family})"

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
        prompts: Sequence[str | Messages],
        *,
        samples: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int | None = 128,
        seed: int = 0,
        number: int = 0,
        raw: bool = False,
        template: str | None = None,
        generator: str = "engine",
    ) -> list[list[str]]:
        """Samples of each prompt, in the run's template: a question, or the messages of a
        conversation, as [{"role": "user", "content": "…"}].

        All ranks call this together, and all get the same.

        max_new_tokens   None: as many as the model can take
        number           of the first sample: each is another one
        raw              give prompts as they stand; so it is too where the run has no template
        template         one of the run's [templates] in its place
        """
        return self.sample(
            prompts,
            samples=samples,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
            number=number,
            raw=raw,
            template=template,
            generator=generator,
        ).texts

    def sample(
        self,
        prompts: Sequence[str | Messages],
        *,
        samples: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int | None = 128,
        seed: int = 0,
        number: int = 0,
        raw: bool = False,
        template: str | None = None,
        generator: str = "engine",
    ) -> Samples:
        """As `generate`, with the tokens and their log-probabilities: what a learner's step takes.

        Another seed gives other samples.
        """
        if wrong := _wrong(prompts, samples):
            raise RunError(wrong)
        sampling = self._sampling(temperature, top_p)
        if not prompts:
            return Samples([], (), sampling.temperature)
        every = [self.prompt_ids(prompt, raw=raw, template=template) for prompt in prompts]
        requests = [
            Request(
                ids,
                range(number + at * samples, number + (at + 1) * samples),
                self._new_tokens(len(ids), max_new_tokens),
            )
            for at, ids in enumerate(every)
        ]
        longest = max((len(one.prompt) + one.max_new_tokens for one in requests), default=0)
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
        made = Learner(
            self,
            lr,
            policy=policy,
            temperature=temperature,
            weight_decay=weight_decay,
            tokens_per_microbatch=tokens_per_microbatch,
        )
        self.learners.append(made)
        return made

    def stream(
        self,
        prompt: str | Messages,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int | None = None,
        seed: int = 0,
        number: int = 0,
        raw: bool = False,
        template: str | None = None,
        generator: str = "engine",
    ) -> Iterator[TextPiece]:
        """One sample, token by token as they are drawn, on the ranks that hold the last stage.

        All ranks call this together. A piece has the token, its log-probability and the text that
        is certain with it; the token that ends a document has none.

        max_new_tokens   absent: as many as the model can take
        number           of the sample: each is another one
        raw              give the prompt as it stands, without the run's template
        template         one of the run's [templates] in its place
        """
        pieces = self.stream_samples(
            prompt,
            (number,),
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
            raw=raw,
            template=template,
            generator=generator,
        )
        yield from (piece for _, piece in pieces)

    def stream_samples(
        self,
        prompt: str | Messages,
        numbers: Sequence[int],
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int | None = None,
        seed: int = 0,
        raw: bool = False,
        template: str | None = None,
        generator: str = "engine",
    ) -> Iterator[tuple[int, TextPiece]]:
        """As `stream`, the samples of these numbers at once: each piece behind its number."""
        ids = self.prompt_ids(prompt, raw=raw, template=template)
        new = self._new_tokens(len(ids), max_new_tokens)
        pieces = stream_texts(
            generator_of(generator, self.model, slots=len(numbers), longest=len(ids) + new),
            Request(ids, tuple(numbers), new),
            decode=self.tokenizer.decode_sampled,
            sampling=self._sampling(temperature, top_p),
            seed=seed,
        )
        for number, piece in pieces:
            yield number, replace(piece, text="") if piece.finish_reason == "stop" else piece

    def prompt_ids(
        self, prompt: str | Messages, *, raw: bool = False, template: str | None = None
    ) -> list[int]:
        """Of a question, or of the turns before an answer, in the run's template or the one of
        [templates] by that name; of a text as it stands where it has none, or with `raw`."""
        written = self.template if template is None else self._named(template)
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        turns = turns_of(asked)
        if written is not None and not raw:
            return written.prompt_ids(turns, self.tokenizer)
        if not isinstance(prompt, str):
            raise RunError(
                f"{self.reference.run} has no [template] to write turns in; give a text, or "
                + WRITE_TEMPLATE
            )
        return self.tokenizer.begun(self.tokenizer.encode(prompt))

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
        if keep and self.learners:
            raise RunError(
                f"{run}: a learner has changed the weights, and keep=True would write their "
                "results down as those of the checkpoint"
            )
        if suites is None:
            check_trust(names_in(self.config, {"evaluation"}), str(run), self.trusted)
        evaluation, templates = chosen(
            *(self.config, str(run)),
            file=suites,
            names=names,
            samples=samples,
            temperature=temperature,
        )
        made = made_suites(self, evaluation)
        results = measured(self, evaluation, templates, made, keep=keep)
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

    def _named(self, template: str) -> Template:
        known = templates_of(self.config)
        if template not in known:
            raise RunError(f"template {unknown_template(template, known)}")
        return known[template]

    def _sampling(self, temperature: float, top_p: float) -> SamplingSettings:
        return SamplingSettings(temperature, top_p=top_p, stop_tokens=(self.tokenizer.eos_id,))

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


def _wrong(prompts: Any, samples: int) -> str:
    """What is wrong with what is to be sampled; "" for nothing."""
    if isinstance(prompts, str):
        return f"prompts is {prompts!r:.60}; give a list of them"
    if any(isinstance(one, Mapping) for one in prompts):
        return (
            "prompts is a list of messages; a prompt is a text, or a list of messages: give "
            "[messages]"
        )
    return "" if samples >= 1 else f"samples is {samples}; allowed are 1 and more"


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
