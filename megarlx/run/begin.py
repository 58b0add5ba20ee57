"""A run in its folder: from nothing, or from a checkpoint of another run.

`start` and `start_excursion` train it too. Where they fail before the first step, they take back
what they have made.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megarlx.checkpoint import release
from megarlx.comm.launch import Launch
from megarlx.config import Config
from megarlx.run.assemble import Run, assemble
from megarlx.run.branch import keep_parent, parent_of, write_lineage
from megarlx.run.directory import RunDirectory, Weights
from megarlx.run.loop import check_startable, train
from megarlx.run.new_folder import NewFolder
from megarlx.run.reference import RunReference


def start(
    config: Config,
    source: Path,
    out: Path,
    started: Launch,
    device: torch.device,
    *,
    fresh: bool = False,
) -> str:
    """Trains a run; returns what stopped it before its end, if anything did."""
    RunDirectory(out).check_free()
    with NewFolder(out, first=started.rank == 0) as folder:
        made = begin(config, source, out, started, device, fresh=fresh)
        return train(made, folder.keep)


def start_excursion(
    reference: RunReference,
    config: Config,
    recipe: Path,
    out: Path,
    started: Launch,
    device: torch.device,
    *,
    fresh: bool = False,
    replayed: Path | None = None,
    weights: Weights = "last",
) -> str:
    """`replayed` is a checkpoint that the parent did not save, made again from one before it."""
    RunDirectory(out).check_free()
    with NewFolder(out, first=started.rank == 0) as folder:
        if started.rank == 0:
            parent = parent_of(reference, replayed, weights)
            write_lineage(RunDirectory(out), parent, recipe, config)
            if replayed is None and keep_parent(parent, out):
                by = str(out.resolve())
                at = reference.checkpoint.parent, reference.iteration
                folder.undo.append(lambda: release(*at, by))
        kept = reference.run
        made = begin(config, recipe, out, started, device, fresh=fresh, tokenizer_from=kept)
        return train(made, folder.keep)


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
    try:
        check_startable(made, fresh)
    except BaseException:
        made.close()  # rewards have processes
        raise
    if started.rank == 0:
        made.write_description(source)
    return made
