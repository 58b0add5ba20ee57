"""Logits before and after: the published implementation against ours, on random tokens.

Both models are held in memory, in fp32 (fp64 where the tensors are), so this is for a machine that
has room for them twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlx.config.model import ModelConfig
from megarlx.hf.errors import ConversionError
from megarlx.hf.sources import TensorSource
from megarlx.model.transformer import Stage
from megarlx.parallel.metadata import Piece, fill_

ROWS, LENGTH, SEED = 2, 32, 20


@dataclass(frozen=True)
class Comparison:
    largest_difference: float
    largest_logit: float

    @property
    def relative(self) -> float:
        return self.largest_difference / self.largest_logit

    def __str__(self) -> str:
        return (
            f"largest difference of logits {self.largest_difference:.3g}, largest logit "
            f"{self.largest_logit:.3g}: relative {self.relative:.2g}"
        )


def load_published(folder: Path, dtype: torch.dtype) -> Any:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ConversionError(
            f"--verify compares with transformers, which does not import ({error}). Install it: "
            "pip install 'megarlx[hf]'"
        ) from error
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval()


def load_ours(config: ModelConfig, source: TensorSource, dtypes: dict[str, torch.dtype]) -> Stage:
    """`dtypes`: what the other side's tensors are rounded to, and so these."""
    wide = torch.float64 if torch.float64 in source.dtypes.values() else torch.float32
    stage = Stage(config, dtype=wide)

    def tensor_of(piece: Piece) -> Tensor:
        shape = piece.global_shape
        values = source.read(piece.name, (0,) * len(shape), shape)
        return values.to(dtypes[piece.name]).to(wide)

    fill_(dict(stage.named_parameters()), stage.layouts, tensor_of)
    return stage


@torch.no_grad()
def compare(
    config: ModelConfig, source: TensorSource, dtypes: dict[str, torch.dtype], folder: Path
) -> Comparison:
    stage = load_ours(config, source, dtypes)
    generator = torch.Generator().manual_seed(SEED)
    length = min(LENGTH, config.max_sequence_length)
    tokens = torch.randint(config.vocab_size, (ROWS, length), generator=generator)
    ours = stage.logits(stage(tokens))[:, : config.vocab_size]
    dtype = ours.dtype
    del stage
    theirs = load_published(folder, dtype)(input_ids=tokens).logits.flatten(0, 1)
    return Comparison((ours - theirs).abs().max().item(), theirs.abs().max().item())
