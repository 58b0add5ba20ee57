"""Folders of Hugging Face of any size, written without building the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from megarlx.config.model import ModelConfig, family_config
from megarlx.config.parameters import published_names
from megarlx.hf.config_map import hugging_face_config

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "convert_checkpoint.py"


def model_of(megabytes: float) -> ModelConfig:
    """As fp32; half of it is one tensor, the embedding."""
    hidden = 256
    rows = int(megabytes * 1e6 / 2 / 4 / hidden)
    shape = {"heads": 4, "intermediate_size": 640, "tied_embeddings": True}
    layers = max(1, round(megabytes * 1e6 / 2 / 4 / (hidden * (4 * hidden + 3 * 640))))
    return family_config("qwen3", vocab_size=rows, hidden_size=hidden, layers=layers, **shape)


def write_folder(folder: Path, megabytes: float, dtype: torch.dtype = torch.bfloat16) -> Path:
    folder.mkdir(parents=True)
    config = model_of(megabytes)
    text = json.dumps(hugging_face_config(config, str(dtype).removeprefix("torch.")))
    (folder / "config.json").write_text(text)
    shapes = config.tensor_shapes()
    generator = torch.Generator().manual_seed(0)
    held = {
        theirs: torch.randn(shapes[ours], generator=generator).to(dtype)
        for ours, theirs in published_names(config).items()
    }
    save_file(held, folder / "model.safetensors")
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(source: Path, target: Path, way: str = "hf>megarlx", *options: str) -> list[str]:
    kind_from, kind_to = way.split(">")
    kinds = ["--from", kind_from, "--to", kind_to]
    return [sys.executable, str(TOOL), *kinds, str(source), str(target), *options]


def run(words: list[str], seconds: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=environment(), capture_output=True, text=True, timeout=seconds, check=False
    )


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything but what says when it was made."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lineage.json"
    }
