"""What is expected of the study is written down before a fresh seed runs.

The page names the settings by their hash, and a test compares it with the configurations: whoever
changes one of them changes what was expected.
"""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path("benchmarks/results/study-expected.md")
SWEEPS = ("configs/study.toml", "configs/composition.toml", "configs/group_size.toml")
STATED = re.compile(r"settings hash:?\s+`?([0-9a-f]{64})\b", re.IGNORECASE)


def settings_hash() -> str:
    """Of the sweeps that claims are judged by, whatever their seeds; in megarlx's own folder."""
    from megarlx.config import load_config
    from megarlx.config.sweep import SweepConfig
    from megarlx.report.records import hash_of
    from megarlx.sweeps.plan import jobs_of
    from megarlx.sweeps.records import JobSettings

    sweeps = [load_config(path, (), SweepConfig) for path in SWEEPS]
    return hash_of([JobSettings(jobs_of(sweep)).all() for sweep in sweeps])


def stated_hash(text: str) -> str:
    """As the page has it."""
    found = STATED.findall(text)
    if len(set(found)) != 1:
        raise ValueError(f"{PAGE}: {len(set(found))} settings hashes are stated; allowed is one")
    return str(found[0])
