"""A world in words of the synthetic one, in which anything may succeed."""

from __future__ import annotations

from typing import Any

from megarlx.rollouts.environments.interface import Step


class Letters:
    """Three turns; a word of an even number of letters at the end is a success."""

    def reset(self, task: dict[str, Any], seed: int) -> str:
        self.task, self.taken = task, 0
        if task.get("broken"):
            raise RuntimeError("there is no such place")
        name: str = task["name"]
        return name

    def step(self, action: str) -> Step:
        self.taken += 1
        even, done = len(action) % 2 == 0, self.taken == 3
        return "ann" if even else "ben", float(even), done, {"success": even, "valid": even}
