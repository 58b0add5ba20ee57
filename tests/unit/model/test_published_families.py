"""Logits equal those of the `transformers` implementation of each family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import FAMILIES, small
from torch import Tensor

from megarlx.config.model import ModelConfig
from megarlx.config.parameters import published_names
from megarlx.hf.config_map import hugging_face_config
from megarlx.model.transformer import Stage
from megarlx.parallel.metadata import Piece, fill_

transformers = pytest.importorskip("transformers")


def their_model(config: ModelConfig) -> Any:
    settings = hugging_face_config(config, "float32")
    kind = settings.pop("model_type")
    theirs = transformers.AutoConfig.for_model(kind, **settings, attn_implementation="eager")
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(theirs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            ones = "norm" in name and not config.norm_plus_one
            parameter.normal_(1.0 if ones else 0.0, 0.2)
    return model


def loaded_from(model: Any, config: ModelConfig) -> Stage:
    stage = Stage(config)
    theirs = model.state_dict()
    names = published_names(config)

    def tensor_of(piece: Piece) -> Tensor:
        tensor: Tensor = theirs[names[piece.name]]
        return tensor

    fill_(dict(stage.named_parameters()), stage.layouts, tensor_of)
    return stage


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_published_implementation(family: str, kv_heads: int, tied: bool) -> None:
    cap = {"final_cap": 3.0} if family == "gemma2" else {}
    config = small(family, kv_heads=kv_heads, tied_embeddings=tied, **cap)
    model = their_model(config)
    stage = loaded_from(model, config)
    tokens = torch.randint(config.vocab_size, (3, 83))
    with torch.no_grad():
        theirs = model(input_ids=tokens).logits
        ours = stage.logits(stage(tokens))
    assert theirs.shape[-1] == 97
    assert torch.isneginf(ours[:, 97:]).all()
    ours = ours[:, :97].view(theirs.shape)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_count_equals_the_published_implementation(family: str) -> None:
    config = small(family)
    model = their_model(config)
    assert config.parameters() == sum(p.numel() for p in model.parameters())
