"""Normal numbers by a counter: any slice, any dtype, any machine has the same; they are normal."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from megarlx.ops.normal import normal_reference, normal_slice_

ops = torch.ops.megarlx
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def drawn(
    *shape: int, key: int = 5, first: int = 0, step: int = 0, std: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    out = torch.full(shape, math.nan, dtype=dtype)
    normal_slice_(out, key=key, first=first, step=step, std=std)
    return out


@pytest.mark.parametrize("key", [0, 7, -1, -(2**63), 2**63 - 1, 0x123456789ABCDEF])
@pytest.mark.parametrize("first", [0, 13, 2**32 * 4 - 500, 2**40 + 1])
def test_numbers_are_those_of_the_formula_in_fp64(key: int, first: int) -> None:
    found = drawn(1000, key=key, first=first).double()
    wanted = normal_reference(torch.arange(first, first + 1000), key)
    assert ((found - wanted).abs() <= 1e-6 * wanted.abs().clamp(min=1)).all()


def test_every_machine_has_the_same_bits() -> None:
    """Held as a hash: what an instruction set or a compiler's contraction would change."""
    numbers = drawn(100_000, key=-3, first=2**33 + 5, std=0.02)
    bits = hashlib.sha256(numbers.numpy().tobytes()).hexdigest()
    assert bits[:16] == "b75691fd5a7d72c8"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 15, 64, 100, 129])
def test_a_slice_has_the_bits_of_the_whole(dtype: torch.dtype, columns: int) -> None:
    rows = 9
    whole = drawn(rows, columns, step=columns, std=0.3).to(dtype)
    for top, bottom, left, right in (
        (0, rows, 0, columns),
        (2, 7, 0, columns),
        (0, rows, columns // 3, columns),
        (3, 4, columns // 2, columns // 2 + 1),
        (8, 9, 0, (columns + 1) // 2),
    ):
        wide = torch.full((rows + 1, columns + 3), 7.0, dtype=dtype)
        out = wide[top:bottom, left:right]
        normal_slice_(out, key=5, first=top * columns + left, step=columns, std=0.3)
        assert torch.equal(out, whole[top:bottom, left:right])
        out.fill_(7)
        assert (wide == 7).all()
    assert torch.equal(drawn(rows * columns, std=0.3, dtype=dtype), whole.flatten())


def test_rows_may_overlap_in_the_numbers_they_take() -> None:
    numbers = drawn(40)
    rows = drawn(5, 20, first=3, step=4)
    assert torch.equal(rows, torch.stack([numbers[3 + 4 * r : 23 + 4 * r] for r in range(5)]))
    assert torch.equal(drawn(3, 8), numbers[:8].expand(3, 8))


def test_keys_have_numbers_that_are_not_correlated() -> None:
    """Keys that differ by a bit or by one, and neighbours of one key: within 5 deviations of 0."""
    count = 200_000
    rows = [drawn(count, key=key) for key in (0, 1, 2, 3, 1 << 32, -1)]
    rows += [rows[0].roll(by) for by in (1, 16, 32, 48, 64)]
    table = torch.corrcoef(torch.stack(rows).double())
    table.fill_diagonal_(0)
    assert table.abs().max() < 5 / math.sqrt(count)
    squares = torch.corrcoef(torch.stack(rows).double().square())
    squares.fill_diagonal_(0)
    assert squares.abs().max() < 5 / math.sqrt(count)


def test_numbers_are_normal() -> None:
    """Moments within 5 deviations, the whole distribution by Kolmogorov and Smirnov, the tails."""
    count = 2_000_000
    x = drawn(count, key=11).double()
    for power, moment, square in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105)):
        deviation = math.sqrt((square - moment**2) / count)
        assert abs(x.pow(power).mean().item() - moment) < 5 * deviation, power
    steps = torch.arange(count, dtype=torch.float64) / count
    below = torch.special.ndtr(x.sort().values)
    distance = torch.maximum((below - steps).max(), (steps + 1 / count - below).max())
    assert distance.item() * math.sqrt(count) < 2.23  # exceeded once in 10^4
    for bound in (3.0, 4.0):
        share = 2 * torch.special.ndtr(torch.tensor(-bound, dtype=torch.float64)).item()
        beyond = (x.abs() > bound).sum().item()
        assert abs(beyond - share * count) < 5 * math.sqrt(share * count), bound
    assert x.abs().max() < 6.77


def test_std_multiplies_and_what_is_empty_is_left_alone() -> None:
    numbers = drawn(100)
    assert torch.equal(drawn(100, std=0.25), numbers * 0.25)
    assert not drawn(100, std=0.0).any()
    for shape in ((0,), (0, 5), (5, 0)):
        assert drawn(*shape).shape == shape


def test_threads_change_nothing() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = drawn(300, 333, step=333)
    torch.set_num_threads(3)
    assert torch.equal(drawn(300, 333, step=333), alone)
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": torch.zeros(2, 3, dtype=torch.float16)}, "out is Half"),
        ({"out": torch.zeros(2, 3, 4)}, r"allowed: \[rows, columns\]"),
        ({"out": torch.zeros(3, 2).T}, "side by side"),
        ({"first": -1}, "first is -1"),
        ({"first": 2**62}, "first is"),
        ({"step": -1}, "step is -1"),
        ({"step": 2**62}, "step is"),
        ({"std": -0.5}, "std is -0.5"),
        ({"std": math.nan}, "std is nan"),
        ({"std": math.inf}, "std is inf"),
    ],
)
def test_wrong_arguments_are_refused_by_name(changes: dict, message: str) -> None:
    given = {"out": torch.zeros(2, 3), "key": 1, "first": 0, "step": 3, "std": 1.0} | changes
    with pytest.raises(ValueError, match=message):
        ops.normal_slice_(**given)


@pytest.mark.not_emulated("fake tensors know no emulated op by this name")
def test_opcheck() -> None:
    torch.library.opcheck(ops.normal_slice_.default, (torch.zeros(3, 7), 5, 2, 9, 0.5))
