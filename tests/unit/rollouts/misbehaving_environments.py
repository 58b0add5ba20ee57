"""Environments that do what environments must not do, where the action says so."""

from __future__ import annotations

import os
import sys
import time
from typing import Any


class Obedient:
    """Echoes; after `turns` actions it is done, with the reward that the task names."""

    def __init__(self, turns: int = 3) -> None:
        self.turns = turns

    def reset(self, task: dict[str, Any], seed: int) -> str:
        self.task, self.seed, self.said = task, seed, list[str]()
        if "at_reset" in task:
            self._do(task["at_reset"])
        return f"task {task['name']}"

    def step(self, action: str) -> Any:
        print("an environment may print")
        os.write(1, b'{"answers": []}\n')  # and even try to answer by itself
        if (bad := self._do(action)) is not None:
            return bad
        self.said.append(action)
        done = len(self.said) == self.turns
        info = {"success": done, "valid": action != "nonsense", "object": self, "pid": os.getpid()}
        return " ".join(self.said), self.task.get("reward", 0.0) if done else 0.0, done, info

    def _do(self, action: str) -> Any:
        if action == "hang":
            time.sleep(600)
        if action == "crash":
            os.kill(os.getpid(), 11)
        if action == "exit":
            sys.exit(3)
        if action == "fork":
            os.fork()  # a second process, which would answer too
        if action == "raise":
            raise RuntimeError("asked to")
        wrong: dict[str, Any] = {
            "none": ("seen", 0.0, False),
            "bytes": (b"seen", 0.0, False, {}),
            "text reward": ("seen", "good", False, {}),
            "nan": ("seen", float("nan"), False, {}),
            "list": ("seen", 0.0, False, []),
            "long": ("x" * 10_000_000, 0.0, False, {}),
            "huge": ("seen", 1e308, False, {}),
            "beyond": ("seen", 10**400, False, {}),
            "digits": ("seen", "000", False, {}),
            "flood": ("seen", 0.0, False, {"seen": "x" * 10_000_000}),
        }
        if action == "hoard":
            bytearray(1 << 40)
        return wrong.get(action)


class Forgetful(Obedient):
    """Shows something else each time."""

    def step(self, action: str) -> Any:
        observation, *rest = super().step(action)
        return f"{observation} {os.getpid()}", *rest


class Unmakeable(Obedient):
    def __init__(self) -> None:
        raise ValueError("not today")


class Rooms:
    """Rooms in a row: "go" leads on, and what else is said decides what happens."""

    def __init__(self, rooms: int = 3, misbehave: str = "") -> None:
        self.rooms, self.misbehave = rooms, misbehave

    def reset(self, task: dict[str, Any], seed: int) -> str:
        self.task, self.room = task, 0
        return f"task {task['number']} room 0"

    def step(self, action: str) -> tuple[str, float, bool, dict[str, Any]]:
        words = action.split()
        if "lose" in words and self.misbehave == "raise":
            raise RuntimeError("asked to")
        if "lose" in words and self.misbehave == "unknown word":
            return "a word that is not known", 0.0, False, {}
        self.room += "go" in words
        done = "win" in words or self.room == self.rooms
        reward = float("win" in words) + 0.5 * ("go" in words)
        info = {"success": "win" in words, "valid": "stay" not in words}
        return f"room {self.room}", reward, done, info


class Trap(Obedient):
    """Says how many words were said; an action with the word `trap` makes it do `bad`."""

    def __init__(self, turns: int = 3, trap: str = "", bad: str = "") -> None:
        super().__init__(turns)
        self.trap, self.bad = trap, bad

    def reset(self, task: dict[str, Any], seed: int) -> str:
        super().reset({"name": "", **task}, seed)
        question: str = task["question"]
        return question

    def step(self, action: str) -> Any:
        words = action.split()
        if self.trap in words and (bad := self._do(self.bad)) is not None:
            return bad
        self.said.append(action)
        reward = sum(word[1:].isdigit() and int(word[1:]) < 10 for word in words) / 5
        info = {"success": reward > 0, "valid": True}
        return f"w{len(words) % 3}", reward, len(self.said) == self.turns, info
