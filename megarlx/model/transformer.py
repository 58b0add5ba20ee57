"""The transformer: one pipeline stage of it, which is all of it when there is one stage.

Letters: B rows of a batch, S tokens a row, T = B·S tokens one after another, t the tokens a rank
holds between tensor-parallel parts (T, or T / tp under sequence parallelism), V padded vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megarlx.comm.groups import Group
from megarlx.config.model import ModelConfig
from megarlx.model import rope
from megarlx.model.core_attention import AttentionKind
from megarlx.model.documents import Documents
from megarlx.model.initialise import initialise_
from megarlx.model.kv_cache import CacheStep, KVCache, PageTable
from megarlx.model.layers import layers
from megarlx.model.metadata import TensorParallel, parameter_layouts
from megarlx.model.transformer_layer import Layer, Recompute
from megarlx.ops import Head, LossInputs
from megarlx.ops.product import linear
from megarlx.ops.weight_gradient import adds_by_product
from megarlx.parallel.metadata import ParameterLayout
from megarlx.parallel.microbatches import Loss


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
        attention: AttentionKind = "auto",
        fp8: str | None = None,
        kept_gradients_mib: int = 0,
        delay_weight_gradients: bool = False,
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
        self._kept_gradients_mib = kept_gradients_mib
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
        of_layers = options | {"delay_weight_gradient": delay_weight_gradients}
        self.layers = nn.ModuleDict(
            {
                str(index): Layer(config, index, self.backend, of_layers, recompute, attention)
                for index in range(first, last)
            }
        )
        if self.has_head:
            self.norm = self.backend.RMSNorm(
                config.hidden_size,
                eps=config.norm_eps,
                plus_one=config.norm_plus_one,
                sequence_parallel=self.sequence_parallel,
                dtype=dtype,
                device=device,
            )
            if not (config.tied_embeddings and self.has_embedding):
                # rows of the vocabulary, like the embedding; `head_weight` is used, not its forward
                self.head = self.backend.VocabEmbedding(padded, config.hidden_size, **options)
        self.layouts = self.layouts_at(group.rank)
        self.embedding_scale: float | None = None
        if config.scaled_embedding:  # rounded to the type of the weights, as published models are
            self.embedding_scale = torch.tensor(config.hidden_size**0.5, dtype=dtype).item()
        self.final_cap = config.final_cap or None
        self._by_product = False
        # by rotary base; not buffers: moving the stage to another dtype must not round them
        bases = {config.rope_theta_of(layer) for layer in range(first, last)}
        self.radians = {base: rope.frequencies(config, base) for base in sorted(bases)}

    def layouts_at(self, tp_rank: int) -> dict[str, ParameterLayout]:
        """Of the parameters that a tensor-parallel rank holds of this stage."""
        return parameter_layouts(
            self.config,
            TensorParallel(self.group.size, tp_rank, self.sequence_parallel),
            first=self.first,
            last=self.last,
            embedding=self.has_embedding,
            head=self.has_head,
        )

    @property
    def head_weight(self) -> Tensor:
        """[V / tp, hidden]; behind the vocabulary's end its rows are padding."""
        table = self.embedding if self.config.tied_embeddings and self.has_embedding else self.head
        weight: Tensor = table.weight
        return weight

    def initialise_(self, seed: int) -> Stage:
        """Draw this stage's slices of the weights that `seed` means for the whole model."""
        parameters = dict(self.named_parameters())
        initialise_(
            parameters,
            self.layouts,
            seed=seed,
            std=self.config.init_std,
            norms=0.0 if self.config.norm_plus_one else 1.0,
        )
        return self

    def kv_cache(self, table: PageTable) -> KVCache:
        """An empty cache for the layers of this stage."""
        return KVCache.empty(
            self.last - self.first,
            table,
            self.config.local_kv_heads(self.group.size),
            self.config.head_dim,
            dtype=next(self.parameters()).dtype,
        )

    def forward(
        self,
        inputs: Tensor,
        *,
        documents: Documents | Tensor | None = None,
        longest: int | None = None,
        positions: Tensor | None = None,
        cache: CacheStep | None = None,
        loss_inputs: LossInputs | None = None,
        loss: Loss | None = None,
    ) -> Tensor:
        """Token ids ([B, S] or [T]) on the first stage, hidden states [t, hidden] on the others.

        `documents` as a tensor is offsets, of any shape that flattens to [N + 1] (a pipeline cuts
        them into [1, N + 1] a micro-batch), with `longest` a bound on their length if one is known;
        without `documents` every row of [B, S] ids is one. `positions` are by default counted from
        each document's beginning.
        Returns hidden states [t, hidden]; on the last stage normalised ones [T, hidden], or with
        `loss`, which is told `loss_inputs`, the loss as shape [1].
        """
        documents = self._documents(inputs, documents, longest, cache)
        if self.has_embedding:
            inputs = inputs.reshape(-1)
        self._check_tokens(inputs, documents)
        if positions is None:
            positions = documents.positions if cache is None else cache.positions
        with self.backend.precision(self.fp8, self.group):
            x = self._embedded(inputs) if self.has_embedding else inputs
            rotations = self._rotations(positions.reshape(-1), x.dtype)
            for index, layer in enumerate(self.layers.values()):
                held = None if cache is None else cache.layer(index)
                rotation = rotations[layer.rope_theta]  # type: ignore[index]
                if self.recompute == "full" and torch.is_grad_enabled():
                    x = self.backend.recompute(layer, x, rotation, documents, held)
                else:
                    x = layer(x, rotation, documents, held)
        if not self.has_head:
            return x
        x = self._enter_head(self.norm(x))
        if loss is None or loss_inputs is None:
            return x
        head = self._head(x)
        return head.check(loss(head, loss_inputs).loss).reshape(1)

    def _head(self, x: Tensor) -> Head:
        weight = self.head_weight
        into = weight.grad if self._by_product and adds_by_product(weight) else None
        of_model = (self.group, self.config.vocab_size, self.final_cap)
        return Head(x, weight, *of_model, into, self._kept_gradients_mib)

    def add_by_product(self, on: bool) -> None:
        """As of layers_torch.ColumnLinear, for the head."""
        self._by_product = on

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, hidden] of the last stage to this rank's [T, V / tp], padding ids at -inf.

        For evaluation and generation; training never makes this matrix.
        """
        out = linear(hidden, self.head_weight)
        out = out if out.dtype == torch.float64 else out.float()
        if self.final_cap is not None:
            out = self.final_cap * torch.tanh(out / self.final_cap)
        rows = len(self.head_weight)
        real = min(max(self.config.vocab_size - self.group.rank * rows, 0), rows)
        if real < rows:
            out[:, real:] = -torch.inf
        return out

    def _embedded(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        return x if self.embedding_scale is None else x * self.embedding_scale

    def _rotations(self, positions: Tensor, dtype: torch.dtype) -> dict[float, rope.Rotation]:
        """By rotary base, of all layers that have it."""
        for base, radians in self.radians.items():
            if radians.device != positions.device:
                self.radians[base] = radians.to(positions.device, non_blocking=True)
        return {
            base: rope.rotation(positions, radians, dtype) for base, radians in self.radians.items()
        }

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
