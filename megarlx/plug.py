"""What a configuration may name: one of our names, `module:name`, or `file.py:name`.

OURS is a table of strings: what it names is imported when it is first used. Nothing of megarlx is
imported here, so that a worker process can start fast.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any


class PlugError(ValueError):
    """A name that cannot be used; says the kind, what is wrong, and what is allowed."""


@dataclass(frozen=True)
class Kind:
    """`form` is what a user's name looks like; `ours` maps short names to whole ones."""

    form: str
    ours: dict[str, str]


KINDS: dict[str, Kind] = {
    "reward": Kind(
        "module:function or module:Class",
        {
            "marked_answer": "megarlx.rollouts.rewards.answers:marked_answer",
            "final_number": "megarlx.rollouts.rewards.answers:final_number",
            "answer_format": "megarlx.rollouts.rewards.answers:answer_format",
            "length_penalty": "megarlx.rollouts.rewards.answers:length_penalty",
            "math_equal": "megarlx.rollouts.rewards.answers:math_equal",
            "world_behaviour": "megarlx.study.world.rewards:world_behaviour",
            "model": "megarlx.rollouts.rewards.model:RewardModel",
            "judge": "megarlx.rollouts.rewards.judge:Judge",
            "chat_judge": "megarlx.rollouts.rewards.chat_judge:ChatJudge",
        },
    ),
    "environment": Kind(
        "module:Class",
        {
            "calculator": "megarlx.study.environments.calculator:Calculator",
            "sokoban": "megarlx.study.environments.sokoban:Sokoban",
            "shop": "megarlx.study.environments.shop:Shop",
            "gymnasium": "megarlx.rollouts.environments.gymnasium:TextGym",
            "tools": "megarlx.rollouts.environments.tools:Tools",
        },
    ),
    "loss": Kind(
        "module:function",
        {
            "reinforce": "megarlx.objectives.losses:reinforce",
            "ppo_clip": "megarlx.objectives.losses:ppo_clip",
            "cispo": "megarlx.objectives.losses:cispo",
            "gspo": "megarlx.objectives.losses:gspo",
            "sapo": "megarlx.objectives.losses:sapo",
        },
    ),
    "advantage": Kind(
        "module:function",
        {
            "grpo": "megarlx.rollouts.advantages:grpo",
            "dr_grpo": "megarlx.rollouts.advantages:dr_grpo",
            "rloo": "megarlx.rollouts.advantages:rloo",
            "maxrl": "megarlx.rollouts.advantages:maxrl",
            "gigpo": "megarlx.rollouts.advantages:gigpo",
        },
    ),
    "aggregation": Kind(
        "module:function",
        {
            "token_mean": "megarlx.objectives.aggregations:token_mean",
            "sequence_mean": "megarlx.objectives.aggregations:sequence_mean",
            "sequence_sum": "megarlx.objectives.aggregations:sequence_sum",
            "sequence_sum_fixed": "megarlx.objectives.aggregations:sequence_sum_fixed",
        },
    ),
    "update rule": Kind(
        "module:Class",
        {
            "adamw": "megarlx.training.update_rules:AdamW",
            "muon": "megarlx.training.muon:Muon",
        },
    ),
    "combination": Kind(
        "module:function",
        {
            "weighted_sum": "megarlx.training.combine:weighted_sum",
            "projection": "megarlx.training.combine:projection",
            "sign_agreement": "megarlx.training.combine:sign_agreement",
        },
    ),
    "objective": Kind("module:Class", {}),
    "family": Kind(
        "module:name",
        {
            name: f"megarlx.config.families:{name.upper()}"
            for name in ("olmo2", "llama3", "qwen2", "qwen3", "gemma2", "gemma3")
        },
    ),
    "data maker": Kind(
        "module:Class",
        {
            "world": "megarlx.study.world.maker:WorldMaker",
            "agents": "megarlx.study.environments.maker:AgentsMaker",
        },
    ),
    "generator": Kind(
        "module:Class",
        {
            "engine": "megarlx.generation.engine:Engine.of",
            "engine_fp8": "megarlx.generation.fp8:fp8_engine",
        },
    ),
    "suite": Kind(
        "module:function",
        {
            "pass_at_k": "megarlx.evaluation.kinds:pass_at_k",
            "choice": "megarlx.evaluation.kinds:choice",
            "cloze": "megarlx.evaluation.kinds:cloze",
            "perplexity": "megarlx.evaluation.kinds:perplexity",
            "behaviour": "megarlx.evaluation.kinds:behaviour",
            "agent": "megarlx.evaluation.kinds:agent",
            "lookups": "megarlx.study.world.lookups:lookups",
        },
    ),
    "claim": Kind(
        "module:function", {f"P{n}": f"megarlx.study.claims.paper:P{n}" for n in range(1, 16)}
    ),
}


def ours(kind: str) -> tuple[str, ...]:
    return tuple(KINDS[kind].ours)


def allowed(kind: str) -> str:
    """For example `"calculator", "shop", or module:Class (file.py:Class)`."""
    form = KINDS[kind].form
    in_a_file = form.rpartition(" ")[2].replace("module:", "file.py:")
    return ", ".join([*(f'"{name}"' for name in ours(kind)), f"{form} ({in_a_file})"])


def problem(kind: str, name: str) -> str | None:
    """What is wrong with the form of a name; whether it exists is found when it is resolved."""
    if name in KINDS[kind].ours or _has_form(name):
        return None
    return f"is {name!r}; allowed are {allowed(kind)}"


def whole(kind: str, name: str) -> str:
    return KINDS[kind].ours.get(name, name)


def resolve(kind: str, name: str) -> Any:
    if wrong := problem(kind, name):
        raise PlugError(f"{kind} {wrong}")
    try:
        return load(whole(kind, name))
    except Exception as error:  # whatever a user's module raises while it is imported
        why = f"{type(error).__name__}: {error}"
        raise PlugError(
            f"{kind} {name!r} cannot be imported: {why}; allowed are {allowed(kind)}"
        ) from error


def file_of(name: str) -> Path | None:
    """Where a user's `module:name` or `file.py:name` lies, without running it; None: not known."""
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        found = [Path(place)]
    else:
        top, *rest = place.split(".")
        spec = None if top == "__main__" else importlib.util.find_spec(top)
        folders = (spec.submodule_search_locations if spec else None) or ()
        # To find a module in a package would run the package: it is looked for by name.
        found = [Path(folder, *rest) for folder in folders]
        found = [one for at in found for one in (at.with_suffix(".py"), at / "__init__.py")]
        if spec and spec.origin and not rest:
            found = [Path(spec.origin)]
    return next((path for path in found if path.is_file()), None)


def load(name: str) -> Any:
    """What `module:name` or `file.py:name` names."""
    place, _, attribute = name.rpartition(":")
    module = _of_file(place) if place.endswith(".py") else importlib.import_module(place)
    return attrgetter(attribute)(module)


@cache
def _of_file(file: str) -> Any:
    """The module in a file. Its folder does not come before others on the path."""
    path = Path(file).resolve()
    name = f"megarlx_file_{path.stem}_{abs(hash(str(path))):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # as its name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _has_form(name: str) -> bool:
    place, colon, attribute = name.rpartition(":")
    dotted = all(part.isidentifier() for part in place.split("."))
    return bool(colon) and attribute.isidentifier() and (dotted or place.endswith(".py"))
