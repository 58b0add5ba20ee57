"""A run in its folder, ready to be trained: from nothing, or from a checkpoint of another run."""

from __future__ import annotations

from pathlib import Path

import torch

from megarlx.comm.launch import Launch
from megarlx.config import Config
from megarlx.run.assemble import Run, assemble
from megarlx.run.branch import keep_parent, parent_of, write_lineage
from megarlx.run.directory import RunDirectory
from megarlx.run.loop import check_startable
from megarlx.run.reference import RunReference


def begin(
    config: Config,
    source: Path,
    out: Path,
    started: Launch,
    device: torch.device,
    *,
    fresh: bool = False,
    tokenizer_from: Path | None = None,
) -> Run:
    """`source` is the file that the configuration was read from; a copy of it stays with the run.

    fresh   refuse a folder that already holds checkpoints
    """
    made = assemble(config, out, started, device, tokenizer_from=tokenizer_from)
    check_startable(made, fresh)
    if started.rank == 0:
        made.write_description(source)
    return made


def begin_excursion(
    reference: RunReference,
    config: Config,
    recipe: Path,
    out: Path,
    started: Launch,
    device: torch.device,
    *,
    fresh: bool = False,
    replayed: Path | None = None,
) -> Run:
    """`replayed` is a checkpoint that the parent did not save, made again from one before it."""
    if started.rank == 0:
        start = parent_of(reference, replayed)
        write_lineage(RunDirectory(out), start, recipe, config)
        if replayed is None:
            keep_parent(start, out)
    return begin(config, recipe, out, started, device, fresh=fresh, tokenizer_from=reference.run)
