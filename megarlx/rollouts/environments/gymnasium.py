"""Environments of others: anything with Gymnasium's reset and step whose observations are texts.

function = "gymnasium"
options = { make = "gymnasium:make", arguments = { id = "Some/TextWorld-v0" } }
"""

from __future__ import annotations

from typing import Any

from megarlx import plug
from megarlx.rollouts.environments.interface import Step, Task


class TextGym:
    """reset(seed=, options=) -> (observation, info), step -> (observation, reward, terminated,
    truncated, info); older ones that return the observation alone, or one `done`, are taken too.
    """

    def __init__(
        self,
        make: str = "gymnasium:make",
        arguments: dict[str, Any] | None = None,
        success_key: str = "success",
        valid_key: str = "valid",
        observation_key: str | None = None,
        action_ids: list[str] | None = None,
    ) -> None:
        """make             module:function that is called with `arguments` for the environment
        success_key      of info, where it says whether the task was solved
        valid_key        of info, where it says whether the action was one
        observation_key  of observations that are dicts: the text's
        action_ids       texts of the actions 0, 1, …, for environments that take numbers
        """
        self.environment = plug.load(make)(**(arguments or {}))
        self.success_key, self.valid_key = success_key, valid_key
        self.observation_key = observation_key
        self.actions = {text: at for at, text in enumerate(action_ids or [])}

    def reset(self, task: Task, seed: int) -> str:
        out = self.environment.reset(seed=seed, options=task)
        self.last: Any = out[0] if isinstance(out, tuple) else out
        return self._text(self.last)

    def step(self, action: str) -> Step:
        given: Any = action
        if self.actions:
            given = self.actions.get(action.strip())
            if given is None:
                return self._text(self.last), 0.0, False, {"valid": False}
        out = self.environment.step(given)
        if not isinstance(out, tuple) or len(out) not in (4, 5):
            raise TypeError(f"step returned {str(out)[:80]!r}; expected 4 or 5 values")
        self.last, reward, *ends, info = out
        kept = dict(info)
        for ours, theirs in (("success", self.success_key), ("valid", self.valid_key)):
            if theirs in info:
                kept[ours] = bool(info[theirs])
        return self._text(self.last), reward, any(ends), kept

    def _text(self, observation: Any) -> Any:
        """What is no text is passed on, and refused with its type named."""
        if self.observation_key is not None and isinstance(observation, dict):
            return observation.get(self.observation_key)
        return observation
