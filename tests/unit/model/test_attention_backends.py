"""Every kernel says what it serves, serves it, and refuses the rest."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
import torch
from test_attention import masked_softmax, random_qkv, same_document_and_past
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megarlx.choices import (
    AMPERE,
    SERVES,
    Attention,
    Machine,
    Needs,
    Package,
    Served,
    choose_attention,
    without_attention,
)
from megarlx.model import attention as dispatch
from megarlx.model.attention import attention
from megarlx.model.attention_blocks import BLOCKS
from megarlx.model.attention_flash import Flash
from megarlx.model.attention_form import QUERY_BLOCK, AttentionForm
from megarlx.model.attention_sdpa import SDPA
from megarlx.model.core_attention import CoreAttention
from megarlx.model.documents import Documents
from megarlx.model.kv_cache import CacheStep, KVCache, PageTable

SCALE = 0.37
FORMS = [
    AttentionForm(SCALE, window, cap)
    for window, cap in itertools.product((None, 1, 9, 150), (None, 0.7))
]
LENGTHS = [[7], [13, 13, 13], [1, 30, 2, 17, 17, 5], [300, 190, 3, 0, 0]]


def by_definition(inputs: Any, allowed: Tensor, form: AttentionForm) -> Tensor:
    place = torch.arange(allowed.shape[1])
    if form.window is not None:
        rows = torch.arange(allowed.shape[1] - allowed.shape[0], allowed.shape[1])
        allowed = allowed & (rows[:, None] - place < form.window)
    if form.cap is None:
        return masked_softmax(*inputs, allowed)
    q, k, v = (x.double() for x in inputs)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = form.cap * torch.tanh(torch.einsum("thd,uhd->htu", q, k) * SCALE / form.cap)
    return torch.einsum("htu,uhd->thd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_blocks_serve_windows_caps_and_groups(
    lengths: list[int], kv_heads: int, form: AttentionForm
) -> None:
    inputs = random_qkv(sum(lengths), 4, kv_heads, torch.float64)
    out = attention(*inputs, documents=Documents.of(lengths), form=form, kernel="blocks")
    expected = by_definition(inputs, same_document_and_past(lengths), form)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(out)
    for _ in range(2):  # as split schedules do
        ours = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
        theirs = torch.autograd.grad(expected, inputs, upstream, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("new", [1, 5, 140])
def test_blocks_serve_a_cache(new: int, form: AttentionForm) -> None:
    """What is continued equals the whole."""
    held, longest = [3, 20, 0], 192
    torch.manual_seed(1)
    whole = [[torch.randn(n + new, h, 10, dtype=torch.float64) for h in (4, 2, 2)] for n in held]
    cache = KVCache.empty(1, PageTable.of_slots(4, longest), 2, 10, dtype=torch.float64)
    slots = torch.tensor([2, 0, 3])
    for slot, n, (_, k, v) in zip(slots, held, whole, strict=True):
        cache.keys[0, slot, :n], cache.values[0, slot, :n] = k[:n], v[:n]
    documents = Documents.rows(3, new)
    step = CacheStep(cache, documents, slots, torch.tensor(held), 32 if new < 140 else longest)
    q, k, v = (torch.cat([of[i][n:] for of, n in zip(whole, held, strict=True)]) for i in range(3))
    out = attention(q, k, v, documents=documents, form=form, cache=step.layer(0))
    for found, n, of in zip(out.split(new), held, whole, strict=True):
        expected = by_definition(of, same_document_and_past([n + new]), form)[n:]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


class Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("window", [None, 64])
def test_no_square_of_scores_exists(window: int | None) -> None:
    length, heads = 2048, 2
    q, k, v = (torch.randn(length, heads, 8, requires_grad=True) for _ in range(3))
    with Largest() as seen:
        form = AttentionForm(SCALE, window, 5.0)
        out = attention(q, k, v, documents=Documents.of([length]), form=form)
        out.sum().backward()
    keys = length if window is None else QUERY_BLOCK + window - 1
    assert seen.numbers <= max(heads * QUERY_BLOCK * keys, length * heads * 8)
    assert seen.numbers < heads * length * length / 8


def test_attention_backends_say_what_they_serve() -> None:
    every: tuple[Served, ...] = get_args(Served)
    assert set(SERVES["blocks"]) == set(every)
    assert set(SERVES) == set(get_args(Attention))
    flash = Flash(2, SDPA.packed, None)  # type: ignore[arg-type]
    for backend, kind in ((SDPA, "sdpa"), (BLOCKS, "blocks"), (flash, "flash")):
        assert backend.serves == SERVES[kind]  # type: ignore[index]
    for kind, window, cap in itertools.product(SERVES, (None, 4), (None, 2.0)):
        form = AttentionForm(SCALE, window, cap)
        if kind == "cudnn" and not form.needs:
            continue  # needs Transformer Engine
        if form.needs <= set(SERVES[kind]):
            core = CoreAttention(4, 2, 10, layer_number=1, form=form, kind=kind)
            q, k, v = random_qkv(9, 4, 2, torch.float64)
            found = core(q, k, v, Documents.of([9]), None)
            expected = by_definition((q, k, v), same_document_and_past([9]), form)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        else:
            lacks = ", ".join(sorted(form.needs))
            said = f"layer 3.*{kind} serves .*, and this needs {lacks}; allowed: auto, blocks"
            with pytest.raises(ValueError, match=said):
                CoreAttention(4, 2, 10, layer_number=4, form=form, kind=kind)


def test_a_call_is_refused_as_a_layer_is() -> None:
    q, k, v = random_qkv(9, 4, 2, torch.float64)
    for kernel in ("sdpa", "flash"):
        with pytest.raises(ValueError, match=f"{kernel} serves .* needs grouped|needs window"):
            attention(
                q,
                k,
                v,
                documents=Documents.of([9]),
                form=AttentionForm(1.0, 4),
                kernel=kernel,  # type: ignore[arg-type]
            )


def test_flash_attention_is_asked_only_for_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[AttentionForm] = []

    class Watched:
        serves = SERVES["flash"]

        def packed(
            self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, form: Any
        ) -> Tensor:
            asked.append(form)
            return SDPA.packed(q, k, v, documents, form)

    class OnCuda(Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr(dispatch, "flash", Watched)
    for form in FORMS:
        q, k, v = (x.detach().bfloat16() for x in random_qkv(9, 4, 2, torch.float64))
        attention(q.as_subclass(OnCuda), k, v, documents=Documents.of([9]), form=form)
    assert asked == [AttentionForm(SCALE)]


def test_the_machine_chooses_what_serves_the_model() -> None:
    both = Package("2.8"), Package("2.7")
    gpu = Machine("a GPU", AMPERE, *both)
    for machine, plain in ((Machine(), "sdpa"), (gpu, "cudnn")):
        assert choose_attention(machine, Needs("bf16", 64)).value == plain
        for needs in (("window",), ("cap",), ("cap", "window")):
            asks = Needs("bf16", 64, of_attention=frozenset(needs))  # type: ignore[arg-type]
            choice = choose_attention(machine, asks)
            assert (choice.value, "needs " + ", ".join(needs) in choice.why) == ("blocks", True)
            refused = [kind for kind in SERVES if without_attention(kind, gpu, asks)]
            assert refused == ["cudnn", "flash", "sdpa"]
