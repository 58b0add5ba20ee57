"""The master weights of this rank's shard, and the model's weights that are rounded from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megarlx.parallel.data_parallel import DataParallel


class Masters:
    """`common` is the last average. With local steps each objective has a copy that it moves."""

    def __init__(
        self, data_parallel: DataParallel, names: Sequence[str], *, local_steps: bool
    ) -> None:
        self._data_parallel = data_parallel
        weights, dtype = data_parallel.weights, data_parallel.gradient_dtype
        shard = data_parallel.shard_of_weights()
        are_weights = shard is weights and weights.dtype == dtype and not local_steps
        self.common = shard if are_weights else shard.to(dtype, copy=True)
        # Where updated weights are written in the model's type, before they are gathered.
        rounded = shard is weights or shard.dtype != dtype
        self.out = shard if rounded and not are_weights else None
        self.locals = {name: self.common.clone() for name in names} if local_steps else {}

    def of(self, name: str) -> Tensor:
        """What an objective's steps move."""
        return self.locals.get(name, self.common)

    def add_(self, delta: Tensor, name: str | None = None) -> None:
        """To the common one, or to what an objective's steps move."""
        master = self.common if name is None else self.of(name)
        master.add_(delta)
        if master is self.common and self.out is not None:
            self.out.copy_(master)

    def gather(self) -> None:
        """Every rank's masters become everybody's weights; `out` has been written."""
        self._data_parallel.gather_weights(self.common if self.out is None else self.out)

    @torch.no_grad()
    def to_weights(self) -> None:
        """The model's weights again, rounded as a step would round them; all copies equal."""
        for local in self.locals.values():
            local.copy_(self.common)
        self._to_weights(self.common)

    @torch.no_grad()
    def to_weights_of(self, name: str) -> None:
        """Puts the weights in place that an objective has come to by itself."""
        if self.locals:
            self._to_weights(self.locals[name])

    def _to_weights(self, masters: Tensor) -> None:
        if self.out is not None:
            self.out.copy_(masters)
            masters = self.out
        self._data_parallel.gather_weights(masters)
