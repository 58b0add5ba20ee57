"""What an environment's process serves: steps of many episodes, none of which can stop another by
raising or by answering nonsense. (No torch here: it must start fast.)

A request is a list of items, one an episode:

    {"episode": 7, "task": {…}, "seed": 3, "replay": ["left", …]}    begin it, and act these again
    {"episode": 7, "action": "left"}                                 one step
    {"episode": 7, "end": true}                                      it is over: nothing is answered

An answer has one entry an item: what came out, or {"failed": kind, "detail": …}.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from megarlx import plug
from megarlx.rollouts.environments.interface import Environment
from megarlx.rollouts.rewards.values import described, number, wrong
from megarlx.rollouts.workers.worker_program import describe


class Misbehaved(Exception):
    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


def environment_class(name: str) -> Any:
    """What has no reset and step is not made at all: making it may do anything."""
    named = plug.resolve("environment", name)
    if missing := [m for m in ("reset", "step") if not callable(getattr(named, m, None))]:
        raise TypeError(f"{name} is no environment: it has no {' and no '.join(missing)}")
    return named


class EnvironmentServer:
    def __init__(self, function: str, options: dict[str, Any], most_characters: int) -> None:
        kind = environment_class(function)
        self.make: Callable[[], Environment] = lambda: kind(**options)
        self.most_characters = most_characters
        self.idle = [self.make()]  # made at once, so that one that cannot be is seen at the start
        self.running: dict[int, Environment] = {}

    def __call__(self, request: list[dict[str, Any]]) -> dict[str, Any]:
        return {"answers": [self._answer(item) for item in request if not self._ended(item)]}

    def _ended(self, item: dict[str, Any]) -> bool:
        if "end" not in item:
            return False
        if item["episode"] in self.running:
            self.idle.append(self.running.pop(item["episode"]))
        return True

    def _answer(self, item: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._begun(item) if "task" in item else self._step(item)
        except Misbehaved as problem:
            failed, detail = problem.kind, problem.detail
        except Exception as error:  # noqa: BLE001 a user's environment may raise anything
            failed, detail = "error", describe(error)
        self.running.pop(item["episode"], None)  # who knows what state it is in
        return {"failed": failed, "detail": detail}

    def _begun(self, item: dict[str, Any]) -> dict[str, Any]:
        environment = self.idle.pop() if self.idle else self.make()
        self.running[item["episode"]] = environment
        observation = self._text(environment.reset(item["task"], item["seed"]), "reset")
        for action in item["replay"]:
            observation = self._stepped(environment, action)["observation"]
        return {"observation": observation}

    def _step(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["episode"] not in self.running:
            raise Misbehaved("error", "the episode could not be begun")
        return self._stepped(self.running[item["episode"]], item["action"])

    def _stepped(self, environment: Environment, action: str) -> dict[str, Any]:
        out = environment.step(action)
        if not isinstance(out, tuple | list) or len(out) != 4:
            raise Misbehaved(
                "wrong_shape",
                f"step returned {_shown(out)}; expected (observation, reward, done, info)",
            )
        observation, reward, done, info = out
        return {
            "observation": self._text(observation, "step"),
            "reward": _reward(reward),
            "done": bool(done),
            "info": self._kept(info),
        }

    def _kept(self, info: Any) -> dict[str, Any]:
        """What JSON can carry, within the size of an observation."""
        if not isinstance(info, dict):
            raise Misbehaved("wrong_shape", f"step's info is {_shown(info)}, not a dict")
        kept = {
            str(key): value
            for key, value in info.items()
            if isinstance(value, bool | int | str)
            or (isinstance(value, float) and math.isfinite(value))
        }
        size = sum(len(key) + len(str(value)) for key, value in kept.items())
        if size > self.most_characters:
            raise Misbehaved(
                "too_long",
                f"step's info has {size} characters; max_observation_characters is "
                f"{self.most_characters}",
            )
        return kept

    def _text(self, observation: Any, where: str) -> str:
        if not isinstance(observation, str):
            raise Misbehaved("wrong_shape", f"{where}'s observation is {_shown(observation)}")
        if len(observation) > self.most_characters:
            raise Misbehaved(
                "too_long",
                f"{where}'s observation has {len(observation)} characters; "
                f"max_observation_characters is {self.most_characters}",
            )
        return observation


def _reward(value: Any) -> float:
    try:
        reward = number(value)
    except (TypeError, ValueError):
        raise Misbehaved("wrong_shape", f"step's reward is {_shown(value)}, not a number") from None
    if kind := wrong(reward):
        raise Misbehaved(kind, f"step's reward: {described(reward)}")
    return reward


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}: {str(value)[:80]!r}"
