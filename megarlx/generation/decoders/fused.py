"""One token a row through the layers of a stage on a CPU, on the live weights, a part at a time.

For tensor parallelism, where ranks have to meet between the parts (packed.py: alone).

The model's own forward makes a tensor for everything it computes and serves packed documents; for
one token a row that is most of the time. Here a layer is four matrix products into buffers kept
from step to step and four fused kernels between them (megarlx/ops/decode.py).

Letters: W rows of the step, of which `rows.live` are real.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from megarlx.comm.collectives import all_reduce_
from megarlx.config.families import PLAIN_LAYERS, listed
from megarlx.generation.decoders.weights import LayerWeights, weights_of
from megarlx.generation.rows import Rows
from megarlx.model import rope
from megarlx.model.kv_cache import KVCache
from megarlx.model.transformer import Stage
from megarlx.ops.decode import decode_attention_, decode_norm_, decode_swiglu_


@dataclass(frozen=True)
class _Layer(LayerWeights):
    keys: Tensor
    values: Tensor


class FusedDecoder:
    """A decoder (interface.py). Weights are read where training writes them: nothing is copied."""

    implements: ClassVar[frozenset[str] | None] = PLAIN_LAYERS | listed(
        Stage="device=cpu dtype=float32|float64 splits_heads=True sequence_parallel=True",
        Attention="spans_ranks=True",
        ColumnLinear="sequence_parallel=True",
        RowLinear="sequence_parallel=True",
        RMSNorm="sequence_parallel=True",
        VocabEmbedding="sequence_parallel=True",
    )
    pads: ClassVar[bool] = True

    def __init__(self, stage: Stage, cache: KVCache, most_rows: int) -> None:
        self.stage, self.config, self.group = stage, stage.config, stage.group
        some = next(stage.parameters())
        self.dtype = some.dtype
        places = torch.arange(cache.table.longest)
        cosines, sines = rope.rotation(places, next(iter(stage.radians.values())), some.dtype)
        self.cosines, self.sines = cosines[:, 0].contiguous(), sines[:, 0].contiguous()
        self.cache = cache
        self.begin()
        config, tp = self.config, self.group.size
        self.scale = config.query_scalar**-0.5
        heads, kv_heads = config.heads // tp, cache.keys.shape[3]
        widths = {
            "x": config.hidden_size,
            "h": config.hidden_size,
            "part": config.hidden_size,
            "qkv": (heads + 2 * kv_heads) * config.head_dim,
            "attended": heads * config.head_dim,
            "gate_up": 2 * config.intermediate_size // tp,
            "inner": config.intermediate_size // tp,
        }
        if stage.has_head:
            widths["logits"] = len(stage.head_weight)
        # zeros: rows of padding are multiplied too, and what they hold must be a number
        self._whole = {n: torch.zeros(most_rows, w, dtype=self.dtype) for n, w in widths.items()}
        self._views: dict[int, SimpleNamespace] = {}

    def begin(self) -> None:
        """Before a generation: weights may have been given other memory since the last one."""
        caches = zip(self.cache.keys, self.cache.values, strict=True)
        self.layers = [
            _Layer(**weights_of(layer), keys=keys, values=values)
            for layer, (keys, values) in zip(self.stage.layers.values(), caches, strict=True)
        ]

    def hidden(self, width: int) -> Tensor:
        """[W, hidden]: what `forward` leaves, and what it starts from where nothing is embedded."""
        buffer: Tensor = self._buffers(width).x
        return buffer

    def forward(self, rows: Rows, width: int) -> Tensor:
        """The stage's layers for the newest token of every row."""
        b = self._buffers(width)
        if self.stage.has_embedding:
            self._embed(rows.tokens[:width], b.x)
        post = self.config.norm_position == "post"
        eps, pending = self.config.norm_eps, None
        for layer in self.layers:
            source = b.x
            if not post:
                decode_norm_(b.x, pending, layer.attention_norm, eps, b.h)
                source = b.h
            torch.mm(source, layer.qkv, out=b.qkv)
            if layer.qkv_bias is not None:
                b.qkv.add_(layer.qkv_bias)
            decode_attention_(
                b.qkv,
                layer.keys,
                layer.values,
                self.cache.table.rows,
                rows.slots,
                rows.positions,
                self.cosines,
                self.sines,
                b.attended,
                scale=self.scale,
                rows=rows.live,
                q_weight=layer.q_norm,
                k_weight=layer.k_norm,
                inverse=self._inverse(b.qkv) if self.config.qk_norm == "full" else None,
                eps=eps,
            )
            torch.mm(b.attended, layer.o, out=b.part)
            all_reduce_(b.part, self.group)
            if post:
                decode_norm_(b.x, b.part, layer.attention_norm, eps)
            else:
                decode_norm_(b.x, b.part, layer.mlp_norm, eps, b.h)
            torch.mm(source, layer.gate_up, out=b.gate_up)
            decode_swiglu_(b.gate_up, b.inner)
            torch.mm(b.inner, layer.down, out=b.part)
            all_reduce_(b.part, self.group)
            if post:
                decode_norm_(b.x, b.part, layer.mlp_norm, eps)
            else:
                pending = b.part
        if pending is not None:
            b.x.add_(pending)
        return b.x

    def logits(self, width: int) -> Tensor:
        """[W, V / tp] of what `forward` left, padding ids included."""
        b = self._buffers(width)
        decode_norm_(b.x, None, self.stage.norm.weight.detach(), self.config.norm_eps, b.h)
        return torch.mm(b.h, self.stage.head_weight.detach().t(), out=b.logits)

    def _buffers(self, width: int) -> SimpleNamespace:
        if width not in self._views:
            self._views[width] = SimpleNamespace(**{n: t[:width] for n, t in self._whole.items()})
        return self._views[width]

    def _embed(self, tokens: Tensor, out: Tensor) -> None:
        table = self.stage.embedding.weight.detach()
        if self.group.size == 1:
            torch.index_select(table, 0, tokens, out=out)
            return
        local = tokens - self.group.rank * len(table)
        elsewhere = (local < 0) | (local >= len(table))
        torch.index_select(table, 0, local.masked_fill(elsewhere, 0), out=out)
        out.masked_fill_(elsewhere[:, None], 0)
        all_reduce_(out, self.group)

    def _inverse(self, qkv: Tensor) -> Tensor | None:
        """1 / rms over the heads of all ranks; nothing where this rank holds all of them."""
        config, tp = self.config, self.group.size
        if tp == 1:
            return None
        q = config.heads // tp * config.head_dim
        kv = (qkv.shape[1] - q) // 2
        sums = torch.stack((qkv[:, :q].square().sum(1), qkv[:, q : q + kv].square().sum(1)), 1)
        all_reduce_(sums, self.group)
        sums[:, 0] /= config.heads * config.head_dim
        sums[:, 1] /= config.kv_heads * config.kv_copies(tp) * config.head_dim
        return sums.add_(config.norm_eps).rsqrt_()
