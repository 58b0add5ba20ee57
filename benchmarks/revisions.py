"""Two revisions of this repository, timed in turn: training, generation and RL steps on a CPU.

    python benchmarks/revisions.py BEFORE AFTER [--rounds 15] [--only NAME …] [--clock processor]
        [--json PATH] [--markdown PATH]

BEFORE and AFTER are folders with a revision each (git worktree), its native code built in place.
Every case runs in two processes, one a revision, each from that revision's own benchmarks; they
take turns, and only one works at a time. The change is the median over rounds of after / before,
with the quartiles of that ratio beside it. The processor's clock counts what a process computes, on
one thread: for a machine that does other things too.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

EPOCHS = 4
NEW_TOKENS = 96
PROMPT_TOKENS, SAMPLES_PER_PROMPT = 32, 8


def training(size: str) -> Callable[[], object]:
    """One step of pre-training on the same batch."""
    import torch
    from training import SIZES, our_step

    torch.manual_seed(0)
    case = SIZES[size]
    shape = (case.sequences, case.sequence_length + 1)
    return our_step(case, torch.randint(case.model.vocab_size, shape))


def _generate(model: Any, vocabulary: int, batch: int) -> Callable[[], object]:
    import torch

    from megarlx.generation.engine import Engine
    from megarlx.generation.requests import Request, SamplingSettings

    torch.manual_seed(0)
    per_prompt = min(batch, SAMPLES_PER_PROMPT)
    prompts = torch.randint(vocabulary, (batch // per_prompt, PROMPT_TOKENS)).tolist()
    ids = iter(range(batch))
    requests = [
        Request(prompt, [next(ids) for _ in range(per_prompt)], NEW_TOKENS) for prompt in prompts
    ]
    engine = Engine.of(model, slots=batch, longest=PROMPT_TOKENS + NEW_TOKENS)
    settings = SamplingSettings()
    return lambda: engine.generate(requests, settings, 0)


def generation(size: str, batch: str) -> Callable[[], object]:
    from training import SIZES

    from megarlx.comm.groups import Mesh
    from megarlx.model.build import build_model

    config = SIZES[size].model
    model = build_model(config, Mesh.alone(), seed=0)
    return _generate(model, config.vocab_size, int(batch))


def _sharded(size: str, batch: str) -> Callable[[], object]:
    from training import SIZES

    from megarlx.comm.groups import Mesh
    from megarlx.model.build import build_model

    config = SIZES[size].model
    model = build_model(config, Mesh.build(tp=2), seed=0)
    return _generate(model, config.vocab_size, int(batch))


def _second_rank(connection: Connection, store: str, size: str, batch: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=1, world_size=2)
    step = _sharded(size, batch)
    with contextlib.suppress(EOFError):  # the first rank's end
        while connection.recv():
            step()


def tensor_parallel(size: str, batch: str) -> Callable[[], object]:
    """Generation by two ranks of tensor parallelism, a thread each."""
    import multiprocessing
    import tempfile

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = f"{tempfile.mkdtemp()}/store"
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    arguments = (there, store, size, batch)
    context.Process(target=_second_rank, args=arguments, daemon=True).start()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=2)
    step = _sharded(size, batch)

    def both() -> None:
        here.send(True)
        step()

    return both


def rl(size: str, preset: str) -> Callable[[], object]:
    """A step of RL; gspo: a rollout and its four epochs."""
    import rl_step
    from training import SIZES

    from megarlx.config.policy import PolicyConfig

    case = rl_step.Case(SIZES[size].model, prompts=16, samples=8, new_tokens=NEW_TOKENS)
    if preset == "grpo":
        return rl_step.our_step(case)[0]
    told = PolicyConfig.model_validate({"preset": preset})
    changed = functools.partial(rl_step.RlConfig, epochs_per_rollout=EPOCHS, policy=told)
    vars(rl_step)["RlConfig"] = changed  # what its `policy` makes its configuration with
    step = rl_step.our_step(case)[0]

    def epochs() -> None:
        for _ in range(EPOCHS):
            step()

    return epochs


MAKERS: dict[str, Callable[..., Callable[[], object]]] = {
    "training": training,
    "generation": generation,
    "generation tp 2": tensor_parallel,
    "rl": rl,
}
CASES = [
    *(f"training, {size}" for size in ("0.2M", "2M")),
    *(f"generation, {size}, {n}" for size in ("0.2M", "2M") for n in (1, 32, 128)),
    *(f"generation tp 2, {size}, {n}" for size in ("0.2M", "2M") for n in (16, 64)),
    *(f"rl, {size}, {preset}" for size in ("0.2M", "2M") for preset in ("grpo", "gspo")),
]
TURN_SECONDS = 0.4  # a turn repeats what is shorter
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def serve(case: str, clock: str) -> None:
    """Runs the case as often as each line that comes in says, and answers with its seconds."""
    now = CLOCKS[clock]
    kind, *words = case.split(", ")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the case prints is no answer
    step = MAKERS[kind](*words)
    step()
    answers.write("ready\n")
    for line in sys.stdin:
        repetitions = int(line)
        start = now()
        for _ in range(repetitions):
            step()
        answers.write(f"{(now() - start) / repetitions}\n")


@contextlib.contextmanager
def served(tree: Path, case: str, clock: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'benchmarks'}"}
    if clock == "processor":
        environment["OMP_NUM_THREADS"] = "1"
    # -P: nothing of this folder
    command = [sys.executable, "-P", __file__, "--serve", case, clock]
    with subprocess.Popen(
        command, cwd=tree, env=environment, stdin=-1, stdout=-1, stderr=2, text=True, bufsize=1
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def answer(process: subprocess.Popen[str]) -> str:
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        sys.exit(f"{process.args!r} ended with {process.wait()}")
    return line.strip()


def seconds(process: subprocess.Popen[str], repetitions: int) -> float:
    """Of one step, the mean of so many."""
    assert process.stdin is not None
    process.stdin.write(f"{repetitions}\n")
    process.stdin.flush()
    return float(answer(process))


def compared(
    trees: tuple[Path, Path], case: str, clock: str, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of a step before and after, by round."""
    with served(trees[0], case, clock) as before, served(trees[1], case, clock) as after:
        sides = (before, after)
        assert [answer(side) for side in sides] == ["ready", "ready"]
        warm_up = max(seconds(side, 1) for side in sides)
        repetitions = math.ceil(TURN_SECONDS / warm_up)
        taken: tuple[list[float], list[float]] = ([], [])
        for number in range(rounds):
            for side in random.Random(number).sample((0, 1), 2):
                taken[side].append(seconds(sides[side], repetitions))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    sys.path.insert(0, str(Path(__file__).parent))
    from timing import machine, write_json

    parser.add_argument("--json", type=Path, help="the file for the rows and the machine")
    parser.add_argument("--markdown", type=Path, help="the file for the table")
    options = parser.parse_args()
    trees = (options.before.resolve(), options.after.resolve())
    facts = machine()
    lines = ["| | before, ms | after, ms | change | its quartiles |", "|---|---|---|---|---|"]
    rows: list[dict[str, object]] = []
    for case in options.only:
        before, after = compared(trees, case, options.clock, options.rounds)
        ratios = [a / b - 1 for a, b in zip(after, before, strict=True)]
        low, middle, high = (100 * q for q in statistics.quantiles(ratios, n=4))
        one, two = (1000 * statistics.median(side) for side in (before, after))
        lines.append(
            f"| {case} | {one:.4g} | {two:.4g} | {middle:+.1f}% | {low:+.1f} to {high:+.1f}% |"
        )
        print(lines[-1], flush=True)
        rows.append({"case": case, "before_seconds": before, "after_seconds": after})
    if options.json:
        write_json(options.json, facts, rows)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main()
