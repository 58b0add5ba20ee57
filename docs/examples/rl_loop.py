"""A loop of RL, written out: draw samples, say what they are worth, take a step.

python docs/examples/rl_loop.py runs/example@latest 20
"""

import json
import sys
from pathlib import Path

import megarlx


def main(name: str, steps: int = 20) -> list[float]:
    rewards = []
    with megarlx.open(name) as run:
        lines = (Path(run.config.data.place) / "prompts.jsonl").read_text().splitlines()
        questions = [json.loads(line)["question"] for line in lines[: 8 * steps]]
        learner = run.learner(lr=3e-4, policy={"preset": "dr_grpo"})
        for step in range(steps):
            asked = questions[8 * step : 8 * step + 8]
            samples = run.sample(asked, samples=8, max_new_tokens=40, seed=step)
            scores = [[min(1, 40 / (1 + len(text))) for text in texts] for texts in samples.texts]
            metrics = learner.step(samples, scores)  # run.sample now draws from the new weights
            rewards.append(metrics["rl/reward"])
            print(f"{step}: reward {rewards[-1]:.3f}, loss {metrics['loss']:.4f}")
    return rewards


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
