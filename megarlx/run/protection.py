"""From a stage's `protect` to the weights that an objective leaves alone."""

from __future__ import annotations

from torch import Tensor

from megarlx.config.stages import ProtectConfig
from megarlx.model.build import ParallelModel
from megarlx.run.directory import RunDirectory, RunError
from megarlx.run.reference import resolve
from megarlx.training.protect import ProtectError, protected_mask


def protected(config: ProtectConfig, model: ParallelModel, place: str) -> Tensor:
    """bool [P], of this rank's shard; `place` is the key that an error names."""
    found = resolve(config.run)
    parent = RunDirectory(found.run).parent
    if parent is None:
        raise RunError(
            f"{place}.run is '{config.run}', whose lineage.json has no parent; allowed is an "
            "excursion, RUN@N: what it moved is known from where it began"
        )
    if parent.weights != "last":
        raise RunError(
            f"{place}.run is '{config.run}', which began with an average of weights; allowed is an "
            "excursion from a checkpoint's last weights"
        )
    if not parent.checkpoint.is_dir():
        raise RunError(
            f"{place}.run is '{config.run}', which began at {parent.checkpoint}; that is not there "
            "any more"
        )
    try:
        return protected_mask(model, found.checkpoint, parent.checkpoint, config.share)
    except ProtectError as error:
        raise RunError(f"{place}: {error}") from None
