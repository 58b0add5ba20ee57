"""Checkpoints: saved from any layout, loaded into any other, whole or refused.

    saver = Saver(run / "checkpoints", mesh.world, Retention(last=3, every=1000))
    pause = saver.save(iteration, shards, state)     # returns once the shards are copied
    saved = saver.poll()                             # at every step, on every rank
    loaded = load(latest(run / "checkpoints", mesh.world), shards, mesh.world)

Nothing is unpickled: tensors are safetensors files, everything else is JSON.
"""

from megarlx.checkpoint.errors import CheckpointError
from megarlx.checkpoint.folder import checkpoint_name, complete, iterations, latest
from megarlx.checkpoint.loading import WEIGHTS_ONLY, Loaded, keeps_average, load
from megarlx.checkpoint.manifest import Manifest, read_manifest
from megarlx.checkpoint.retention import Retention, refer, referenced, release
from megarlx.checkpoint.saving import Pause, Saved, Saver
from megarlx.checkpoint.shards import FlatShards
from megarlx.checkpoint.state import check_run_state, reading_state
from megarlx.checkpoint.storage import AVERAGE, FROZEN, OPTIMIZER
from megarlx.checkpoint.verify import verify

__all__ = [
    "AVERAGE",
    "FROZEN",
    "OPTIMIZER",
    "WEIGHTS_ONLY",
    "CheckpointError",
    "FlatShards",
    "Loaded",
    "Manifest",
    "Pause",
    "Retention",
    "Saved",
    "Saver",
    "check_run_state",
    "checkpoint_name",
    "complete",
    "iterations",
    "keeps_average",
    "latest",
    "load",
    "read_manifest",
    "reading_state",
    "refer",
    "referenced",
    "release",
    "verify",
]
