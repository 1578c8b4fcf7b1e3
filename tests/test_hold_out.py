import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standard_errors import SIGMAS

from jvae import data


@pytest.mark.parametrize(
    ("num", "fraction", "num_test"),
    [
        # At least two are held out,
        (3, 0.1, 2),
        (10, 0.1, 2),
        (10**6, 1e-9, 2),
        # at least one is left,
        (3, 0.9, 2),
        (4, 0.9, 3),
        (5, 0.999, 4),
        (100, 1 - 1e-12, 99),
        # and in between it is the nearest number, of two the even one.
        (10, 0.25, 2),
        (14, 0.25, 4),
        (10, 0.26, 3),
        (7, 0.5, 4),
        (100, 0.1, 10),
        (1000, 0.0154, 15),
        (60_000, 1 / 6, 10_000),
        (999_999, 1 / 3, 333_333),
    ],
)
def test_sizes(num: int, fraction: float, num_test: int) -> None:
    train, test = data.hold_out(num, fraction, 0)
    assert test.shape == (num_test,)
    assert train.shape == (num - num_test,)


@settings(max_examples=50, deadline=None)
@given(
    num=st.integers(3, 300),
    fraction=st.floats(0, 1, exclude_min=True, exclude_max=True),
    seed=st.integers(0, 2**64),
)
def test_every_example_is_in_one_part_and_each_part_rises(
    num: int, fraction: float, seed: int
) -> None:
    train, test = data.hold_out(num, fraction, seed)
    assert len(train) >= 1
    assert len(test) >= 2
    assert (np.diff(train) > 0).all()
    assert (np.diff(test) > 0).all()
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(num))
    again = data.hold_out(num, fraction, seed)
    np.testing.assert_array_equal(again[0], train)
    np.testing.assert_array_equal(again[1], test)


@pytest.mark.parametrize(
    ("num", "fraction", "seed", "test"),
    [
        (3, 0.1, 0, [1, 2]),
        (5, 0.4, 1, [2, 4]),
        (10, 0.2, 0, [2, 3]),
        (10, 0.2, 1, [2, 9]),
        (20, 0.25, 0, [2, 3, 11, 13, 15]),
        (20, 0.25, 2**40, [3, 8, 9, 11, 18]),
    ],
)
def test_a_split_never_changes(num: int, fraction: float, seed: int, test: list[int]) -> None:
    """Whoever split their data with these keeps the split."""
    np.testing.assert_array_equal(data.hold_out(num, fraction, seed)[1], test)


def test_a_large_split_never_changes() -> None:
    _, test = data.hold_out(70_000, 1 / 7, 3)
    digest = hashlib.sha256(test.astype("<i8").tobytes()).hexdigest()
    assert digest == "ce9868b5dd095a9338aacc10a5f6392096dec31ee4e6e12e9141c85f0bde55b9"


def test_other_seeds_are_other_splits() -> None:
    splits = {data.hold_out(50, 0.2, seed)[1].tobytes() for seed in range(100)}
    assert len(splits) == 100


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.1, math.nan, math.inf])
def test_fractions_outside_0_to_1_are_refused(fraction: float) -> None:
    message = f"the fraction to hold out must be between 0 and 1, got {fraction}"
    with pytest.raises(ValueError, match=f"^{message}$") as error:
        data.hold_out(10, fraction, 0)
    assert not isinstance(error.value, data.DataError)


@pytest.mark.parametrize("num", [0, 1, 2])
def test_too_few_examples_are_refused(num: int) -> None:
    with pytest.raises(data.DataError, match=f"^data: {num} examples, at least 3 are needed"):
        data.hold_out(num, 0.5, 0)


def test_every_example_and_every_pair_is_held_out_equally_often() -> None:
    num, num_test, num_seeds = 12, 3, 4000
    held_out = np.zeros((num_seeds, num))
    for seed in range(num_seeds):
        held_out[seed, data.hold_out(num, num_test / num, seed)[1]] = 1
    single = num_test / num
    pair = single * (num_test - 1) / (num - 1)
    expected = np.full((num, num), pair) + np.diag(np.full(num, single - pair))
    frequency = held_out.T @ held_out / num_seeds
    error = np.sqrt(expected * (1 - expected) / num_seeds)
    np.testing.assert_array_less(np.abs(frequency - expected), SIGMAS * error)
