"""The one player: questions or tasks in, episodes out.

RL, evaluation, the readiness probe and agents all play this way. What is played is a `Game`: a
question, whose episode has one turn and is worth what rewards say of it, or a task in an
environment. What a turn says is told in one place, `Player.play`: rewards and environments are
given the same text of the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megarlx.comm.collectives import barrier, gather_values
from megarlx.comm.groups import Group
from megarlx.data.order import key_of
from megarlx.data.prompts import Drawn, Prompt
from megarlx.data.tokenizer import Tokenizer
from megarlx.generation.interface import Generator
from megarlx.generation.requests import Request, SamplingSettings, Trajectory, TurnEnd
from megarlx.generation.stop import text_of
from megarlx.rollouts.episodes import Episode
from megarlx.rollouts.shown import tokens_of

SEEDS = 1 << 31  # of environments: libraries of random numbers often take no larger ones


@dataclass(frozen=True)
class Start:
    """A question or a task, and a sequence id for each episode wanted of it."""

    group: int  # its number
    sequence_ids: tuple[int, ...]
    prompt: Prompt
    ids: Sequence[int] = ()  # how a question is asked; an environment says how a task begins
    seed: int = 0  # of the environment, the same for all of them


def starts_of(drawn: Iterable[Drawn], samples: int, seed: int) -> list[Start]:
    """So many episodes of each."""
    return [
        Start(
            one.number,
            tuple(range(one.number * samples, (one.number + 1) * samples)),
            one.prompt,
            one.ids,
            key_of(seed, "environment", one.number) % SEEDS,
        )
        for one in drawn
    ]


class Game(Protocol):
    """How episodes begin, what answers a turn, and what they were worth.

    All ranks of a copy of the model hold one and call `begin` and `episodes` together, each
    data-parallel rank with its own starts, if it has any.
    """

    talks: bool  # turns are answered; without, every episode has one turn
    max_tokens: int | None  # of an episode; None: as many as the generator can hold
    invalid_action_penalty: float

    def begin(self, starts: Sequence[Start], most_tokens: int) -> list[Request]: ...

    def answer(self, ends: list[TurnEnd], texts: list[str]) -> list[Sequence[int] | None]:
        """What each turn said -> the ids to go on behind, or None where the episode is over. One
        that talks is asked on the first rank of a copy of the model, in the middle of generation;
        one that does not on all ranks, when all turns are there."""
        ...

    def episodes(
        self, starts: Sequence[Start], made: Mapping[int, Trajectory], group: Group
    ) -> list[Episode]:
        """Of all sequence ids of all starts, in their order. What stops one rank of the group stops
        all of them."""
        ...

    def metrics(self, episodes: Sequence[Episode]) -> Mapping[str, tuple[float, float]]:
        """(sum, count) of each, of the last episodes, so that ranks can add theirs up."""
        ...

    def example(self, episode: Episode) -> dict[str, Any]:
        """For people to read."""
        ...

    def close(self) -> None: ...


class Player:
    """Plays a game with the weights as they are."""

    def __init__(
        self, generator: Callable[[], Generator], game: Game, tokenizer: Tokenizer
    ) -> None:
        self.generator, self.game, self.tokenizer = generator, game, tokenizer
        # of the last play: generating, waiting for others of the group, finding out the rewards
        self.seconds = self.waited_seconds = self.reward_seconds = 0.0

    def play(
        self, starts: Sequence[Start], sampling: SamplingSettings, seed: int, group: Group
    ) -> list[Episode]:
        """All ranks of the group call this together, each with its own starts, if it has any."""
        generator, game, decode = self.generator(), self.game, self.tokenizer.decode_sampled

        def heard(ends: list[TurnEnd]) -> list[Sequence[int] | None]:
            return game.answer(ends, [text_of(end.tokens, sampling, decode) for end in ends])

        begun = time.perf_counter()
        most = min(game.max_tokens or generator.longest, generator.longest)
        made = generator.episodes(
            game.begin(starts, most),
            sampling,
            seed,
            heard if game.talks else None,
            max_tokens=most,
        )
        played = time.perf_counter()
        barrier(group)
        met = time.perf_counter()
        if not game.talks:
            heard([_only_turn(one) for one in made])
        found = game.episodes(starts, {one.sequence_id: one for one in made}, group)
        self.seconds, self.waited_seconds = played - begun, met - played
        self.reward_seconds = time.perf_counter() - met
        return found

    def example(self, episode: Episode) -> dict[str, Any]:
        """For people to read, token by token too."""
        return self.game.example(episode) | tokens_of(episode, self.tokenizer.decode_sampled)

    def close(self) -> None:
        self.game.close()


def _only_turn(one: Trajectory) -> TurnEnd:
    said = one.completion
    return TurnEnd(one.sequence_id, 0, said.tokens.tolist(), said.finish_reason, 0)


def from_first(make: Callable[[], Any], group: Group, stops: type[Exception]) -> Any:
    """A JSON value that the group's first rank makes, on all ranks; and what stops it, stops all
    of them."""
    said: dict[str, Any] = {}
    if group.rank == 0:
        try:
            said = {"made": make()}
        except stops as error:
            said = {"stopped": str(error)}
    said = gather_values(said, group)[0]
    if "stopped" in said:
        raise stops(said["stopped"])
    return said["made"]
