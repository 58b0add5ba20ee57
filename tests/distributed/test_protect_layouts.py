"""Protected weights are the same ones in every layout, and training leaves them alone there."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grid import assemble, chunks
from test_muon_layouts import Axes, model, trainer_of

from megarlx.checkpoint import Saver
from megarlx.training.protect import protected_mask

LAYOUTS: list[Axes] = [{"tp": 4}, {"tp": 2, "pp": 2}, {"dp": 3}]  # with copies, ties and padding


def save(axes: Axes, folder: Path) -> None:
    for seed in (7, 8):
        trainer = trainer_of(axes, seed=seed, tied=True)
        trainer.save(Saver(folder / str(seed), trainer.mesh.world), {}, blocking=True)


def protect(axes: Axes, folder: Path) -> dict[str, Any]:
    trainer = trainer_of(axes, tied=True)
    one, other = (folder / str(seed) / "iter_00000000" for seed in (7, 8))
    mask = protected_mask(trainer.model, one, other, 0.05)
    trainer.optimizer.protected["pretraining"] = mask
    before = trainer.optimizer.master.clone()
    for _ in range(2):
        trainer.step()
    after = trainer.optimizer.master
    assert torch.equal(before[mask].view(torch.int64), after[mask].view(torch.int64))
    return {"mask": chunks(trainer, mask.double()), "weights": chunks(trainer, after)}


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_the_protected_weights_do_not_depend_on_the_layout(
    run: Callable[..., Any], tmp_path: Path, axes: Axes
) -> None:
    run(2, save, {"dp": 2}, tmp_path)
    (single,) = run(1, protect, {}, tmp_path)
    ranks = run(math.prod(axes.values()), protect, axes, tmp_path)
    expected, found = (
        {what: assemble(model(True), [one[what] for one in parts]) for what in single}
        for parts in ([single], ranks)
    )
    for name, mask in expected["mask"].items():
        np.testing.assert_array_equal(found["mask"][name], mask, err_msg=name)
        np.testing.assert_allclose(found["weights"][name], expected["weights"][name], rtol=1e-9)
    weights = sum(mask.size for mask in expected["mask"].values())
    assert sum(mask.sum() for mask in expected["mask"].values()) == round(0.05 * weights)
