"""Estimates of log p(x) and of bounds over whole datasets, in bounded memory."""

import functools
import math

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jvae.checks import check_count, check_key
from jvae.estimators import Bound, log_densities, log_mean_exp
from jvae.models import Params, check_data, posterior

# Rows of decoder input at once: enough to keep matrix products busy, few enough for a cache.
_ROWS = 1000


def log_likelihood(
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    *,
    num_samples: int = 5000,
) -> Float[Array, "*batch"]:
    """Estimate log p(x) by importance sampling with q(z|x) as the proposal.

        log 1/K Σₖ p(x, zₖ) / q(zₖ|x),  zₖ ~ q(z|x)

    Burda, Grosse & Salakhutdinov (2016), Section 2: a lower bound in expectation, exact as
    K → ∞. Exactly K samples are drawn, in chunks: memory does not grow with K or with the batch
    beyond one number a sample of the examples in hand.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key; each example's samples have a key of their own.
      num_samples: K, the draws of z an example.

    Returns:
      [*batch] nats.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, or `num_samples` is below 1.
    """
    check_key(key)
    return _log_likelihood(
        params, check_data(params, x), key, check_count("num_samples", num_samples)
    )


@functools.partial(jax.jit, static_argnums=3)
def _log_likelihood(
    params: Params, x: Float[Array, "..."], key: PRNGKeyArray, num_samples: int
) -> Float[Array, "*batch"]:
    def estimate(example: tuple[Array, PRNGKeyArray]) -> Array:
        x, key = example
        q = posterior(params, x)
        log_w = jax.lax.map(
            lambda k: log_densities(params, q, x, k).weight,
            jax.random.split(key, num_samples),
            batch_size=min(num_samples, _ROWS),
        )
        return log_mean_exp(log_w)

    data_shape = params.model.data_shape
    batch = x.shape[: x.ndim - len(data_shape)]
    flat = x.reshape(math.prod(batch), *data_shape)
    keys = jax.random.split(key, flat.shape[0])
    examples_at_once = max(1, _ROWS // num_samples)
    return jax.lax.map(estimate, (flat, keys), batch_size=examples_at_once).reshape(batch)


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
