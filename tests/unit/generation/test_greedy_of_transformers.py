"""Greedy tokens equal those of `transformers` generate on the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_cases import engine, prompt, small_stage

from megarlx.generation.requests import Request, SamplingSettings

transformers = pytest.importorskip("transformers")


def their_olmo2(stage: Any) -> Any:
    c = stage.config
    model = transformers.Olmo2ForCausalLM(
        transformers.Olmo2Config(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            intermediate_size=c.intermediate_size,
            rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    ours = {name: tensor.detach() for name, tensor in stage.named_parameters()}
    state = {"model.embed_tokens.weight": ours["embedding.weight"][: c.vocab_size]}
    state["model.norm.weight"] = ours["norm.weight"]
    state["lm_head.weight"] = ours["head.weight"][: c.vocab_size]
    for index in range(c.layers):
        layer, theirs = f"layers.{index}", f"model.layers.{index}"
        qkv = ours[f"{layer}.attention.qkv.weight"].split((c.query_size, c.kv_size, c.kv_size))
        for name, part in zip("qkv", qkv, strict=True):
            state[f"{theirs}.self_attn.{name}_proj.weight"] = part
        for name in ("q_norm", "k_norm"):
            state[f"{theirs}.self_attn.{name}.weight"] = ours[f"{layer}.attention.{name}.weight"]
        state[f"{theirs}.self_attn.o_proj.weight"] = ours[f"{layer}.attention.o.weight"]
        gate, up = ours[f"{layer}.mlp.gate_up.weight"].chunk(2)
        state[f"{theirs}.mlp.gate_proj.weight"], state[f"{theirs}.mlp.up_proj.weight"] = gate, up
        state[f"{theirs}.mlp.down_proj.weight"] = ours[f"{layer}.mlp.down.weight"]
        state[f"{theirs}.post_attention_layernorm.weight"] = ours[f"{layer}.attention_norm.weight"]
        state[f"{theirs}.post_feedforward_layernorm.weight"] = ours[f"{layer}.mlp_norm.weight"]
    model.load_state_dict(state)
    return model


def test_greedy_tokens_equal_those_of_transformers() -> None:
    stage = small_stage("olmo2", hidden_size=40, init_std=0.3)
    model = their_olmo2(stage)
    prompts = [prompt(11, seed) for seed in range(8)]
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor(prompts), max_new_tokens=30, do_sample=False, eos_token_id=None
        )[:, 11:]
    requests = [Request(tokens, (index,), 30) for index, tokens in enumerate(prompts)]
    ours = engine(stage).generate(requests, SamplingSettings(temperature=0.0), seed=0)
    assert torch.equal(torch.stack([c.tokens for c in ours]), theirs)
    assert len({tuple(row) for row in theirs.tolist()}) == 8
