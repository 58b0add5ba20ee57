"""Every path of attention against an explicit masked softmax in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarlx.model.attention import attention
from megarlx.model.attention_form import AttentionForm
from megarlx.model.documents import Documents, padded_length
from megarlx.model.kv_cache import CacheStep, KVCache, PageTable

SCALE = 0.37
FORM = AttentionForm(SCALE)


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """q [T, H, D], k and v [U, K, D], allowed [T, U], all in fp64."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thd,uhd->htu", q.double(), k.double()) * SCALE
    return torch.einsum(
        "htu,uhd->thd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v.double()
    )


def same_document_and_past(lengths: list[int]) -> Tensor:
    owner = torch.repeat_interleave(torch.tensor(lengths))
    place = torch.arange(len(owner))
    return (owner[:, None] == owner[None, :]) & (place[:, None] >= place[None, :])


def random_qkv(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(tokens)
    return tuple(
        torch.randn(tokens, n, 10, dtype=dtype, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "lengths",
    [[7], [13, 13, 13], [1, 30, 2, 17, 17, 5], [64, 1, 1, 65], [200, 190, 3, 0, 0]],
    ids=str,
)
def test_packed_equals_masked_softmax_forward_and_backward(
    lengths: list[int], kv_heads: int
) -> None:
    inputs = random_qkv(sum(lengths), 4, kv_heads, torch.float64)
    out = attention(*inputs, documents=Documents.of(lengths), form=FORM)
    expected = masked_softmax(*inputs, same_document_and_past(lengths))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_padded_offsets_of_a_micro_batch_are_empty_documents() -> None:
    offsets = torch.tensor([0, 5, 12, 12, 12], dtype=torch.int32)
    inputs = random_qkv(12, 4, 2, torch.float64)
    out = attention(*inputs, documents=Documents(offsets, 12, 12), form=FORM)
    torch.testing.assert_close(out, masked_softmax(*inputs, same_document_and_past([5, 7])))


@pytest.mark.parametrize("changed", ["q", "k", "v"])
def test_no_document_feels_its_neighbour(changed: str) -> None:
    lengths = [9, 40, 9, 23]
    inputs = dict(zip("qkv", random_qkv(sum(lengths), 4, 2, torch.float32), strict=True))
    documents = Documents.of(lengths)
    before = attention(**inputs, documents=documents, form=FORM)
    inputs[changed] = inputs[changed].detach().clone()
    inputs[changed][9:49] = torch.nan
    after = attention(**inputs, documents=documents, form=FORM)
    assert torch.equal(before[:9], after[:9])
    assert torch.equal(before[49:], after[49:])
    assert not torch.equal(before[9:49], after[9:49])


def test_no_token_feels_its_future() -> None:
    q, k, v = random_qkv(50, 4, 2, torch.float32)
    documents = Documents.of([20, 30])
    before = attention(q, k, v, documents=documents, form=FORM)
    k, v = k.detach().clone(), v.detach().clone()
    k[35:], v[35:] = 9.0, 9.0
    after = attention(q, k, v, documents=documents, form=FORM)
    assert torch.equal(before[:35], after[:35])
    assert not torch.equal(before[35:], after[35:])


def test_padding_is_at_most_an_eighth_or_a_small_tile() -> None:
    for length in range(1, 5000):
        padded = padded_length(length)
        assert length <= padded < length + max(16, length / 8 + 1)


def filled_cache(starts: list[int], slots: list[int]) -> tuple[KVCache, Tensor, Tensor]:
    torch.manual_seed(3)
    cache = KVCache.empty(2, PageTable.of_slots(5, 300), 2, 10, dtype=torch.float64)
    # what lies behind a slot's length is some older sequence's and must not matter
    cache.keys.normal_()
    cache.values.normal_()
    return cache, cache.keys.clone(), cache.values.clone()


@pytest.mark.parametrize("slots", [[0, 1, 2], [4, 0, 3]])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [1, 4, 2], [150, 3, 129]], ids=str)
def test_cached_attention_is_bottom_right_aligned(lengths: list[int], slots: list[int]) -> None:
    starts = [6, 0, 140]
    cache, keys, values = filled_cache(starts, slots)
    documents = Documents.of(lengths)
    q, k, v = (x.detach() for x in random_qkv(sum(lengths), 4, 2, torch.float64))
    span = max(s + n for s, n in zip(starts, lengths, strict=True))
    step = CacheStep(cache, documents, torch.tensor(slots), torch.tensor(starts), span)
    out = attention(q, k, v, documents=documents, form=FORM, cache=step.layer(1))
    begin = 0
    for slot, start, length in zip(slots, starts, lengths, strict=True):
        rows = slice(begin, begin + length)
        seen_k = torch.cat([keys[1, slot, :start], k[rows]])
        seen_v = torch.cat([values[1, slot, :start], v[rows]])
        allowed = torch.arange(start + length) <= torch.arange(length)[:, None] + start
        expected = masked_softmax(q[rows], seen_k, seen_v, allowed)
        torch.testing.assert_close(out[rows], expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(cache.keys[1, slot, start : start + length], k[rows])
        begin += length
    assert torch.equal(cache.keys[0], keys[0])


def test_fresh_slots_take_the_packed_path_and_are_filled() -> None:
    lengths, slots = [5, 9], torch.tensor([3, 1])
    cache, keys, _ = filled_cache([], [])
    documents = Documents.of(lengths)
    q, k, v = (x.detach() for x in random_qkv(14, 4, 2, torch.float64))
    step = CacheStep(cache, documents, slots, torch.zeros(2, dtype=torch.int64), 9, fresh=True)
    out = attention(q, k, v, documents=documents, form=FORM, cache=step.layer(0))
    torch.testing.assert_close(out, masked_softmax(q, k, v, same_document_and_past(lengths)))
    assert torch.equal(cache.keys[0, 3, :5], k[:5])
    assert torch.equal(cache.values[0, 1, :9], v[5:])
    assert torch.equal(cache.keys[0, 1, 9:], keys[0, 1, 9:])


def test_wrong_sizes_are_refused_with_the_numbers() -> None:
    q, k, v = random_qkv(8, 4, 2, torch.float32)
    with pytest.raises(ValueError, match="8 tokens, documents 9"):
        attention(q, k, v, documents=Documents.of([9]), form=FORM)
    cache, _, _ = filled_cache([], [])
    with pytest.raises(ValueError, match="span is 301; allowed: 1 to 300"):
        CacheStep(cache, Documents.of([1]), torch.tensor([0]), torch.tensor([300]), 301)
    with pytest.raises(ValueError, match="do not add up to 9"):
        _ = Documents(torch.tensor([0, 8], dtype=torch.int32), 9, 9).lengths
