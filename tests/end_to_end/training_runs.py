"""Small runs of `megarlx train` for tests: a tiny model on a tiny world."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np

from megarlx.cli import main
from megarlx.data.token_files import TokenFile
from megarlx.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]

CONFIG = """
[model]
family = "olmo2"
vocab_size = 400
hidden_size = 24
layers = 4
heads = 2
intermediate_size = 40
max_sequence_length = 32

[training]
steps = 12
sequences_per_step = 8
sequences_per_microbatch = 2
sequence_length = 32

[optimizer]
lr = 3e-3
schedule = "constant"

[data]
maker = "world"
folder = "{world}"
[data.options]
documents = 400
held_out_documents = 20

[logging]
log_every_steps = 1
validation_sequences = 8
"""


def write_config(folder: Path, world: Path) -> Path:
    path = folder / "run.toml"
    path.write_text(CONFIG.format(world=world))
    return path


def train(config: Path, out: Path, *overrides: str, fresh: bool = False) -> int:
    words = ["train", str(config), "--out", str(out)]
    for override in overrides:
        words += ["--set", override]
    return main([*words, "--fresh"] if fresh else words)


def command(
    config: Path, out: Path, *overrides: str, processes: int = 1, restarts: int = 0
) -> list[str]:
    words = [*launcher(processes, restarts), "train", str(config), "--out", str(out)]
    for override in overrides:
        words += ["--set", override]
    return words


def launcher(processes: int = 1, restarts: int = 0) -> list[str]:
    """What stands before the command of `megarlx`."""
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        words += ["--max-restarts", str(restarts)]
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [*words, "-m", "megarlx"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(words: list[str], seconds: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=environment(), capture_output=True, text=True, timeout=seconds, check=False
    )


def tool(name: str) -> ModuleType:
    """tools/NAME.py, whose `main` gets the words of a command line."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(out: Path) -> dict[int, float]:
    lines = read_metrics(out / "metrics.jsonl")
    return {x["step"]: x["loss/pretraining"] for x in lines if "loss/pretraining" in x}


def tensors(out: Path, step: int) -> dict[str, bytes]:
    """The bytes of every tensor file of a checkpoint."""
    folder = out / "checkpoints" / f"iter_{step:08d}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def unigram_entropy(prefix: Path) -> float:
    """Nats a token, of the tokens of a file drawn one by one."""
    file = TokenFile(prefix)
    counts = np.bincount(np.asarray(file.raw))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
