"""Scores of lm-eval tasks equal those of lm-eval's own `hf` model on the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlx.comm.groups import Mesh
from megarlx.config.model import family_config
from megarlx.data.tokenizer import FileTokenizer
from megarlx.model.build import ParallelModel, build_model

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

LONGEST = 48
WORDS = ["red", "green", "blue", "tom", "ann", "eva", "buys", "sells", "3", "4", "5", "so", "then"]


def text(number: int, length: int) -> str:
    draw = torch.Generator().manual_seed(number)
    return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=draw))


@pytest.fixture(scope="module")
def tokenizer() -> FileTokenizer:
    """Byte-level BPE: pieces of words, as real ones have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text(i, 30) for i in range(40)], trainer)
    return FileTokenizer(json.loads(made.to_str()), None, "small")


@pytest.fixture(scope="module")
def model(tokenizer: FileTokenizer) -> ParallelModel:
    config = family_config(
        "olmo2",
        vocab_size=tokenizer.vocab_size,
        hidden_size=24,
        layers=2,
        heads=2,
        head_dim=12,
        intermediate_size=40,
        max_sequence_length=LONGEST,
        init_std=0.25,
    )
    return build_model(config, Mesh.alone(), seed=3)


@pytest.fixture(scope="module")
def theirs(model: ParallelModel, tokenizer: FileTokenizer) -> Any:
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer

    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer.definition()["tokenizer"])),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    return HFLM(pretrained=their_olmo2(model), tokenizer=wrapped, batch_size=3, max_length=LONGEST)


def their_olmo2(model: ParallelModel) -> Any:
    c = model.config
    made = transformers.Olmo2ForCausalLM(
        transformers.Olmo2Config(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            intermediate_size=c.intermediate_size,
            rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            max_position_embeddings=LONGEST,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    (stage,) = model.stages
    ours = {name: tensor.detach() for name, tensor in stage.named_parameters()}
    state = {
        "model.embed_tokens.weight": ours["embedding.weight"][: c.vocab_size],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": ours["head.weight"][: c.vocab_size],
    }
    for index in range(c.layers):
        here, there = f"layers.{index}", f"model.layers.{index}"
        qkv = ours[f"{here}.attention.qkv.weight"].split((c.query_size, c.kv_size, c.kv_size))
        for name, part in zip("qkv", qkv, strict=True):
            state[f"{there}.self_attn.{name}_proj.weight"] = part
        for name in ("q_norm", "k_norm"):
            state[f"{there}.self_attn.{name}.weight"] = ours[f"{here}.attention.{name}.weight"]
        state[f"{there}.self_attn.o_proj.weight"] = ours[f"{here}.attention.o.weight"]
        gate, up = ours[f"{here}.mlp.gate_up.weight"].chunk(2)
        state[f"{there}.mlp.gate_proj.weight"], state[f"{there}.mlp.up_proj.weight"] = gate, up
        state[f"{there}.mlp.down_proj.weight"] = ours[f"{here}.mlp.down.weight"]
        state[f"{there}.post_attention_layernorm.weight"] = ours[f"{here}.attention_norm.weight"]
        state[f"{there}.post_feedforward_layernorm.weight"] = ours[f"{here}.mlp_norm.weight"]
    made.load_state_dict(state)
    return made


def tasks(folder: Path) -> list[dict[str, Any]]:
    """A multiple choice, a perplexity over texts longer than the model, and a generation."""
    rows = [
        {
            "question": text(i, 4 + 9 * (i % 6)),  # some longer than the model can read
            "choices": [text(100 * i + c, 1 + c) for c in range(4)],
            "answer": i % 4,
            "page": text(i, 20 + 15 * (i % 5)),
        }
        for i in range(24)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(path)},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
    }
    return [
        {
            **data,
            "task": "small_choice",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        {
            **data,
            "task": "small_pages",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        {
            **data,
            "task": "small_answers",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": [" so", "5 5"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]


def evaluated(lm: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from lm_eval.evaluator import simple_evaluate

    found = simple_evaluate(lm, tasks=tasks(folder), bootstrap_iters=0, log_samples=True)
    answers = {
        name: [sample["filtered_resps"] for sample in sorted(s, key=lambda s: s["doc_id"])]
        for name, s in found["samples"].items()
    }
    return found["results"], answers


def test_scores_of_all_three_kinds_of_tasks_are_those_of_the_hf_model(
    model: ParallelModel, theirs: Any, tokenizer: FileTokenizer, tmp_path: Path
) -> None:
    from megarlx.evaluation.lm_eval import MegarlxLM

    ours, our_answers = evaluated(MegarlxLM(model, tokenizer, tokens_per_pass=256), tmp_path)
    expected, their_answers = evaluated(theirs, tmp_path)
    for task in ("small_choice", "small_answers"):
        for name, value in expected[task].items():
            if name.endswith(",none") and not name.split(",")[0].endswith("_stderr"):
                assert ours[task][name] == value, (task, name)
    for name in ("word_perplexity,none", "bits_per_byte,none"):
        assert ours["small_pages"][name] == pytest.approx(expected["small_pages"][name], rel=1e-5)
    assert our_answers["small_answers"] == their_answers["small_answers"]
    for one, other in zip(our_answers["small_choice"], their_answers["small_choice"], strict=True):
        for (a, greedy), (b, their_greedy) in zip(one, other, strict=True):
            assert a == pytest.approx(b, abs=1e-3)
            assert greedy == their_greedy
    assert 0 < ours["small_choice"]["acc,none"] < 1


def test_the_harness_knows_the_model_by_its_name() -> None:
    from lm_eval.api.registry import get_model

    from megarlx.run import lm_eval_harness

    assert get_model("megarlx") is lm_eval_harness.RunLM


def test_generation_longer_than_the_model_is_refused(
    model: ParallelModel, tokenizer: FileTokenizer
) -> None:
    from lm_eval.api.instance import Instance

    from megarlx.evaluation.lm_eval import MegarlxLM

    request = Instance("generate_until", {}, ("red", {"max_gen_toks": LONGEST}), 0)
    with pytest.raises(ValueError, match=r"max_gen_toks is 48; .* allows 1 to 47"):
        MegarlxLM(model, tokenizer).generate_until([request])
