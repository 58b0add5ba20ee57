"""What the engine gives back: the model's own distribution, ended where it should be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from generation_cases import (
    FAMILIES,
    engine,
    mixed_requests,
    prompt,
    recomputed,
    same_bits,
    small_stage,
)

from megarlx.generation.engine import Engine
from megarlx.generation.requests import Request, SamplingSettings
from megarlx.generation.stop import StopStrings
from megarlx.generation.text import stream_texts

PLAIN = SamplingSettings()
LETTERS = "".join(chr(0x100 + token) for token in range(97))


def letters(tokens: object) -> str:
    return "".join(LETTERS[t] for t in tokens)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_recomputing_everything(family: str, dtype: torch.dtype) -> None:
    # bf16 goes through the model's own layers; its rounding moves log-probs more
    stage = small_stage(family, dtype=dtype)
    requests = [Request(prompt(n, n), (n, 100 + n), 10) for n in (1, 2, 17, 40)]
    found = engine(stage).generate(requests, PLAIN, seed=9)
    assert [c.sequence_id for c in found] == [1, 101, 2, 102, 17, 117, 40, 140]
    if dtype == torch.bfloat16:
        first = [
            recomputed(stage, replace(c.request, max_new_tokens=1), c.sequence_id, 9) for c in found
        ]
        gap = torch.cat(
            [
                a.logprobs[:1] - b.logprobs
                for a, b in zip(found, first, strict=True)
                if a.tokens[0] == b.tokens[0]
            ]
        )
        assert len(gap) >= 6
        assert gap.abs().max() < 0.1
        return
    for completion in found:
        expected = recomputed(stage, completion.request, completion.sequence_id, 9)
        assert torch.equal(completion.tokens, expected.tokens)
        torch.testing.assert_close(completion.logprobs, expected.logprobs, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(completion.sampled_logprobs, completion.logprobs)


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_heads": 4},
        {"kv_heads": 1},
        {"heads": 1, "kv_heads": 1},
        {"head_dim": 72, "kv_heads": 2},
        {"tied_embeddings": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("qk_norm", ["none", "per_head", "full"])
def test_every_shape_of_heads_decodes_like_the_model(qk_norm: str, changes: dict) -> None:
    stage = small_stage("olmo2", dtype=torch.float64, qk_norm=qk_norm, **changes)
    request = Request(prompt(9, 1), (4,), 12)
    (found,) = engine(stage).generate([request], PLAIN, seed=2)
    expected = recomputed(stage, request, 4, 2)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-6, atol=1e-6)


def test_settings_of_sampling_reach_the_draw() -> None:
    requests = mixed_requests(3, 4)
    settings = SamplingSettings(temperature=0.7, top_k=5)
    found = engine(small_stage()).generate(requests, settings, seed=1)
    assert all((c.sampled_logprobs > c.logprobs).any() for c in found)
    greedy = engine(small_stage()).generate(requests, SamplingSettings(temperature=0.0), seed=1)
    assert all((c.sampled_logprobs == 0).all() for c in greedy)
    for first in range(0, 12, 4):
        group = greedy[first : first + 4]
        assert all(torch.equal(c.tokens, group[0].tokens) for c in group)


def test_weights_are_read_live() -> None:
    stage, requests = small_stage(), mixed_requests(2, 2)
    kept = engine(stage)
    before = kept.generate(requests, PLAIN, seed=1)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.mul_(1.3)
    after = kept.generate(requests, PLAIN, seed=1)
    assert not same_bits(before, after)
    assert same_bits(after, engine(stage).generate(requests, PLAIN, seed=1))


def test_completions_can_be_trained_on() -> None:
    (found,) = engine(small_stage()).generate([Request([1, 2], (0,), 3)], PLAIN, seed=1)
    weight = torch.ones(3, requires_grad=True)
    (weight * found.logprobs).sum().backward()
    assert torch.equal(weight.grad, found.logprobs)


def test_a_stop_token_is_kept_and_ends_its_sequence_only() -> None:
    requests = mixed_requests(6, 8, new=20)
    free = engine(small_stage()).generate(requests, PLAIN, seed=3)
    stops = SamplingSettings(stop_tokens=(11, 60, 61))
    stopped = engine(small_stage()).generate(requests, stops, seed=3)
    reasons = set()
    for a, b in zip(free, stopped, strict=True):
        hits = torch.isin(a.tokens, torch.tensor(stops.stop_tokens)).nonzero().flatten().tolist()
        end = hits[0] + 1 if hits else len(a.tokens)
        assert torch.equal(b.tokens, a.tokens[:end])
        assert torch.equal(b.logprobs, a.logprobs[:end])
        assert b.finish_reason == ("stop" if hits else "length")
        reasons.add(b.finish_reason)
    assert reasons == {"stop", "length"}


def test_a_stop_token_at_the_length_limit_is_a_stop() -> None:
    request = Request([5, 6, 7], (0,), 4)
    (free,) = engine(small_stage()).generate([request], PLAIN, seed=3)
    last = SamplingSettings(stop_tokens=(int(free.tokens[-1]),))
    (found,) = engine(small_stage()).generate([request], last, seed=3)
    assert found.finish_reason == "stop"


def test_stop_strings_end_a_sequence_across_token_boundaries() -> None:
    requests = mixed_requests(4, 8, new=20)
    free = engine(small_stage()).generate(requests, PLAIN, seed=3)
    # two texts that occur: one inside the first sequence, of three tokens; one of a single token
    texts = (letters(free[0].tokens[4:7].tolist()), letters(free[9].tokens[3:4].tolist()))
    settings = SamplingSettings(stop_strings=texts)
    found = engine(small_stage(), detokenize=letters).generate(requests, settings, seed=3)
    assert found[0].finish_reason == "stop_string"
    for a, b in zip(free, found, strict=True):
        text = letters(a.tokens.tolist())
        ends = [text.index(stop) + len(stop) for stop in texts if stop in text]
        expected = min(ends, default=len(text))
        assert len(b.tokens) == expected
        assert torch.equal(b.tokens, a.tokens[:expected])
        assert b.finish_reason == ("stop_string" if ends else "length")


def test_stop_strings_are_found_behind_tokens_without_text() -> None:
    """Tokens 0 stand for nothing; the text must be looked for further back."""
    stop = StopStrings(("ab",), lambda tokens: "".join("?ab"[t] for t in tokens if t))
    assert stop.reached([1] + [0] * 40 + [2])
    assert not stop.reached([2] + [0] * 40 + [1])
    with pytest.raises(ValueError, match="no detokenize function"):
        StopStrings(("x",), None)


def test_a_group_shares_one_prefill_however_few_slots_there_are() -> None:
    requests = mixed_requests(5, 9)
    prompt_tokens = sum(len(r.prompt) - 1 for r in requests)
    with_prompt = sum(len(r.prompt) > 1 for r in requests)
    found = []
    for slots in (45, 16, 3, 1):
        kept = engine(small_stage(), slots=slots)
        found.append(kept.generate(requests, PLAIN, seed=4))
        assert kept.counts.tokens_prefilled == prompt_tokens
        assert kept.counts.prompts_prefilled == with_prompt
        assert kept.counts.tokens_decoded == sum(len(c.tokens) for c in found[-1])
    assert all(same_bits(found[0], other) for other in found[1:])


def test_a_freed_slot_is_taken_at_the_next_step() -> None:
    """Lengths 2 and 20 in turn over 8 slots: waiting for whole batches would take 5 · 20 steps."""
    requests = [Request([3, i % 97], (i,), 2 if i % 2 else 20) for i in range(40)]
    kept = engine(small_stage(), slots=8)
    kept.generate(requests, PLAIN, seed=1)
    tokens = sum(r.max_new_tokens for r in requests)
    assert kept.counts.tokens_decoded == tokens
    assert kept.counts.steps <= tokens / 8 + 20


def test_nothing_to_do_is_no_completions() -> None:
    assert engine(small_stage()).generate([], PLAIN, seed=1) == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], (0,), 4), "request 0: the prompt has 0 tokens; allowed: 1 to 63"),
        (
            Request([1] * 60, (0,), 5),
            "60 tokens with max_new_tokens 5 makes 65; .* at most 64",
        ),
        (Request([1], (0,), 0), "max_new_tokens is 0; allowed: 1 or more"),
        (Request([1, 97], (0,), 4), "token id 97; allowed: 0 to 96"),
        (Request([1], (7, 7), 4), "sequence id 7 occurs twice"),
    ],
    ids=["empty", "long", "none", "unknown", "twice"],
)
def test_requests_that_cannot_be_finished_are_refused_with_the_numbers(
    request_: Request, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine(small_stage()).generate([request_], PLAIN, seed=1)


def test_engines_that_cannot_be_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="slots is 0; allowed: 1 or more"):
        Engine([small_stage()], slots=0, longest=8)
    with pytest.raises(ValueError, match="longest is 5000; allowed: 2 to 4096"):
        Engine([small_stage()], slots=1, longest=5000)


def test_logits_without_a_number_name_the_sequence() -> None:
    stage = small_stage()
    with torch.no_grad():
        stage.norm.weight[3] = torch.nan
    with pytest.raises(RuntimeError, match="sequence 8 at position 2"):
        engine(stage).generate([Request([1, 2], (8,), 3)], PLAIN, seed=1)


def test_streamed_tokens_are_the_completions_tokens() -> None:
    requests = mixed_requests(3, 3)
    settings = SamplingSettings(stop_tokens=(11, 60, 61))
    kept = engine(small_stage(), slots=4)
    expected = kept.generate(requests, settings, seed=6)
    streamed: dict[int, list] = {c.sequence_id: [] for c in expected}
    for new in kept.stream(requests, settings, seed=6):
        streamed[new.sequence_id].append(new)
    for completion in expected:
        news = streamed[completion.sequence_id]
        assert [n.token for n in news] == completion.tokens.tolist()
        assert [n.logprob for n in news] == completion.logprobs.tolist()
        assert [n.finish_reason for n in news[:-1]] == [None] * (len(news) - 1)
        assert news[-1].finish_reason == completion.finish_reason


def test_streamed_text_never_shows_half_a_character() -> None:
    """Tokens are bytes: one above 63 begins a character of two."""

    def decode(tokens: object) -> str:
        data = bytes((195 if t > 63 else 128 + t) if t > 40 else 65 + t for t in tokens)  # type: ignore[attr-defined]
        return data.decode(errors="replace")

    request = Request([1, 2, 3], (0, 7, 4), 40)
    found = list(
        stream_texts(engine(small_stage()), request, decode=decode, sampling=PLAIN, seed=2)
    )
    texts = set()
    for number in request.sequence_ids:
        pieces = [piece for one, piece in found if one == number]
        assert "".join(p.text for p in pieces) == decode([p.token for p in pieces])
        assert pieces[-1].finish_reason == "length"
        assert len(pieces) == 40
        texts.add("".join(p.text for p in pieces))
    assert len(texts) == 3
