"""An environment of tools: what the policy calls is called, and its answer comes back as a turn.

    [rl.environment]
    function = "tools"
    options = { tools = ["my_tools.py:search", "my_tools.py:add"] }

An action with <tool_call>{"name": …, "arguments": {…}}</tool_call> calls a tool, as models trained
by Hugging Face's templates write it. Any other action is the answer, and ends the episode.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from megarlx import plug
from megarlx.rollouts.environments.interface import Step, Task
from megarlx.rollouts.rewards.sample import Reward, Sample

CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
SHOWN_CHARACTERS = 2000  # of what a tool returns


class Tools:
    """A task is {"question": …, "answer": …}. An answer is worth what `reward` says, and solved
    from `solved_from` on."""

    def __init__(
        self,
        tools: list[str],
        reward: str = "final_number",
        reward_options: dict[str, Any] | None = None,
        solved_from: float = 1.0,
        explained: bool = True,
    ) -> None:
        """`explained`: the question comes with the tools, and how one is called."""
        self.tools: dict[str, Callable[..., Any]] = {}
        for name in tools:
            tool = plug.load(name)
            self.tools[tool.__name__] = tool
        if not self.tools:
            raise ValueError("environment tools: tools is empty; give module:function of each")
        made: Any = plug.resolve("reward", reward)
        options = reward_options or {}
        scorer: Any = made(**options) if inspect.isclass(made) else partial(made, **options)
        self.reward: Reward = scorer
        self.solved_from = solved_from
        self.explanation = _explained(self.tools) if explained else ""

    def reset(self, task: Task, seed: int) -> str:
        self.task = task
        question = task.get("question")
        if not isinstance(question, str):
            raise ValueError(f"environment tools: the task's question is {question!r}; not a text")
        return self.explanation + question

    def step(self, action: str) -> Step:
        calls = CALL.findall(action)
        if calls:
            called = [self._called(text) for text in calls]
            valid = all(worked for _, worked in called)
            answers = "\n".join(text[:SHOWN_CHARACTERS] for text, _ in called)
            return answers, 0.0, False, {"valid": valid, "role": "tool"}
        answer = self.task.get("answer")
        sample = Sample(
            self.task["question"], action, None if answer is None else str(answer), dict(self.task)
        )
        reward = self.reward([sample])[0]
        if reward is None:
            raise ValueError("environment tools: the reward has nothing to say about the answer")
        return "", float(reward), True, {"success": reward >= self.solved_from}

    def _called(self, text: str) -> tuple[str, bool]:
        """What is shown, and whether the call was one. A tool's own error is shown to the policy,
        which may do better."""
        try:
            call = json.loads(text)
            name, given = call["name"], call.get("arguments", {})
            tool = self.tools[name]
            inspect.signature(tool).bind(**given)
        except (ValueError, KeyError, TypeError, RecursionError):
            names = ", ".join(self.tools)
            return f"no such call: {text[:200]}; tools are {names}", False
        try:
            return str(tool(**given)), True
        except Exception as error:  # noqa: BLE001 - a tool may raise anything
            return f"{type(error).__name__}: {error}", True


def _explained(tools: Mapping[str, Callable[..., Any]]) -> str:
    lines = ["You may call these tools:"]
    for name, tool in tools.items():
        said = (inspect.getdoc(tool) or "").partition("\n")[0]
        lines.append(f"{name}{inspect.signature(tool)}{': ' if said else ''}{said}")
    lines.append(
        'Call one with <tool_call>{"name": "…", "arguments": {…}}</tool_call>; what you write '
        "without a call is your answer."
    )
    return "\n".join(lines) + "\n\n"
