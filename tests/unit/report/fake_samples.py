"""Files of samples as RL and evaluations leave them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORDS = ("the", "sum", "of", "7", "and", "5", "is", "12", "so", "ann", "has", "twelve", "books")
HOSTILE = (
    '<img src=x onerror="document.title=1"></script><script>document.title=2</script>\x00\u202e'
)


def sample(draw: random.Random, prompt: str, group: int, **more: Any) -> dict[str, Any]:
    tokens = [[" " + draw.choice(WORDS) for _ in range(draw.randrange(5, 40))]]
    reward = float(draw.random() < 0.4)
    return {
        "prompt": prompt,
        "completion": "".join(tokens[0]),
        "reference": "12",
        "reward": reward,
        "finish_reason": draw.choice(["stop", "stop", "length"]),
        "group": group,
        "tokens": tokens,
        "logprobs": [[round(-draw.expovariate(1.0), 4) for _ in tokens[0]]],
        **more,
    }


def lines(
    groups: int, samples: int, *, of_training: bool, seed: int = 0
) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)
    for group in range(groups):
        prompt = f"Question {group}: what is 7 + 5?"
        for number in range(samples):
            more: dict[str, Any] = {"id": f"test/{group}"}
            if of_training:
                more = {"advantage": round(draw.gauss(0, 1), 4)}
            if of_training and group == 1:
                more |= {"prompt": prompt + HOSTILE, "reference": HOSTILE}
                if number == 0:
                    said = {"completion": HOSTILE, "tokens": [[HOSTILE]], "logprobs": [[-1.0]]}
                    more |= {**said, "finish_reason": "stop"}
            yield sample(draw, prompt, group) | more


def episode(draw: random.Random, group: int) -> dict[str, Any]:
    turns = draw.randrange(1, 4)
    tokens = [[" go", f" {draw.choice(['up', 'down'])}"] for _ in range(turns)]
    return sample(
        draw,
        f"Room {group}",
        group,
        tokens=tokens,
        logprobs=[[-0.5, -3.0] for _ in tokens],
        advantages=[[1.5, -0.75] for _ in tokens],
        seen=[f"you see door {n}" for n in range(1, turns)],
        finish_reason="success",
    )


def write(path: Path, made: Iterator[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in made), encoding="utf-8")
    return path


def run_with_samples(run: Path, *, steps: tuple[int, ...] = (0, 20, 40), groups: int = 3) -> Path:
    """RL's and an evaluation's samples, and an agent's; and of a megarlx that told no tokens."""
    lineage = {"parent": None, "recipe": "rl", "seed": 0, "trunk_tokens": 0}
    run.mkdir(parents=True, exist_ok=True)
    (run / "lineage.json").write_text(json.dumps(lineage))
    folder = run / "samples"
    for step in steps:
        made = lines(groups, 4, of_training=True, seed=step)
        write(folder / f"step_{step:08d}.rl.jsonl", made)
        write(folder / f"iter_{step:08d}.math.jsonl", lines(30, 2, of_training=False, seed=step))
    draw = random.Random(5)
    write(folder / "step_00000020.agent.jsonl", (episode(draw, n // 3) for n in range(12)))
    keys = ("prompt", "completion", "reference", "reward", "finish_reason")
    old = ({k: line[k] for k in keys} for line in lines(3, 2, of_training=False))
    write(folder / "iter_00000040.old.jsonl", old)
    return run
