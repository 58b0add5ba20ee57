"""Tensor parallelism of any size, with and without sequence parallelism, is the same function."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megarlx.comm import collectives, differentiable
from megarlx.comm.groups import Mesh
from megarlx.config.model import ModelConfig, RopeScaling, family_config
from megarlx.model.documents import Documents
from megarlx.model.kv_cache import CacheStep, PageTable
from megarlx.model.transformer import Stage
from megarlx.ops import Head, LossInputs
from megarlx.parallel.metadata import sum_partial_gradients_

FAMILIES = ("olmo2", "llama3", "qwen2", "qwen3", "gemma2", "gemma3")
OF_FAMILY: dict[str, Any] = {
    "gemma2": {"window": 5, "attention_cap": 2.0, "final_cap": 3.0},
    "gemma3": {"window": 5, "full_attention_every": 2, "window_rope_theta": 100.0},
}
LENGTHS = [9, 4, 15]  # 28 tokens: split evenly by 1, 2 and 4


def small(family: str, kv_heads: int) -> ModelConfig:
    scaling = (
        RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
        if family == "llama3"
        else None
    )
    return family_config(
        family,
        vocab_size=301,
        hidden_size=20,
        layers=2,
        heads=8,
        kv_heads=kv_heads,
        head_dim=6,
        intermediate_size=36,
        rope_scaling=scaling,
        init_std=0.3,
        **OF_FAMILY.get(family, {}),
    )


def split_loss(head: Head, inputs: LossInputs) -> Any:
    """Cross entropy over a split vocabulary, from the definition; stands for head.token_loss."""
    logits = differentiable.gather_from_group(F.linear(head.hidden, head.weight), head.group)
    logits = logits[:, : head.vocab_size]
    return SimpleNamespace(loss=F.cross_entropy(logits, inputs.targets, reduction="sum"))


def model_space(stage: Stage, of: Callable[[Tensor], Tensor | None]) -> list[tuple]:
    """(name, shape, dim, offset, values, counted) of every piece this rank holds."""
    found = []
    for name, parameter in stage.named_parameters():
        value = of(parameter)
        assert value is not None, name
        for piece in stage.layouts[name].pieces:
            part = piece.of_parameter(value).detach().clone()
            found.append(
                (
                    piece.name,
                    piece.global_shape,
                    piece.dim,
                    piece.offset,
                    part,
                    piece.counts_in_norm,
                )
            )
    return found


def whole_tensors(ranks: list[list[tuple]]) -> dict[str, Tensor]:
    """Every rank's pieces put together; copies must hold the same bits."""
    tensors: dict[str, Tensor] = {}
    for name, shape, dim, offset, part, _ in (piece for pieces in ranks for piece in pieces):
        tensor = tensors.setdefault(name, torch.full(shape, torch.nan, dtype=part.dtype))
        place = tensor.narrow(dim, offset, part.shape[dim])
        assert place.isnan().all() or torch.equal(place, part), f"copies of {name} differ"
        place.copy_(part)
    return tensors


def one_step(
    family: str, kv_heads: int, tp: int, sequence_parallel: bool, recompute: str
) -> dict[str, Any]:
    group = Mesh.build(tp=tp, timeout_seconds=20.0).tp
    config = small(family, kv_heads)
    stage = Stage(
        config,
        group=group,
        sequence_parallel=sequence_parallel,
        recompute=recompute,  # type: ignore[arg-type]
        dtype=torch.float64,
    ).initialise_(21)
    generator = torch.Generator().manual_seed(2)
    # norms away from 1, so that a wrong slice of a norm's weight shows
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            for piece in stage.layouts[name].pieces:
                if "norm" in name:
                    whole = torch.rand(piece.global_shape, generator=generator) + 0.5
                    piece.of_parameter(parameter).copy_(piece.of_tensor(whole))
    tokens = torch.randint(config.vocab_size, (sum(LENGTHS),), generator=generator)
    targets = torch.randint(config.vocab_size, (sum(LENGTHS),), generator=generator)
    documents = Documents.of(LENGTHS)
    with torch.no_grad():
        local = stage.logits(stage(tokens, documents=documents))
        logits = collectives.all_gather(local, group, dim=1)
    loss = stage(
        tokens,
        documents=documents,
        loss_inputs=LossInputs(targets),
        loss=split_loss,
    )
    loss.backward()
    gradients = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    sum_partial_gradients_(stage.layouts, gradients, group)
    return {
        "loss": loss.detach(),
        "logits": logits[:, : config.vocab_size],
        "padding": bool(torch.isneginf(logits[:, config.vocab_size :]).all()),
        "gradients": model_space(stage, lambda p: p.grad),
        "weights": model_space(stage, lambda p: p),
    }


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_split_model_gives_the_whole_models_logits_and_gradients(
    run: Callable, family: str, kv_heads: int, tp: int, sequence_parallel: bool
) -> None:
    (whole,) = run(1, one_step, family, kv_heads, 1, False, "none")
    ranks = run(tp, one_step, family, kv_heads, tp, sequence_parallel, "none")
    expected_weights = whole_tensors([whole["weights"]])
    expected = whole_tensors([whole["gradients"]])
    for name, weight in whole_tensors([r["weights"] for r in ranks]).items():
        assert torch.equal(weight, expected_weights[name]), name
    for rank in ranks:
        assert rank["padding"]
        assert (rank["logits"] - whole["logits"]).norm() <= 1e-10 * whole["logits"].norm()
        torch.testing.assert_close(rank["loss"], whole["loss"], rtol=1e-10, atol=0)
    gradients = whole_tensors([r["gradients"] for r in ranks])
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-10 * expected[name].norm(), name
    squares = sum(
        float(part.square().sum()) for r in ranks for *_, part, counted in r["gradients"] if counted
    )
    assert squares == pytest.approx(sum(float(g.square().sum()) for g in expected.values()))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_under_sequence_parallelism_changes_nothing(
    run: Callable, recompute: str
) -> None:
    kept = run(2, one_step, "olmo2", 1, 2, True, "none")
    again = run(2, one_step, "olmo2", 1, 2, True, recompute)
    for a, b in zip(kept, again, strict=True):
        for one, other in zip(a["gradients"], b["gradients"], strict=True):
            assert torch.equal(one[4], other[4]), one[0]


def generated(tp: int) -> Tensor:
    """Logits of a prefill and three cached steps."""
    group = Mesh.build(tp=tp, timeout_seconds=20.0).tp
    config = small("qwen3", 2)
    stage = Stage(config, group=group, dtype=torch.float64).initialise_(3)
    cache = stage.kv_cache(PageTable.of_slots(3, 24))
    tokens = torch.arange(sum(LENGTHS))
    found = []
    with torch.no_grad():
        documents = Documents.of(LENGTHS)
        slots, held = torch.arange(3), torch.zeros(3).long()
        step = CacheStep(cache, documents, slots, held, 15, fresh=True)
        found.append(stage.logits(stage(tokens, cache=step)))
        held = held + torch.tensor(LENGTHS)
        for number in range(3):
            step = CacheStep(cache, Documents.of([1, 1, 1]), slots, held + number, 16 + number)
            found.append(stage.logits(stage(torch.tensor([7, 8, 9]) + number, cache=step)))
    gathered = collectives.all_gather(torch.cat(found), group, dim=1)
    return gathered[:, : config.vocab_size]


@pytest.mark.parametrize("tp", [2, 4])
def test_cached_decoding_of_a_split_model_equals_the_whole_models(run: Callable, tp: int) -> None:
    (expected,) = run(1, generated, 1)
    for logits in run(tp, generated, tp):
        assert (logits - expected).norm() <= 1e-10 * expected.norm()
