"""What a next-token batch says of itself on the host, so that nobody asks the device for it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from megarlx.config.model import family_config
from megarlx.data.loader import BatchLayout, Loader, Sample
from megarlx.model.transformer import Stage
from megarlx.objectives.supervised import Supervised
from megarlx.parallel.microbatches import call_stage

LENGTH = 20


class Documents:
    sequence_length = LENGTH

    def __init__(self, masked: bool = False) -> None:
        self.masked = masked

    def sample(self, index: int) -> Sample:
        tokens = np.random.default_rng(index).integers(0, 97, LENGTH + 1)
        mask = np.arange(LENGTH) < 7 if self.masked else None
        return Sample(tokens[:-1], tokens[1:], mask, (3 + index, LENGTH - 3 - index), 0)

    def fingerprint(self) -> dict[str, object]:
        return {}

    def tokens_by_source(self, consumed_sequences: int) -> dict[str, int]:
        return {}


def batch_of(data: Documents, *, apart: bool = True) -> tuple[Supervised, Any]:
    loader = Loader(data, BatchLayout(6, 3), with_documents=apart, prefetch_steps=0)
    objective = Supervised("pretraining", loader)
    return objective, objective.next_batch()


def test_a_batch_in_which_every_token_counts_has_no_mask() -> None:
    _, batch = batch_of(Documents())
    assert [part.inputs.mask for part in batch.microbatches] == [None, None]
    assert batch.weight.dtype == torch.float64
    assert (batch.weight.item(), batch.tokens) == (6 * LENGTH, 6 * LENGTH)
    _, batch = batch_of(Documents(masked=True))
    masks = [part.inputs.mask.sum().item() for part in batch.microbatches]
    assert (masks, batch.weight.item()) == ([21, 21], 42)


@pytest.mark.parametrize(("apart", "longest"), [(True, LENGTH - 3), (False, LENGTH)])
def test_the_longest_document_is_a_number_of_the_host(apart: bool, longest: int) -> None:
    _, batch = batch_of(Documents(), apart=apart)
    parts = batch.microbatches
    assert max(part.longest for part in parts) == longest
    assert all(part.longest == int(part.documents.diff().max()) for part in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_mask_gives_the_bits_of_a_full_one(dtype: torch.dtype) -> None:
    config = family_config(
        "olmo2", vocab_size=97, hidden_size=40, layers=2, heads=4, intermediate_size=56
    )
    found = []
    for masked in (False, True):
        stage = Stage(config, dtype=dtype).initialise_(3)
        objective, batch = batch_of(Documents())
        part = batch.microbatches[0]
        if masked:
            whole = replace(part.inputs, mask=torch.ones(3, LENGTH, dtype=torch.bool))
            part = replace(part, inputs=whole)
        loss = call_stage(stage, None, part, partial(objective.loss, normalizer=batch.weight))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in stage.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_z_loss_is_a_part_of_the_loss_that_is_trained() -> None:
    config = family_config(
        "olmo2", vocab_size=97, hidden_size=40, layers=2, heads=4, intermediate_size=56
    )
    stage = Stage(config, dtype=torch.float64).initialise_(3)
    losses = []
    for weight in (0.0, 0.25):
        loader = Loader(Documents(), BatchLayout(6, 3), with_documents=True, prefetch_steps=0)
        one = Supervised("pretraining", loader, z_loss=weight)
        batch = one.next_batch()
        part, loss = batch.microbatches[0], partial(one.loss, normalizer=batch.weight)
        losses.append(call_stage(stage, None, part, loss).item())
        logits = stage.logits(call_stage(stage, None, part, None))[:, :97]
    expected = 0.25 * logits.logsumexp(1).square().sum() / batch.weight
    assert losses[1] - losses[0] == pytest.approx(expected.item(), rel=1e-9)
