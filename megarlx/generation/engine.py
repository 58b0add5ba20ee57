"""Generation on the live training weights: prompts in, completions out, on any layout.

Every data-parallel rank is given its own requests; the tensor- and pipeline-parallel ranks of one
copy of the model are all given the same ones and all return the same completions.

The same seed gives a sequence the same tokens whatever else is generated beside it: noise is keyed
by (sequence id, position), rows are computed each alone or in products whose rows do not depend on
their neighbours, and prompts are padded by their own length (widths.py says where the limits are).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megarlx.choices import PAGE_TOKENS, PREFILL_TOKENS
from megarlx.comm.collectives import all_reduce_
from megarlx.comm.groups import Mesh
from megarlx.generation.ahead import AheadRun, DeviceRows
from megarlx.generation.decoders.choose import decoder_of
from megarlx.generation.decoders.fp8 import Fp8Products
from megarlx.generation.decoders.in_place import InPlaceDecoder
from megarlx.generation.decoders.interface import Decoder
from megarlx.generation.decoders.stage import StageDecoder
from megarlx.generation.kept import Counts
from megarlx.generation.requests import (
    Completion,
    NewToken,
    OnTurnsEnd,
    Request,
    SamplingSettings,
    Trajectory,
)
from megarlx.generation.rows import Rows
from megarlx.generation.run import Run
from megarlx.generation.stop import Detokenize
from megarlx.generation.widths import NARROW, ladder, rows_agree
from megarlx.model.build import ParallelModel
from megarlx.model.documents import padded_length
from megarlx.model.kv_cache import PageTable, shares_prompts
from megarlx.model.transformer import Stage
from megarlx.ops.narrow_product import MOST_ROWS


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
        cache_tokens: int | None = None,
        fp8: bool = False,
    ) -> None:
        """`stages` are those of this rank; `detokenize` is needed for stop strings only.

        one_width     decode every step at the width of all slots; by default where the rows of
                      products of different widths differ, and where the weights are in fp8
        prefill_tokens  most tokens of several prompts in one product; None: by the device
        cache_tokens  that the caches hold, in whole pages; None: what `slots` sequences of the
                      longest length fill
        fp8             decode with weights in fp8, where fp8.without_fp8 has nothing against it
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
        in_place = all(decoder_of(stage) is InPlaceDecoder for stage in self.stages)
        # few rows cost what their matrices cost to read, so they need no second width
        few = in_place and 0 < each <= MOST_ROWS
        self.widths = (each,) if few else ladder(each)
        self.slots = [range(g * each, (g + 1) * each) for g in range(self.ranks)]
        self.idle_slot = self.ranks * each  # where rows of padding write
        on_cpu = self.device.type == "cpu"
        self.prefill_tokens = prefill_tokens or PREFILL_TOKENS["cpu" if on_cpu else "cuda"]
        # a card would spend its time on launches, were its prompts prefilled one by one
        prompts_alone = bool(one_width) or on_cpu
        if one_width is None and not few:
            one_width = fp8 or not self._rows_agree(self.widths)
            # sequence parallelism splits the rows of the model's own layers
            if on_cpu and not one_width and not self.stages[0].sequence_parallel:
                narrow = (*NARROW, *self.widths)
                self.widths = narrow if self._rows_agree(narrow) else self.widths
        if one_width:
            self.widths = self.widths[-1:]
            self.prefill_tokens = 0 if prompts_alone else self.prefill_tokens
        most, places = self.widths[-1], padded_length(longest)
        self.table = PageTable.empty(
            self.idle_slot + 1,
            longest,
            size=PAGE_TOKENS["cpu" if on_cpu else "cuda"],
            shares=shares_prompts(slots, on_cpu),
            tokens=cache_tokens,
            device=self.device,
        )
        self.caches = [stage.kv_cache(self.table) for stage in self.stages]
        self.decoders: list[Decoder] = [
            InPlaceDecoder(stage, cache, most, Fp8Products(most))
            if fp8
            else decoder_of(stage)(stage, cache, most)
            for stage, cache in zip(self.stages, self.caches, strict=True)
        ]
        self.pads = any(decoder.pads for decoder in self.decoders)
        # of those that are faster than the model's own layers, until their first step
        self.unchecked = {
            index: StageDecoder(self.stages[index], self.caches[index], most)
            for index, decoder in enumerate(self.decoders)
            if not isinstance(decoder, StageDecoder)
        }
        # what is compared in place of a decoder that rounds the weights
        self.exact: dict[int, Decoder] = {
            index: InPlaceDecoder(self.stages[index], self.caches[index], most)
            for index in (self.unchecked if fp8 else ())
        }
        self.rows = [Rows(most, self.idle_slot, self.device) for _ in self.slots]
        # Where one rank decodes in graphs that feed themselves, the host need not see each token.
        self.device_rows: DeviceRows | None = None
        if self.ranks == len(self.stages) == 1 and isinstance(self.decoders[0], InPlaceDecoder):
            self.device_rows = DeviceRows(most, self.idle_slot, self.device)
        shape = (self.idle_slot + 1, places + 1)
        # What was drawn for each slot, by position. Tokens are known on every rank.
        self.drawn_tokens = np.zeros(shape, dtype=np.int64)
        self.drawn_logprobs = torch.full((2, *shape), torch.nan, device=self.device)
        self.counts = Counts()

    @staticmethod
    def of(model: ParallelModel, **options: Any) -> Engine:
        return Engine(model.stages, model.mesh, **options)

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSettings, seed: int
    ) -> list[Completion]:
        make = Run if self.device_rows is None else AheadRun
        return make(self, requests, sampling, seed).to_the_end().completions()

    def stream(
        self, requests: Sequence[Request], sampling: SamplingSettings, seed: int
    ) -> Iterator[NewToken]:
        return Run(self, requests, sampling, seed).new_tokens()

    def episodes(
        self,
        requests: Sequence[Request],
        sampling: SamplingSettings,
        seed: int,
        on_turns_end: OnTurnsEnd | None = None,
        *,
        max_tokens: int | None = None,
        feed_up_to: int | None = None,
    ) -> list[Trajectory]:
        """Turns that end in the same step are asked about in one call, and nothing is decoded until
        it returns; while a sequence waits for nothing its slot decodes.

        feed_up_to   observations of so many tokens go through decode steps, longer ones are
                     prefilled; by default 32 on a CPU, where a decode step costs by the row, and 4
                     elsewhere
        """
        run = Run(self, requests, sampling, seed, on_turns_end, max_tokens, feed_up_to)
        return run.to_the_end().trajectories()

    def metrics(self) -> Mapping[str, float]:
        return {"cache_tokens_held": float(self.counts.places_held)}

    def _rows_agree(self, widths: Sequence[int]) -> bool:
        weights = [p.detach() for stage in self.stages for p in stage.parameters()]
        agree = rows_agree(weights, (*widths, 1024))
        everyone = torch.tensor([float(agree)], device=self.device)
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
