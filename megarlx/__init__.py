"""megarlx: a trainer for language models, with reinforcement learning anywhere in training.

The names of PUBLIC are imported when they are first used: `import megarlx` imports nothing else.
"""

from typing import Any

__version__ = "0.2.0"

PUBLIC = {
    "load_config": "megarlx.config:load_config",
    "train": "megarlx.run.api:train",
    "branch": "megarlx.run.api:branch",
    "transplant": "megarlx.run.api:transplant",
    "merge": "megarlx.run.api:merge",
    "open": "megarlx.run.api:open",
    "report_on": "megarlx.report.command:report_on",  # megarlx.report is a package
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"megarlx has no '{name}'; it has {', '.join(PUBLIC)}")
    from megarlx.plug import load

    return load(PUBLIC[name])


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
