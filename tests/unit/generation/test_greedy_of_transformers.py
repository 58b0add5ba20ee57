"""Greedy tokens equal those of `transformers` generate on the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_cases import FAMILIES, engine, prompt, small_stage

from megarlx.config.parameters import published_names
from megarlx.generation.requests import Request, SamplingSettings
from megarlx.hf.config_map import hugging_face_config

transformers = pytest.importorskip("transformers")


def their_model(stage: Any) -> Any:
    config = stage.config
    settings = hugging_face_config(config, "float32")
    theirs = transformers.AutoConfig.for_model(
        settings.pop("model_type"), **settings, attn_implementation="eager"
    )
    model = transformers.AutoModelForCausalLM.from_config(theirs).eval()
    names = published_names(config)
    ours = {name: tensor.detach() for name, tensor in stage.named_parameters()}
    state = {
        names[piece.name]: piece.of_parameter(ours[name])
        for name, layout in stage.layouts.items()
        for piece in layout.pieces
    }
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_transformers(family: str) -> None:
    stage = small_stage(family, hidden_size=40, init_std=0.3, tied_embeddings=False)
    model = their_model(stage)
    prompts = [prompt(11, seed) for seed in range(8)]
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor(prompts), max_new_tokens=30, do_sample=False, eos_token_id=None
        )[:, 11:]
    requests = [Request(tokens, (index,), 30) for index, tokens in enumerate(prompts)]
    ours = engine(stage).generate(requests, SamplingSettings(temperature=0.0), seed=0)
    assert torch.equal(torch.stack([c.tokens for c in ours]), theirs)
    assert len({tuple(row) for row in theirs.tolist()}) == 8
