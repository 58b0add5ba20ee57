"""docs/own_model.md, command by command, with a tiny model on two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from documents import fenced
from public_models import tiny_model
from training_runs import ROOT, environment

transformers = pytest.importorskip("transformers")

# What the document says, and what is small enough for a test.
SMALLER = {
    "--nproc-per-node 8": "--nproc-per-node 2",
    "sequence_length = 2048": "sequence_length = 160",
    "sequences_per_step = 32": "sequences_per_step = 4",
    "prompts_per_step = 64": "prompts_per_step = 2",
    "samples_per_prompt = 16": "samples_per_prompt = 4",
    "max_completion_tokens = 512": "max_completion_tokens = 12",
    "steps = 100": "steps = 2",
    "steps = 200": "steps = 2",
    "warmup_steps = 10": "warmup_steps = 1",
    "samples = 32": "samples = 4",
    "max_new_tokens = 512": "max_new_tokens = 12",
}


def test_the_way_from_a_model_of_ones_own_to_the_report(tmp_path: Path) -> None:
    commands = "\n".join(fenced(ROOT / "docs" / "own_model.md", "bash"))
    for shown, small in SMALLER.items():
        assert shown in commands, f"docs/own_model.md no longer says {shown!r}"
        commands = commands.replace(shown, small)
    tiny_model(tmp_path / "models" / "OLMo-2-0425-1B")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    # The repository's own folder is on the path because nothing need be installed for a test.
    script = f"""
set -euo pipefail
megarlx() {{ {sys.executable} -m megarlx "$@"; }}
python() {{ {sys.executable} "$@"; }}
torchrun() {{ {sys.executable} -m torch.distributed.run --standalone "$@"; }}
{commands.replace("PYTHONPATH=$PWD", f"PYTHONPATH=$PWD:{ROOT}")}
"""
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    summary = json.loads((tmp_path / "runs/mine/report/summary.json").read_text())
    assert summary, done.stdout
    for run, steps in (("base", 0), ("sft_then_rl", 4)):
        path = tmp_path / f"runs/mine/{run}/evaluations/iter_{steps:08d}.mine.json"
        result = json.loads(path.read_text())
        assert [item["samples"] for item in result["items"]] == [4, 4]
    # What comes back is the trained model: other weights, in the type that was asked for.
    before, after = (
        dict(
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder).named_parameters()
        )
        for folder in ("models/OLMo-2-0425-1B", "models/mine")
    )
    assert before.keys() == after.keys()
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    assert any(not torch.equal(before[n].bfloat16(), after[n]) for n in before)
