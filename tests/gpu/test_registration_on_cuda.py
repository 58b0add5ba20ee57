"""The ops as torch sees them on a CUDA device, and gradients in fp32 of parameters in bf16."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import megarlx.ops.decode
import megarlx.ops.decode_parts  # noqa: F401  (fake kernels)
from megarlx.comm.groups import Group
from megarlx.config.model import family_config
from megarlx.model.documents import Documents
from megarlx.model.transformer import Stage
from megarlx.ops import sample
from megarlx.ops.linear_token_loss import Head
from megarlx.ops.loss_spec import LossSpec, TokenLoss
from megarlx.ops.token_inputs import LossInputs
from megarlx.parallel.data_parallel import DataParallel

pytestmark = pytest.mark.gpu
CSRC = Path(__file__).resolve().parents[2] / "csrc"
SPEC = LossSpec("ppo_clip", kl="k3", kl_coefficient=0.1, entropy_coefficient=0.1)


def number(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


def check(card: Any, op: Any, *arguments: Any, **named: Any) -> None:
    """opcheck of an op of megarlx on the card."""
    moved = tuple(card.moved(list(arguments)))
    torch.library.opcheck(op.default, moved, card.moved(named))


def check_sampling(card: Any) -> None:
    ops = torch.ops.megarlx
    keys = torch.arange(12).view(6, 2)
    seed, heat = torch.ones(1, dtype=torch.int64), torch.rand(1)
    logits = torch.rand(6, 256)
    filters = (torch.full((1,), 5), torch.rand(1), 0.1 * torch.rand(1))
    for given in ((None, None, None), filters):
        check(card, ops.sample, logits, seed, keys, heat, *given, 250)
    check(card, ops.sample_partials, logits, seed, keys, heat, 128, 300)
    moved = card.moved([logits, seed, keys, heat])
    partials = ops.sample_partials(*moved, 0, 256)[None]
    check(card, ops.sample_combine, partials, heat)


def check_losses(card: Any) -> None:
    ops = torch.ops.megarlx
    targets, mask = torch.randint(0, 31, (9,)), torch.arange(9) != 4
    tokens = (targets, mask, torch.rand(9), -torch.rand(9), -torch.rand(9), torch.rand(9))
    numbers = (number(3), number(0.9))
    whole = (*tokens, *numbers, 31, *SPEC.arguments)
    logits, hidden, weight = torch.rand(9, 32), torch.rand(9, 16), torch.rand(32, 16)
    for with_gradient in (True, False):

        def leaf(tensor: torch.Tensor, needed: bool = with_gradient) -> torch.Tensor:
            return card.moved(tensor).detach().requires_grad_(needed)

        arguments = card.moved(list(whole))
        torch.library.opcheck(ops.token_loss.default, (leaf(logits), *arguments, with_gradient))
        torch.library.opcheck(
            ops.linear_token_loss.default,
            (leaf(hidden), leaf(weight), *arguments, 4, 1, True, with_gradient),
        )
    into = torch.zeros(32, 16)
    check(card, ops._linear_token_loss_, hidden, weight, *whole, 4, 0, True, into)
    place = (number(0.9), 0, 31)
    check(card, ops.token_loss_sums, logits, targets, mask, *place)
    partials = ops.token_loss_sums(*card.moved([logits, targets, mask, *place]))
    slopes = (partials, targets, mask, *torch.rand(3, 9), *place)
    for gradient in (None, torch.zeros(9, 32), torch.zeros(9, 32, dtype=torch.bfloat16)):
        check(card, ops.token_loss_gradient_, logits, *slopes, gradient)
    for factor in (1.0, 0.5):
        check(card, ops._scale_gradient_, torch.rand(9, 32), number(factor))


def check_updates(card: Any) -> None:
    ops = torch.ops.megarlx
    for dtype in (torch.float32, torch.float64):
        buffers = [[torch.rand(37, dtype=dtype) for _ in range(2)] for _ in range(3)]
        master = torch.rand(37, dtype=dtype)
        two = torch.full((2,), 0.5, dtype=torch.float64)
        one = two[:1].clone()
        check(
            card, ops.average_adamw_, master, *buffers,
            lrs=two, beta1s=[0.9, 0.9], beta2s=[0.95, 0.95], eps=[1e-8, 1e-8], weight_decays=two,
            steps=torch.zeros(2, dtype=torch.int64), clips=two, weights=two, found_inf=None,
            param_out=torch.zeros(37, dtype=torch.bfloat16),
        )  # fmt: skip
        check(
            card, ops.adamw_update_, master, *(buffer[0] for buffer in buffers),
            lr=one, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=one,
            steps=torch.zeros(1, dtype=torch.int64), clip=one, found_inf=None,
            delta=torch.zeros(37, dtype=dtype),
        )  # fmt: skip
        wire = torch.zeros(37, dtype=torch.bfloat16)
        check(card, ops.replica_average_pack, master, one, None, wire)
        check(card, ops.replica_average_skip_, wire, torch.tensor([True]))
        check(card, ops.replica_average_apply_, master, wire, True, None)


def check_elementwise(card: Any) -> None:
    ops = torch.ops.megarlx
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, weight, turn = (torch.rand(*shape).to(dtype) for shape in ((6, 8), (8,), (6, 1, 2)))
        inverse = card.moved(ops.rms_norm(x.double(), weight.double(), 1e-5)[1])
        inverse = inverse.to(torch.float64 if dtype == torch.float64 else torch.float32)
        for residual in (None, x):
            check(card, ops.rms_norm, x, weight, 1e-5, residual)
        for with_weight in (True, False):
            check(card, ops.rms_norm_backward, x, x, weight, inverse, with_weight)
        check(card, ops.swiglu, x)
        check(card, ops.swiglu_backward, x[:, :4], x)
        qkv = torch.rand(6, 16).to(dtype)
        for sizes in ((), (8, 4), (4, 4)):
            weights = [torch.rand(size).to(dtype) for size in sizes] or [None, None]
            norms = inverse.new_ones(6, {(): 0, (8, 4): 2, (4, 4): 3}[sizes])
            sums = inverse.new_ones(6, 2) if sizes == (8, 4) else None
            check(card, ops._heads, qkv, *weights, turn, turn, 2, 1, 1e-5, sums, 2)
            grads = (qkv[:, :8].view(6, 2, 4), qkv[:, None, :4], qkv[:, None, 4:8])
            given = (*grads, qkv, *weights, turn, turn, norms)
            check(card, ops._heads_backward, *given, bool(sizes), sums, 2)
        check(card, ops._heads_sums, qkv, 2, 1)
        weights = [torch.rand(size).to(dtype) for size in (8, 4)]
        check(card, ops._heads_backward_sums, *grads[:2], qkv, *weights, turn, turn)


def check_decode_parts(card: Any) -> None:
    ops = torch.ops.megarlx
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, y, weight, turn = (torch.rand(*s).to(dtype) for s in ((3, 8), (3, 8), (8,), (8, 2)))
        check(card, ops.decode_norm_, x, y, weight, 1e-5, None)
        check(card, ops.decode_norm_, x, y, weight, 1e-5, torch.zeros_like(x))
        check(card, ops.decode_swiglu_, x, torch.zeros(3, 4, dtype=dtype))
        qkv, cache = torch.rand(3, 16).to(dtype), torch.zeros(2, 4, 1, 4, dtype=dtype)
        table, places = torch.tensor([[1, 1, 0, 0, 1]], dtype=torch.int32), torch.arange(3)
        given = (qkv, cache, cache.clone(), table, 0 * places, places, turn, turn)
        q = torch.rand(3, 2, 4).to(dtype)
        check(card, ops.decode_heads_, *given, weight[:4], weight[:4], None, 1, 1e-5, q)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        check(card, ops.merge_attention, *(q, torch.rand(3, 2, dtype=wide)) * 2)
    whole, flags = torch.arange(3), torch.zeros(3, dtype=torch.bool)
    rows = (whole, whole.clone(), whole.clone(), torch.zeros(3, 2, dtype=torch.int64))
    ring = (torch.zeros(1, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64))
    given = (whole, torch.rand(3), torch.rand(3), whole, whole, 5)
    check(card, ops.decode_advance_, *given, *rows, flags, *ring, torch.zeros(2, 2, 3))


def check_products(card: Any) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, weight, bias = (torch.rand(*s).to(dtype) for s in ((3, 16), (5, 16), (5,)))
        given = (x, weight, bias, None, True, torch.zeros(3, 5, dtype=dtype))
        check(card, torch.ops.megarlx.narrow_product_, *given)
        # the other tests of opcheck multiply what they are given, which torch cannot in e4m3
        values = card.moved(torch.zeros(3, 16, dtype=torch.float8_e4m3fn))
        moved = (card.moved(x), values, card.moved(torch.zeros(3)))
        op = torch.ops.megarlx.e4m3_rows_.default
        torch.library.opcheck(op, moved, test_utils=("test_faketensor",))


def check_weights(card: Any) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rows = torch.zeros(3, 5, dtype=dtype)
        check(card, torch.ops.megarlx.normal_slice_, rows, 7, 2, 9, 0.02)


CHECKS = (
    *(check_sampling, check_losses, check_updates, check_elementwise, check_decode_parts),
    *(check_weights, check_products),
)


@pytest.mark.parametrize("of", CHECKS)
def test_opcheck(on_card: Any, of: Callable[[Any], None]) -> None:
    of(on_card)


def test_opcheck_covers_every_op_with_a_cuda_kernel() -> None:
    registered: set[str] = set()
    for path in CSRC.glob("*.cpp"):
        text = path.read_text()
        if "TORCH_LIBRARY_IMPL(megarlx, CUDA, m)" in text:
            registered |= set(re.findall(r'm\.impl\("(\w+)"', text))
    assert len(registered) > 12
    checked = re.findall(
        r"\bops\.(?:megarlx\.)?(\w+)", "".join(inspect.getsource(of) for of in CHECKS)
    )
    assert registered - set(checked) <= {"philox", "gumbel"}  # CPU only, beside sample


def test_sampling_can_be_compiled(on_card: Any) -> None:
    logits, keys = on_card.moved([torch.rand(4, 300), torch.arange(8).view(4, 2)])
    seed, heat = on_card.moved([torch.ones(1, dtype=torch.int64), torch.ones(1)])

    def drawn(x: torch.Tensor) -> torch.Tensor:
        return sample(x * 2, seed=seed, keys=keys, temperature=heat).token

    compiled = torch.compile(drawn, backend="aot_eager")
    assert torch.equal(compiled(logits), drawn(logits))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
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
    stage = Stage(config, dtype=torch.bfloat16, device="cuda").initialise_(0)
    parameters: dict[str, nn.Parameter] = dict(stage.named_parameters())
    flat = DataParallel(parameters, stage.layouts, Group.alone("dp"))
    views = {name: p.grad for name, p in parameters.items()}
    flat.begin(torch.zeros(flat.layout.shard_size, device="cuda"))
    tokens = torch.randint(0, 203, (64,), device="cuda")
    documents = Documents.of([40, 24], "cuda")

    def loss(head: Head, inputs: LossInputs) -> TokenLoss:
        return head.token_loss(inputs, LossSpec(), normalizer=64.0)

    once: dict[str, torch.Tensor] = {}
    for number_done in (1, 2):
        learned = LossInputs(tokens.roll(-1))
        stage(tokens, documents=documents, loss=loss, loss_inputs=learned).backward()
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
