"""What a next-token batch says of itself on the host, so that nobody asks the device for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megarlx.config.model import family_config
from megarlx.data.loader import BatchLayout, Loader, Sample
from megarlx.model.transformer import Stage
from megarlx.objectives.supervised import Supervised

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
    assert "mask" not in batch.inputs
    assert batch.weight.dtype == torch.float64
    assert (batch.weight.item(), batch.tokens) == (6 * LENGTH, 6 * LENGTH)
    _, batch = batch_of(Documents(masked=True))
    assert (batch.inputs["mask"].sum().item(), batch.weight.item()) == (42, 42)


@pytest.mark.parametrize(("apart", "longest"), [(True, LENGTH - 3), (False, LENGTH)])
def test_the_longest_document_is_a_number_of_the_host(apart: bool, longest: int) -> None:
    _, batch = batch_of(Documents(), apart=apart)
    assert batch.inputs["longest"] == longest
    assert batch.inputs["longest"] == int(batch.inputs["documents"].diff().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_mask_gives_the_bits_of_a_full_one(dtype: torch.dtype) -> None:
    config = family_config(
        "olmo2", vocab_size=97, hidden_size=40, layers=2, heads=4, intermediate_size=56
    )
    found = []
    for masked in (False, True):
        stage = Stage(config, dtype=dtype).initialise_(3)
        objective, batch = batch_of(Documents())
        fields = dict(batch.inputs)
        documents = fields.pop("documents")[0]
        fields = {k: v[:3] if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
        if masked:
            fields["mask"] = torch.ones(3, LENGTH, dtype=torch.bool)
        loss = stage(
            fields.pop("tokens"),
            documents=documents,
            normalizer=batch.weight,
            loss=objective.loss,
            **fields,
        )
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in stage.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
