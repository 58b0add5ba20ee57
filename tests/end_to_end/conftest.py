"""One world for all runs of a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import write_config


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    return write_config(folder, folder / "world")
