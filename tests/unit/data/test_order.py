import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarlx.data.order import BITS, Shuffle, key_of, mix, mix_array, shuffled, uniform


@given(st.integers(1, 3000), st.integers(0, BITS))
def test_a_shuffle_is_a_permutation(count: int, key: int) -> None:
    shuffle = Shuffle(count, key)
    assert sorted(shuffle[i] for i in range(count)) == list(range(count))
    assert sorted(shuffled(count, key).tolist()) == list(range(count))


def test_shuffles_of_large_counts_stay_inside() -> None:
    count = 10**12 + 7
    shuffle = Shuffle(count, 5)
    found = {shuffle[i] for i in (*range(200), count - 1)}
    assert len(found) == 201
    assert all(0 <= x < count for x in found)
    with pytest.raises(IndexError, match=f"position {count}; allowed 0 to {count - 1}"):
        shuffle[count]


def test_different_keys_give_unrelated_orders() -> None:
    n = 4096
    for make in (lambda key: [Shuffle(n, key)[i] for i in range(n)], lambda k: shuffled(n, k)):
        first, second = np.array(make(key_of(1, "a", 0))), np.array(make(key_of(1, "a", 1)))
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.06  # 4 standard errors
        assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < 0.06
        assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.06
        assert (first == second).sum() < 10  # Poisson(1)


@given(st.lists(st.integers(0, BITS), max_size=20))
def test_the_array_form_is_the_scalar_form(numbers: list[int]) -> None:
    assert mix_array(np.array(numbers, np.uint64)).tolist() == [mix(x) for x in numbers]


def test_orders_stay_what_they_are_for_ever() -> None:
    assert mix(0) == 0xE220A8397B1DCDAF  # the published first output of SplitMix64 with seed 0
    assert [Shuffle(10, 1)[i] for i in range(10)] == [6, 7, 3, 2, 5, 8, 0, 1, 9, 4]
    assert shuffled(10, 1).tolist() == [2, 4, 6, 5, 0, 3, 9, 8, 7, 1]


def test_keys_depend_on_every_part_and_its_place() -> None:
    keys = [key_of(1, 2), key_of(2, 1), key_of(1, 2, 0), key_of(1, "2"), key_of(1), key_of("1", 2)]
    assert len(set(keys)) == len(keys)


def test_uniform_numbers_are_uniform() -> None:
    values = np.array([uniform(7, i) for i in range(4000)])
    assert (values >= 0).all()
    assert (values < 1).all()
    counts = np.histogram(values, 10, (0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001
