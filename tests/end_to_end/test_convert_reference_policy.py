"""A run with a reference policy: its weights alone are exported, a new layout takes all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_branch_command import TRUNK, branch
from training_runs import tool, train

from megarlx.checkpoint import FROZEN, read_manifest
from megarlx.hf.sources import CheckpointSource

RECIPE = """
[rl]
prompts_per_step = 2
samples_per_prompt = 2
max_completion_tokens = 8
policy = { preset = "grpo", kl = "k3", kl_coefficient = 0.1 }
[[rl.rewards]]
function = "length_penalty"
options = { max_tokens = 8, buffer = 4.0 }
workers = 0

[[stages]]
steps = 4
[stages.objectives.rl]
lr = 1e-3

[checkpoints]
save_every_steps = 2
[evaluation]
readiness_prompts = 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk, and an excursion with a reference from it."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "trunk.toml").write_text(TRUNK.format(world=folder / "world"))
    assert train(folder / "trunk.toml", folder / "trunk", "training.steps=4") == 0
    (folder / "recipe.toml").write_text(RECIPE)
    assert branch(f"{folder / 'trunk'}@4", folder / "recipe.toml", folder / "run") == 0
    return folder


def convert(way: str, *words: object) -> int:
    kind_from, kind_to = way.split(">")
    kinds = ["--from", kind_from, "--to", kind_to, "--quiet"]
    return tool("convert_checkpoint").main([*kinds, *map(str, words)])


def held(run: Path, iteration: int) -> dict[str, torch.Tensor]:
    source = CheckpointSource(run / "checkpoints" / f"iter_{iteration:08d}")
    return {name: source.read(name, [0] * len(s), s) for name, s in source.shapes.items()}


def test_the_weights_alone_go_to_hugging_face(folder: Path) -> None:
    pytest.importorskip("transformers")
    assert convert("megarlx>hf", folder / "run", folder / "hf", "--verify") == 0
    exported = load_file(folder / "hf" / "model.safetensors")
    weights = {n: t for n, t in held(folder / "run", 4).items() if "/" not in n}
    assert len(exported) == len(weights)
    theirs = exported["model.embed_tokens.weight"]
    assert torch.equal(theirs, weights["embedding.weight"])
    assert not torch.equal(theirs, held(folder / "run", 4)[f"{FROZEN}rl/embedding.weight"])


@pytest.mark.parametrize("layout", [["--layout", "2,1,1"], ["--file-megabytes", "0.02"]], ids=str)
def test_a_new_layout_takes_the_reference_and_the_run_goes_on_in_it(
    folder: Path, tmp_path: Path, layout: list[str]
) -> None:
    wide = tmp_path / "wide"
    assert convert("megarlx>megarlx", f"{folder / 'run'}@2", wide, *layout) == 0
    files = read_manifest(wide / "checkpoints" / "iter_00000002").files
    kinds = [file.name.partition("-")[0] for file in files]
    assert list(dict.fromkeys(kinds)) == ["model", "optimizer", "frozen"]
    assert kinds.count("frozen") == kinds.count("model") > 1
    assert branch(f"{folder / 'trunk'}@4", folder / "recipe.toml", wide) == 0
    one, other = held(folder / "run", 4), held(wide, 4)
    assert one.keys() == other.keys()
    assert any(name.startswith(FROZEN) for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)
