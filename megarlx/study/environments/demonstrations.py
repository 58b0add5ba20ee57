"""What is made of a built-in environment: tasks, demonstrations for a cold start, and the two
policies that a trained one lies between.

A conversation has the observations as the user's turns and the actions as the assistant's, so SFT
sees the tokens that generation sees, and learns the actions only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarlx.config.environment import EnvironmentConfig
from megarlx.data.conversations import Conversation, Frames, Turn
from megarlx.data.draw import Draw, Split
from megarlx.data.token_files import write_atomically
from megarlx.rollouts.environments.interface import BuiltIn, Task, built_in, success_rate

TEMPLATE = Frames(user="seen : {content} act :", assistant=" {content}")
TEMPLATE_WORDS = ("seen", "act", ":")


@dataclass(frozen=True)
class Sizes:
    """How many of each to write."""

    train_tasks: int = 1024
    validation_tasks: int = 128
    test_tasks: int = 128
    demonstrations: int = 256


def demonstration(
    environment: BuiltIn,
    task: Task,
    *,
    max_turns: int,
    draw: Draw,
    mistakes: float = 0.0,
    solved_only: bool = True,
) -> Conversation | None:
    """The solver's episode; a share `mistakes` of its actions are random ones. With `solved_only`
    None where it did not end in success: then the solver could not make up for them."""
    turns: list[Turn] = []
    observation, done, info = environment.reset(task, 0), False, dict[str, Any]()
    while not done and len(turns) < 2 * max_turns:
        wrong = mistakes > 0 and draw.uniform() < mistakes
        action = environment.random_action(draw) if wrong else environment.solution()
        if action is None:
            break
        turns += [Turn("user", observation), Turn("assistant", action)]
        observation, _, done, info = environment.step(action)
    if solved_only and not (done and info.get("success")):
        return None
    return Conversation(tuple(turns)) if turns else None


def write_environment(
    config: EnvironmentConfig,
    folder: str | Path,
    sizes: Sizes | None = None,
    *,
    seed: int = 0,
    mistakes: float = 0.0,
    solved_only: bool = True,
    words: Iterable[str] = TEMPLATE_WORDS,
) -> dict[str, float]:
    """
    demonstrations.jsonl   {"messages": […]}                           SFT, of training tasks
    tasks_<split>.jsonl    {"question": …, "task": {…}, "id": …}       RL; evaluation
    environment.words      the tokenizer's words, with the template's
    environment.json       what is written here, and the rates of solver and random policy; last

    `question` is the first observation. Returns the rates on the test tasks.
    """
    sizes, place, environment = sizes or Sizes(), Path(folder), built_in(config)
    place.mkdir(parents=True, exist_ok=True)
    done = place / "environment.json"
    done.unlink(missing_ok=True)
    counts: dict[Split, int] = {
        "train": sizes.train_tasks,
        "validation": sizes.validation_tasks,
        "test": sizes.test_tasks,
    }
    for split, count in counts.items():
        tasks = [environment.task(split, index) for index in range(count)]
        lines = (
            {"question": environment.reset(task, 0), "task": task, "id": f"{split}/{index}"}
            for index, task in enumerate(tasks)
        )
        _write(place / f"tasks_{split}.jsonl", lines)
    # `tasks` are the test tasks now
    rates = {
        "solver": success_rate(environment, tasks, max_turns=config.max_turns),
        "random": success_rate(
            environment, tasks, max_turns=config.max_turns, draw=Draw(seed, "random")
        ),
    }
    _write(
        place / "demonstrations.jsonl",
        _demonstrations(
            environment, sizes.demonstrations, config.max_turns, seed, mistakes, solved_only
        ),
    )
    listed = dict.fromkeys((*environment.words, *words))
    write_atomically(place / "environment.words", "".join(f"{word}\n" for word in listed))
    about = {"environment": config.model_dump(), "seed": seed, "mistakes": mistakes, **rates}
    about["solved_only"] = solved_only
    write_atomically(done, json.dumps(about, indent=1) + "\n")
    return rates


def _demonstrations(
    environment: BuiltIn,
    count: int,
    max_turns: int,
    seed: int,
    mistakes: float,
    solved_only: bool,
) -> Iterable[dict[str, Any]]:
    written, index = 0, 0
    while written < count:
        if index >= 20 * count + 100:
            raise ValueError(
                f"environment: {written} of {index} demonstrations came to an end in {max_turns} "
                f"turns with mistakes = {mistakes}; fewer mistakes or more turns are needed"
            )
        task, draw = environment.task("train", index), Draw(seed, "demonstration", index)
        index += 1
        made = demonstration(
            environment,
            task,
            max_turns=max_turns,
            draw=draw,
            mistakes=mistakes,
            solved_only=solved_only,
        )
        if made is not None:
            written += 1
            yield {"messages": [{"role": t.role, "content": t.content} for t in made.turns]}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
