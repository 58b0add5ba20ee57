"""Tools are called as the policy asks, and what goes wrong is shown to it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megarlx.config.trust import needs_trust
from megarlx.rollouts.environments.tools import Tools

TOOLS = '''
def add(x: int, y: int = 1):
    """Adds two numbers."""
    return x + y


def fail():
    raise RuntimeError("out of paper")
'''


@pytest.fixture
def environment(tmp_path: Path) -> Tools:
    (tmp_path / "my_tools.py").write_text(TOOLS)
    made = Tools([f"{tmp_path}/my_tools.py:{name}" for name in ("add", "fail")])
    made.reset({"question": "3 + 4?", "answer": 7}, 0)
    return made


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_the_question_comes_with_the_tools(environment: Tools) -> None:
    shown = environment.reset({"question": "3 + 4?", "answer": "7"}, 0)
    assert "add(x: int, y: int = 1): Adds two numbers." in shown
    assert shown.endswith("\n\n3 + 4?")
    environment.explanation = ""
    assert environment.reset({"question": "3 + 4?"}, 0) == "3 + 4?"


def test_calls_are_answered_in_their_order_by_turns_of_a_tool(environment: Tools) -> None:
    observation, reward, done, info = environment.step(call("add", x=3, y=4) + call("add", x=1))
    assert (observation, reward, done) == ("7\n2", 0.0, False)
    assert info == {"valid": True, "role": "tool"}


@pytest.mark.parametrize(
    ("action", "valid", "said"),
    [
        (call("fail"), True, "RuntimeError: out of paper"),
        (call("sub", x=1), False, "no such call: .*; tools are add, fail"),
        (call("add", z=1), False, "no such call"),
        ("<tool_call>{nothing}</tool_call>", False, "no such call"),
        ('<tool_call>{"name": ["add"]}</tool_call>', False, "no such call"),
        ('<tool_call>{"name": "add", "arguments": 3}</tool_call>', False, "no such call"),
    ],
)
def test_what_goes_wrong_in_a_call_is_shown_and_ends_nothing(
    environment: Tools, action: str, valid: bool, said: str
) -> None:
    observation, reward, done, info = environment.step(action)
    assert (reward, done, info["valid"]) == (0.0, False, valid)
    assert re.match(said, observation)


@pytest.mark.parametrize(("answer", "reward"), [("It is 7.", 1.0), ("It is 8.", 0.0)])
def test_an_action_without_a_call_is_the_answer(
    environment: Tools, answer: str, reward: float
) -> None:
    assert environment.step(answer) == ("", reward, True, {"success": reward == 1.0})


def test_another_run_cannot_name_it_unasked() -> None:
    assert needs_trust("environment", "tools")
