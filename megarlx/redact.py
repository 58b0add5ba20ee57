"""Secrets among the options of rewards and environments: they are used, and kept nowhere.

What a run writes down (resolved.json, config.toml, its logs, trackers) holds NOT_KEPT in the place
of a text whose key, or whose form, says that it is a secret. Best is not to write it at all:
`headers_from_env` names variables of the environment.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

NOT_KEPT = "(a secret: not kept)"
FROM_ENVIRONMENT = "headers_from_env"
# Whole words of a key: X-Api-Key, access_token, but not tokenizer.
KEY = re.compile(
    r"(?<![a-z])(authorization|auth|bearer|cookie|password|passwd|secret|credential|"
    r"(api|private|access|secret)?key|token)s?(?![a-z])"
)
WITH_PASSWORD = re.compile(r"\w+://[^/\s@:]*:[^/\s@]+@")  # https://name:password@host
SHORTEST = 6  # characters: shorter ones stand in too many words to be hidden in text


def is_secret(key: str, value: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", key).lower()
    return bool(KEY.search(words) or WITH_PASSWORD.match(value))


def redacted(value: Any, in_options: bool = False, key: str = "") -> Any:
    """What may be written down of a configuration, or of a part of one."""
    if isinstance(value, Mapping):
        return {
            k: v if k == FROM_ENVIRONMENT else redacted(v, in_options or k == "options", str(k))
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted(one, in_options, key) for one in value]
    return NOT_KEPT if in_options and isinstance(value, str) and is_secret(key, value) else value


def secrets_in(value: Any, in_options: bool = False, key: str = "") -> Iterator[str]:
    """The texts that `redacted` leaves out."""
    if isinstance(value, Mapping):
        for k, v in value.items():
            if k != FROM_ENVIRONMENT:
                yield from secrets_in(v, in_options or k == "options", str(k))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from secrets_in(one, in_options, key)
    elif in_options and isinstance(value, str) and is_secret(key, value) and value != NOT_KEPT:
        yield value


def from_environment(value: Any) -> Iterator[str]:
    """The texts that a configuration says are in variables of the environment."""
    if isinstance(value, Mapping):
        for k, v in value.items():
            if k == FROM_ENVIRONMENT and isinstance(v, Mapping):
                yield from (os.environ[str(name)] for name in v.values() if name in os.environ)
            else:
                yield from from_environment(v)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from from_environment(one)


def hidden(text: str, secrets: Collection[str]) -> str:
    """A text that may quote a configuration, without its secrets."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= SHORTEST:
            for form in (secret, json.dumps(secret)[1:-1]):
                text = text.replace(form, NOT_KEPT)
    return text


def hidden_toml(text: str) -> str:
    """A configuration file to be kept beside a run."""
    for secret in set(secrets_in(tomllib.loads(text))):
        for form in (json.dumps(secret), json.dumps(secret, ensure_ascii=False), f"'{secret}'"):
            text = text.replace(form, json.dumps(NOT_KEPT))
    if any(secrets_in(tomllib.loads(text))):
        return "# This file held secrets in a form that could not be hidden: see resolved.json.\n"
    return text


def check_kept(options: Mapping[str, Any], where: str) -> None:
    """Raises ValueError where options come from a run that did not keep their secrets."""
    for key, value in options.items():
        inside = f"{where}.{key}"
        if isinstance(value, Mapping):
            check_kept(value, inside)
        elif value == NOT_KEPT:
            raise ValueError(
                f"{inside} is not kept with a run; give it again, or name a variable of the "
                f"environment in {FROM_ENVIRONMENT}"
            )
