"""Word problems with a calculator: `calc 7 + 5` is answered with `12`, `answer 12` ends it.

The questions are those of the synthetic world, so that its documents can be trained on before.
"""

from __future__ import annotations

from typing import Any

from megarlx.data.draw import Draw, Split
from megarlx.rollouts.environments import interface
from megarlx.study.world.problems import Problem, Step, Writer, problem_at
from megarlx.study.world.settings import WorldError, WorldSettings

SIGNS = {"add": "+", "subtract": "-", "times": "*", "divide": "/"}
QUESTION = ("has", "and", "with", "by", ".", "how", "many", "?")
TOOL = ("calc", "answer", *SIGNS.values(), "wrong", "right", "error")


class Calculator:
    """`world` is a table of WorldSettings; of those given none, the ones below hold."""

    def __init__(self, world: dict[str, Any] | None = None) -> None:
        plain = {"quantities": 1, "steps": [0, 1, 1], "largest": 60}
        self.settings = WorldSettings.from_json({**plain, **(world or {})})
        if self.settings.digits:
            raise WorldError("calculator: digits is true; a number must be one word")
        self.writer = Writer(self.settings)

    @property
    def words(self) -> list[str]:
        settings = self.settings
        found = (
            *map(str, range(settings.largest + 1)),
            *(settings.names + settings.objects + settings.times),
            *(word for operation in settings.operations for word in operation.words),
            *QUESTION,
            *TOOL,
        )
        return list(dict.fromkeys(found))

    def task(self, split: Split, index: int) -> interface.Task:
        return {"split": split, "index": index}

    def reset(self, task: interface.Task, seed: int) -> str:
        self.problem: Problem = problem_at(
            self.settings, task["split"], task["index"], "calculator"
        )
        self.calls = [call for step in range(len(self.problem.steps)) if (call := self._call(step))]
        self.made = 0  # of these calls
        question = self.writer.question(self.problem)
        self.seen = [int(word) for word in question.split() if word.isdigit()]
        return question

    def step(self, action: str) -> interface.Step:
        match action.split():
            case ["answer", *numbers] if numbers and all(n.isdigit() for n in numbers):
                right = tuple(map(int, numbers)) == self.problem.answer
                info = {"success": right, "valid": True}
                return "right" if right else "wrong", float(right), True, info
            case ["calc", a, sign, b] if a.isdigit() and b.isdigit() and sign in SIGNS.values():
                if self.made < len(self.calls) and action.split() == self.calls[self.made].split():
                    self.made += 1
                return self._value(int(a), sign, int(b)), 0.0, False, {"valid": True}
        return "error", 0.0, False, {"valid": False}

    def solution(self) -> str | None:
        if self.made < len(self.calls):
            return self.calls[self.made]
        return "answer " + " ".join(map(str, self.problem.answer))

    def random_action(self, draw: Draw) -> str:
        if draw.below(2):
            return "answer " + " ".join(str(draw.one(self.seen)) for _ in self.problem.answer)
        sign = draw.one(list(SIGNS.values()))
        return f"calc {draw.one(self.seen)} {sign} {draw.one(self.seen)}"

    def _call(self, at: int) -> str | None:
        step: Step = self.problem.steps[at]
        if step.operation.kind == "swap":
            return None
        return (
            f"calc {self.problem.before(at)[step.at]} {SIGNS[step.operation.kind]} {step.operand}"
        )

    def _value(self, a: int, sign: str, b: int) -> str:
        """Numbers that are no word of this world are an error, as on a small display."""
        if sign == "/" and (b == 0 or a % b):
            return "error"
        value = {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a // b
        if not 0 <= value <= self.settings.largest:
            return "error"
        self.seen.append(value)
        return str(value)
