"""From a configuration to objectives: what each trains on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megarlx import plug
from megarlx.comm.groups import Group
from megarlx.comm.launch import EveryRankWarning
from megarlx.config import Config, RlConfig, SftConfig
from megarlx.config.distill import DistillConfig
from megarlx.config.environment import EnvironmentConfig
from megarlx.config.objectives import PRETRAINING, OwnConfig
from megarlx.config.own_samples import FP8_GENERATOR
from megarlx.config.rollouts import run_and_step
from megarlx.config.run_sections import DataConfig, SourceConfig
from megarlx.data.blend import Blend, Composition
from megarlx.data.conversations import Conversation, Template, read_conversations
from megarlx.data.held_tokens import HeldTokens
from megarlx.data.loader import BatchLayout, Loader
from megarlx.data.packing import ConversationData
from megarlx.data.prompts import FewShot, Prompt, PromptData, PromptKeys, read_prompts
from megarlx.data.samples import Dataset, TokenSource
from megarlx.data.token_files import TokenFile, check_tokenizer
from megarlx.data.tokenizer import Tokenizer
from megarlx.generation.fp8 import without_fp8
from megarlx.generation.interface import Generator, generator_of
from megarlx.model.build import ParallelModel
from megarlx.objectives.interface import Objective
from megarlx.objectives.policy import KeepSamples, Reinforcement
from megarlx.objectives.supervised import Supervised
from megarlx.rollouts.bank import FOLDER, Bank, conversations_of
from megarlx.rollouts.environment_game import EnvironmentGame
from megarlx.rollouts.player import Player
from megarlx.rollouts.question_game import QuestionGame
from megarlx.rollouts.rewards.rewards import Rewards
from megarlx.rollouts.rollout import Sampler
from megarlx.run.directory import RunError
from megarlx.run.left_out import tell_left_out
from megarlx.run.made import data_of, file_of
from megarlx.run.make_distillation import distillation
from megarlx.run.tokenizer import template_of, templates_of


class ObjectiveMaker:
    """Makes each objective once, when a stage first names it."""

    def __init__(
        self,
        config: Config,
        model: ParallelModel,
        tokenizer: Tokenizer | None,
        device: torch.device,
        samples: Path,
    ) -> None:
        self.config, self.model, self.mesh = config, model, model.mesh
        self.device, self.samples = device, samples
        self._tokenizer = tokenizer
        self.data = data_of(config)
        self._made: dict[str, Objective] = {}
        self._rewards: list[Rewards] = []

    def __getitem__(self, name: str) -> Objective:
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def start_rewards(self) -> None:
        """Their code is there: a later stage would be a late place to find out."""
        for rewards in self._rewards:
            rewards.start(self.mesh.world, here=self.mesh.model.is_first)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise RunError("data.tokenizer is missing: text cannot be read without one")
        return self._tokenizer

    def template(self, name: str | None = None) -> Template:
        """One of [templates], or the run's own."""
        if name is not None:
            return templates_of(self.config)[name]
        found = template_of(self.config.template)
        assert found is not None  # the configuration saw to it
        return found

    def _make(self, name: str) -> Objective:
        if name == PRETRAINING:
            return self._pretraining()
        given = self.config.named_objectives[name]
        if isinstance(given, OwnConfig):
            return self._own(name, given)
        if isinstance(given, DistillConfig):
            return distillation(self, name, given)
        return self._sft(name, given) if isinstance(given, SftConfig) else self._rl(name, given)

    def _own(self, name: str, config: OwnConfig) -> Objective:
        made = plug.resolve("objective", config.function)(
            self.model, self._tokenizer, **config.options
        )
        if not isinstance(made, Objective):
            raise RunError(
                f"objectives.{name}.own.function is {config.function!r}, which makes a "
                f"{type(made).__name__}; expected a class derived from Objective"
            )
        made.name = name
        return made

    # Supervised learning.

    def _pretraining(self) -> Supervised:
        data = self._data()
        if not data.sources:
            raise RunError("[data] has no sources: there is nothing to pre-train on")
        own = Composition(0, {source.name: source.weight for source in data.sources})
        schedule = [Composition(part.from_tokens, part.weights) for part in data.composition]
        blend = Blend(
            [self._source(source) for source in data.sources],
            schedule or [own],
            self.config.training.seed,
        )
        return self._supervised(PRETRAINING, blend, data.documents_apart)

    def _sft(self, name: str, config: SftConfig) -> Supervised:
        training = self.config.training
        if config.rollouts is not None:
            conversations = conversations_of(*config.rollouts, config.filter)
        else:
            path = file_of(config.conversations, self.config, f"{name}.conversations")
            conversations = list(read_conversations(path))
            if not conversations:
                raise RunError(f"{name}.conversations is {path!r}: the file holds none")
            _tell_of_silence(path, conversations)
        length = config.sequence_length or training.sequence_length
        if length > self.config.model.max_sequence_length:
            raise RunError(
                f"{name}.sequence_length is {length}; model.max_sequence_length allows "
                f"{self.config.model.max_sequence_length}"
            )
        data = ConversationData(
            conversations,
            self.template(config.template),
            self.tokenizer,
            length,
            training.seed,
            demonstrations="all" if config.rollouts else config.demonstrations,
            packing=config.packing,
            too_long=config.when_too_long,
            name=name,
        )
        tell_left_out(
            f"{name}.conversations", data.too_long, data.conversations + data.too_long, length + 1
        )
        return self._supervised(
            name,
            data,
            True,
            config.sequences_per_step,
            config.sequences_per_microbatch,
        )

    def _supervised(
        self,
        name: str,
        data: Dataset,
        documents_apart: bool,
        sequences_per_step: int | None = None,
        sequences_per_microbatch: int | None = None,
        *,
        prefetch_steps: int = 2,
        group: Group | None = None,
        z_loss: float | None = None,
    ) -> Supervised:
        training = self.config.training
        group = group or self.mesh.dp  # at least these; a stage may deal to more
        each = sequences_per_microbatch or training.sequences_per_microbatch
        batches = BatchLayout(
            sequences_per_step or training.sequences_per_step,
            each,
            group.rank,
            group.size,
            name if sequences_per_step else "training",
        )
        self.model.pipeline.plan.check_microbatches(batches.microbatches)
        # In one micro-batch: every document has at least one token.
        most_documents = each * data.sequence_length if self.mesh.pp.size > 1 else None
        loader = Loader(
            data,
            batches,
            with_documents=documents_apart,
            documents_at_most=most_documents,
            prefetch_steps=prefetch_steps,
        )
        weight = training.z_loss if z_loss is None else z_loss
        return Supervised(name, loader, device=self.device, z_loss=weight)

    def validation(self) -> dict[str, Supervised]:
        """One small dataset a source; its first sequences, the same at every validation."""
        if self.data is None:
            return {}
        everyone = self.mesh.data
        unit = self.config.training.sequences_per_microbatch * everyone.size
        count = -(-self.config.logging.validation_sequences // unit) * unit
        found = {}
        for source in self.data.validation:
            only = Blend([self._source(source)], [Composition(0, {source.name: 1.0})], seed=0)
            found[source.name] = self._supervised(
                source.name,
                only,
                self.data.documents_apart,
                count,
                prefetch_steps=0,
                group=everyone,
                z_loss=0.0,
            )
        return found

    def _data(self) -> DataConfig:
        if self.data is None:
            raise RunError("the configuration has no [data]: there is nothing to pre-train on")
        return self.data

    def _source(self, source: SourceConfig) -> TokenSource:
        training = self.config.training
        file = self._rollouts(source) if source.prefix is None else self._file(source.prefix)
        return TokenSource(source.name, file, training.sequence_length, training.seed)

    def _file(self, prefix: str) -> TokenFile:
        if self._tokenizer is not None:
            check_tokenizer(prefix, self._tokenizer.fingerprint)
        return TokenFile(prefix, self.config.model.vocab_size)

    def _rollouts(self, source: SourceConfig) -> HeldTokens:
        """Each a document: question and answer in the run's template."""
        assert source.rollouts is not None
        named = run_and_step(source.rollouts)
        assert named is not None  # the configuration saw to both
        found = conversations_of(*named, source.filter)
        documents = [self.template().encode(one, self.tokenizer)[0] for one in found]
        return HeldTokens(f"rollouts of {source.rollouts}", documents)

    # Policy optimisation.

    def _rl(self, name: str, config: RlConfig) -> Reinforcement:
        if config.generator == FP8_GENERATOR:
            for why in filter(None, map(without_fp8, self.model.stages)):
                raise RunError(
                    f"{name}.generator is {FP8_GENERATOR!r}, but {why}; allowed here: 'engine'"
                )
        if config.environment is not None:
            player, prompts = self._tasks(name, config, config.environment)
        else:
            player, prompts = self._questions(name, config)
        bank = None
        if config.bank is not None and self.mesh.model.is_first:
            folder = self.samples.parent / FOLDER / name
            bank = Bank(folder, config.bank, lambda: self.mesh.traffic.step)
        seed = self.config.training.seed
        sampler = Sampler(config, player, prompts, self.mesh.dp, seed, bank)
        return Reinforcement(name, config, self.model, sampler, keep_samples=self._keeper(name))

    def _tasks(
        self, name: str, config: RlConfig, environment: EnvironmentConfig
    ) -> tuple[Player, PromptData]:
        most, length = environment.max_episode_tokens, self.config.model.max_sequence_length
        if most > length:
            raise RunError(
                f"{name}.environment.max_episode_tokens is {most}; model.max_sequence_length "
                f"allows {length}"
            )
        room = most - environment.max_turn_tokens
        tasks = self._prompts(name, config, min(config.max_prompt_tokens or room, room))
        game = EnvironmentGame(
            environment, self.template(config.template), self.tokenizer, self.mesh
        )
        return Player(self.generator(config, most), game, self.tokenizer), tasks

    def _questions(self, name: str, config: RlConfig) -> tuple[Player, PromptData]:
        prompts, longest = self.questions(name, config)
        rewards = Rewards(config.rewards, config.reward_failures_allowed)
        self._rewards.append(rewards)
        game = QuestionGame(rewards, config.max_completion_tokens, self.mesh)
        return Player(self.generator(config, longest), game, self.tokenizer), prompts

    def questions(self, name: str, config: RlConfig | DistillConfig) -> tuple[PromptData, int]:
        """Prompts that leave room for a completion; the most tokens that both become."""
        length = self.config.model.max_sequence_length
        room = length - config.max_completion_tokens
        if room < 1:
            raise RunError(
                f"{name}.max_completion_tokens is {config.max_completion_tokens}; "
                f"model.max_sequence_length = {length} leaves no room for a prompt"
            )
        prompts = self._prompts(name, config, min(config.max_prompt_tokens or room, room))
        longest = prompts.longest + config.max_completion_tokens
        if config.tokens_per_microbatch < longest:
            raise RunError(
                f"{name}.tokens_per_microbatch is {config.tokens_per_microbatch}; a prompt and its "
                f"completion have up to {longest} tokens"
            )
        return prompts, longest

    def _prompts(self, name: str, config: RlConfig | DistillConfig, most: int) -> PromptData:
        keys, few_shot, by_difficulty = PromptKeys(config.question_key), FewShot(), None
        if isinstance(config, RlConfig):
            asks = config.environment is None
            keys = PromptKeys(config.question_key, config.answer_key, needs_question=asks)
            by_difficulty = config.by_difficulty
            if config.examples is not None:
                file = file_of(config.examples, self.config, f"{name}.examples")
                few_shot = FewShot(tuple(read_conversations(file)))
        path = file_of(config.prompts, self.config, f"{name}.prompts")
        prompts = read_prompts(path, keys)
        if not prompts:
            raise RunError(f"{name}.prompts is {path!r}: the file holds none")
        _check_alone(name, config, prompts)
        data = PromptData(
            prompts,
            self.template(config.template),
            self.tokenizer,
            self.config.training.seed,
            few_shot=few_shot,
            max_prompt_tokens=most,
            too_long=config.when_too_long,
            by_difficulty=by_difficulty,
            name=name,
        )
        tell_left_out(f"{name}.prompts", data.too_long, len(prompts), most)
        return data

    def generator(self, config: RlConfig | DistillConfig, longest: int) -> Callable[[], Generator]:
        return _once(
            lambda: generator_of(
                config.generator,
                self.model,
                slots=config.slots,
                longest=longest,
                detokenize=self.tokenizer.decode_sampled,
                prefill_tokens=config.prefill_tokens,
                cache_tokens=config.cache_tokens,
            )
        )

    def _keeper(self, name: str) -> KeepSamples:
        every = self.config.named_objectives[name]
        assert isinstance(every, RlConfig)

        def keep(rollout: int, examples: list[dict[str, Any]]) -> bool:
            step = rollout * every.steps_of_a_rollout
            if step % every.keep_samples_every_steps:
                return False
            self.samples.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"step": step, **example}) + "\n" for example in examples]
            path = self.samples / f"step_{step:08d}.{name}.jsonl"
            path.write_text("".join(lines), encoding="utf-8")
            return True

        return keep


def _once(make: Callable[[], Generator]) -> Callable[[], Generator]:
    """Caches are made when something is first generated, and only then."""
    made: list[Generator] = []

    def get() -> Generator:
        if not made:
            made.append(make())
        return made[0]

    return get


def _tell_of_silence(path: str | Path, conversations: Sequence[Conversation]) -> None:
    last = [one.turns[-1] for one in conversations]
    silent = sum(not (turn.content.strip() or turn.calls or turn.more) for turn in last)
    if silent:
        warnings.warn(
            f"{path}: {silent} of {len(last)} answers are empty; the model learns to say nothing",
            EveryRankWarning,
            stacklevel=2,
        )


def _check_alone(name: str, config: RlConfig | DistillConfig, prompts: Sequence[Prompt]) -> None:
    """Turns before a question are for a template; refuses them where it has no part."""
    for key in ("environment", "bank"):
        if getattr(config, key, None) is not None and any(prompt.before for prompt in prompts):
            raise RunError(
                f"{name}.prompts {config.prompts} has questions behind other turns; {name}.{key} "
                "has a place for the question alone"
            )
