"""What distillation trains on: samples of the model as it is, or conversations that a run kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from megarlx.comm.groups import Group
from megarlx.config.distill import DistillConfig
from megarlx.data.conversations import Conversation, Template
from megarlx.data.order import key_of, shuffled
from megarlx.data.prompts import PromptData
from megarlx.data.tokenizer import Tokenizer
from megarlx.generation.requests import SamplingSettings
from megarlx.rollouts.completions import Completions
from megarlx.rollouts.episodes import EpisodeBatch
from megarlx.rollouts.player import Player, starts_of

Counts = Mapping[str, float]  # tokens generated and read


class TextError(ValueError):
    """Texts that cannot be trained on."""


class OwnTexts:
    """Samples of prompts; nothing scores them."""

    def __init__(
        self, config: DistillConfig, player: Player, prompts: PromptData, group: Group, seed: int
    ) -> None:
        """`group` shares out the prompts."""
        self.config, self.player, self.prompts = config, player, prompts
        self.group, self.seed, self.waited_seconds = group, seed, 0.0
        ends = (player.tokenizer.eos_id,)
        self.sampling = SamplingSettings(temperature=config.temperature, stop_tokens=ends)

    def next(self) -> tuple[Completions, Counts]:
        n = self.config.samples_per_prompt
        drawn = self.prompts.take(self.config.prompts_per_rollout)
        starts = starts_of(drawn[self.group.rank :: self.group.size], n, self.seed)
        episodes = self.player.play(starts, self.sampling, self.seed, self.group)
        self.waited_seconds += self.player.waited_seconds
        device = self.player.generator().device
        played = EpisodeBatch.of(episodes, per_task=n, device=device).gathered(self.group)
        made = replace(played.completions, rollout_logprobs=None, truncated=None)
        read = sum(len(one.ids) for one in drawn)
        return made, {"generated": float(made.written.sum()), "read": float(read)}

    def state(self) -> dict[str, Any]:
        return self.prompts.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.prompts.load_state(state)

    def close(self) -> None:
        self.player.close()


class KeptTexts:
    """Conversations in a seeded order, another in each epoch."""

    def __init__(
        self,
        config: DistillConfig,
        conversations: Sequence[Conversation],
        template: Template,
        tokenizer: Tokenizer,
        longest: int,
        seed: int,
        name: str,
        device: torch.device,
    ) -> None:
        self.count = config.prompts_per_rollout * config.samples_per_prompt
        self.name, self.seed, self.device, self.drawn = name, seed, device, 0
        self.group, self.waited_seconds = Group.alone("data"), 0.0
        encoded = [template.encode(one, tokenizer) for one in conversations]
        self._texts = [one for one in encoded if len(one[0]) <= longest]
        self.too_long = len(encoded) - len(self._texts)
        if self.too_long and config.when_too_long == "stop":
            most = max(len(ids) for ids, _ in encoded)
            raise TextError(
                f"{name}: a rollout has {most} tokens; allowed are {longest}; too_long = 'skip' "
                "leaves such rollouts out"
            )
        if not self._texts:
            raise TextError(f"{name}: all {len(encoded)} rollouts have more than {longest} tokens")
        content = json.dumps(self._texts).encode()
        self._fingerprint = hashlib.sha256(content).hexdigest()

    def next(self) -> tuple[Completions, Counts]:
        """The same on all ranks, which hold them all."""
        taken = [self._texts[self._place(self.drawn + at)] for at in range(self.count)]
        self.drawn += self.count

        def row(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        made = Completions(
            row([i for ids, _ in taken for i in ids], torch.int64),
            row([len(ids) for ids, _ in taken], torch.int64),
            # nothing stands before a text's first token to predict it from
            row([i for _, says in taken for i in (False, *says[1:])], torch.bool),
        )
        return made, {"generated": 0.0, "read": 0.0}

    def _place(self, number: int) -> int:
        epoch, at = divmod(number, len(self._texts))
        return int(shuffled(len(self._texts), key_of(self.seed, self.name, epoch))[at])

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "texts": self._fingerprint}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if state["texts"] != self._fingerprint:
            raise TextError(f"{self.name}: the rollouts are not those that the run was saved with")
        self.drawn = int(state["drawn"])

    def close(self) -> None:
        """There is nothing to close."""
