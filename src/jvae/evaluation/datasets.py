"""Bounds over whole datasets, a batch at a time."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jvae.checks import check_count, check_key
from jvae.estimators import Bound
from jvae.models import Params


def bound_by_example(
    params: Params,
    x: Shaped[Array | np.ndarray, "num ..."],
    key: PRNGKeyArray,
    *,
    bound: Bound,
    batch_size: int = 500,
) -> Float[Array, "num"]:
    """A bound on every example of a dataset, a batch at a time.

    Each example has a key of its own, so that the result does not depend on `batch_size`.

    Args:
      params: from `jvae.init`.
      x: float [num, *data_shape].
      key: a typed PRNG key.
      bound: a function `(params, x, key) -> nats`, hashable.
      batch_size: examples at once.

    Returns:
      [num] nats. Its mean's standard error is `std(ddof=1) / sqrt(num)`.

    Raises:
      TypeError: `key` is no typed key.
      ValueError: `batch_size` is below 1; and as `bound`.
    """
    check_key(key)
    return _bound_by_example(params, x, key, bound, check_count("batch_size", batch_size))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _bound_by_example(
    params: Params,
    x: Shaped[Array | np.ndarray, "num ..."],
    key: PRNGKeyArray,
    bound: Bound,
    batch_size: int,
) -> Float[Array, "num"]:
    keys = jax.random.split(key, x.shape[0])
    return jax.lax.map(lambda e: bound(params, *e), (x, keys), batch_size=batch_size)
