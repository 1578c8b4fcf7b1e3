"""Comparison of Monte Carlo means with exact answers."""

import numpy as np
import numpy.typing as npt

# Two-sided probability 6e-7 a comparison.
SIGMAS = 5
# Relative float32 rounding of a sum of a hundred terms, 100 · 2⁻²⁴.
ROUNDING = 6e-6


def mean_and_error(draws: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The mean of independent draws (first axis) and its standard error."""
    draws = np.asarray(draws, np.float64)
    return draws.mean(axis=0), draws.std(axis=0, ddof=1) / np.sqrt(len(draws))


def assert_mean_is(draws: npt.ArrayLike, expected: npt.ArrayLike) -> None:
    """The mean of the draws is `expected`, within its own standard error."""
    mean, error = mean_and_error(draws)
    expected = np.asarray(expected, np.float64)
    assert mean.shape == expected.shape
    tolerance = SIGMAS * error + ROUNDING * (1 + np.abs(expected))
    np.testing.assert_array_less(np.abs(mean - expected), tolerance)
