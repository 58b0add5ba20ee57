"""docs/extending.md, block by block: what it shows works, and its TOML is a configuration."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
from documents import fenced
from training_runs import ROOT

from megarlx.config.objectives import RlConfig

DOCUMENT = ROOT / "docs" / "extending.md"
FILE = re.compile(r"# (\w+\.py)\n")


def test_every_python_block_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    # Rewards and environments are imported by processes of their own.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    blocks = fenced(DOCUMENT, "python")
    assert len(blocks) == 15
    files = []
    shared: dict[str, object] = {"__name__": "documentation"}
    for block in blocks:
        if found := FILE.match(block):
            (tmp_path / found[1]).write_text(block)
            files.append(found[1].removesuffix(".py"))
        else:
            exec(compile(block, f"{DOCUMENT.name}: {block[:60]}", "exec"), shared)
    assert files == ["my_rewards", "my_rooms", "counting"]
    assert all(name not in sys.modules for name in ("my_rewards", "my_rooms"))  # not in here


def test_its_configurations_are_taken() -> None:
    first, second = (tomllib.loads(block) for block in fenced(DOCUMENT, "toml"))
    (reward,) = RlConfig.model_validate(first["rl"]).rewards
    assert (reward.function, reward.weight) == ("my_rewards:brevity", 0.1)
    environment = RlConfig.model_validate(second["rl"]).environment
    assert environment is not None
    assert environment.options == {"rooms": 3}
