"""One token a row through the layers of a stage on a CPU, in one native call a step.

Before a generation the live weights are laid out once in panels (megarlx/ops/decode.py), which is
one pass over them; after that a thread takes its rows through all layers and meets no other thread
and no Python on the way. A row's bits are the same whatever rows there are, so no width is padded.

Samples of one prompt read its keys and values from one memory (model/kv_cache.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from megarlx.config.families import PLAIN_LAYERS, listed
from megarlx.generation.rows import Rows
from megarlx.model import rope
from megarlx.model.kv_cache import KVCache
from megarlx.model.transformer import Stage
from megarlx.model.transformer_layer import Layer
from megarlx.ops.decode import PackedHead, PackedLayers, decode_step_, packed, packed_gate_up


class PackedDecoder:
    """A decoder (interface.py)."""

    implements: ClassVar[frozenset[str] | None] = PLAIN_LAYERS | listed(
        Stage="device=cpu dtype=float32|float64 splits_heads=False"
    )
    pads: ClassVar[bool] = False

    def __init__(self, stage: Stage, cache: KVCache, most_rows: int) -> None:
        self.stage, self.cache, config = stage, cache, stage.config
        dtype = next(stage.parameters()).dtype
        places = torch.arange(cache.table.longest)
        cosines, sines = rope.rotation(places, next(iter(stage.radians.values())), dtype)
        self.cosines, self.sines = cosines[:, 0].contiguous(), sines[:, 0].contiguous()
        attended = config.heads * config.head_dim
        a_row = 2 * config.hidden_size + 2 * attended + config.intermediate_size
        a_row += 2 * config.kv_heads * config.head_dim
        self.scratch = torch.empty(most_rows * a_row, dtype=dtype)
        self._hidden = torch.zeros(most_rows, config.hidden_size, dtype=dtype)
        self._logits = (
            torch.zeros(most_rows, len(stage.head_weight), dtype=dtype) if stage.has_head else None
        )

    def begin(self) -> None:
        """Before a generation: the weights as they are now."""
        self.layers = packed_layers(list(self.stage.layers.values()))  # type: ignore[arg-type]
        self.head = None
        if self.stage.has_head:
            weight = packed(self.stage.head_weight.detach())
            self.head = PackedHead(self.stage.norm.weight.detach(), weight)

    def hidden(self, width: int) -> Tensor:
        """[W, hidden]: what `forward` leaves, and what it starts from where nothing is embedded."""
        return self._hidden[:width]

    def forward(self, rows: Rows, width: int) -> Tensor:
        """The stage's layers for the newest token of every row."""
        config, first = self.stage.config, self.stage.has_embedding
        decode_step_(
            self._hidden,
            self.layers,
            self.cache.keys,
            self.cache.values,
            self.cache.table.rows,
            rows.slots,
            rows.positions,
            self.cosines,
            self.sines,
            self.scratch,
            rows=rows.live,
            heads=config.heads,
            intermediate=config.intermediate_size,
            post=config.norm_position == "post",
            eps=config.norm_eps,
            scale=config.query_scalar**-0.5,
            tokens=rows.tokens if first else None,
            embedding=self.stage.embedding.weight.detach() if first else None,
            head=self.head,
            logits=self._logits,
        )
        return self.hidden(width)

    def logits(self, width: int) -> Tensor:
        """[W, V] of the last `forward`, padding ids included."""
        assert self._logits is not None
        return self._logits[:width]


def packed_layers(layers: Sequence[Layer]) -> PackedLayers:
    def stacked(of: Callable[[Layer], Tensor]) -> Tensor:
        return torch.stack([of(layer).detach() for layer in layers])

    some = layers[0].attention
    normed = some.qk_norm != "none"
    with torch.no_grad():
        return PackedLayers(
            qkv=stacked(lambda layer: packed(layer.attention.qkv.weight)),
            o=stacked(lambda layer: packed(layer.attention.o.weight)),
            gate_up=stacked(lambda layer: packed_gate_up(layer.mlp.gate_up.weight)),
            down=stacked(lambda layer: packed(layer.mlp.down.weight)),
            attention_norm=stacked(lambda layer: layer.attention_norm.weight),
            mlp_norm=stacked(lambda layer: layer.mlp_norm.weight),
            qkv_bias=None
            if some.qkv.bias is None
            else stacked(lambda layer: layer.attention.qkv.bias),
            q_norm=stacked(lambda layer: layer.attention.q_norm.weight) if normed else None,
            k_norm=stacked(lambda layer: layer.attention.k_norm.weight) if normed else None,
        )
