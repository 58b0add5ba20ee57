"""The two halves of replica_average_ in one process; P is the number of elements."""

from __future__ import annotations

import pytest
import torch

from megarlx.comm.groups import Group
from megarlx.ops.averaging import replica_average_

skip_ = torch.ops.megarlx.replica_average_skip_.default
apply_ = torch.ops.megarlx.replica_average_apply_.default


def pack(
    x: torch.Tensor, weight: torch.Tensor, found_inf: torch.Tensor | None, wire: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    packed = torch.empty_like(x, dtype=wire)
    return packed, *torch.ops.megarlx.replica_average_pack(x, weight, found_inf, packed)


def number(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def normal(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rng = torch.Generator().manual_seed(count)
    return torch.randn(count, generator=rng, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("count", [0, 1, 7, 1025, 65_536, 65_537, 200_003])
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_pack_scales_rounds_and_measures(count: int, wire: torch.dtype) -> None:
    x = normal(count)
    packed, squared_norm, found_inf = pack(x, number(0.3), None, wire)
    assert torch.equal(packed, (torch.tensor(0.3) * x).to(wire))
    assert torch.allclose(squared_norm, x.double().square().sum(), rtol=1e-13)
    assert found_inf.tolist() == [False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 1024, 65_540, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pack_finds_one_bad_element_anywhere(bad: float, where: int, dtype: torch.dtype) -> None:
    x = normal(70_001, dtype)
    x[where] = bad
    assert pack(x, number(1), None, dtype)[2].item()
    packed, _, found_inf = pack(x, number(1), torch.tensor([True]), dtype)
    assert found_inf.item()
    assert packed.eq(0).all()


def test_the_largest_finite_fp32_numbers_are_not_an_overflow() -> None:
    x = torch.full((1000,), torch.finfo(torch.float32).max)
    _, squared_norm, found_inf = pack(x, number(1), None, torch.float32)
    assert torch.allclose(squared_norm, x.double().square().sum(), rtol=1e-13)
    assert not found_inf.item()


def test_norms_have_the_same_bits_for_any_number_of_threads() -> None:
    x, norms, threads = normal(500_001), [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            norms.append(pack(x, number(1), None, torch.float32)[1].item())
    finally:
        torch.set_num_threads(threads)
    assert len(set(norms)) == 1


@pytest.mark.parametrize("flag", [True, False])
def test_skip_zeroes_only_where_the_flag_says_so(flag: bool) -> None:
    x = torch.full((37,), float("nan"))
    skip_(x, torch.tensor([flag]))
    assert x.eq(0).all() if flag else x.isnan().all()


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 1025, 70_001])
def test_apply_adds_or_hands_on_and_copies_out(add: bool, wire: torch.dtype, count: int) -> None:
    target, summed = normal(count), normal(count + 1)[1:].to(wire)
    expected = (target if add else 0) + summed.float()
    out = torch.empty(count, dtype=torch.bfloat16)
    apply_(target, summed, add, out)
    assert torch.equal(target, expected)
    assert torch.equal(out, expected.bfloat16())


def test_a_group_of_one_applies_the_weighted_update() -> None:
    master, delta = normal(99), normal(98 + 1) * 0.1
    expected = master + 0.5 * delta
    report = replica_average_(master, delta, weight=0.5, group=Group.alone("replica"))
    assert torch.equal(master, expected)
    assert not report.found_inf.item()


def test_an_unreported_overflow_leaves_the_master_alone() -> None:
    master, delta = normal(99), normal(99)
    before = master.clone()
    delta[50] = float("nan")
    report = replica_average_(master, delta, weight=0.5, group=Group.alone("replica"))
    assert torch.equal(master, before)
    assert report.found_inf.item()


def test_opcheck() -> None:
    x = normal(33)
    flag = torch.tensor([False])
    pack_op = torch.ops.megarlx.replica_average_pack.default
    torch.library.opcheck(pack_op, (x, number(0.5), None, x.bfloat16()))
    torch.library.opcheck(pack_op, (x, number(0.5), flag, x.clone()))
    torch.library.opcheck(skip_, (x.clone(), flag))
    out = torch.empty(33, dtype=torch.bfloat16)
    torch.library.opcheck(apply_, (x.clone(), x.bfloat16(), True, out))
    torch.library.opcheck(apply_, (x.clone(), x.bfloat16(), False, None))


def test_bad_input_is_named() -> None:
    x, alone = normal(10), Group.alone("replica")
    with pytest.raises(ValueError, match=r"of is 'losses'; allowed: 'updates', 'gradients'"):
        replica_average_(x, x.clone(), weight=1, group=alone, of="losses")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"packed.dtype is Half; allowed: Float or BFloat16"):
        replica_average_(x, x.clone(), weight=1, group=alone, wire=torch.half)
    with pytest.raises(ValueError, match=r"packed.dtype is torch.bfloat16; allowed: torch.float32"):
        replica_average_(x, x.clone(), weight=1, group=alone, packed=x.bfloat16())
    with pytest.raises(ValueError, match=r"packed is in the same memory as input"):
        replica_average_(x, y := x.clone(), weight=1, group=alone, packed=y)
    with pytest.raises(ValueError, match=r"weight is nan; allowed: finite"):
        replica_average_(x, x.clone(), weight=float("nan"), group=alone)
    with pytest.raises(ValueError, match=r"input.stride is \[2\]; allowed: contiguous"):
        replica_average_(x[:5], x[::2], weight=1, group=alone)
    with pytest.raises(ValueError, match=r"summed.shape is \[9\]; allowed: \[10\]"):
        replica_average_(x, normal(9), weight=1, group=alone)
    with pytest.raises(ValueError, match=r"found_inf.shape is \[2\]"):
        replica_average_(x, normal(10), weight=1, group=alone, found_inf=torch.zeros(2))
    with pytest.raises(ValueError, match=r"param_out is in the same memory as target"):
        replica_average_(x, normal(10), weight=1, group=alone, param_out=x)
