"""Argument checks made at trace time, so that a wrong call fails where it was written."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_key(key: Any, batch: tuple[int, ...] = ()) -> None:
    """Refuse anything but one typed PRNG key, or an array of them whose shape is `batch`.

    Raises:
      TypeError: `key` is no typed key (a raw `jax.random.PRNGKey` included).
      ValueError: `key` is an array of keys of another shape.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        given = type(key).__name__ if dtype is None else f"an array of {dtype}"
        raise TypeError(f"key must be a typed key, as jax.random.key(seed) makes, got {given}")
    if key.shape not in ((), batch):
        if batch:
            raise ValueError(f"key must be one key or {batch} of them, got {key.shape}")
        raise ValueError(f"key must be one key, got {key.shape}: index it, or jax.vmap over it")


def check_count(name: str, value: Any) -> int:
    """Return `value` as an int of at least 1.

    Raises:
      TypeError: `value` is no Python or NumPy integer (a traced value included).
      ValueError: `value` is below 1.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError as error:  # jax's own errors for traced values are TypeErrors too
        raise TypeError(f"{name} must be a static int, got {type(value).__name__}") from error
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def check_between(name: str, value: Any, low: float, high: float = math.inf) -> Any:
    """Return `value`, a finite number from `low` to `high`; one that is traced passes unseen.

    Raises:
      TypeError: `value` is no number.
      ValueError: it is out of range.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    array = np.asarray(value)
    if isinstance(value, bool) or array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (np.isfinite(array) & (low <= array) & (array <= high)).all():
        ends = [f"at least {low:g}"] * (low > -math.inf) + [f"at most {high:g}"] * (high < math.inf)
        raise ValueError(f"{name} must be {' and '.join(['finite', *ends])}, got {value}")
    return value
