"""One generation from its requests to its trajectories: what is under way on this rank.

Only one rank of a copy of the model is asked what is observed behind a turn; the others are sent
the answers, along the tensor-parallel group and then with the pipeline's messages.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megarlx.comm.collectives import broadcast_
from megarlx.generation.decoders.interface import checked_forward
from megarlx.generation.kept import Counts, Kept
from megarlx.generation.pages import Pages
from megarlx.generation.prefill import Chunk, chunks_of, prefill
from megarlx.generation.requests import (
    Completion,
    NewToken,
    OnTurnsEnd,
    Request,
    SamplingSettings,
    Trajectory,
    TurnEnd,
    check_requests,
)
from megarlx.generation.ring import Item, Ring
from megarlx.generation.rows import Rows
from megarlx.generation.scheduler import Admission, Finished, Scheduler
from megarlx.generation.stop import StopStrings
from megarlx.generation.widths import narrowest
from megarlx.ops import sample

if TYPE_CHECKING:
    from megarlx.generation.engine import Engine


class Run:
    """`on_turns_end` None: every sequence ends with its first turn, and nobody is asked."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        sampling: SamplingSettings,
        seed: int,
        on_turns_end: OnTurnsEnd | None = None,
        max_tokens: int | None = None,
        feed_up_to: int | None = None,
    ) -> None:
        most = engine.longest if max_tokens is None else max_tokens
        check_requests(
            requests, longest=engine.longest, most=most, vocab_size=engine.config.vocab_size
        )
        self.engine, self.on_turns_end = engine, on_turns_end
        device = engine.device
        if feed_up_to is None:
            feed_up_to = 32 if device.type == "cpu" else 4
        engine.counts = Counts()
        self.pages = Pages(engine.table, requests, most, turns=on_turns_end is not None)
        self.scheduler = Scheduler(
            requests,
            sampling,
            StopStrings(sampling.stop_strings, engine.detokenize),
            rows=engine.rows,
            slots=engine.slots,
            pages=self.pages,
            tokens=engine.drawn_tokens,
            observe=None if on_turns_end is None else self._observe,
            max_tokens=most,
            feed_up_to=feed_up_to,
        )
        self.seed = torch.tensor([seed], dtype=torch.int64, device=device)
        self.temperature = torch.tensor([sampling.temperature], device=device)
        self.filters = {
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
        }
        self.ring = Ring(engine.mesh.decode, device)
        self.rank, self.ranks = engine.mesh.pp.rank, engine.ranks
        groups = len(engine.rows)
        self.drawn: list[np.ndarray | None] = [None] * groups
        self.chunks: list[list[Chunk]] = [[] for _ in range(groups)]
        self.over = [False] * groups
        self.prefilled: list[Tensor] = []
        self.kept: dict[int, Kept] = {}
        self.drawn_logprobs = engine.drawn_logprobs
        self.ended: list[Finished] = []
        for decoder in engine.decoders:
            decoder.begin()

    def finished(self) -> Iterator[tuple[Rows, int]]:
        """Runs to the end; yields a group's rows and their number whenever tokens were drawn."""
        for tick in itertools.count():
            index = tick - self.rank
            item = Item.number(index, self.ranks, len(self.engine.stages))
            drew = False
            with torch.inference_mode():
                if self.ranks > 1:
                    self.ring.turn(lambda item=item, index=index: self._receive(item, index))  # type: ignore[misc]
                else:
                    self._receive(item, index)
                if index >= 0 and not self.over[item.group]:
                    drew = self._work(item)
            if drew:
                rows = self.engine.rows[item.group]
                yield rows, rows.live
            if all(self.over):
                self.ring.flush()
                return

    def to_the_end(self) -> Run:
        for _ in self.finished():
            pass
        return self

    def trajectories(self) -> list[Trajectory]:
        return [one.trajectory() for one in self._found()]

    def completions(self) -> list[Completion]:
        return [one.completion() for one in self._found()]

    def _found(self) -> list[Kept]:
        """In the order of the requests. Log-probs are known on the last pipeline stage, which sends
        them to the others."""
        found = [self.kept[index] for index in range(len(self.kept))]
        if self.ranks > 1 and found:
            drawn = [one.logprobs[:, begin:end] for one in found for begin, end in one.turns.spans]
            sent = torch.cat(drawn, dim=1)
            broadcast_(sent, self.engine.mesh.decode, source=self.ranks - 1)
            sizes = [part.shape[1] for part in drawn]
            for part, of_last in zip(drawn, sent.split(sizes, dim=1), strict=True):
                part.copy_(of_last)
        return found

    def new_tokens(self) -> Iterator[NewToken]:
        """Whether a token was the last is known with the next step, so tokens come one late."""
        last: dict[int, NewToken] = {}
        for rows, live in self.finished():
            yield from self._ended(last)
            logprobs = self._last_logprobs(rows, live)
            drawn = self.drawn[self.engine.rows.index(rows)]
            assert drawn is not None
            for row in range(live):
                sequence = rows.sequences[row]
                before = last.pop(sequence.sequence_id, None)
                if before is not None:
                    yield before
                logprob, sampled = logprobs[row]
                last[sequence.sequence_id] = NewToken(
                    sequence.sequence_id, int(drawn[row]), logprob, sampled, None
                )
        yield from self._ended(last)

    def _ended(self, last: dict[int, NewToken]) -> Iterator[NewToken]:
        for done in self.ended:
            token = last.pop(done.sequence.sequence_id, None)
            if token is None:  # drawn on another rank
                continue
            yield NewToken(
                token.sequence_id, token.token, token.logprob, token.sampled_logprob, done.reason
            )
        self.ended = []

    def _last_logprobs(self, rows: Rows, live: int) -> list[list[float]]:
        places = (rows.slots[:live], rows.keys[:live, 1])
        table: list[list[float]] = torch.stack(
            [t[places] for t in self.engine.drawn_logprobs], dim=1
        ).tolist()
        return table

    # One tick.

    def _receive(self, item: Item, index: int) -> None:
        """What the neighbour sent for this item; with a step's first, the scheduler goes on."""
        if index < 0 or self.over[item.group]:
            return
        if item.chunk == 0:
            self._begin_step(item)
        if self.ranks == 1 or self.over[item.group] or (self.rank == 0 and item.chunk == 0):
            return
        stage, decoder = self.engine.stages[item.chunk], self.engine.decoders[item.chunk]
        self.prefilled = [
            self.ring.receive_(chunk.hidden_like(stage)) for chunk in self.chunks[item.group]
        ]
        self.ring.receive_(decoder.hidden(self._width(item.group)))

    def _begin_step(self, item: Item) -> None:
        group, engine = item.group, self.engine
        rows = engine.rows[group]
        if item.step == 0:
            admission = self.scheduler.fill(group)
        else:
            drawn = self._tokens_of_last_step(group)
            finished, admission = self.scheduler.advance(group, drawn)
            self._keep(finished)
        self.over[group] = rows.live == 0
        self._admitted(group, admission)

    def _admitted(self, group: int, admission: Admission) -> None:
        """What the cache needs before the next step, cut into products and counted."""
        engine, counts = self.engine, self.engine.counts
        self.chunks[group] = chunks_of(admission, engine.prefill_tokens, engine.device)
        counts.prompts_prefilled += len(admission.prefills)
        prompt_tokens = sum(map(len, admission.prefills.values()))
        prompt_tokens += sum(len(tokens) for _, tokens in admission.continued.values())
        counts.tokens_prefilled += prompt_tokens
        computed = sum(chunk.tokens.numel() for chunk in self.chunks[group])
        counts.tokens_padded += computed - prompt_tokens
        counts.tokens_observed = self.scheduler.tokens_observed
        counts.places_held = self.pages.most_held * self.pages.table.size

    def _tokens_of_last_step(self, group: int) -> np.ndarray:
        """Drawn here, or sent by the neighbour; they travel up to the rank that drew them."""
        last = self.ranks - 1
        if self.rank != last:
            rows = self.engine.rows[group]
            tokens = self.ring.receive_(torch.empty_like(rows.tokens[: rows.live]))
            if self.rank + 1 < last:
                self.ring.outgoing.append(tokens)
            return tokens.cpu().numpy()
        tokens_here = self.drawn[group]
        assert tokens_here is not None
        return tokens_here

    def _work(self, item: Item) -> bool:
        """This item through the stage it is for; whether tokens were drawn."""
        engine, group = self.engine, item.group
        stage, decoder = engine.stages[item.chunk], engine.decoders[item.chunk]
        rows, width = engine.rows[group], self._width(group)
        self._prefill(item)
        if item.chunk in engine.unchecked:
            exact = engine.exact.get(item.chunk)
            checked_forward(decoder, engine.unchecked[item.chunk], rows, width, exact)
            del engine.unchecked[item.chunk]
            engine.exact.pop(item.chunk, None)
        else:
            decoder.forward(rows, width)
        if not stage.has_head:
            self.ring.outgoing.append(decoder.hidden(width).clone())
            return False
        n = rows.live
        drawn = sample(
            decoder.logits(width)[:n].float(),
            seed=self.seed,
            keys=rows.keys[:n],
            temperature=self.temperature,
            group=stage.group,
            vocab_size=engine.config.vocab_size,
            **self.filters,  # type: ignore[arg-type]
        )
        places = (rows.slots[:n], rows.keys[:n, 1])
        engine.drawn_logprobs[0].index_put_(places, drawn.logprob)
        engine.drawn_logprobs[1].index_put_(places, drawn.sampled_logprob)
        self.drawn[group] = drawn.token.cpu().numpy()
        if self.ranks > 1:
            self.ring.outgoing.append(drawn.token)
        counts = engine.counts
        counts.steps += 1
        counts.tokens_decoded += n
        counts.rows_padded += width - n
        return True

    def _prefill(self, item: Item) -> None:
        engine = self.engine
        stage, cache = engine.stages[item.chunk], engine.caches[item.chunk]
        for number, chunk in enumerate(self.chunks[item.group]):
            given = None if stage.has_embedding else self.prefilled[number]
            out = prefill(stage, cache, chunk, given)
            if not stage.has_head:
                self.ring.outgoing.append(out)

    def _keep(self, finished: list[Finished]) -> None:
        """What the slots of finished sequences hold, before they are used again."""
        engine = self.engine
        self.ended += finished
        with torch.inference_mode(False):  # so that their tensors may be trained on
            for done in finished:
                self.kept[done.sequence.index] = Kept(
                    done.sequence,
                    self.scheduler.turns.pop(done.sequence.index),
                    engine.drawn_tokens[done.slot, : done.length].copy(),
                    self.drawn_logprobs[:, done.slot, : done.length].cpu().clone(),
                )

    def _width(self, group: int) -> int:
        live = self.engine.rows[group].live
        return narrowest(self.engine.widths, live) if self.engine.pads else live

    # What is observed.

    def _observe(self, turns: list[TurnEnd]) -> Sequence[Sequence[int] | None]:
        """Of the rank that asks; every other one is sent the same."""
        mesh, device = self.engine.mesh, self.engine.device
        answers: Sequence[Sequence[int] | None] | None = None
        if self.rank == 0 and mesh.tp.rank == 0:
            answers = self._asked(turns)
            if self.ranks == mesh.tp.size == 1:
                return answers
        # [length of each, -1 for None], then their tokens
        lengths = torch.zeros(len(turns), dtype=torch.int64, device=device)
        if answers is not None:
            known = [-1 if answer is None else len(answer) for answer in answers]
            lengths.copy_(torch.tensor(known))
        self._pass_on(lengths)
        flat = torch.zeros(int(lengths.clamp_min(0).sum()), dtype=torch.int64, device=device)
        if answers is not None:
            flat.copy_(torch.tensor([i for a in answers if a is not None for i in a]))
        if len(flat):
            self._pass_on(flat)
        parts = iter(flat.tolist())
        return [
            None if length < 0 else [next(parts) for _ in range(length)]
            for length in lengths.tolist()
        ]

    def _pass_on(self, tensor: Tensor) -> None:
        """From the first stage's ranks to the next stage's, and so on to the last."""
        if self.rank == 0:
            broadcast_(tensor, self.engine.mesh.tp, source=0)
        else:
            self.ring.receive_(tensor)
        if self.rank + 1 < self.ranks:
            self.ring.outgoing.append(tensor)

    def _asked(self, turns: list[TurnEnd]) -> Sequence[Sequence[int] | None]:
        assert self.on_turns_end is not None  # a run that asks nobody does not come here
        answers = self.on_turns_end(turns)
        if len(answers) != len(turns):
            raise ValueError(
                f"generate: on_turns_end answered {len(answers)} of {len(turns)} turns; needed: "
                "ids or None for each"
            )
        vocab_size = self.engine.config.vocab_size
        for turn, answer in zip(turns, answers, strict=True):
            if answer is None:
                continue
            wrong = [token for token in answer if not 0 <= token < vocab_size]
            if wrong or len(answer) == 0:
                what = f"holds token id {wrong[0]}" if wrong else "has 0 tokens"
                raise ValueError(
                    f"generate: the observation behind turn {turn.turn} of sequence "
                    f"{turn.sequence_id} {what}; allowed: 1 id or more, of 0 to {vocab_size - 1}"
                )
        return answers
