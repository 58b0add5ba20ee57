"""From a public model to a run and back, and from a run trained here to transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import tool, train, write_config

from megarlx.data.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")


def convert(way: str, *words: object) -> None:
    kind_from, kind_to = way.split(">")
    kinds = ["--from", kind_from, "--to", kind_to]
    assert tool("convert_checkpoint").main([*kinds, *map(str, words)]) == 0


def test_a_trained_run_speaks_the_same_through_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on words, exported with its tokenizer, greedy tokens as our engine draws them."""
    from megarlx.generation.engine import Engine
    from megarlx.generation.requests import Request, SamplingSettings
    from megarlx.hf.sources import CheckpointSource
    from megarlx.hf.trunk import find_checkpoint, model_of_run
    from megarlx.hf.verify import load_ours

    out, exported = tmp_path / "run", tmp_path / "exported"
    assert train(write_config(tmp_path, tmp_path / "world"), out) == 0
    convert("megarlx>hf", out, exported, "--verify")
    assert "verify: largest difference of logits" in capsys.readouterr().out
    tokenizer = load_tokenizer(tmp_path / "world" / "tokenizer.json")
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    words = transformers.AutoTokenizer.from_pretrained(exported)
    assert len(words) == tokenizer.vocab_size

    source = CheckpointSource(find_checkpoint(f"{out}@12"))
    engine = Engine(
        [load_ours(model_of_run(out), source, dict(source.dtypes))], slots=16, longest=32
    )
    prompts = [[5, 9, 17, 3], [40, 41, 42, 43]]
    requests = [Request(ids, (i,), 12) for i, ids in enumerate(prompts)]
    sampling = SamplingSettings(temperature=0.0, stop_tokens=(tokenizer.eos_id,))
    ours = engine.generate(requests, sampling, seed=0)
    for ids, completion in zip(prompts, ours, strict=True):
        text = tokenizer.decode(ids)
        inputs = words(text, return_tensors="pt")["input_ids"]
        assert inputs[0].tolist() == ids
        with torch.no_grad():
            drawn = theirs.generate(inputs, max_new_tokens=12, do_sample=False)[0, 4:].tolist()
        assert drawn == completion.tokens.tolist()


def test_two_revisions_become_a_run_that_the_other_tools_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.Olmo2Config(
        vocab_size=97,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        max_position_embeddings=64,
        pad_token_id=None,
        eos_token_id=None,
    )
    trunk = tmp_path / "trunk"
    for step, tokens in ((1000, "2B"), (2000, "4B")):
        torch.manual_seed(step)
        source = tmp_path / f"step{step}"
        transformers.Olmo2ForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
        words = ("--into", trunk, "--iteration", step, "--tokens", tokens)
        convert("hf>megarlx", source, *words, "--verify", "--quiet")
        assert ": good" in capsys.readouterr().out
    inspect = tool("inspect_checkpoint")
    assert inspect.main([f"{trunk}@tokens:3B", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "iteration 2000" in shown
    assert '"pretraining": 4000000000' in shown
    convert("megarlx>megarlx", f"{trunk}@1000", tmp_path / "tp2", "--layout", "2,1,1")
    manifest = tmp_path / "tp2" / "checkpoints" / "iter_00001000" / "manifest.json"
    assert len(json.loads(manifest.read_text())["files"]) == 2
    convert("megarlx>hf", tmp_path / "tp2", tmp_path / "back")
    capsys.readouterr()
    assert inspect.main(["--diff", str(tmp_path / "step1000"), str(tmp_path / "back")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(rows) == 25
    assert all(row[3] == "0" for row in rows)
