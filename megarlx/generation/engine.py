"""Generation on the live training weights: prompts in, completions out, on any layout.

Every data-parallel rank is given its own requests; the tensor- and pipeline-parallel ranks of one
copy of the model are all given the same ones and all return the same completions.

The same seed gives a sequence the same tokens whatever else is generated beside it: noise is keyed
by (sequence id, position), rows are computed each alone or in products whose rows do not depend on
their neighbours, and prompts are padded by their own length (widths.py says where the limits are).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from megarlx.choices import PREFILL_TOKENS
from megarlx.comm.collectives import all_reduce_, broadcast_
from megarlx.comm.groups import Mesh
from megarlx.generation.decoders.choose import decoder_of
from megarlx.generation.decoders.interface import Decoder, checked_forward
from megarlx.generation.decoders.stage import StageDecoder
from megarlx.generation.prefill import Chunk, chunks_of, copy_prompts_, prefill
from megarlx.generation.requests import (
    Completion,
    NewToken,
    Request,
    Sampled,
    SamplingSettings,
    check_requests,
)
from megarlx.generation.ring import Item, Ring
from megarlx.generation.rows import Rows
from megarlx.generation.scheduler import Admission, Finished, Scheduler
from megarlx.generation.stop import Detokenize, StopStrings
from megarlx.generation.widths import NARROW, ladder, narrowest, rows_agree
from megarlx.model.build import ParallelModel
from megarlx.model.documents import padded_length
from megarlx.model.transformer import Stage
from megarlx.ops import sample

Made = TypeVar("Made", bound=Sampled)


@dataclass
class Counts:
    """What a generation computed on this rank."""

    prompts_prefilled: int = 0
    tokens_prefilled: int = 0  # padding not counted
    tokens_padded: int = 0  # of prefills
    steps: int = 0
    tokens_decoded: int = 0
    rows_padded: int = 0  # of decode steps
    tokens_observed: int = 0  # of observations (episodes.py), prefilled or fed in decode steps


class Engine:
    """Caches and buffers for `slots` sequences at once of at most `longest` tokens each."""

    def __init__(
        self,
        stages: Sequence[Stage],
        mesh: Mesh | None = None,
        *,
        slots: int,
        longest: int,
        detokenize: Detokenize | None = None,
        prefill_tokens: int | None = None,
        one_width: bool | None = None,
    ) -> None:
        """`stages` are those of this rank; `detokenize` is needed for stop strings only.

        one_width     decode every step at the width of all slots; by default only where the rows
                      of products of different widths differ, and never on CUDA
        prefill_tokens  most tokens of several prompts in one product; None: by the device
        """
        self.stages, self.mesh = list(stages), Mesh.alone() if mesh is None else mesh
        self.config = self.stages[0].config
        if longest < 2 or longest > self.config.max_sequence_length:
            raise ValueError(
                f"generate: longest is {longest}; allowed: 2 to {self.config.max_sequence_length}, "
                "the model's max_sequence_length"
            )
        self.ranks = self.mesh.pp.size
        self._check_stages()
        self.longest, self.detokenize = longest, detokenize
        self.device = next(self.stages[0].parameters()).device
        each = -(-slots // self.ranks) if slots > 0 else 0
        self.widths = ladder(each)
        self.slots = [range(g * each, (g + 1) * each) for g in range(self.ranks)]
        self.idle_slot = self.ranks * each  # where rows of padding write
        on_cpu = self.device.type == "cpu"
        self.prefill_tokens = prefill_tokens or PREFILL_TOKENS["cpu" if on_cpu else "cuda"]
        if one_width is None and self.device.type == "cpu":
            one_width = not self._rows_agree(self.widths)
            # sequence parallelism splits the rows of the model's own layers
            if not one_width and not self.stages[0].sequence_parallel:
                narrow = (*NARROW, *self.widths)
                self.widths = narrow if self._rows_agree(narrow) else self.widths
        if one_width:
            self.widths, self.prefill_tokens = self.widths[-1:], 0
        most, places = self.widths[-1], padded_length(longest)
        self.caches = [stage.kv_cache(self.idle_slot + 1, places) for stage in self.stages]
        self.decoders: list[Decoder] = [
            decoder_of(stage)(stage, cache, most)
            for stage, cache in zip(self.stages, self.caches, strict=True)
        ]
        self.pads = any(decoder.pads for decoder in self.decoders)
        # of those that are faster than the model's own layers, until their first step
        self.unchecked = {
            index: StageDecoder(self.stages[index], self.caches[index], most)
            for index, decoder in enumerate(self.decoders)
            if not isinstance(decoder, StageDecoder)
        }
        self.rows = [Rows(most, self.idle_slot, self.device) for _ in self.slots]
        shape = (self.idle_slot + 1, places + 1)
        # What was drawn for each slot, by position. Tokens are known on every rank.
        self._tokens = np.zeros(shape, dtype=np.int64)
        self._logprobs = torch.full((2, *shape), torch.nan, device=self.device)
        self.counts = Counts()

    @staticmethod
    def of(model: ParallelModel, **options: Any) -> Engine:
        return Engine(model.stages, model.mesh, **options)

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSettings, seed: int
    ) -> list[Completion]:
        """One completion for each sequence id of each request, in that order."""
        run = _Run(self, requests, sampling, seed)
        for _ in run.finished():
            pass
        return run.completions()

    def stream(
        self, requests: Sequence[Request], sampling: SamplingSettings, seed: int
    ) -> Iterator[NewToken]:
        """Every token as soon as it is drawn."""
        return _Run(self, requests, sampling, seed).new_tokens()

    def _rows_agree(self, widths: Sequence[int]) -> bool:
        weights = [p.detach() for stage in self.stages for p in stage.parameters()]
        agree = rows_agree(weights, (*widths, 1024))
        everyone = torch.tensor([float(agree)])
        for group in (self.mesh.model, self.mesh.dp):
            all_reduce_(everyone, group, op="min")
        return bool(everyone)

    def _check_stages(self) -> None:
        first = [stage.has_embedding for stage in self.stages].count(True)
        last = [stage.has_head for stage in self.stages].count(True)
        rank = self.mesh.pp.rank
        if first != (rank == 0) or last != (rank == self.ranks - 1):
            raise ValueError(
                f"generate: pipeline rank {rank} of {self.ranks} holds {first} embeddings and "
                f"{last} heads; allowed: stages dealt round, so that the first rank embeds and the "
                "last one has the head (schedules 1f1b, interleaved, zero_bubble)"
            )


class _Run:
    """One generation: its scheduler, and what is under way."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        sampling: SamplingSettings,
        seed: int,
    ) -> None:
        config = engine.config
        check_requests(requests, longest=engine.longest, vocab_size=config.vocab_size)
        self.engine = engine
        self.scheduler = self._scheduler(requests, sampling)
        device = engine.device
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
        self.admissions = [Admission()] * groups
        self.chunks: list[list[Chunk]] = [[] for _ in range(groups)]
        self.over = [False] * groups
        self.prefilled: list[Tensor] = []
        self.found: dict[int, Completion] = {}
        self.ended: list[Finished] = []
        engine.counts = Counts()
        for decoder in engine.decoders:
            decoder.begin()

    def _scheduler(self, requests: Sequence[Request], sampling: SamplingSettings) -> Scheduler:
        engine = self.engine
        stop_strings = StopStrings(sampling.stop_strings, engine.detokenize)
        return Scheduler(requests, sampling, stop_strings, rows=engine.rows, slots=engine.slots)

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

    def completions(self) -> list[Completion]:
        return self.with_logprobs([self.found[index] for index in range(len(self.found))])

    def with_logprobs(self, found: list[Made]) -> list[Made]:
        """On all pipeline stages those that the last one has seen."""
        if self.ranks == 1 or not found:
            return found
        sizes = [len(one.tokens) for one in found]
        both = torch.stack(
            [
                torch.cat([one.logprobs for one in found]),
                torch.cat([one.sampled_logprobs for one in found]),
            ]
        )
        broadcast_(both, self.engine.mesh.decode, source=self.ranks - 1)
        logprobs, sampled = (table.split(sizes) for table in both)
        return [
            replace(one, logprobs=a.clone(), sampled_logprobs=b.clone())
            for one, a, b in zip(found, logprobs, sampled, strict=True)
        ]

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
            [t[places] for t in self.engine._logprobs], dim=1
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
            tokens = self._tokens_of_last_step(group)
            n = rows.live
            engine._tokens[rows.host_slots[:n], rows.host_keys[:n, 1]] = tokens[:n]
            finished, admission = self.scheduler.advance(group, tokens)
            self._keep(finished)
        self.over[group] = rows.live == 0
        self.admissions[group] = admission
        self.chunks[group] = chunks_of(admission, engine.prefill_tokens, engine.device)
        counts = engine.counts
        counts.prompts_prefilled += len(admission.prefills)
        prompt_tokens = sum(map(len, admission.prefills.values()))
        prompt_tokens += sum(len(tokens) for _, tokens in admission.continued.values())
        counts.tokens_prefilled += prompt_tokens
        computed = sum(chunk.tokens.numel() for chunk in self.chunks[group])
        counts.tokens_padded += computed - prompt_tokens

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
            checked_forward(decoder, engine.unchecked[item.chunk], rows, width)
            del engine.unchecked[item.chunk]
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
        engine._logprobs[0].index_put_(places, drawn.logprob)
        engine._logprobs[1].index_put_(places, drawn.sampled_logprob)
        self.drawn[group] = drawn.token.cpu().numpy()
        if self.ranks > 1:
            self.ring.outgoing.append(drawn.token)
        counts = engine.counts
        counts.steps += 1
        counts.tokens_decoded += n
        counts.rows_padded += width - n
        return True

    def _prefill(self, item: Item) -> None:
        admission, engine = self.admissions[item.group], self.engine
        stage, cache = engine.stages[item.chunk], engine.caches[item.chunk]
        copy_prompts_(cache, admission.early_copies, admission.lengths)
        for number, chunk in enumerate(self.chunks[item.group]):
            given = None if stage.has_embedding else self.prefilled[number]
            out = prefill(stage, cache, chunk, given)
            if not stage.has_head:
                self.ring.outgoing.append(out)
        copy_prompts_(cache, admission.copies, admission.lengths)

    def _keep(self, finished: list[Finished]) -> None:
        """Completions of finished sequences, before their slots are used again."""
        self.ended += finished
        with torch.inference_mode(False):  # so that their tensors may be trained on
            for done in finished:
                request = done.sequence.request
                span = slice(len(request.prompt), done.length)
                logprobs = self.engine._logprobs[:, done.slot, span].cpu().clone()
                self.found[done.sequence.index] = Completion(
                    request,
                    done.sequence.sequence_id,
                    torch.from_numpy(self.engine._tokens[done.slot, span].copy()),
                    logprobs[0],
                    logprobs[1],
                    done.reason,
                )

    def _width(self, group: int) -> int:
        live = self.engine.rows[group].live
        return narrowest(self.engine.widths, live) if self.engine.pads else live
