"""Whether two results of a suite may be subtracted: the questions, how they were asked and scored.

How many were asked and sampled is left aside, since differences are taken question by question and
pass@k is unbiased. So are examples and stop strings: a base that answers nothing without them is
compared with what was trained from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ASKED_BY = (
    *("temperature", "top_p", "max_new_tokens", "correct_from", "normalise"),
    *("question_key", "answer_key", "split", "options", "made"),
)
REWARDS_ARE = ("function", "weight", "options")
EPISODES_ARE = ("function", "options", "max_turns", "max_turn_tokens", "max_episode_tokens")
DIGEST_LETTERS = 64
SHOWN_LETTERS = 200

How = Mapping[str, Any]


def how_asked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a result's settings makes its numbers others; what it does not know is absent."""
    suite, files = settings.get("suite") or {}, settings.get("files") or {}
    found = {key: suite[key] for key in ASKED_BY if key in suite}
    if suite.get("environment"):
        found["environment"] = _part(suite["environment"], EPISODES_ARE)
    rewards = suite.get("rewards")
    if suite.get("path") is not None and rewards == []:
        rewards = [{"function": "final_number", "weight": 1.0, "options": {}}]
    if rewards:
        found["rewards"] = [_part(reward, REWARDS_ARE) for reward in rewards]
    for name, digest in files.items():
        if name == suite.get("path"):
            found["questions"] = digest
        elif name != suite.get("few_shot_path"):
            found[name] = digest
    return found | ({"made data": settings["made"]} if settings.get("made") else {})


def apart(one: How, other: How) -> list[str]:
    """Names of what both know, and know differently."""
    return [name for name, value in one.items() if name in other and other[name] != value]


def shown(how: How, names: list[str]) -> str:
    """As `temperature 0.6`; of a file the beginning of its digest."""
    return ", ".join(f"{name} {_short(how[name])}" for name in names if name in how)


def _part(table: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: table[key] for key in keys if key in table}


def _short(value: Any) -> str:
    text = str(value)
    if len(text) == DIGEST_LETTERS and isinstance(value, str):
        return f"of digest {text[:8]}"
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}…"
