"""Which way of policy optimisation makes agents better, and which stays stable, at equal budget.

python benchmarks/agents.py [--environments sokoban calculator shop] [--seeds 0 1 2] [--steps 48]
    [--methods grpo cispo gspo gigpo sampo] [--folder DIR] [--json PATH] [--markdown PATH]

For each environment and seed one cold start on demonstrations, and from it one excursion a method:
the same tasks, episodes a step, steps and learning rate. Methods differ by their preset alone; the
penalty of the divergence is one for all (--kl), and every rollout feeds two steps, so that ratios
move. Success is on held-out tasks. A method collapsed if success or the valid-action rate in
training fell below half of its peak, or the gradient norm grew to ten times its start, and stayed
there (means of five steps). With --folder, runs that are there already are not made again, and
--only-there reports what is there without making any.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timing import Row, add_outputs, machine, write_json

from megarlx.cli import main as megarlx
from megarlx.training.metrics import read_metrics

METHODS = ("grpo", "cispo", "gspo", "gigpo", "sampo")
# Success in percent, of ALFWorld, WebShop and Sokoban (2602.21534)
ARLARENA = {
    "grpo": (62.4, 57.7, 83.9),
    "cispo": (54.4, 54.7, 26.0),
    "gspo": (78.6, 72.5, 82.2),
    "gigpo": (81.1, 56.6, 82.7),
    "sampo": (92.7, 77.7, 88.9),
}
CLAIMS = (  # each with the method that is better in it, and the one that is worse
    ("SAMPO beats GRPO", "sampo", "grpo"),
    ("SAMPO beats GSPO, so advantages of turns and dropping groups help", "sampo", "gspo"),
    ("SAMPO beats GiGPO, so clipping whole sequences helps", "sampo", "gigpo"),
    ("GSPO beats CISPO: tolerant clipping ends lower", "gspo", "cispo"),
    ("GRPO beats CISPO", "grpo", "cispo"),
    ("GiGPO beats GRPO", "gigpo", "grpo"),
)
LIMITS = {"sokoban": (8, 4), "calculator": (8, 8), "shop": (8, 6)}  # turns, tokens of each

COLD_START = """
[model]
family = "olmo2"
vocab_size = 256
hidden_size = 64
layers = 3
heads = 2
intermediate_size = 160
max_sequence_length = 256
[training]
seed = {seed}
sequences_per_step = 16
sequences_per_microbatch = 16
sequence_length = 256
[template]
user = "seen : {{content}} act :"
assistant = " {{content}}"
[data]
maker = "agents"
folder = "{world}"
[[data.options.environments]]
function = "{environment}"
tasks = 2048
demonstrations = 2000
mistakes = 0.1
[sft]
[[stages]]
steps = {cold_steps}
[stages.objectives.sft]
lr = 3e-3
warmup_steps = {warmup}
[evaluation]
at_end = true
[[evaluation.suites]]
name = "held_out"
kind = "agent"
path = "{world}/{environment}/tasks_test.jsonl"
samples = 2
temperature = 1.0
environment = {{ function = "{environment}", workers = 0, {limits} }}
"""

RECIPE = """
[rl]
prompts = "{{made}}/{environment}/tasks_train.jsonl"
prompts_per_step = {tasks}
samples_per_prompt = 8
steps_per_rollout = 2
policy = {{ preset = "{method}", kl = "k3", kl_coefficient = {kl} }}
environment = {{ function = "{environment}", workers = 0, {limits} }}
[[stages]]
steps = {steps}
[stages.objectives.rl]
lr = {lr}
schedule = "constant"
weight_decay = 0.0
[evaluation]
at_end = true
[logging]
log_every_steps = 1
"""


@dataclass(frozen=True)
class Outcome:
    environment: str
    method: str
    seed: int
    before: float  # success of the cold start
    after: float
    collapses: tuple[str, ...]
    seconds: float


def limits_of(environment: str) -> str:
    turns, tokens = LIMITS[environment]
    return f"max_turns = {turns}, max_turn_tokens = {tokens}, max_episode_tokens = 240"


def command(*words: str) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = megarlx(list(words))
    if code:
        raise SystemExit(f"megarlx {' '.join(words)} ended with {code}\n{said.getvalue()}")


def is_there(run: Path) -> bool:
    return any((run / "evaluations").glob("iter_*.held_out.json"))


def write_settings(path: Path, text: str, run: Path) -> None:
    """A run that is there must be one of just these settings."""
    if is_there(run) and path.exists() and path.read_text() != text:
        raise SystemExit(
            f"{run} is there with other settings than {path.name}; use another --folder"
        )
    path.write_text(text)


def held_out_success(run: Path) -> float:
    (path,) = (run / "evaluations").glob("iter_*.held_out.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    return float(result["metrics"]["success"])


def smoothed(values: Sequence[float], width: int = 5) -> list[float]:
    return [statistics.fmean(values[i : i + width]) for i in range(max(1, len(values) - width + 1))]


def collapses_of(metrics: Sequence[Mapping[str, Any]], environment: str) -> tuple[str, ...]:
    """What of the run broke down, and did not come back."""
    lines, found = [line for line in metrics if "rl/reward" in line], []
    for key in (f"rl/success_{environment}", f"rl/valid_actions_{environment}"):
        course = smoothed([line[key] for line in lines])
        if course[-1] < max(course) / 2:
            found.append(key.removeprefix("rl/").removesuffix(f"_{environment}"))
    norms = smoothed([line["grad_norm/rl"] for line in lines])
    if norms[-1] > 10 * norms[0]:
        found.append("gradient")
    return tuple(found)


def compare(environment: str, seed: int, folder: Path, given: argparse.Namespace) -> list[Outcome]:
    place = folder / f"{environment}_{seed}"
    place.mkdir(parents=True, exist_ok=True)
    common = {"environment": environment, "limits": limits_of(environment)}
    start = place / "cold_start"
    config = place / "cold_start.toml"
    text = COLD_START.format(
        seed=seed,
        world=(folder / "worlds" / environment).resolve(),
        cold_steps=given.cold_steps,
        warmup=min(20, given.cold_steps // 2),
        **common,
    )
    write_settings(config, text, start)
    if given.only_there and not is_there(start):
        return []
    if not is_there(start):
        command("train", str(config), "--out", str(start))
    before, found = held_out_success(start), []
    for method in given.methods:
        recipe, run = place / f"{method}.toml", place / method
        text = RECIPE.format(
            method=method,
            tasks=given.tasks,
            steps=given.steps,
            lr=given.lr,
            kl=given.kl,
            **common,
        )
        write_settings(recipe, text, run)
        if given.only_there and not is_there(run):
            continue
        if not is_there(run):
            command("branch", f"{start}@latest", str(recipe), "--out", str(run))
        lines = list(read_metrics(run / "metrics.jsonl"))
        seconds = max(line.get("cost/seconds", 0.0) for line in lines)
        after, broken = held_out_success(run), collapses_of(lines, environment)
        found.append(Outcome(environment, method, seed, before, after, broken, seconds))
        end = f" ({', '.join(broken)} collapsed)" if broken else ""
        print(f"{environment} {method} seed {seed}: {before:.3f} -> {after:.3f}{end}", flush=True)
    return found


def of(found: Sequence[Outcome], environment: str, method: str) -> list[Outcome]:
    return [one for one in found if (one.environment, one.method) == (environment, method)]


def report(found: Sequence[Outcome], given: argparse.Namespace) -> str:
    lines = [
        "# Agents: methods of policy optimisation at equal budget",
        "",
        f"Command: `python {' '.join(sys.argv)}`",
        "",
        *(f"- {name.replace('_', ' ')}: {value}" for name, value in machine().items()),
        "",
        f"A cold start of {given.cold_steps} supervised steps; then {given.steps} steps of "
        f"{given.tasks} tasks, 8 episodes each, lr {given.lr:g}, two steps a rollout, "
        f"{given.kl:g} · KL. Success on held-out tasks at temperature 1: mean over the seeds "
        f"{', '.join(map(str, given.seeds))}, and the lowest and highest of them.",
        "",
        "| method | "
        + " | ".join(f"{e} before | {e} after | {e} collapsed" for e in given.environments)
        + " | ARLArena: ALFWorld / WebShop / Sokoban |",
        "|---|" + "---|" * (3 * len(given.environments) + 1),
    ]
    for method in given.methods:
        cells = []
        for environment in given.environments:
            own = of(found, environment, method)
            if not own:
                cells += ["–", "–", "–"]
                continue
            after = [one.after for one in own]
            spread = f"{statistics.fmean(after):.2f} ({min(after):.2f}–{max(after):.2f})"
            broken = sorted({what for one in own for what in one.collapses})
            count = sum(bool(one.collapses) for one in own)
            cells += [
                f"{statistics.fmean(one.before for one in own):.2f}",
                spread,
                f"{count} of {len(own)}" + (f" ({', '.join(broken)})" if broken else ""),
            ]
        theirs = " / ".join(f"{value:.1f}" for value in ARLARENA[method])
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {theirs} |")
    return "\n".join([*lines, "", *claims(found, given.environments), ""])


def claims(found: Sequence[Outcome], environments: Sequence[str]) -> list[str]:
    """What ARLArena found, beside the same differences here: seed by seed, of the same start."""
    lines = [
        "ARLArena's differences (ALFWorld / WebShop / Sokoban, points of success) beside those "
        "here: mean over seeds, and the lowest and highest. *reproduced*: all seeds say what "
        "theirs say on average, and there are three; *contradicted*: every seed says the opposite; "
        "else *not seen*.",
        "",
        "| claim | ARLArena | " + " | ".join(environments) + " |",
        "|---|---|" + "---|" * len(environments),
    ]
    for text, better, worse in CLAIMS:
        theirs = [a - b for a, b in zip(ARLARENA[better], ARLARENA[worse], strict=True)]
        cells = [" / ".join(f"{value:+.1f}" for value in theirs)]
        for environment in environments:
            after = {
                (one.method, one.seed): one.after for one in found if one.environment == environment
            }
            seeds = {seed for _, seed in after}
            gaps = [
                100 * (after[better, seed] - after[worse, seed])
                for seed in sorted(seeds)
                if (better, seed) in after and (worse, seed) in after
            ]
            cells.append(verdict(gaps))
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return lines


def verdict(gaps: Sequence[float]) -> str:
    if not gaps:
        return "–"
    says = "not seen"
    if len(gaps) > 2 and (min(gaps) > 0 or max(gaps) < 0):
        says = "reproduced" if min(gaps) > 0 else "contradicted"
    return f"{statistics.fmean(gaps):+.1f} ({min(gaps):+.1f} to {max(gaps):+.1f}): {says}"


def rows(found: Sequence[Outcome]) -> list[Row]:
    return [
        {
            "name": f"{one.environment}: held-out success after {one.method}",
            "size": f"seed {one.seed}, {one.seconds:.0f} s"
            + (f", collapsed: {', '.join(one.collapses)}" if one.collapses else ""),
            "ours": one.after,
            "baseline": one.before,
            "baseline_name": "cold start",
            "ratio": one.after / one.before if one.before else None,
            "unit": "success",
        }
        for one in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cold-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--tasks", type=int, default=16, help="of one step; 8 episodes each")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--kl", type=float, default=0.01)
    parser.add_argument("--folder", type=Path, help="where runs are kept; absent: nowhere")
    parser.add_argument("--only-there", action="store_true", help="make no run, report those there")
    add_outputs(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        found = [
            one
            for seed in given.seeds
            for environment in given.environments
            for one in compare(environment, seed, folder, given)
        ]
    text = report(found, given)
    print(text)
    if given.markdown is not None:
        given.markdown.write_text(text, encoding="utf-8")
    if given.json is not None:
        write_json(given.json, machine(), rows(found))


if __name__ == "__main__":
    main()
