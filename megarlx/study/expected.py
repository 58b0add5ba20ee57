"""What is expected of the study is written down before a fresh seed runs.

The page names the settings by their hash, and a test compares it with the configurations: whoever
changes one of them changes what was expected.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PAGE = Path("benchmarks/results/study-expected.md")
SWEEPS = ("configs/study.toml", "configs/composition.toml", "configs/group_size.toml")
KEPT_PAGE = Path("benchmarks/results/kept-expected.md")
KEPT_SWEEPS = ("configs/kept.toml", "configs/kept_arithmetic.toml", "configs/kept_facts.toml")
KEPT_CHOSEN = Path("configs/kept_chosen.toml")  # rates that the tuning seeds chose
STATED = re.compile(r"settings hash:?\s+`?([0-9a-f]{64})\b", re.IGNORECASE)


def settings_hash() -> str:
    """Of the sweeps that claims are judged by, whatever their seeds; in megarlx's own folder."""
    from megarlx.report.record_files import hash_of

    return hash_of([hash_of_sweep(path) for path in SWEEPS])


def kept_hash() -> str:
    """Of the kept study: its sweeps, of which one seed says all, and the rates that were chosen."""
    from megarlx.report.record_files import hash_of

    chosen = tomllib.loads(KEPT_CHOSEN.read_text()) if KEPT_CHOSEN.exists() else {}
    return hash_of([*(hash_of_sweep(path, "seeds=[0]") for path in KEPT_SWEEPS), chosen])


def hash_of_sweep(path: str, *overrides: str) -> str:
    from megarlx.config import load_config
    from megarlx.config.sweep import SweepConfig
    from megarlx.sweeps.plan import jobs_of
    from megarlx.sweeps.records import JobSettings

    return JobSettings(jobs_of(load_config(path, overrides, SweepConfig))).all()


def stated_hash(text: str, page: Path = PAGE) -> str:
    """As the page has it."""
    found = STATED.findall(text)
    if len(set(found)) != 1:
        raise ValueError(f"{page}: {len(set(found))} settings hashes are stated; allowed is one")
    return str(found[0])
