"""Bounds over whole datasets, a batch at a time."""

import contextlib
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jvae.checks import check_count, check_key
from jvae.estimators import Bound
from jvae.evaluation.examples import examples_at_once, map_on_devices, mesh_of
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

    Each example has a key of its own, so that the result does not depend on `batch_size`, nor on
    the devices that examples are split over (`jvae.distributed.split_examples`). Memory does not
    grow with the draws that the bound takes: the more they are, the fewer examples at once.

    Args:
      params: from `jvae.init`.
      x: float [num, *data_shape].
      key: a typed PRNG key.
      bound: a function `(params, x, key) -> nats`, hashable.
      batch_size: examples at once, at most.

    Returns:
      [num] nats. Its mean's standard error is `std(ddof=1) / sqrt(num)`.

    Raises:
      TypeError: `key` is no typed key.
      ValueError: `batch_size` is below 1; and as `bound`.
    """
    check_key(key)
    batch_size = check_count("batch_size", batch_size)
    return _bound_by_example(params, x, key, _same(bound), batch_size, mesh_of(x))


def _same(bound: Bound) -> Bound:
    """For partials of equal arguments, which differ for `jit`, one that was compiled before."""
    if isinstance(bound, functools.partial):
        with contextlib.suppress(TypeError):  # of arguments that have no hash, such as arrays
            return _partial(bound.func, *bound.args, **bound.keywords)
    return bound


@functools.lru_cache(typed=True)
def _partial(function: Bound, /, *args: Any, **keywords: Any) -> Bound:
    return functools.partial(function, *args, **keywords)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _bound_by_example(
    params: Params,
    x: Shaped[Array | np.ndarray, "num ..."],
    key: PRNGKeyArray,
    bound: Bound,
    batch_size: int,
    mesh: Mesh | None,
) -> Float[Array, "num"]:
    of_one, arguments = functools.partial(bound, params), (x, jax.random.split(key, x.shape[0]))
    # A bound sees one example, and so takes as many draws at once as one example may have.
    size = min(batch_size, examples_at_once(of_one, arguments))
    return map_on_devices(of_one, arguments, size, mesh)
