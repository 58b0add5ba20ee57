"""Checkpoints against plain torch.save and torch.load of the same tensors, and what a save stops.

Ours writes the weights and both moments with digests, syncs files and folders, and loads only what
it has checked. torch.save does none of that; a row with a sync of its file is there too.

    python benchmarks/checkpoints.py [--sizes 2M 10M 60M] [--folder PATH] [--json PATH]
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from timing import Row, add_outputs, interleaved_seconds, machine, row, shown, write_results
from training import SIZES

from megarlx.checkpoint import FlatShards, Retention, Saver, load
from megarlx.comm.groups import Mesh
from megarlx.model.build import build_model
from megarlx.training.optimizer import Optimizer
from megarlx.training.parts import UpdateSettings


def shards_of(size: str) -> FlatShards:
    model = build_model(SIZES[size].model, Mesh.alone(), seed=0)
    optimizer = Optimizer(model.data_parallel, {"pretraining": UpdateSettings()}, [])
    for shard in optimizer.shards.shards.values():
        shard.normal_()
    return optimizer.shards


def measure(size: str, folder: Path, pairs: int) -> list[Row]:
    shards = shards_of(size)
    world = Mesh.alone().world
    saver = Saver(folder / "ours", world, Retention(last=1))
    numbers = itertools.count()
    tensors = {
        name: values
        for name, tensor in shards.tensors(counted_only=True).items()
        for _, values in tensor.blocks
    }
    megabytes = sum(values.nbytes for values in tensors.values()) / 1e6
    label = f"{size}, {megabytes:.0f} MB"
    plain = folder / "plain.pt"

    def torch_save(sync: bool) -> None:
        with open(plain, "wb") as file:
            # Clones: torch.save would store the flat shard that they are views of once, and so be
            # timed at something else than the tensors.
            torch.save({name: values.clone() for name, values in tensors.items()}, file)
            if sync:
                file.flush()
                os.fsync(file.fileno())

    def torch_load() -> None:
        for name, values in torch.load(plain, weights_only=True, mmap=True).items():
            tensors[name].copy_(values)

    def save() -> None:
        saver.save(next(numbers), shards, {}, blocking=True)

    def ours_load() -> None:
        assert saver.last is not None
        load(saver.last.path, shards, world)

    saving = interleaved_seconds(
        {"ours": save, "synced": lambda: torch_save(True), "plain": lambda: torch_save(False)},
        pairs=pairs,
    )
    loading = interleaved_seconds({"ours": ours_load, "plain": torch_load}, pairs=pairs)
    pauses: dict[str, list[float]] = {"background": [], "blocking": []}
    for _ in range(pairs + 1):
        pauses["background"].append(saver.save(next(numbers), shards, {}).seconds)
        saver.wait()
        pauses["blocking"].append(saver.save(next(numbers), shards, {}, blocking=True).seconds)
    # The first background save makes the host copies that later ones use again.
    background, blocking = (median(pauses[kind][1:]) * 1e3 for kind in ("background", "blocking"))

    def rate(seconds: float) -> float:
        return megabytes / seconds

    ours = rate(saving["ours"])
    return [
        row("save", label, ours, rate(saving["synced"]), "torch.save + fsync", "MB/s"),
        row("save", label, ours, rate(saving["plain"]), "torch.save, not synced", "MB/s"),
        row(
            "load, digests checked",
            label,
            rate(loading["ours"]),
            rate(loading["plain"]),
            "torch.load(mmap) + copy",
            "MB/s",
        ),
        row("pause of a save", label, background, blocking, "our blocking save", "ms"),
        row(
            "pause of the first save",
            label,
            pauses["background"][0] * 1e3,
            blocking,
            "our blocking save",
            "ms",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["2M", "10M", "60M"])
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    parser.add_argument("--pairs", type=int, default=5, help="timed rounds a size")
    add_outputs(parser)
    options = parser.parse_args()
    facts = machine()
    rows: list[Row] = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            start = time.perf_counter()
            for found in measure(size, Path(folder), options.pairs):
                rows.append(shown(found))
            print(f"({size} took {time.perf_counter() - start:.0f} s)", flush=True)
    write_results(options, "Checkpoints on a CPU's disk", facts, rows)


if __name__ == "__main__":
    main()
