"""Samples of a prompt share its keys and values: they exist once, and are read once for all.

flash-attn's part is stood in for by plain torch here; what it is given, and what is merged of what
it leaves, is the decoder's own of a card.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_stand_ins import Stand
from generation_cases import engine, mixed_requests, prompt, same_bits, small_stage
from test_ahead import NATIVE, Launches, in_place_on_a_cpu
from torch import Tensor

from megarlx.generation import engine as engines
from megarlx.generation.ahead import AheadRun
from megarlx.generation.decoders import in_place
from megarlx.generation.engine import Engine
from megarlx.generation.requests import Completion, Request, SamplingSettings
from megarlx.model.attention_flash import Flash
from megarlx.model.attention_form import AttentionForm
from megarlx.model.attention_sdpa import SDPA
from megarlx.model.documents import Documents
from megarlx.model.kv_cache import CacheStep, KVCache, LayerCache, PageTable, shares_prompts

__all__ = ["in_place_on_a_cpu"]

CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}


def random_step(
    dtype: torch.dtype, slots: list[int], positions: list[int], *, size: int, first: list[int]
) -> CacheStep:
    """Slots whose first part is that of the slot of the same length, pages at random."""
    generator = torch.Generator().manual_seed(len(slots))
    count, of_slot = len(first), -(-48 // size)
    pages = torch.randperm(2 * count * of_slot, generator=generator).view(count, 2, of_slot)
    for slot, length in enumerate(first):
        pages[slot, 0] = pages[first.index(length), 0]
    rows = torch.cat((torch.tensor(first)[:, None], pages.flatten(1)), 1).int()
    table = PageTable(rows, pages.numel(), size, shares=True)
    cache = KVCache.empty(1, table, 2, 8, dtype=dtype)
    for tensor in (cache.keys, cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    n = len(slots)
    return CacheStep(
        cache, Documents.rows(n, 1), torch.tensor(slots), torch.tensor(positions), table.longest
    )


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("size", [4, 16, 48])
def test_two_parts_are_attention_over_both(dtype: torch.dtype, size: int) -> None:
    """Groups together and torn apart, prompts of one token, the same length twice."""
    first = [7, 7, 20, 0, 7, 0, 16]
    slots = [0, 1, 4, 2, 3, 0, 5, 6, 3]
    positions = [7, 30, 12, 47, 0, 8, 5, 16, 40]
    step = random_step(dtype, slots, positions, size=size, first=first)
    stand = Stand()
    q = torch.randn(len(slots), 4, 8, dtype=dtype)
    form = AttentionForm(0.3)
    found = stand.flash.decode(q, step.layer(0), form)
    expected = SDPA.decode(q, step.layer(0), form)
    torch.testing.assert_close(found, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    # once for neighbours, and one place that does not count where nothing is shared
    assert stand.read["shared"] == 7 + 20 + 1 + 7 + 1 + 16 + 1


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_a_row_has_the_same_bits_among_any_rows(dtype: torch.dtype) -> None:
    first = [7, 7, 20, 0, 7, 0, 16]
    slots, positions = [0, 1, 4, 2, 3, 5, 6], [7, 30, 12, 47, 0, 5, 16]
    form, stand = AttentionForm(0.3), Stand()
    q = torch.randn(len(slots), 4, 8, dtype=dtype)
    step = random_step(dtype, slots, positions, size=4, first=first)
    whole = stand.flash.decode(q, step.layer(0), form)
    for order in ([3], [0, 2], [6, 5, 4, 3, 2, 1, 0], [1, 3, 0, 4], [2, 2, 2]):
        some = CacheStep(
            step.cache,
            Documents.rows(len(order), 1),
            step.slots[order],
            step.starts[order],
            step.span,
        )
        out = stand.flash.decode(q[order], some.layer(0), form)
        assert torch.equal(out, whole[order]), order
    assert len(stand.splits) == 1


def two_parts(monkeypatch: pytest.MonkeyPatch) -> Stand:
    stand = Stand()
    monkeypatch.setattr(
        in_place, "decode_attention", lambda q, cache, form, _: stand.flash.decode(q, cache, form)
    )
    return stand


def that_differ(a: list[Completion], b: list[Completion]) -> int:
    """Sequences with another token."""
    pairs = zip(a, b, strict=True)
    return sum(not torch.equal(one.tokens, other.tokens) for one, other in pairs)


@pytest.mark.usefixtures("in_place_on_a_cpu")
@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_tokens_are_those_of_attention_over_the_whole(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, requests = small_stage(family, dtype), mixed_requests(6, 5)
    settings = SamplingSettings(stop_tokens=(11, 60))
    expected = engine(stage).generate(requests, settings, seed=3)
    stand = two_parts(monkeypatch)
    found = engine(stage).generate(requests, settings, seed=3)
    assert stand.read["shared"] > 0
    assert that_differ(found, expected) == 0  # of 30 sequences
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("in_place_on_a_cpu")
def test_a_sample_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other samples of its prompt, other prompts, slots, and a cache in which it had to wait."""
    two_parts(monkeypatch)
    stage, requests = small_stage("olmo2"), mixed_requests(6, 5)
    settings = SamplingSettings(stop_tokens=(11, 60))
    expected = engine(stage).generate(requests, settings, seed=3)
    for options in ({"slots": 4}, {"slots": 64}, {"cache_tokens": 80}):
        assert same_bits(engine(stage, **options).generate(requests, settings, seed=3), expected)
    kept = engine(stage)
    for request in requests[::2]:
        for number in request.sequence_ids[1:3]:
            one = Request(request.prompt, [number], request.max_new_tokens)
            (found,) = kept.generate([one], settings, seed=3)
            (same,) = (c for c in expected if c.sequence_id == number)
            assert torch.equal(found.tokens, same.tokens)
            assert torch.equal(found.logprobs, same.logprobs)


@pytest.mark.usefixtures("in_place_on_a_cpu")
def test_a_prompt_is_read_once_for_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = two_parts(monkeypatch)
    stage = small_stage("llama3")
    kept = engine(stage)
    kept.unchecked.clear()
    kept.generate([Request(prompt(33, 1), list(range(10)), 8)], SamplingSettings(), seed=1)
    # and not at all in the steps behind the last token, which the host learns late: their idle rows
    # read one place
    assert stand.read["shared"] // (32 * stage.config.layers) == 8


@pytest.mark.parametrize("slots", [1, 3])
def test_on_a_card_an_engine_of_one_slot_has_one_part(
    slots: int, in_place_on_a_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "shares_prompts", lambda slots, _: shares_prompts(slots, False))
    stand = two_parts(monkeypatch)
    stage, requests = small_stage("qwen3", torch.float64), mixed_requests(3, 2)
    expected = engine(stage).generate(requests, SamplingSettings(), seed=1)
    stand.read["shared"] = 0
    found = engine(stage, slots=slots).generate(requests, SamplingSettings(), seed=1)
    assert that_differ(found, expected) == 0
    assert (stand.read["shared"] == 0) == (slots == 1)


def held_tokens(kept: Engine) -> int:
    return kept.counts.places_held


@pytest.mark.parametrize("samples", [1, 4, 16])
def test_keys_and_values_of_a_prompt_exist_once(samples: int) -> None:
    kept = engine(small_stage())
    kept.generate([Request(prompt(41, 1), list(range(samples)), 16)], SamplingSettings(), seed=1)
    assert held_tokens(kept) == 48 + 16 * samples  # 40 of the prompt, 16 of each sample
    assert not kept.caches[0].keys[:, 1 + 3 + samples :].any()  # and behind the idle page no more


def test_nobody_waits_for_pages_by_default() -> None:
    """The longest sequences, whose prompts end where most of a page is lost."""
    for length in (2, 18, 34, 50):
        kept = engine(small_stage(), slots=16)
        requests = [Request(prompt(length, i), [i], 64 - length) for i in range(16)]
        kept.generate(requests, SamplingSettings(), seed=1)
        assert kept.counts.steps == 64 - length


@pytest.mark.parametrize("tokens", [80, 128, 400])
def test_few_pages_make_sequences_wait_and_change_none(tokens: int) -> None:
    stage, requests = small_stage("llama3"), mixed_requests(9, 5)
    settings = SamplingSettings(stop_tokens=(11, 60))
    expected = engine(stage).generate(requests, settings, seed=7)
    kept = engine(stage, cache_tokens=tokens)
    assert same_bits(kept.generate(requests, settings, seed=7), expected)
    assert held_tokens(kept) <= tokens
    assert kept.caches[0].keys.shape[1:3] == (1 + tokens // 16, 16)
    every: list[Any] = kept.episodes(requests, settings, 7)
    assert [one.tokens.tolist()[len(one.request.prompt) :] for one in every] == [
        one.tokens.tolist() for one in expected
    ]


def test_what_can_never_fit_is_refused_before_anything_starts() -> None:
    kept = engine(small_stage(), cache_tokens=60)
    requests = [Request(prompt(4, 0), [0], 3), Request(prompt(20, 1), [1], 44)]
    with pytest.raises(ValueError, match="request 1 needs 5 pages of 16 tokens; allowed: at most"):
        kept.generate(requests, SamplingSettings(), seed=1)


class OneLaunch:
    """Each part of attention as one operation."""

    lse = torch.zeros(64, 4)

    def shared(self, q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.relu(q), self.lse[: len(q)]

    own = shared


@pytest.mark.usefixtures("in_place_on_a_cpu")
def test_a_layer_of_two_parts_is_eleven_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = Flash(2, Stand().varlen, OneLaunch())

    def attend(q: Tensor, cache: LayerCache, form: AttentionForm, _: Any) -> Tensor:
        _ = cache.step.parts  # which the kernels read, made once a step
        return flash.decode(q, cache, form)

    monkeypatch.setattr(in_place, "decode_attention", attend)
    stage = small_stage("olmo2")
    kept = engine(stage)
    kept.unchecked.clear()
    run = AheadRun(kept, mixed_requests(4, 4), SamplingSettings(stop_tokens=(3,)), 1)
    with torch.inference_mode():
        run._admit(run.scheduler.fill(0))
        state = kept.device_rows.state(16)
        run._step(state, 16)  # which makes its buffers
        with Launches() as launches:
            run._step(state, 16)
    assert launches.names.count("megarlx::merge_attention") == stage.config.layers
    assert len(launches.names) <= 11 * stage.config.layers + 6 + 24
