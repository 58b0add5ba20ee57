"""Turns of agents a second: a cache that goes on, and a loop that prefills every turn.

Both use the same engine, weights, slots, seeds and observations, and draw the same tokens. The
naive loop asks for one turn of every episode at a time and gives it all that stands before: that is
what calling a generator once a turn comes to. Environments answer at once on both sides.

A turn ends at a stop token, after about 8 of at most 16 tokens; observations have 24 tokens and
first ones 32. Groups of 8 episodes begin alike.

    python benchmarks/agent_turns.py [--sizes 0.2M 2M] [--turns 2 4 8 16] [--slots 64]
        [--episodes 128] [--rounds 5] [--json PATH] [--markdown PATH]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from timing import Row, add_outputs, machine, row, shown, write_results
from training import SIZES

from megarlx.config.model import ModelConfig
from megarlx.generation.engine import Engine
from megarlx.generation.requests import Request, SamplingSettings, TurnEnd
from megarlx.model.transformer import Stage

FIRST_TOKENS, OBSERVATION_TOKENS, TURN_TOKENS, GROUP = 32, 24, 16, 8
LONGEST_TURN = OBSERVATION_TOKENS + TURN_TOKENS


class Bench:
    def __init__(self, config: ModelConfig, turns: int, slots: int, episodes: int) -> None:
        longest = FIRST_TOKENS + turns * LONGEST_TURN
        longest_allowed = max(longest, config.max_sequence_length)
        config = config.model_copy(update={"max_sequence_length": longest_allowed})
        self.turns, vocab_size = turns, config.vocab_size
        generator = torch.Generator().manual_seed(0)
        shape = (episodes // GROUP, FIRST_TOKENS)
        first = torch.randint(vocab_size, shape, generator=generator).tolist()
        self.requests = [
            Request(prompt, range(g * GROUP, (g + 1) * GROUP), TURN_TOKENS)
            for g, prompt in enumerate(first)
        ]
        shape = (turns, OBSERVATION_TOKENS)
        self.observations: list[list[int]] = torch.randint(
            vocab_size, shape, generator=generator
        ).tolist()
        self.settings = SamplingSettings(stop_tokens=tuple(range(vocab_size // 8)))
        self.engine = Engine([Stage(config).initialise_(0)], slots=slots, longest=longest)

    def on_turns_end(self, ends: list[TurnEnd]) -> list[Sequence[int] | None]:
        return [None if e.turn + 1 == self.turns else self.observations[e.turn] for e in ends]

    def ours(self) -> list[list[int]]:
        found = self.engine.episodes(self.requests, self.settings, 0, self.on_turns_end)
        return [t.tokens.tolist() for t in found]

    def naive(self) -> list[list[int]]:
        requests, whole = self.requests, dict[int, list[int]]()
        self.naive_tokens = 0
        for turn in range(self.turns):
            for c in self.engine.generate(requests, self.settings, 0):
                whole[c.sequence_id] = [*c.request.prompt, *c.tokens.tolist()]
            self.naive_tokens += self.tokens_computed
            if turn + 1 < self.turns:
                for tokens in whole.values():
                    tokens += self.observations[turn]
                requests = [Request(t, (i,), TURN_TOKENS) for i, t in whole.items()]
        return list(whole.values())

    @property
    def tokens_computed(self) -> int:
        """In the last generation."""
        return self.engine.counts.tokens_prefilled + self.engine.counts.tokens_decoded


def measure(name: str, turns: int, slots: int, episodes: int, rounds: int) -> list[Row]:
    bench = Bench(SIZES[name].model, turns, slots, episodes)
    naive, ours = bench.naive(), bench.ours()  # a warm-up, too
    computed = bench.tokens_computed
    same = sum(a == b for a, b in zip(ours, naive, strict=True)) / len(ours)
    assert same > 0.95, f"{same:.0%} of the episodes are the same"  # prefilled or decoded: rounding
    taken: dict[str, list[float]] = {"ours": [], "naive": []}
    for _ in range(rounds):
        for key, function in (("ours", bench.ours), ("naive", bench.naive)):
            start = time.perf_counter()
            function()
            taken[key].append(time.perf_counter() - start)
    rate = episodes * turns / statistics.median(taken["ours"])
    faster = statistics.median(b / a for a, b in zip(taken["ours"], taken["naive"], strict=True))
    label = f"{name}, {slots} slots, {episodes} episodes × {turns} turns"
    named = "prefill every turn"
    return [
        row("agent turns", label, rate, rate / faster, named, "turns/s"),
        row("tokens computed", label, computed, bench.naive_tokens, named, "tokens"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["0.2M", "2M"])
    parser.add_argument("--turns", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--episodes", type=int, default=128, help="a multiple of 8")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds a case")
    add_outputs(parser)
    options = parser.parse_args()
    facts, rows = machine(), list[Row]()
    for name in options.sizes:
        for turns in options.turns:
            for found in measure(name, turns, options.slots, options.episodes, options.rounds):
                rows.append(shown(found))
    write_results(options, "Turns of agents on a CPU", facts, rows)


if __name__ == "__main__":
    main()
