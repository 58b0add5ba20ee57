import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megarlx.data.order import BITS, key_of, mix, shuffled, uniform


@given(st.integers(0, 3000), st.integers(0, BITS))
def test_a_shuffle_is_a_permutation(count: int, key: int) -> None:
    assert sorted(shuffled(count, key).tolist()) == list(range(count))


def test_different_keys_give_unrelated_orders() -> None:
    n = 4096
    first, second = shuffled(n, key_of(1, "a", 0)), shuffled(n, key_of(1, "a", 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06  # 4 standard errors
    assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < 0.06
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.06
    assert (first == second).sum() < 10  # Poisson(1)


def test_orders_stay_what_they_are_for_ever() -> None:
    assert mix(0) == 0xE220A8397B1DCDAF  # the published first output of SplitMix64 with seed 0
    assert key_of(3, "name", 5) == 8785443651018032475
    assert shuffled(10, 1).tolist() == [6, 4, 7, 1, 0, 2, 5, 8, 3, 9]


def test_keys_depend_on_every_part_and_its_place() -> None:
    keys = [key_of(1, 2), key_of(2, 1), key_of(1, 2, 0), key_of(1, "2"), key_of(1), key_of("1", 2)]
    assert len(set(keys)) == len(keys)


def test_uniform_numbers_are_uniform() -> None:
    values = np.array([uniform(7, i) for i in range(4000)])
    assert (values >= 0).all()
    assert (values < 1).all()
    counts = np.histogram(values, 10, (0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001
