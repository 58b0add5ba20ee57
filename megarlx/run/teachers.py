"""The teachers of an objective that distils: other runs' weights, frozen, as shards."""

from __future__ import annotations

from typing import Any

import torch

from megarlx.checkpoint import WEIGHTS_ONLY, FlatShards, load
from megarlx.config import Config, load_config
from megarlx.data.tokenizer import Tokenizer
from megarlx.model.build import ParallelModel
from megarlx.objectives.distill import Frozen
from megarlx.run.directory import RunDirectory, RunError
from megarlx.run.reference import resolve
from megarlx.run.tokenizer import load_tokenizer_of

OF_BEGINNINGS = ("init_std",)  # keys of [model] that do not change what weights compute


def frozen_teacher(
    text: str, config: Config, tokenizer: Tokenizer, model: ParallelModel, place: str
) -> Frozen:
    """`text` is RUN@N; `place` the key that names it. All ranks call it together."""
    found = resolve(text)
    theirs = load_config(found.run / "resolved.json", trusted=())
    _check_model(theirs.model.model_dump(), config.model.model_dump(), f"{place}: {text}")
    other = load_tokenizer_of(theirs, RunDirectory(found.run))
    if other is None or other.fingerprint != tokenizer.fingerprint:
        given = "none" if other is None else f"'{other.name}' ({other.fingerprint})"
        raise RunError(
            f"{place}: {text} has the tokenizer {given}; allowed is this run's, "
            f"'{tokenizer.name}' ({tokenizer.fingerprint})"
        )
    parallel = model.data_parallel
    like = parallel.shard_of_weights()
    masters = torch.zeros_like(like, dtype=parallel.gradient_dtype)
    shards = FlatShards(parallel.layout, parallel.layouts, parallel.group.rank, {"": masters})
    loaded = load(found.checkpoint, shards, model.mesh.world, ignore=WEIGHTS_ONLY)
    return Frozen(text, loaded.digest, masters.to(like.dtype))


def _check_model(theirs: dict[str, Any], ours: dict[str, Any], place: str) -> None:
    for key, value in ours.items():
        if key not in OF_BEGINNINGS and theirs.get(key) != value:
            raise RunError(
                f"{place} has model.{key} = {theirs.get(key)!r}; allowed is this model's, {value!r}"
            )
