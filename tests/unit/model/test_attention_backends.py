"""Every kernel says what it serves, serves it, and refuses the rest."""

from __future__ import annotations

import inspect
import itertools
from typing import Any, get_args

import pytest
import torch
from test_attention import masked_softmax, random_qkv, same_document_and_past
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from megarlx.choices import (
    AMPERE,
    OF_TORCH,
    SERVES,
    Attention,
    Machine,
    Needs,
    Package,
    Served,
    choose_attention,
    flash_of,
    without_attention,
)
from megarlx.model import attention as dispatch
from megarlx.model.attention import attention
from megarlx.model.attention_blocks import BLOCKS
from megarlx.model.attention_flash import Flash, varlen_of_torch
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
        assert backend.serves_packed == SERVES[kind]  # type: ignore[index]
    assert set(flash.serves) == {"grouped", "cached"}
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
            said = (
                f"layer 3.*{kind} serves .*, and this needs {lacks}; allowed: auto, flash, blocks"
            )
            with pytest.raises(ValueError, match=said):
                CoreAttention(4, 2, 10, layer_number=4, form=form, kind=kind)


def test_a_call_is_refused_as_a_layer_is() -> None:
    q, k, v = random_qkv(9, 4, 2, torch.float64)
    with pytest.raises(ValueError, match="sdpa serves grouped, cached, and this needs window"):
        attention(
            *(q, k, v), documents=Documents.of([9]), form=AttentionForm(1.0, 4), kernel="sdpa"
        )


class OnCuda(Tensor):
    is_cuda = True  # type: ignore[assignment]


def of_definition(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float, left: int, cap: float
) -> Tensor:
    """What flash-attn documents: a row sees its own place and `left` places before it."""
    lengths = offsets.diff().tolist()
    form = AttentionForm(scale, None if left < 0 else left + 1, cap or None)
    assert scale == SCALE  # which the definition here has
    return by_definition((q, k, v), same_document_and_past(lengths), form).to(q.dtype)


def flash_two(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
    window_size: Any = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
) -> Tensor:  # fmt: skip
    """The signature of flash-attn 2.8."""
    assert causal
    assert window_size[1] in (-1, 0)
    assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
    return of_definition(q, k, v, cu_seqlens_q, softmax_scale, window_size[0], softcap)


def flash_three(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
    max_seqlen_k: int, seqused_q: Any = None, seqused_k: Any = None, softmax_scale: Any = None,
    causal: bool = False, qv: Any = None, q_descale: Any = None, k_descale: Any = None,
    v_descale: Any = None, window_size: Any = (-1, -1), attention_chunk: int = 0,
    softcap: float = 0.0, num_splits: int = 1, pack_gqa: Any = None, deterministic: bool = False,
    sm_margin: int = 0, return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """The signature of flash-attn 3."""
    assert causal
    return of_definition(q, k, v, cu_seqlens_q, softmax_scale, window_size[0], softcap)


class FlashFour(torch.autograd.Function):
    """Its backward of packed documents refuses a soft-cap."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *told: Any) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.told = told
        return of_definition(q, k, v, *told)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        assert ctx.told[-1] == 0.0
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = of_definition(*inputs, *ctx.told)
        return *torch.autograd.grad(out, inputs, grads[0]), None, None, None, None


def flash_four(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
    max_seqlen_q: Any = None, max_seqlen_k: Any = None, seqused_q: Any = None,
    seqused_k: Any = None, page_table: Any = None, softmax_scale: Any = None,
    causal: bool = False, window_size: Any = (None, None), learnable_sink: Any = None,
    softcap: float = 0.0, num_splits: int = 1, pack_gqa: Any = None, deterministic: bool = False,
    score_mod: Any = None, mask_mod: Any = None, block_sparse_tensors: Any = None,
    cu_total_m_blocks: Any = None, cu_total_n_blocks: Any = None, aux_tensors: Any = None,
    return_lse: bool = False,
) -> tuple[Tensor, None]:  # fmt: skip
    """The signature of flash-attn 4, for which None is no window."""
    assert causal
    left = -1 if window_size[0] is None else window_size[0]
    return FlashFour.apply(q, k, v, cu_seqlens_q, softmax_scale, left, softcap), None


def packed_of_torch(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: Any = None, window_size: Any = (-1, -1),
    enable_gqa: bool = False, seqused_k: Any = None, block_table: Any = None,
    num_splits: Any = None,
) -> Tensor:  # fmt: skip
    """The signature of torch's; by itself it is not causal."""
    assert window_size[1] == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return of_definition(query, key, value, cu_seq_q, scale, window_size[0], 0.0)


def test_the_stand_in_for_torch_has_the_signature_of_torch() -> None:
    if not flash_of(torch.__version__):
        pytest.skip("this torch brings none")
    theirs, ours = (
        inspect.signature(one).parameters for one in (varlen.varlen_attn, packed_of_torch)
    )
    assert {n: p.default for n, p in theirs.items()} == {n: p.default for n, p in ours.items()}


@pytest.fixture(params=["2", "3", "4", OF_TORCH])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Flash:
    made = {"2": flash_two, "3": flash_three, "4": flash_four, OF_TORCH: varlen_of_torch}
    monkeypatch.setattr(varlen, "varlen_attn", packed_of_torch)
    found = Flash(request.param, made[request.param], None)
    monkeypatch.setattr(dispatch, "flash", lambda: found)
    return found


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("lengths", LENGTHS[1:3], ids=str)
def test_every_flash_attention_computes_what_is_asked_or_leaves_it(
    installed: Flash, lengths: list[int], kv_heads: int, form: AttentionForm
) -> None:
    """Forward and backward, of packed documents; what a version lacks goes on by blocks."""
    inputs = random_qkv(sum(lengths), 4, kv_heads, torch.float64)
    halves = [x.detach().bfloat16().requires_grad_() for x in inputs]
    for kernel in ("auto", "flash"):
        out = attention(
            *(x.as_subclass(OnCuda) for x in halves),  # type: ignore[arg-type]
            documents=Documents.of(lengths),
            form=form,
            kernel=kernel,  # type: ignore[arg-type]
        )
        whole = [x.detach().double().requires_grad_() for x in halves]
        expected = by_definition(whole, same_document_and_past(lengths), form)
        torch.testing.assert_close(out.double().as_subclass(Tensor), expected, rtol=0.02, atol=0.02)
        upstream = torch.randn_like(expected)
        ours = torch.autograd.grad(out, halves, upstream.bfloat16().as_subclass(OnCuda))
        for a, b in zip(ours, torch.autograd.grad(expected, whole, upstream), strict=True):
            torch.testing.assert_close(a.double().as_subclass(Tensor), b, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_flash_attention_is_asked_only_for_what_it_serves(
    installed: Flash, form: AttentionForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[AttentionForm] = []
    monkeypatch.setattr(
        Flash, "packed", lambda *given: asked.append(given[-1]) or SDPA.packed(*given[1:])
    )
    q, k, v = (x.detach().bfloat16() for x in random_qkv(9, 4, 2, torch.float64))
    attention(q.as_subclass(OnCuda), k, v, documents=Documents.of([9]), form=form)
    lacks = installed.version in ("4", OF_TORCH) and form.cap is not None
    assert asked == ([] if lacks else [form])


def test_the_machine_chooses_what_serves_the_model() -> None:
    engine = Package("2.8")
    for machine, plain in ((Machine(), "sdpa"), (Machine("a GPU", AMPERE, engine), "cudnn")):
        assert choose_attention(machine, Needs("bf16", 64)).value == plain
    for version, needs in itertools.product(
        ("", "2", "3", "4", OF_TORCH), (("window",), ("cap",), ("cap", "window"))
    ):
        asks = Needs("bf16", 64, of_attention=frozenset(needs))  # type: ignore[arg-type]
        gpu = Machine("a GPU", AMPERE, engine, Package(version))
        fits = bool(version) and not ("cap" in needs and version in ("4", OF_TORCH))
        choice = choose_attention(gpu, asks)
        assert choice.value == ("flash" if fits else "blocks")
        assert "needs " + ", ".join(needs) in choice.why
        refused = [kind for kind in SERVES if without_attention(kind, gpu, asks)]
        assert refused == (["cudnn", "sdpa"] if fits else ["cudnn", "flash", "sdpa"])
        assert choose_attention(Machine(), asks).value == "blocks"


@pytest.mark.parametrize(
    ("version", "found"),
    [("2.11.0+cu130", ""), ("2.12.0a0", OF_TORCH), ("2.13.0+cpu", OF_TORCH), ("3.0.0", OF_TORCH)],
)
def test_torch_brings_a_flash_attention_with_grouped_heads_from_2_12_on(
    version: str, found: str
) -> None:
    assert flash_of(version) == found
