"""An excursion with RL from a trained run, with a reward of one's own.

python docs/examples/rl.py runs/example@latest runs/example_rl
"""

import json
import sys
from pathlib import Path

import megarlx

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "recipes" / "rl.toml"


def short(samples, characters=40):
    """1 for an answer of so many characters, less for a longer one."""
    return [min(1.0, characters / max(1, len(sample.completion))) for sample in samples]


def main(run: str, out: str, *overrides: str) -> None:
    # A reward is a name: file.py:function. It runs in a process of its own.
    reward = f'rl.rewards=[{{ function = "{Path(__file__).resolve()}:short" }}]'
    megarlx.branch(run, RECIPE, out, [reward, *overrides])
    for name in (run, f"{out}@latest"):
        with megarlx.open(name) as opened:
            tests = Path(opened.config.data.place) / "test.jsonl"
            questions = [json.loads(line)["question"] for line in tests.read_text().splitlines()]
            answers = opened.generate(questions[:32], samples=2, max_new_tokens=40)
        lengths = [len(answer) for of_question in answers for answer in of_question]
        print(f"{name}: {sum(lengths) / len(lengths):.1f} characters an answer")


if __name__ == "__main__":
    main(*sys.argv[1:])
