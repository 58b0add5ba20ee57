"""There and back without a bit changed, the same logits on the way, the same greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import FAMILIES, convert, published, same_bits, save, tensors, transformers

from megarlx.checkpoint import read_manifest, verify
from megarlx.generation.engine import Engine
from megarlx.generation.requests import Request, SamplingSettings
from megarlx.hf.sources import CheckpointSource
from megarlx.hf.trunk import find_checkpoint, model_of_run
from megarlx.hf.verify import load_ours
from megarlx.model.transformer import Stage


def stage_of(run: Path) -> Stage:
    source = CheckpointSource(find_checkpoint(str(run)))
    return load_ours(model_of_run(run), source, dict(source.dtypes))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_comes_back_and_logits_agree_on_the_way(
    tmp_path: Path, family: str, tied: bool, kv_heads: int
) -> None:
    model = published(family, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    there = save(model, tmp_path / "hf")
    # Small files on our side: most tensors then lie in several blocks.
    assert convert(there, tmp_path / "run", file_bytes=3000) == 0
    assert convert(tmp_path / "run", tmp_path / "back", "megarlx>hf", file_bytes=40_000) == 0
    assert same_bits(tensors(there), tensors(tmp_path / "back"))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    verify(find_checkpoint(str(tmp_path / "run")))

    tokens = torch.randint(97, (3, 83), generator=torch.Generator().manual_seed(1))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager"
    )
    with torch.no_grad():
        theirs = model(input_ids=tokens).logits
        again = loaded.eval()(input_ids=tokens).logits
        stage = stage_of(tmp_path / "run")
        ours = stage.logits(stage(tokens))[:, :97].view(theirs.shape)
    assert torch.equal(again, theirs)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_widened_and_come_back_as_they_were(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    there = save(published("qwen2", dtype=dtype), tmp_path / "hf")
    convert(there, tmp_path / "run")
    manifest = read_manifest(find_checkpoint(str(tmp_path / "run")))
    assert {tensor.dtype for tensor in manifest.tensors.values()} == {"float32"}
    convert(tmp_path / "run", tmp_path / "back", "megarlx>hf")
    assert same_bits(tensors(there), tensors(tmp_path / "back"))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_a_mixture_of_types_comes_back_tensor_by_tensor(tmp_path: Path) -> None:
    model = published("olmo2", dtype=torch.bfloat16)
    model.model.norm.float()
    there = save(model, tmp_path / "hf")
    convert(there, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back", "megarlx>hf")
    assert same_bits(tensors(there), tensors(tmp_path / "back"))
    convert(tmp_path / "run", tmp_path / "wide", "megarlx>hf", dtype="float32")
    assert {t.dtype for t in tensors(tmp_path / "wide").values()} == {torch.float32}


def test_a_tied_model_may_carry_its_head_twice_but_not_another_one(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    there = save(published("llama", tie_word_embeddings=True), tmp_path / "hf")
    held = tensors(there)
    twice = {**held, "lm_head.weight": held["model.embed_tokens.weight"].clone()}
    save_file(twice, there / "model.safetensors")
    convert(there, tmp_path / "run")
    twice["lm_head.weight"][3, 4] += 1
    save_file(twice, there / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight is not the embedding"):
        convert(there, tmp_path / "other")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_the_export_are_those_of_our_engine(tmp_path: Path, family: str) -> None:
    convert(save(published(family), tmp_path / "hf"), tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back", "megarlx>hf")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(97, (4, 11), generator=generator)
    with torch.no_grad():
        theirs = model.generate(prompts, max_new_tokens=20, do_sample=False)[:, 11:]
    engine = Engine([stage_of(tmp_path / "run")], slots=16, longest=64)
    requests = [Request(tokens, (index,), 20) for index, tokens in enumerate(prompts.tolist())]
    ours = engine.generate(requests, SamplingSettings(temperature=0.0), seed=0)
    assert torch.equal(torch.stack([c.tokens for c in ours]), theirs)
    assert len({tuple(row) for row in theirs.tolist()}) == 4


def test_verify_says_the_difference_and_fails_above_the_tolerance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = save(published("olmo2"), tmp_path / "hf")
    assert convert(there, tmp_path / "run", verify=True) == 0
    assert "largest difference of logits" in capsys.readouterr().out
    assert convert(there, tmp_path / "other", verify=True, tolerance=1e-12) == 3
    assert "BAD" in capsys.readouterr().out
    # Rounding is asked for, and is no error of the conversion.
    options = {"verify": True, "dtype": "bfloat16"}
    assert convert(tmp_path / "run", tmp_path / "back", "megarlx>hf", **options) == 0
