"""Attention alone, forward and backward, of every implementation that is installed.

B × S tokens in documents of L each, H heads of D; causal, bf16 on a GPU. The operations counted are
those below the diagonal: 2·B·S·L·H·D forward, 2.5 times as many backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.clock import Call, interleaved
from gpu.pieces import Context, Failed, Piece, Result, need, note
from gpu.trace import traced
from megarlx.model.attention import attention
from megarlx.model.attention_form import AttentionForm
from megarlx.model.documents import Documents

SHAPE, SMALL = (4, 4096, 16, 128), (2, 24, 3, 16)  # B, S, H, D
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(backend: SDPBackend) -> Attend:
    """q, k, v: [B, S, H, D]."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return attend


def ours(documents: Documents) -> Attend:
    """The model's own choice, of the same tokens cut into these documents."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape, scale = q.shape, q.shape[-1] ** -0.5
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return attention(q, k, v, documents=documents, form=AttentionForm(scale)).view(shape)

    return attend


def measured(context: Context, attends: dict[str, tuple[Attend, int]]) -> Result:
    """`attends` say how long the documents are that they see."""
    device = context.device
    batch, length, heads, dim = context.either(SHAPE, SMALL)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, upstream = (
        torch.randn(batch, length, heads, dim, device=device, dtype=dtype) for _ in range(4)
    )
    for x in (q, k, v):
        x.requires_grad_()

    def one(attend: Attend, document: int) -> Result:
        operations = 2 * batch * length * document * heads * dim
        out = attend(q, k, v)

        @torch.no_grad()
        def forward(_: int) -> Tensor:
            return attend(q, k, v)

        def backward(_: int) -> object:
            return torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True)

        calls: dict[str, Call] = {"forward": forward, "backward": backward}
        seconds = interleaved(calls, device, rounds=5, budget_seconds=2)
        ran = traced(lambda: forward(0), device).attention
        rates = {
            part: times * operations / seconds[part] / 1e12
            for part, times in (("forward", 1.0), ("backward", 2.5))
        }
        return {"seconds": seconds, "tflops": rates, "attention": ran}

    found: Result = {"rows": [], "ran": {}}
    for name, (attend, document) in attends.items():
        try:
            found["ran"][name] = result = one(attend, document)
        except Exception as error:  # noqa: BLE001 - told: the others are still measured
            note(f"attention, {name}: {type(error).__name__}: {error}"[:200])
            continue
        parts = (
            f"{part} {1e3 * result['seconds'][part]:.3f} ms {rate:.0f} TFLOP/s"
            for part, rate in result["tflops"].items()
        )
        note(f"attention, {name}: {', '.join(parts)}; ran: {result['attention']}")
    if not found["ran"]:
        raise Failed("no implementation ran", found)
    return found


def of_torch(context: Context) -> Result:
    """The model's own, and each backend of torch's SDPA."""
    batch, length = context.either(SHAPE, SMALL)[:2]
    attends: dict[str, tuple[Attend, int]] = {}
    for document in (length, length // 8):
        documents = Documents.of([document] * (batch * length // document), context.device)
        attends[f"the model's, documents of {document}"] = ours(documents), document
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    for backend in context.either(backends, [SDPBackend.MATH]):
        attends[f"SDPA {backend.name}"] = sdpa(backend), length
    return measured(context, attends)


def of_packages(context: Context) -> Result:
    """flash-attn's function for documents of one length, and Transformer Engine's module."""
    engine = need("transformer_engine.pytorch")  # first: it must load cuDNN before torch does
    flash = need("flash_attn")
    module = engine.DotProductAttention(
        *SHAPE[2:], attn_mask_type="causal", qkv_format="bshd", attention_dropout=0.0
    )
    attends: dict[str, Attend] = {
        "Transformer Engine": lambda q, k, v: module(q, k, v).view(q.shape),
        "flash-attn 2": lambda q, k, v: flash.flash_attn_func(q, k, v, causal=True),
    }
    length = context.either(SHAPE, SMALL)[1]
    return measured(context, {name: (attend, length) for name, attend in attends.items()})


PIECES = [
    Piece("attention", 8, of_torch),
    Piece("attention-packages", 15, of_packages, needs="Transformer Engine and flash-attn"),
]
