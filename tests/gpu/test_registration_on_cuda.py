"""The ops as torch sees them on a CUDA device, and gradients in fp32 of parameters in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megarlx.comm.groups import Group
from megarlx.config.model import family_config
from megarlx.model.documents import Documents
from megarlx.model.transformer import Stage
from megarlx.ops import sample
from megarlx.ops.linear_token_loss import linear_token_loss
from megarlx.ops.loss_spec import LossSpec
from megarlx.ops.native import load
from megarlx.parallel.data_parallel import DataParallel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(load().built_with["cuda"] is None, reason="built without CUDA"),
]
DEVICE = "cuda"
SPEC = LossSpec("ppo_clip", kl="k3", kl_coefficient=0.1, entropy_coefficient=0.1)


def number(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, device=DEVICE)


@pytest.mark.parametrize("filtered", [False, True])
def test_opcheck_of_sampling(filtered: bool) -> None:
    ops = torch.ops.megarlx
    keys = torch.arange(12, device=DEVICE).view(6, 2)
    seed, heat = torch.ones(1, dtype=torch.int64, device=DEVICE), random(1)
    filters: tuple[Any, ...] = (None, None, None)
    if filtered:
        filters = (torch.full((1,), 5, device=DEVICE), random(1), 0.1 * random(1))
    logits = random(6, 256)
    torch.library.opcheck(ops.sample.default, (logits, seed, keys, heat, *filters, 250))
    torch.library.opcheck(ops.sample_partials.default, (logits, seed, keys, heat, 128, 300))
    partials = ops.sample_partials(logits, seed, keys, heat, 0, 256)[None]
    torch.library.opcheck(ops.sample_combine.default, (partials, heat))


@pytest.mark.parametrize("with_gradient", [True, False])
def test_opcheck_of_the_token_losses(with_gradient: bool) -> None:
    ops = torch.ops.megarlx
    targets = torch.randint(0, 31, (9,), device=DEVICE)
    mask = torch.arange(9, device=DEVICE) != 4
    tokens = (mask, random(9), -random(9), -random(9), random(9))
    logits = random(9, 32).requires_grad_(with_gradient)
    arguments = (logits, targets, *tokens, number(3), number(0.9), 31, *SPEC.arguments)
    torch.library.opcheck(ops.token_loss.default, (*arguments, with_gradient))
    hidden = random(9, 16).requires_grad_(with_gradient)
    weight = random(32, 16).requires_grad_(with_gradient)
    arguments = (hidden, weight, targets, *tokens, number(3), number(0.9), 31, *SPEC.arguments)
    torch.library.opcheck(ops.linear_token_loss.default, (*arguments, 4, True, with_gradient))


def test_opcheck_of_the_updates() -> None:
    ops = torch.ops.megarlx
    buffers = [[random(37) for _ in range(2)] for _ in range(3)]
    two = torch.full((2,), 0.5, dtype=torch.float64, device=DEVICE)
    others = {
        "lrs": two,
        "beta1s": [0.9, 0.9],
        "beta2s": [0.95, 0.95],
        "eps": [1e-8, 1e-8],
        "weight_decays": two,
        "steps": torch.zeros(2, dtype=torch.int64, device=DEVICE),
        "clips": two,
        "weights": two,
        "found_inf": None,
        "param_out": torch.empty(37, dtype=torch.bfloat16, device=DEVICE),
    }
    torch.library.opcheck(ops.average_adamw_.default, (random(37), *buffers), others)
    weight = two[:1].clone()
    wire = torch.empty(37, device=DEVICE)
    torch.library.opcheck(ops.replica_average_pack.default, (random(37), weight, None, wire))
    torch.library.opcheck(ops.replica_average_apply_.default, (random(37), random(37), True, None))


def test_sampling_can_be_compiled() -> None:
    logits, keys = random(4, 300), torch.arange(8, device=DEVICE).view(4, 2)
    seed, heat = torch.ones(1, dtype=torch.int64, device=DEVICE), torch.ones(1, device=DEVICE)

    def drawn(x: torch.Tensor) -> torch.Tensor:
        return sample(x * 2, seed=seed, keys=keys, temperature=heat).token

    compiled = torch.compile(drawn, backend="aot_eager")
    assert torch.equal(compiled(logits), drawn(logits))


def test_gradients_of_bf16_parameters_are_summed_in_preset_fp32_views() -> None:
    """Micro-batches add up in the flat fp32 buffer: no gradient is rounded to bf16 between them."""
    config = family_config(
        "olmo2",
        vocab_size=203,
        hidden_size=128,
        layers=2,
        heads=2,
        kv_heads=2,
        head_dim=64,
        intermediate_size=160,
    )
    stage = Stage(config, dtype=torch.bfloat16, device=DEVICE).initialise_(0)
    parameters: dict[str, nn.Parameter] = dict(stage.named_parameters())
    flat = DataParallel(parameters, stage.layouts, Group.alone("dp"))
    views = {name: p.grad for name, p in parameters.items()}
    flat.begin(torch.zeros(flat.layout.shard_size, device=DEVICE))
    tokens = torch.randint(0, 203, (64,), device=DEVICE)
    documents = Documents.of([40, 24], DEVICE)

    def loss(*given: Any, **more: Any) -> Any:
        return linear_token_loss(*given, spec=LossSpec(), normalizer=64.0, **more)

    once: dict[str, torch.Tensor] = {}
    for number_done in (1, 2):
        stage(tokens, documents=documents, loss=loss, targets=tokens.roll(-1)).backward()
        for name, parameter in parameters.items():
            gradient = parameter.grad
            assert gradient is views[name]
            assert gradient is not None
            assert gradient.dtype == torch.float32
            if number_done == 1:
                once[name] = gradient.clone()
            else:
                torch.testing.assert_close(gradient, 2 * once[name], rtol=2e-2, atol=1e-5)
    begin, end = flat.gradients.data_ptr(), flat.gradients.data_ptr() + flat.gradients.nbytes
    assert all(begin <= v.data_ptr() < end for v in views.values() if v is not None)
