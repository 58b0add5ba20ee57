"""How long replicas wait for each other, with and without help in generating, on two processes.

One process is the replica of supervised learning, the other that of policy optimisation. Three
trainers take turns, step by step: replicas that generate together, replicas of which the policy's
generates alone, and both objectives on both processes (colocated, data parallelism of 2).

    python benchmarks/replicas.py [--size 2M] [--rounds 4] [--json PATH] [--markdown PATH]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from rl_step import Case, policy
from timing import Row, add_outputs, machine, markdown, row, write_results
from training import SIZES

from megarlx.comm.collectives import barrier, gather_values
from megarlx.comm.groups import Mesh
from megarlx.data.loader import BatchLayout, Loader
from megarlx.data.samples import Sample
from megarlx.model.build import build_model
from megarlx.objectives.supervised import Supervised
from megarlx.training.parts import UpdateSettings
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage

PROMPTS, SAMPLES, PROMPT_TOKENS = 8, 8, 24
SEQUENCES, LENGTH = 24, 256
TOGETHER, ALONE, COLOCATED = "generating together", "generating alone", "colocated"


class RandomTokens:
    sequence_length = LENGTH

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def sample(self, index: int) -> Sample:
        tokens = np.random.default_rng(index).integers(1, self.vocabulary, LENGTH + 1)
        return Sample(tokens[:-1], tokens[1:], None, (LENGTH,), 0)

    def fingerprint(self) -> dict[str, object]:
        return {}

    def tokens_by_source(self, consumed_sequences: int) -> dict[str, int]:
        return {"random": consumed_sequences * LENGTH}


def trainer_of(case: Case, kind: str) -> Trainer:
    mesh = Mesh.build(dp=2) if kind == COLOCATED else Mesh.build(replica=2)
    model = build_model(case.model, mesh, seed=0)
    layout = BatchLayout(SEQUENCES, 4, mesh.dp.rank, mesh.dp.size)
    adam = UpdateSettings(weight_decay=0.0)
    members = [
        TrainedObjective(one, adam, lambda step: 1e-6)
        for one in (
            Supervised("sft", Loader(RandomTokens(case.model.vocab_size), layout)),
            policy(case, model),
        )
    ]
    stage = TrainingStage(
        members,
        placement="colocated" if kind == COLOCATED else "replicas",
        generate_together=kind == TOGETHER,
    )
    return Trainer(model, [stage])


def measure(rank: int, case: Case, rounds: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    trainers = {kind: trainer_of(case, kind) for kind in (TOGETHER, ALONE, COLOCATED)}
    for trainer in trainers.values():  # caches, threads, allocator
        trainer.step()
        trainer.replicas.take_waited_seconds()
    seconds: dict[str, list[float]] = {kind: [] for kind in trainers}
    waited: dict[str, list[list[float]]] = {kind: [] for kind in trainers}
    for _ in range(rounds):
        for kind, trainer in trainers.items():
            barrier(trainer.mesh.world)
            begun = time.perf_counter()
            trainer.step()
            barrier(trainer.mesh.world)
            seconds[kind].append(time.perf_counter() - begun)
            mine = trainer.replicas.take_waited_seconds() / seconds[kind][-1]
            waited[kind].append(gather_values(mine, trainer.mesh.world))
    for trainer in trainers.values():
        for objective in trainer.objectives.values():
            objective.close()
    if rank == 0:
        torch.save({"seconds": seconds, "waited": waited}, f"{folder}/measured.pt")
    dist.destroy_process_group()


def rows_of(found: dict[str, Any], size: str) -> list[Row]:
    seconds = {kind: statistics.median(values) for kind, values in found["seconds"].items()}
    idle = {
        kind: [
            100 * statistics.median(values) for values in zip(*found["waited"][kind], strict=True)
        ]
        for kind in (TOGETHER, ALONE)
    }
    rows = [
        row("step", size, seconds[TOGETHER], seconds[ALONE], ALONE, "s"),
        row("step", size, seconds[TOGETHER], seconds[COLOCATED], "colocated, dp 2", "s"),
    ]
    both = {kind: statistics.mean(values) for kind, values in idle.items()}
    rows.append(row("idle share, both", size, both[TOGETHER], both[ALONE], ALONE, "%"))
    for at, name in enumerate(("sft", "rl")):
        ours, theirs = (max(idle[kind][at], 1e-3) for kind in (TOGETHER, ALONE))
        rows.append(row(f"idle share, {name}'s replica", size, ours, theirs, ALONE, "%"))
    return rows


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="2M", choices=list(SIZES))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    add_outputs(parser)
    arguments = parser.parse_args()
    case = Case(SIZES[arguments.size].model, PROMPTS, SAMPLES, arguments.new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(measure, (case, arguments.rounds, folder), nprocs=2)
        found = torch.load(f"{folder}/measured.pt")
    size = (
        f"{arguments.size}: rl {PROMPTS}x{SAMPLES}x{arguments.new_tokens}, sft {SEQUENCES}x{LENGTH}"
    )
    rows, facts = rows_of(found, size), machine()
    facts["processes"] = "2, one thread each"
    title = "Replicas waiting for each other, on a CPU"
    print(markdown(title, facts, rows, NOTES))
    write_results(arguments, title, facts, rows, NOTES)


NOTES = (
    "The idle share is the time that a replica stands at the exchange of updates, or after its "
    "part of the samples, until the other is there, over the time of the step. What is left of it "
    "when all generate is the difference between the two objectives' training. Less waiting is "
    "not a shorter step by itself: on two cores the difference between both ways of generating is "
    "within the noise of a few rounds."
)

if __name__ == "__main__":
    main()
