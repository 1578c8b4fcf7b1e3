"""Argument checks made at trace time, so that a wrong call fails where it was written."""

import operator
from typing import Any

import jax
import jax.numpy as jnp


def check_key(key: Any) -> None:
    """Refuse anything but one typed PRNG key.

    Raises:
      TypeError: `key` is no typed key (a raw `jax.random.PRNGKey` included).
      ValueError: `key` is an array of keys.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        given = type(key).__name__ if dtype is None else f"an array of {dtype}"
        raise TypeError(f"key must be a typed key, as jax.random.key(seed) makes, got {given}")
    if key.shape != ():
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
