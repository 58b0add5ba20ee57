"""Files of records: their format, a line for each run, and settings.json for a folder of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megarlx.data.token_files import write_atomically

FORMAT = "megarlx records 3"
SETTINGS = "settings.json"
SHORT = 8  # characters of a hash that names a line of a table


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def is_of_records(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as stream:
        return FORMAT in stream.read(100)


def read(path: Path) -> dict[str, Any]:
    held = read_json(path)
    if held.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {held.get('format')!r}; allowed is {FORMAT!r}")
    return held


def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> str:
    """Their name in settings.json, where each section that runs share stands once."""
    path = folder / SETTINGS
    held: dict[str, Any] = {"format": FORMAT, "sections": {}, "settings": {}}
    if path.exists():
        held = read(path)
    name = hash_of(settings)[:SHORT]
    if name not in held["settings"]:
        sections = {key: hash_of(section)[:SHORT] for key, section in settings.items()}
        held["sections"] |= {sections[key]: section for key, section in settings.items()}
        held["settings"][name] = sections
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lines_of(held))
    return name


def kept_settings(folder: Path) -> dict[str, dict[str, Any]]:
    held = read(folder / SETTINGS)
    return {
        name: {key: held["sections"][section] for key, section in sections.items()}
        for name, sections in held["settings"].items()
    }


def lines_of(held: Mapping[str, Any]) -> str:
    """JSON with a line for each run, so that a changed one is a changed line."""

    def compact(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    parts = []
    for key, value in held.items():
        if isinstance(value, Mapping) and value:
            inside = ",\n".join(f"{json.dumps(k)}:{compact(v)}" for k, v in sorted(value.items()))
            parts.append(f"{json.dumps(key)}:{{\n{inside}\n}}")
        else:
            parts.append(f"{json.dumps(key)}:{compact(value)}")
    return "{" + ",\n".join(parts) + "}\n"
