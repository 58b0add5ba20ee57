"""One token a row through the layers of a stage, in kernels that a CUDA graph holds.

A layer is four products, its attention and four kernels between them (megarlx/ops/decode_parts.py),
all into buffers kept from step to step: 9 launches, 10 where attention takes two. Weights are read
where training writes them, those of the plain layers and those of Transformer Engine's.

Without a graph it runs on a CPU too, where tests compare it with the model's own layers.

Letters: W rows of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn import Module

from megarlx.config.families import PLAIN_LAYERS, TE_LAYERS, listed
from megarlx.generation.decoders.products import Product, Products
from megarlx.generation.decoders.stage import captured
from megarlx.generation.decoders.weights import LayerWeights, weights_of
from megarlx.generation.rows import Rows
from megarlx.model import rope
from megarlx.model.attention import Kernel, decode_attention
from megarlx.model.attention_form import AttentionForm
from megarlx.model.documents import Documents
from megarlx.model.kv_cache import CacheStep, KVCache, LayerCache
from megarlx.model.transformer import Stage
from megarlx.model.transformer_layer import Layer
from megarlx.ops.decode import decode_norm_, decode_swiglu_
from megarlx.ops.decode_parts import decode_heads_


@dataclass(frozen=True)
class _Layer:
    weights: LayerWeights
    form: AttentionForm
    kernel: Kernel
    qkv: Product
    o: Product
    gate_up: Product
    down: Product


class InPlaceDecoder:
    """A decoder (interface.py). A step's inputs are given as tensors, so that a graph may go on
    from what the step before it left there (generation/ahead.py)."""

    implements: ClassVar[frozenset[str] | None] = (
        PLAIN_LAYERS
        | TE_LAYERS
        | listed(Stage="device=cuda dtype=float32|float64|bfloat16 splits_heads=False")
    )
    pads: ClassVar[bool] = True

    def __init__(
        self, stage: Stage, cache: KVCache, most_rows: int, products: Products | None = None
    ) -> None:
        self.stage, self.cache, config = stage, cache, stage.config
        self.products = products or Products(most_rows)
        some = next(stage.parameters())
        self.device, self.places = some.device, cache.table.longest
        places = torch.arange(self.places, device=self.device)
        radians = next(iter(stage.radians.values())).to(self.device)
        cosines, sines = rope.rotation(places, radians, some.dtype)
        self.cosines, self.sines = cosines[:, 0].contiguous(), sines[:, 0].contiguous()
        kv_heads, dim = cache.keys.shape[3:]
        shapes = {
            **dict.fromkeys(("x", "h", "part"), (config.hidden_size,)),
            "qkv": ((config.heads + 2 * kv_heads) * dim,),
            "q": (config.heads, dim),
            "gate_up": (2 * config.intermediate_size,),
            "inner": (config.intermediate_size,),
        }
        if stage.has_head:
            shapes["logits"] = (len(stage.head_weight),)
        # zeros: rows of padding are multiplied too, and what they hold must be a number
        self._whole = {
            name: torch.zeros(most_rows, *shape, dtype=some.dtype, device=self.device)
            for name, shape in shapes.items()
        }
        self._views: dict[int, SimpleNamespace] = {}
        self._graphs: dict[Hashable, Callable[[], None]] = {}
        self.begin()

    def begin(self) -> None:
        """Before a generation: a graph reads the weights where they were when it was captured."""
        layers = [self._layer(*item) for item in self.stage.layers.items()]
        if self.stage.has_head:
            self.head = self.products.by("head", self.stage.head_weight.detach())
        held = [p.data_ptr() for p in self.stage.parameters()]
        if held != getattr(self, "_held", None):
            self._graphs.clear()
        self.layers, self._held = layers, held

    def _layer(self, name: str, module: Module) -> _Layer:
        weights, core = LayerWeights(**weights_of(module)), cast(Layer, module).attention.core
        made = {
            matrix: self.products.by(f"{name}.{matrix}", getattr(weights, matrix).t(), bias)
            for matrix, bias in (
                ("qkv", weights.qkv_bias),
                ("o", None),
                ("gate_up", None),
                ("down", None),
            )
        }
        return _Layer(weights, core.form, core.kernel, **made)

    def hidden(self, width: int) -> Tensor:
        """[W, hidden]: what `forward` leaves, and what it starts from where nothing is embedded."""
        buffer: Tensor = self._buffers(width).x
        return buffer

    def forward(self, rows: Rows, width: int) -> Tensor:
        """The stage's layers for the newest token of every row."""
        given = (rows.tokens[:width], rows.positions[:width], rows.slots[:width])
        self.replay((rows, width), lambda: self.run(*given))
        return self.hidden(width)

    def replay(
        self, key: Hashable, step: Callable[[], None], written: Sequence[Tensor] = ()
    ) -> None:
        """Runs `step`; on CUDA the graph of it, captured when its key is new. The runs that warm it
        up must leave what it reads as it was: `written` is put back."""
        if self.device.type != "cuda":
            step()
            return
        if key not in self._graphs:
            before = [tensor.clone() for tensor in written]
            self._graphs[key] = captured(step)[0].replay
            for tensor, value in zip(written, before, strict=True):
                tensor.copy_(value)
        self._graphs[key]()

    def run(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> None:
        """All of them int64 [W]."""
        b, post = self._buffers(len(tokens)), self.stage.config.norm_position == "post"
        if self.stage.has_embedding:
            torch.index_select(self.stage.embedding.weight.detach(), 0, tokens, out=b.x)
        step = CacheStep(self.cache, b.documents, slots, positions, self.places)
        eps, pending = self.stage.config.norm_eps, None
        for index, layer in enumerate(self.layers):
            source, norms = b.x, layer.weights
            if not post:
                decode_norm_(b.x, pending, norms.attention_norm, eps, b.h)
                source = b.h
            self._attend(b, layer, source, step.layer(index))
            if post:
                decode_norm_(b.x, b.part, norms.attention_norm, eps)
            else:
                decode_norm_(b.x, b.part, norms.mlp_norm, eps, b.h)
            layer.gate_up(source, b.gate_up)
            decode_swiglu_(b.gate_up, b.inner)
            layer.down(b.inner, b.part)
            if post:
                decode_norm_(b.x, b.part, norms.mlp_norm, eps)
            else:
                pending = b.part
        if pending is not None:
            b.x.add_(pending)

    def _attend(self, b: SimpleNamespace, layer: _Layer, source: Tensor, held: LayerCache) -> None:
        """From the normed rows to the output projection's, in `b.part`."""
        layer.qkv(source, b.qkv)
        decode_heads_(
            b.qkv,
            held.keys,
            held.values,
            held.step.slots,
            held.step.starts,
            self.cosines,
            self.sines,
            b.q,
            table=self.cache.table.rows,
            q_weight=layer.weights.q_norm,
            k_weight=layer.weights.k_norm,
            eps=self.stage.config.norm_eps,
        )
        attended = decode_attention(b.q, held, layer.form, layer.kernel)
        layer.o(attended.flatten(1), b.part)

    def logits(self, width: int) -> Tensor:
        """[W, V] of what `forward` left, padding ids included."""
        b = self._buffers(width)
        decode_norm_(b.x, None, self.stage.norm.weight.detach(), self.stage.config.norm_eps, b.h)
        self.head(b.h, b.logits)
        logits: Tensor = b.logits
        return logits

    def _buffers(self, width: int) -> SimpleNamespace:
        if width not in self._views:
            documents = Documents.rows(width, 1, self.device)
            views = {name: whole[:width] for name, whole in self._whole.items()}
            self._views[width] = SimpleNamespace(**views, documents=documents)
        return self._views[width]
