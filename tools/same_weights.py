"""Whether two commits train the same weights.

    python tools/same_weights.py BEFORE AFTER [--within 1e-9] [--only NAME …]

Each commit is checked out and built beside the other, and trains the same short recipes in fp64:
one objective, alternating ones, averaged ones in both placements, with local steps, as gradients,
every policy preset over two epochs, and layouts of tensor and pipeline parallelism. A move of code
must leave every bit; without --within anything else is an error. The interpreter that runs this
file runs both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ("grpo", "dapo", "dr_grpo", "gspo", "rloo", "cispo")
LOSSES = ("sapo", "reinforce")

MODEL = """
[model]
family = "olmo2"
vocab_size = 400
hidden_size = 24
layers = 4
heads = 2
intermediate_size = 40
max_sequence_length = 128

[training]
precision = "fp64"
sequences_per_step = 4
sequences_per_microbatch = 1
sequence_length = 48

[optimizer]
lr = 2e-3

{data}
documents = 300
held_out_documents = 20
prompts = 40

[logging]
validate_every_steps = 1000

[sft]
sequence_length = 128

[rl]
prompts_per_step = 2
samples_per_prompt = 4
max_completion_tokens = 8
[[rl.rewards]]
function = "length_penalty"
options = {{ max_tokens = 8, buffer = 4.0 }}
workers = 0
"""
WORLD = '[data]\nmaker = "world"\nfolder = "{folder}"\n[data.options]'
WORLD_BEFORE_MAKERS = '[data.world]\nfolder = "{folder}"'
ONE = "[[stages]]\nsteps = 6\n[stages.objectives.pretraining]\n"
POLICY = "[[stages]]\nsteps = 6\n[stages.objectives.rl]\nlr = 1e-3\n"
BOTH = """
[[stages]]
steps = 7
combine = "{combine}"
{options}
[stages.objectives.rl]
lr = 1e-3
turns = 2
weight.first = 0.25
[stages.objectives.sft]
lr = 2e-3
weight.first = 0.75
weight.last = 0.5
"""
SAME_COURSE = """
[[stages]]
steps = 7
combine = "average"
of = "gradients"
[stages.objectives.rl]
lr = 1e-3
[stages.objectives.sft]
lr = 1e-3
"""


def both(combine: str, options: str = "") -> str:
    return BOTH.format(combine=combine, options=options)


@dataclass(frozen=True)
class Recipe:
    stages: str
    settings: Mapping[str, str] = field(default_factory=dict)
    processes: int = 1


REPLICAS = {"layout.replica": "2"}
RECIPES: dict[str, Recipe] = {
    "single": Recipe(ONE),
    "single, tp 2": Recipe(ONE, {"layout.tensor": "2"}, 2),
    "single, pp 2": Recipe(ONE, {"layout.pipeline": "2"}, 2),
    "single, pp 2 zero_bubble": Recipe(
        ONE, {"layout.pipeline": "2", "layout.schedule": '"zero_bubble"'}, 2
    ),
    "stages": Recipe(ONE + both("alternate") + ONE.replace("steps = 6", "steps = 3")),
    "alternate": Recipe(both("alternate")),
    "average": Recipe(both("average")),
    "average, tp 2": Recipe(both("average"), {"layout.tensor": "2"}, 2),
    "average, pp 2": Recipe(both("average"), {"layout.pipeline": "2"}, 2),
    "average, replicas": Recipe(both("average", 'placement = "replicas"'), REPLICAS, 2),
    "average, sync_every 3": Recipe(both("average", "sync_every = 3")),
    "average, replicas, sync_every 3": Recipe(
        both("average", 'placement = "replicas"\nsync_every = 3'), REPLICAS, 2
    ),
    "average, adaptive": Recipe(both("average", "[stages.adaptive]")),
    "gradients": Recipe(SAME_COURSE),
    **{
        f"{preset}, two epochs": Recipe(
            POLICY, {"rl.policy.preset": f'"{preset}"', "rl.epochs_per_rollout": "2"}
        )
        for preset in PRESETS
    },
    **{
        f"{loss}, two epochs": Recipe(
            POLICY, {"rl.policy.loss": f'"{loss}"', "rl.epochs_per_rollout": "2"}
        )
        for loss in LOSSES
    },
    "gspo, tp 2": Recipe(
        POLICY,
        {"rl.policy.preset": '"gspo"', "rl.epochs_per_rollout": "2", "layout.tensor": "2"},
        2,
    ),
    "grpo, pp 2": Recipe(
        POLICY,
        {"rl.policy.preset": '"grpo"', "rl.epochs_per_rollout": "2", "layout.pipeline": "2"},
        2,
    ),
}


def train(tree: Path, folder: Path, recipe: Recipe) -> None:
    """One run of the code in `tree`."""
    folder.mkdir(parents=True)
    config = folder / "run.toml"
    data = WORLD if (tree / "megarlx" / "study").exists() else WORLD_BEFORE_MAKERS
    data = data.format(folder=folder.parent / "world")
    config.write_text(MODEL.format(data=data) + recipe.stages)
    words = [sys.executable]
    if recipe.processes > 1:
        words += ["-m", "torch.distributed.run", "--nproc-per-node", str(recipe.processes)]
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    words += ["-m", "megarlx", "train", str(config), "--out", str(folder / "run")]
    for key, value in recipe.settings.items():
        words += ["--set", f"{key}={value}"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)} in {tree} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Everything in the run's last checkpoint: weights, moments, whatever else it kept."""
    last = max((run / "checkpoints").glob("iter_*"))
    found: dict[str, torch.Tensor] = {}
    for file in sorted(last.rglob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                found[f"{file.relative_to(last)}: {name}"] = opened.get_tensor(name)
    return found


def difference(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> float:
    """The largest ‖a − b‖ / ‖a‖ of a tensor; infinite where one side has no such tensor."""
    if before.keys() != after.keys() or not before:
        return float("inf")
    worst = 0.0
    for name, value in before.items():
        other = after[name]
        if value.shape != other.shape:
            return float("inf")
        if not torch.equal(value, other):
            gap = (value.double() - other.double()).norm() / value.double().norm().clamp(min=1e-300)
            worst = max(worst, float(gap), 5e-324)
    return worst


def checked_out(commit: str, tree: Path) -> Path:
    """The commit's tree, with its native code built, or taken from here where it is the same."""
    subprocess.run(
        ["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", tree, commit], check=True
    )
    same = subprocess.run(
        ["git", "-C", ROOT, "diff", "--quiet", commit, "--", "csrc", "setup.py"], check=False
    )
    built = [*(ROOT / "megarlx").glob("*.so"), ROOT / "megarlx/_build.json"]
    if same.returncode == 0 and all(path.exists() for path in built) and len(built) > 1:
        for path in built:
            shutil.copy(path, tree / "megarlx")
    else:
        build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(build, cwd=tree, check=True)
    return tree


def compared(before: Path, after: Path, folder: Path, names: list[str]) -> Iterator[tuple]:
    for name in names:
        place = name.replace(" ", "_").replace(",", "")
        found = []
        for side, tree in (("before", before), ("after", after)):
            train(tree, folder / side / place, RECIPES[name])
            found.append(tensors(folder / side / place / "run"))
        yield name, difference(*found), len(found[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", help="a commit")
    parser.add_argument("after", help="another; HEAD, say")
    parser.add_argument("--within", type=float, default=0.0, help="a relative difference allowed")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    options = parser.parse_args()
    worse = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        trees = [
            checked_out(options.before, folder / "before-tree"),
            checked_out(options.after, folder / "after-tree"),
        ]
        try:
            for name, gap, count in compared(trees[0], trees[1], folder, options.only):
                says = "same bits" if gap == 0 else f"differ by {gap:.1e}"
                print(f"{name:34} {count:4} tensors  {says}", flush=True)
                if gap > options.within:
                    worse.append(name)
        finally:
            for tree in trees:
                subprocess.run(
                    ["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True
                )
    if worse:
        sys.exit(f"not the same weights: {', '.join(worse)}")


if __name__ == "__main__":
    main()
