"""The transformer: one pipeline stage of it, which is all of it when there is one stage.

Letters: B rows of a batch, S tokens a row, T = B·S tokens one after another, t the tokens a rank
holds between tensor-parallel parts (T, or T / tp under sequence parallelism), H query heads and
K key/value heads of this rank, D head_dim, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarlx.comm import collectives
from megarlx.comm.groups import Group
from megarlx.config.model import ModelConfig
from megarlx.model import rope
from megarlx.model.documents import Documents
from megarlx.model.initialise import initialise_
from megarlx.model.kv_cache import CacheStep, KVCache, LayerCache
from megarlx.model.layers import layers
from megarlx.model.metadata import (
    TensorParallel,
    kv_copies,
    local_kv_heads,
    parameter_layouts,
)
from megarlx.ops.elementwise import attention_heads, is_native, swiglu
from megarlx.parallel.metadata import ParameterLayout

# none: keep every activation. full: keep a layer's input and run the layer again in backward.
# selective: run again only what has no weight matrix: QK-norm, rotation and attention from the
# fused projection, and SwiGLU from gate and up; they are many bytes and few operations.
Recompute = Literal["none", "selective", "full"]

Rotation = tuple[Tensor, Tensor]


class TokenLoss(Protocol):
    """What `megarlx.ops.linear_token_loss` returns, as far as a stage looks at it."""

    @property
    def loss(self) -> Tensor: ...


class Attention(nn.Module):
    """Fused projection, QK-norm, rotation, attention over documents, output projection."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        backend: Any,
        options: dict[str, Any],
        recompute: Recompute,
    ) -> None:
        super().__init__()
        self.config, self.group = config, options["group"]
        self.recompute = backend.recompute if recompute == "selective" else None
        tp = self.group.size
        self.heads, self.kv_heads = config.heads // tp, local_kv_heads(config, tp)
        dim = config.head_dim
        self.qkv = backend.ColumnLinear(
            config.hidden_size,
            (self.heads + 2 * self.kv_heads) * tp * dim,
            bias=config.qkv_bias,
            **options,
        )
        self.o = backend.RowLinear(config.heads * dim, config.hidden_size, **options)
        self.core = backend.CoreAttention(self.heads, self.kv_heads, dim, layer_number=index + 1)
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            norm = {
                "eps": config.norm_eps,
                "sequence_parallel": False,
                "dtype": options["dtype"],
                "device": options["device"],
            }
            self.q_norm = backend.RMSNorm(self.heads * dim if full else dim, **norm)
            self.k_norm = backend.RMSNorm(self.kv_heads * dim if full else dim, **norm)

    def forward(
        self, x: Tensor, rotation: Rotation, documents: Documents, cache: LayerCache | None
    ) -> Tensor:
        qkv = self.qkv(x)
        if self.recompute is not None and torch.is_grad_enabled():
            attended = self.recompute(self._attend, qkv, rotation, documents, cache)
        else:
            attended = self._attend(qkv, rotation, documents, cache)
        out: Tensor = self.o(attended)
        return out

    def _attend(
        self, qkv: Tensor, rotation: Rotation, documents: Documents, cache: LayerCache | None
    ) -> Tensor:
        dim = self.config.head_dim
        qk_heads = self.heads + self.kv_heads
        spans_ranks = self.config.qk_norm == "full" and self.group.size > 1
        if is_native(qkv) and not spans_ranks:
            q, k, v = attention_heads(
                qkv, *rotation, self.heads, self.kv_heads, **self._norm_weights()
            )
        elif self.config.qk_norm == "none":
            qk, v = qkv.view(len(qkv), -1, dim).split((qk_heads, self.kv_heads), dim=1)
            q, k = rope.rotate(qk, *rotation).split((self.heads, self.kv_heads), dim=1)
        else:
            widths = (self.heads * dim, self.kv_heads * dim, self.kv_heads * dim)
            q, k, v = qkv.split(widths, dim=1)
            q, k = self._normalise(q, k)
            q = rope.rotate(q.view(len(q), -1, dim), *rotation)
            k = rope.rotate(k.view(len(k), -1, dim), *rotation)
            v = v.unflatten(1, (-1, dim))
        out: Tensor = self.core(q, k, v, documents, cache)
        return out.flatten(1)

    def _norm_weights(self) -> dict[str, Any]:
        if self.config.qk_norm == "none":
            return {}
        weights = {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight}
        return weights | {"eps": self.config.norm_eps}

    def _normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.qk_norm == "per_head":
            dim = self.config.head_dim
            return self.q_norm(q.unflatten(1, (-1, dim))), self.k_norm(k.unflatten(1, (-1, dim)))
        if self.group.size == 1:
            return self.q_norm(q), self.k_norm(k)
        # the norm spans the heads of all ranks: both sums of squares in one reduction. Every
        # rank's output depends on them, so their gradient is summed over the ranks as well
        wide_q, wide_k = (x if x.dtype == torch.float64 else x.float() for x in (q, k))
        sums = torch.stack((wide_q.square().sum(1), wide_k.square().sum(1)), dim=1)
        sums = collectives.copy_to_group(
            collectives.reduce_from_group(sums, self.group), self.group
        )
        config = self.config
        counted = config.kv_heads * kv_copies(config, self.group.size)  # copies were summed too
        inverse_q = (sums[:, :1] / (config.heads * config.head_dim) + config.norm_eps).rsqrt()
        inverse_k = (sums[:, 1:] / (counted * config.head_dim) + config.norm_eps).rsqrt()
        q = (wide_q * inverse_q * self.q_norm.weight).to(q.dtype)
        return q, (wide_k * inverse_k * self.k_norm.weight).to(k.dtype)


class MLP(nn.Module):
    """SwiGLU between a fused gate and up projection and the projection down."""

    def __init__(
        self, config: ModelConfig, backend: Any, options: dict[str, Any], recompute: Recompute
    ) -> None:
        super().__init__()
        self.recompute = recompute == "selective"
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = backend.ColumnLinear(hidden, 2 * inner, bias=False, **options)
        self.down = backend.RowLinear(inner, hidden, **options)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        inner = swiglu(gate_up)
        again = self.recompute and torch.is_grad_enabled()
        with _made_again(inner, gate_up) if again else nullcontext():
            out: Tensor = self.down(inner)
        return out


def _made_again(inner: Tensor, gate_up: Tensor) -> AbstractContextManager[None]:
    """Whoever keeps `inner` for backward keeps gate and up in its place, which are kept anyway.

    A checkpoint around `swiglu` would save nothing: it is the projection down that keeps its input.
    """
    source, storage, shape = gate_up.detach(), inner.untyped_storage()._cdata, inner.shape

    def pack(saved: Tensor) -> Tensor | None:
        same = saved.untyped_storage()._cdata == storage and saved.shape == shape
        return None if same else saved

    def unpack(kept: Tensor | None) -> Tensor:
        return swiglu(source) if kept is None else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Layer(nn.Module):
    """Attention and MLP, each with its norm before it (pre) or behind it (post, OLMo2)."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        backend: Any,
        options: dict[str, Any],
        recompute: Recompute,
    ) -> None:
        super().__init__()
        self.post = config.norm_position == "post"
        norm = {"eps": config.norm_eps, **{k: v for k, v in options.items() if k != "group"}}
        self.attention = Attention(config, index, backend, options, recompute)
        self.mlp = MLP(config, backend, options, recompute)
        self.attention_norm = backend.RMSNorm(config.hidden_size, **norm)
        self.mlp_norm = backend.RMSNorm(config.hidden_size, **norm)

    def forward(
        self, x: Tensor, rotation: Rotation, documents: Documents, cache: LayerCache | None
    ) -> Tensor:
        if self.post:
            attended = self.attention(x, rotation, documents, cache)
            x = self.attention_norm(attended, residual=x)
            out: Tensor = self.mlp_norm(self.mlp(x), residual=x)
            return out
        x = x + self.attention(self.attention_norm(x), rotation, documents, cache)
        return x + self.mlp(self.mlp_norm(x))


class Stage(nn.Module):
    """The layers [first, last), with the embedding before them and the head behind them if asked.

    Parameter names carry the model's layer numbers; `layouts` says what each parameter holds.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        group: Group | None = None,
        first: int = 0,
        last: int | None = None,
        embedding: bool | None = None,
        head: bool | None = None,
        sequence_parallel: bool = False,
        recompute: Recompute = "none",
        backend: str = "torch",
        fp8: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        group = Group.alone() if group is None else group
        last = config.layers if last is None else last
        if not 0 <= first <= last <= config.layers:
            raise ValueError(
                f"stage: layers [{first}, {last}) of a model with {config.layers} layers"
            )
        if recompute not in ("none", "selective", "full"):
            raise ValueError(f"stage: recompute is '{recompute}'; allowed: none, selective, full")
        self.config, self.group = config, group
        self.first, self.last = first, last
        self.has_embedding = first == 0 if embedding is None else embedding
        self.has_head = last == config.layers if head is None else head
        # a group of one has nothing to split the sequence over
        self.sequence_parallel = sequence_parallel and group.size > 1
        self.recompute, self.fp8 = recompute, fp8
        self.backend = layers(backend)
        options = {
            "group": group,
            "sequence_parallel": self.sequence_parallel,
            "dtype": dtype,
            "device": device,
        }
        padded = config.padded_vocab(group.size)
        if self.has_embedding:
            self.embedding = self.backend.VocabEmbedding(padded, config.hidden_size, **options)
        self.layers = nn.ModuleDict(
            {
                str(index): Layer(config, index, self.backend, options, recompute)
                for index in range(first, last)
            }
        )
        if self.has_head:
            self.norm = self.backend.RMSNorm(
                config.hidden_size,
                eps=config.norm_eps,
                sequence_parallel=self.sequence_parallel,
                dtype=dtype,
                device=device,
            )
            if not (config.tied_embeddings and self.has_embedding):
                # rows of the vocabulary, like the embedding; `head_weight` is used, not its forward
                self.head = self.backend.VocabEmbedding(padded, config.hidden_size, **options)
        self.layouts: dict[str, ParameterLayout] = parameter_layouts(
            config,
            TensorParallel(group.size, group.rank, self.sequence_parallel),
            first=first,
            last=last,
            embedding=self.has_embedding,
            head=self.has_head,
        )
        # not a buffer: moving the stage to another dtype must not round it
        self.radians = rope.frequencies(config)

    @property
    def head_weight(self) -> Tensor:
        """[V / tp, hidden]; behind the vocabulary's end its rows are padding."""
        table = self.embedding if self.config.tied_embeddings and self.has_embedding else self.head
        weight: Tensor = table.weight
        return weight

    def initialise_(self, seed: int) -> Stage:
        """Draw this stage's slices of the weights that `seed` means for the whole model."""
        parameters = dict(self.named_parameters())
        initialise_(parameters, self.layouts, seed=seed, std=self.config.init_std)
        return self

    def kv_cache(self, slots: int, longest: int) -> KVCache:
        """An empty cache for the layers of this stage."""
        some = next(self.parameters())
        return KVCache.empty(
            self.last - self.first,
            slots,
            longest,
            local_kv_heads(self.config, self.group.size),
            self.config.head_dim,
            dtype=some.dtype,
            device=some.device,
        )

    def forward(
        self,
        inputs: Tensor,
        *,
        documents: Documents | Tensor | None = None,
        longest: int | None = None,
        positions: Tensor | None = None,
        cache: CacheStep | None = None,
        loss: Callable[..., TokenLoss] | None = None,
        **loss_inputs: Any,
    ) -> Tensor:
        """Token ids ([B, S] or [T]) on the first stage, hidden states [t, hidden] on the others.

        `documents` as a tensor is offsets, of any shape that flattens to [N + 1] (a pipeline cuts
        them into [1, N + 1] a micro-batch), with `longest` a bound on their length if one is known;
        without `documents` every row of [B, S] ids is one. `positions` are by default counted from
        each document's beginning.
        Returns hidden states [t, hidden]; on the last stage normalised ones [T, hidden], or with
        `loss` (the signature of `linear_token_loss`, its spec bound) the loss as shape [1].
        """
        documents = self._documents(inputs, documents, longest, cache)
        if self.has_embedding:
            inputs = inputs.reshape(-1)
        self._check_tokens(inputs, documents)
        if positions is None:
            positions = documents.positions if cache is None else cache.positions
        if self.radians.device != inputs.device:
            self.radians = self.radians.to(inputs.device)
        with self.backend.precision(self.fp8, self.group):
            x = self.embedding(inputs) if self.has_embedding else inputs
            rotation = rope.rotation(positions.reshape(-1), self.radians, x.dtype)
            for index, layer in enumerate(self.layers.values()):
                held = None if cache is None else cache.layer(index)
                if self.recompute == "full" and torch.is_grad_enabled():
                    x = self.backend.recompute(layer, x, rotation, documents, held)
                else:
                    x = layer(x, rotation, documents, held)
        if not self.has_head:
            return x
        x = self._enter_head(self.norm(x))
        if loss is None:
            return x
        flat = {
            name: value.reshape(-1) if isinstance(value, Tensor) and value.dim() == 2 else value
            for name, value in loss_inputs.items()
        }
        result = loss(
            x,
            self.head_weight,
            **flat,
            group=self.group,
            vocab_size=self.config.vocab_size,
            reduce_hidden_grad=False,  # the way into the head sums it
        )
        return result.loss.reshape(1)

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, hidden] of the last stage to this rank's [T, V / tp], padding ids at -inf.

        For evaluation and generation; training never makes this matrix.
        """
        out = F.linear(hidden, self.head_weight)
        out = out if out.dtype == torch.float64 else out.float()
        rows = len(self.head_weight)
        real = min(max(self.config.vocab_size - self.group.rank * rows, 0), rows)
        if real < rows:
            out[:, real:] = -torch.inf
        return out

    def _enter_head(self, x: Tensor) -> Tensor:
        entered: Tensor = self.backend.enter(x, self.group, self.sequence_parallel)
        return entered

    def _documents(
        self,
        inputs: Tensor,
        documents: Documents | Tensor | None,
        longest: int | None,
        cache: CacheStep | None,
    ) -> Documents:
        if isinstance(documents, Documents):
            return documents
        if cache is not None:
            return cache.documents
        tokens = inputs.numel()
        if not self.has_embedding:
            tokens = len(inputs) * (self.group.size if self.sequence_parallel else 1)
        if documents is not None:
            return Documents(documents.reshape(-1).int(), longest or tokens, tokens)
        if not self.has_embedding or inputs.dim() != 2:
            raise ValueError(
                f"stage: no documents given with inputs {tuple(inputs.shape)}; only token ids "
                "of shape [B, S] say by themselves where documents begin"
            )
        return Documents.rows(inputs.shape[0], inputs.shape[1], inputs.device)

    def _check_tokens(self, inputs: Tensor, documents: Documents) -> None:
        split = self.group.size if self.sequence_parallel else 1
        held = len(inputs) if self.has_embedding else len(inputs) * split
        if held != documents.tokens:
            raise ValueError(f"stage: {held} tokens, but documents of {documents.tokens}")
        if held % split:
            raise ValueError(
                f"stage: {held} tokens cannot be split over {split} ranks by sequence parallelism; "
                f"nearest: {held // split * split} or {-(-held // split) * split}"
            )
