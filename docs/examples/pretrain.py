"""Pre-trains the demo's trunk for a few steps, and asks it something.

python docs/examples/pretrain.py runs/example
"""

import json
import sys
from pathlib import Path

import megarlx

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def main(out: str, *overrides: str) -> None:
    # The same line again goes on from the last checkpoint.
    megarlx.train(CONFIGS / "demo_trunk.toml", out, overrides)
    with megarlx.open(f"{out}@latest") as run:
        tests = Path(run.config.data.place) / "test.jsonl"
        question = json.loads(tests.read_text().splitlines()[0])["question"]
        (answers,) = run.generate([question], samples=4, max_new_tokens=24)
    print(question, *answers, sep="\n    ")


if __name__ == "__main__":
    main(*sys.argv[1:])
