"""Every sample of a run, kept in its folder: RUN/rollouts/OBJECTIVE/step_00000040.jsonl.gz.

A file holds one rollout, one sample a line, gzipped; its number is the run's step at which it was
made, so the version of the weights that made it. Files come whole or not at all. A run that goes on
from a checkpoint writes the same bytes again, over what was there of later steps.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarlx.config.rollouts import BankConfig, RolloutFilter
from megarlx.data.conversations import Conversation, Turn
from megarlx.data.tokenizer import NO_TEXT
from megarlx.generation.requests import FinishReason
from megarlx.rollouts.episodes import Episode
from megarlx.rollouts.question_game import PARTS
from megarlx.rollouts.rewards.answers import answer_format
from megarlx.rollouts.rewards.sample import Sample

FOLDER = "rollouts"
MIB = 1 << 20
_NAME = re.compile(r"step_(\d{8,})\.jsonl\.gz")


class BankError(ValueError):
    """Rollouts that are not there, or of which a filter leaves nothing."""


def banked(episode: Episode, *, tokens: bool) -> dict[str, Any]:
    """What is kept of a sample, as JSON; null is a reward that is not known."""
    (turn,), made = episode.turns, episode.trajectory
    assert made is not None
    line = {
        "prompt": turn.observation,
        "text": turn.action,
        "reference": episode.reference,
        "reward": _known(turn.reward),
        "rewards": {name: _known(value) for name, value in turn.info[PARTS].items()},
        "finish_reason": made.reasons[0],
    }
    return line | ({"tokens": made.tokens[made.written].tolist()} if tokens else {})


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


class Bank:
    """Of one objective; `version` is that of the weights now."""

    def __init__(self, folder: Path, config: BankConfig, version: Callable[[], int]) -> None:
        self.folder, self.config, self.version = folder, config, version
        self._begun = False

    def add(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """A rollout that the objective's step `step` begins with; by one process."""
        version = self.version()
        if not self._begun:
            self._drop_from(version)
            self._begun = True
        numbers = {"step": step, "weights": version}
        text = "".join(json.dumps({**numbers, **one}) + "\n" for one in samples)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{version:08d}.jsonl.gz"
        whole = path.with_name(f".{path.name}")
        whole.write_bytes(gzip.compress(text.encode(), mtime=0))
        os.replace(whole, path)
        self._shrink()

    def _drop_from(self, version: int) -> None:
        """What a run that was killed has left of later steps, and half of a file."""
        later = [path for number, path in _shards(self.folder) if number >= version]
        for path in (*later, *self.folder.glob(".step_*")):
            path.unlink()

    def _shrink(self) -> None:
        """The newest rollout stays, whatever its size."""
        shards = sorted(_shards(self.folder))
        sizes = [path.stat().st_size for _, path in shards]
        total = sum(sizes)
        for (_, path), size in zip(shards[:-1], sizes, strict=False):
            if total <= self.config.max_mib * MIB:
                return
            path.unlink()
            total -= size


def _shards(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("step_*.jsonl.gz"):
        if found := _NAME.fullmatch(path.name):
            yield int(found[1]), path


@dataclass(frozen=True)
class Kept:
    """A sample that was read back."""

    prompt: str
    text: str
    reward: float | None
    finish_reason: FinishReason

    @property
    def marked(self) -> bool:
        one = Sample(self.prompt, self.text, None, {}, self.finish_reason)
        return answer_format([one]) == [1.0]


def read_bank(run: str, before: int | None = None) -> list[Kept]:
    """The samples of all objectives of a run in the order in which they were made, those of its
    first `before` steps."""
    folders = sorted(path for path in (Path(run) / FOLDER).glob("*") if path.is_dir())
    shards = [sorted(_shards(folder)) for folder in folders]
    if not any(shards):
        raise BankError(
            f"{run} keeps no rollouts: {Path(run) / FOLDER} holds none; a run whose configuration "
            "has [rl.bank] keeps them"
        )
    numbered = [(number, at, path) for at, held in enumerate(shards) for number, path in held]
    found = []
    for number, _, path in sorted(numbered):
        if before is None or number < before:
            found += [_kept(line, path) for line in _lines(path)]
    return found


def _lines(path: Path) -> list[str]:
    try:
        return gzip.decompress(path.read_bytes()).decode().splitlines()
    except (OSError, EOFError, ValueError) as error:
        raise BankError(f"{path} is damaged: {error}") from None


def _kept(line: str, path: Path) -> Kept:
    try:
        value = json.loads(line)
        return Kept(value["prompt"], value["text"], value["reward"], value["finish_reason"])
    except (ValueError, KeyError, TypeError) as error:
        raise BankError(f"{path} holds a line that is no sample: {error!r}") from None


def filtered(samples: Sequence[Kept], wanted: RolloutFilter) -> tuple[list[Kept], dict[str, int]]:
    """(what is left, in its order; how many each filter took out)."""
    out = Counter[str]()
    seen: set[tuple[str, str]] = set()
    of_question = Counter[str]()
    left = []
    for one in reversed(samples) if wanted.newest else samples:
        if NO_TEXT in one.text:  # ids were drawn that no text has
            out["no_text"] += 1
        elif one.reward is None or one.reward < wanted.min_reward:
            out["min_reward"] += 1
        elif wanted.marked and not one.marked:
            out["marked"] += 1
        elif wanted.dedup and (one.prompt, one.text) in seen:
            out["dedup"] += 1
        elif of_question[one.prompt] >= wanted.per_question:
            out["per_question"] += 1
        else:
            seen.add((one.prompt, one.text))
            of_question[one.prompt] += 1
            left.append(one)
    return left[::-1] if wanted.newest else left, dict(out)


def conversations_of(run: str, before: int | None, wanted: RolloutFilter) -> list[Conversation]:
    """Questions and answers of a run's rollouts, for training on them."""
    samples = read_bank(run, before)
    left, out = filtered(samples, wanted)
    if not left:
        counts = ", ".join(f"{key} took {count}" for key, count in out.items()) or "none was there"
        upto = "" if before is None else f" of its first {before} steps"
        raise BankError(
            f"{run}: of {len(samples)} rollouts{upto} nothing is left: {counts}; the filter is "
            f"{wanted.model_dump()}"
        )
    return [
        Conversation((Turn("user", one.prompt), Turn("assistant", one.text.strip())))
        for one in left
    ]
