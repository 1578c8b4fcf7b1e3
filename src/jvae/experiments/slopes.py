"""Slopes of a power law: straight lines through logarithms, with the errors of the points."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Slope(NamedTuple):
    """A fitted slope and its standard error."""

    value: float
    stderr: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} ± {self.stderr:.3f}"


def log_log(
    x: Sequence[float | int], y: Sequence[float | int], y_stderr: Sequence[float | int]
) -> Slope | None:
    """The exponent of y ∝ x^slope: weighted least squares of log y on log x.

    The standard error is that of the points' own errors or, where they scatter by more than these
    (χ² above its degrees of freedom), larger by the root of that ratio.

    Args:
      x: [num_points], positive.
      y: [num_points], positive.
      y_stderr: [num_points], the standard error of each y, positive.

    Returns:
      None for fewer than two points.
    """
    if len(np.unique(x)) < 2:
        return None
    log_x, log_y = np.log(x), np.log(y)
    weight = (np.asarray(y) / np.asarray(y_stderr)) ** 2
    centred = log_x - np.average(log_x, weights=weight)
    information = (weight * centred**2).sum()
    slope = float((weight * centred * log_y).sum() / information)
    residual = log_y - np.average(log_y, weights=weight) - slope * centred
    freedom = len(log_x) - 2
    scatter = float((weight * residual**2).sum()) / freedom if freedom else 1.0
    return Slope(slope, math.sqrt(max(1.0, scatter) / float(information)))
