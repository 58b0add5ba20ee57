"""A generation whose device goes on by itself: the host reads what was drawn some steps late.

A step is one graph: layers, head, sampling, and each row by its token (`decode_advance_`), which
the next step takes where it lies. A row that drew an end token or reached its limit is
frozen there. What only the host can see, a stop string or who comes next, it sees `lag` steps late:
what was drawn for a sequence after its end is never looked at, and lies in places of its own slot
that the next sequence writes before it reads them. So the tokens are those of lag 0.

For one rank that is asked nothing in between: pipelines, tensor parallelism, episodes and streams
have no lag (run.py).

Letters: W rows of a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megarlx.generation.decoders.in_place import InPlaceDecoder
from megarlx.generation.decoders.interface import checked_forward
from megarlx.generation.requests import Request, SamplingSettings
from megarlx.generation.ring import Item
from megarlx.generation.rows import Rows
from megarlx.generation.run import Run
from megarlx.generation.scheduler import Admission
from megarlx.generation.widths import narrowest
from megarlx.ops import sample
from megarlx.ops.decode_parts import StepState, decode_advance_

if TYPE_CHECKING:
    from megarlx.generation.engine import Engine

LAG = 4  # steps: the host has as long for its part as they take
FIELDS = ("tokens", "positions", "slots", "last_positions")


class DeviceRows:
    """The rows of an engine where its steps read and write them; kept from run to run, since graphs
    hold their places."""

    def __init__(self, most: int, idle_slot: int, device: torch.device) -> None:
        self.idle_slot, self.device = idle_slot, device
        self.table = torch.zeros(len(FIELDS), most, dtype=torch.int64, device=device)
        self.keys = torch.zeros(most, 2, dtype=torch.int64, device=device)
        self.frozen = torch.ones(most, dtype=torch.bool, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        # temperature, top_p, min_p; top_k
        self.reals = torch.zeros(3, 1, device=device)
        self.top_k = torch.zeros(1, dtype=torch.int64, device=device)
        self.ends: dict[int, Tensor] = {}
        self._states: dict[int, StepState] = {}
        self.clear()

    def clear(self) -> None:
        self.table.zero_()
        self.table[FIELDS.index("slots")] = self.idle_slot
        self.keys.zero_()
        self.frozen.fill_(True)

    def begin(self, sampling: SamplingSettings, seed: int) -> None:
        self.clear()
        self.seed.fill_(seed)
        self.top_k.fill_(sampling.top_k)
        reals = (sampling.temperature, sampling.top_p, sampling.min_p)
        self.reals.copy_(torch.tensor(reals)[:, None])
        count = len(sampling.stop_tokens)
        ends = torch.tensor(sampling.stop_tokens, dtype=torch.int64)
        self.ends.setdefault(count, torch.empty(count, dtype=torch.int64, device=self.device))
        self.ends[count].copy_(ends)

    def state(self, width: int) -> StepState:
        """The first rows, and room for what one step draws for them."""
        if width not in self._states:
            fields = dict(zip(FIELDS, (row[:width] for row in self.table), strict=True))
            self._states[width] = StepState(
                **fields,
                keys=self.keys[:width],
                frozen=self.frozen[:width],
                step=self.step,
                history=torch.zeros(1, width, dtype=torch.int64, device=self.device),
                logprobs=torch.zeros(2, 1, width, device=self.device),
            )
        return self._states[width]

    def put(self, rows: Sequence[int], table: np.ndarray, keys: np.ndarray, idle: int) -> None:
        """New rows: table [fields, n] and keys [n, 2]; then `idle` more, that wait for one."""
        n, free = len(rows) - idle, np.zeros((len(FIELDS) + 2, idle), dtype=np.int64)
        free[FIELDS.index("slots")] = self.idle_slot
        values = np.concatenate((np.concatenate((table, keys.T)), free), axis=1)
        whole = torch.from_numpy(np.concatenate((np.array([rows]), values)))
        if self.device.type == "cuda":
            whole = whole.pin_memory().to(self.device, non_blocking=True)
        at = whole[0]
        self.table[:, at] = whole[1 : 1 + len(FIELDS)]
        self.keys[at] = whole[1 + len(FIELDS) :].T
        self.frozen[at] = torch.arange(len(rows), device=self.device) >= n

    def move(self, order: Sequence[int]) -> None:
        """Row i becomes what row order[i] was; the rest is free."""
        n = len(order)
        at = torch.tensor(order).to(self.device, non_blocking=True)
        for table, dim in ((self.table, 1), (self.keys, 0), (self.frozen, 0)):
            table.narrow(dim, 0, n).copy_(table.index_select(dim, at))
        self.table[FIELDS.index("slots"), n:] = self.idle_slot
        self.table[FIELDS.index("positions"), n:] = 0
        self.frozen[n:] = True


@dataclass(frozen=True)
class _Flight:
    """A step under way."""

    number: int
    width: int
    places: dict[int, int]  # the device's row of a sequence, by its index
    tokens: Tensor  # [most] on the host
    logprobs: Tensor  # [2, most]
    landed: torch.cuda.Event | None


class AheadRun(Run):
    """A run of one rank with an InPlaceDecoder."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        sampling: SamplingSettings,
        seed: int,
        lag: int | None = None,
    ) -> None:
        super().__init__(engine, requests, sampling, seed)
        self.lag, self.sampling = LAG if lag is None else lag, sampling
        (decoder,), (self.host_rows,) = engine.decoders, engine.rows
        assert isinstance(decoder, InPlaceDecoder)
        assert engine.device_rows is not None
        self.decoder, self.device_rows = decoder, engine.device_rows
        self.device_rows.begin(sampling, seed)
        self.drawn_logprobs = torch.full(engine.drawn_logprobs.shape, torch.nan)
        self.places: dict[int, int] = {}
        self.free = list(range(self.host_rows.most))[::-1]
        self.flights: deque[_Flight] = deque()
        self.number = 0
        most, pinned = self.host_rows.most, engine.device.type == "cuda"
        self._tokens = torch.zeros(self.lag + 1, most, dtype=torch.int64, pin_memory=pinned)
        self._logprobs = torch.zeros(self.lag + 1, 2, most, pin_memory=pinned)

    def finished(self) -> Iterator[tuple[Rows, int]]:
        with torch.inference_mode():
            self._admit(self.scheduler.fill(0))
        while self.host_rows.live:
            with torch.inference_mode():
                self._launch()
                if len(self.flights) > self.lag:
                    self._take_in(self.flights.popleft())
            yield self.host_rows, self.host_rows.live

    def _launch(self) -> None:
        engine, width = self.engine, self._device_width()
        if engine.unchecked:
            self.host_rows.upload()
            live = narrowest(engine.widths, self.host_rows.live)
            exact = engine.exact.get(0)
            checked_forward(self.decoder, engine.unchecked[0], self.host_rows, live, exact)
            engine.unchecked.clear()
            engine.exact.clear()
        state, s = self.device_rows.state(width), self.sampling
        key = (width, s.top_k > 0, s.top_p < 1, s.min_p > 0, len(s.stop_tokens))
        of = self.device_rows
        written = (of.table, of.keys, of.frozen, of.step)
        self.decoder.replay(key, lambda: self._step(state, width), written)
        at = self.number % (self.lag + 1)
        tokens, logprobs = self._tokens[at], self._logprobs[at]
        tokens[:width].copy_(state.history[0], non_blocking=True)
        logprobs[:, :width].copy_(state.logprobs[:, 0], non_blocking=True)
        landed = None
        if engine.device.type == "cuda":
            landed = torch.cuda.Event()
            landed.record()
        self.flights.append(_Flight(self.number, width, self.places, tokens, logprobs, landed))
        self.number += 1
        engine.counts.steps += 1

    def _step(self, state: StepState, width: int) -> None:
        """All of it on the device."""
        s, of = self.sampling, self.device_rows
        self.decoder.run(state.tokens, state.positions, state.slots)
        heat, top_p, min_p = of.reals
        logits = self.decoder.logits(width)
        drawn = sample(
            logits.float() if logits.dtype == torch.float64 else logits,
            seed=of.seed,
            keys=state.keys,
            temperature=heat,
            top_k=of.top_k if s.top_k > 0 else 0,
            top_p=top_p if s.top_p < 1 else 1.0,
            min_p=min_p if s.min_p > 0 else 0.0,
            vocab_size=self.engine.config.vocab_size,
        )
        ends = of.ends[len(s.stop_tokens)]
        decode_advance_(state, *drawn, ends=ends, idle_slot=of.idle_slot)

    def _take_in(self, flight: _Flight) -> None:
        """What a step drew, for the sequences that it had and that are not over."""
        if flight.landed is not None:
            flight.landed.synchronize()
        rows, n = self.host_rows, self.host_rows.live
        places = np.array([flight.places.get(one.index, -1) for one in rows.sequences])
        drew = places >= 0
        tokens = np.where(drew, flight.tokens.numpy()[places], 0)
        slots, positions = rows.host_slots[:n][drew], rows.host_keys[:n, 1][drew]
        self.drawn_logprobs.numpy()[:, slots, positions] = flight.logprobs.numpy()[:, places[drew]]
        finished, admission = self.scheduler.advance(0, tokens, None if drew.all() else drew)
        self.drawn[0] = tokens
        self._keep(finished)
        counts = self.engine.counts
        counts.tokens_decoded += int(drew.sum())
        counts.rows_padded += flight.width - int(drew.sum())
        self._admit(admission, [done.sequence.index for done in finished])

    def _admit(self, admission: Admission, over: Sequence[int] = ()) -> None:
        """The device's rows as the host's are by now, and the prompts of new ones."""
        self._admitted(0, admission)
        self._prefill(Item(0, 0, 0))
        rows, places = self.host_rows, dict(self.places)
        new = [r for r, one in enumerate(rows.sequences) if one.index not in places]
        if not new and not over:
            return
        self.free += [places.pop(index) for index in over]
        self.free.sort(reverse=True)
        taken = [self.free.pop() for _ in new]
        places |= {rows.sequences[r].index: place for r, place in zip(new, taken, strict=True)}
        idle = [*set(self.places.values()) - set(places.values())]
        self.places = places
        host = (rows.host_tokens, rows.host_positions, rows.host_slots, rows.last_positions)
        table = np.stack([values[new] for values in host])
        self.device_rows.put([*taken, *idle], table, rows.host_keys[new], len(idle))
        self._close_ranks()

    def _close_ranks(self) -> None:
        """Fewer rows that stand apart go together, where a narrower step then holds them."""
        live = len(self.places)
        if not live or narrowest(self.engine.widths, live) >= self._device_width():
            return
        order = sorted(self.places.items(), key=lambda one: one[1])
        self.device_rows.move([place for _, place in order])
        self.places = {index: place for place, (index, _) in enumerate(order)}
        self.free = list(range(live, self.host_rows.most))[::-1]

    def _device_width(self) -> int:
        return narrowest(self.engine.widths, max(self.places.values()) + 1)
