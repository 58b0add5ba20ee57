"""A sequence-classification folder as a reward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megarlx.config.reward import RewardConfig
from megarlx.rollouts.rewards.model import RewardModel
from megarlx.rollouts.rewards.rewards import Rewards
from megarlx.rollouts.rewards.sample import Sample

SAMPLES = [Sample("a b", " c"), Sample("a", " d d d d e"), Sample("b", "")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", *"abcde"])}
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = transformers.LlamaConfig(
        vocab_size=7, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("reward_model")
    transformers.LlamaForSequenceClassification(config).save_pretrained(out)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(out)
    return out


def test_rewards_are_the_chosen_logit_whatever_the_batch(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        alone = [
            model(**tokenizer(s.prompt + s.completion, return_tensors="pt")).logits[0]
            for s in SAMPLES
        ]
    for label in (0, 1):
        expected = [float(logits[label]) for logits in alone]
        for batch in (1, 2, 16):
            reward = RewardModel(str(folder), label=label, samples_per_batch=batch)
            assert reward(SAMPLES) == pytest.approx(expected, abs=1e-5)
    assert len({round(x, 4) for x in expected}) == 3


def test_it_runs_in_a_process_of_its_own(folder: Path) -> None:
    limits = {"time_limit_seconds": 60.0, "samples_per_call": 64}
    rewards = Rewards([RewardConfig(function="model", options={"folder": str(folder)}, **limits)])
    try:
        scored = rewards.score(SAMPLES)
    finally:
        rewards.close()
    assert scored.totals == pytest.approx(RewardModel(str(folder))(SAMPLES), abs=1e-5)


def test_folders_without_safetensors_and_labels_that_are_not_there_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"no \.safetensors file there"):
        RewardModel(str(tmp_path))
    with pytest.raises(ValueError, match="label is 2; allowed are 0 to 1"):
        RewardModel(str(folder), label=2)
