"""log p(x) by importance sampling with q(z|x) as the proposal."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PRNGKeyArray, Shaped

from jvae.checks import check_count, check_key
from jvae.chunks import map_in_chunks
from jvae.estimators.sampling import draw
from jvae.evaluation.estimates import LogLikelihood, from_log_weights
from jvae.evaluation.examples import map_examples, mesh_of, rows_at_once
from jvae.models import Params, check_data, posterior


def importance_sampling(
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: Key[Array, "..."],
    *,
    num_samples: int = 5000,
) -> LogLikelihood:
    """Estimate log p(x) by importance sampling with q(z|x) as the proposal, and say how well.

        log 1/K Σₖ wₖ,  wₖ = p(x, zₖ) / q(zₖ|x),  zₖ ~ q(z|x)

    Burda, Grosse & Salakhutdinov (2016), Theorem 1: a lower bound in expectation, exact as
    K → ∞. Exactly K samples are drawn, in chunks: memory does not grow with K or with the batch
    beyond one number a sample of the examples in hand. Examples that are split over devices
    (`jvae.distributed.split_examples`) are worked on where they lie, with the same numbers.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key, or one for each example, [*batch]. Of one key, example i of a
        flattened batch of N has `jax.random.split(key, N)[i]`: with a part of those keys a part
        of a dataset has the estimates that it has in the whole.
      num_samples: K, the draws of z an example.

    Returns:
      `LogLikelihood(estimate, stderr, ess)`, each [*batch]: nats, nats and a number from 1 to K,
      K where q(z|x) is the posterior. `warn_if_unreliable` reads the last.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, keys are of another shape than the batch, or
        `num_samples` is below 1.
    """
    mesh, x = mesh_of(x), check_data(params, x)
    check_key(key, x.shape[: x.ndim - len(params.model.data_shape)])
    num_samples = check_count("num_samples", num_samples)
    return _importance_sampling(params, x, key, num_samples, mesh)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _importance_sampling(
    params: Params,
    x: Float[Array, "..."],
    key: Key[Array, "..."],
    num_samples: int,
    mesh: Mesh | None,
) -> LogLikelihood:
    def estimate(x: Array, key: PRNGKeyArray) -> LogLikelihood:
        q = posterior(params, x)
        log_w = map_in_chunks(
            lambda keys: draw(params, q, x, keys)[1].weight,
            jax.random.split(key, num_samples),
            rows_at_once(params),
        )
        return from_log_weights(log_w)

    return map_examples(estimate, params, x, key, rows_per_example=num_samples, mesh=mesh)


def log_likelihood(
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: Key[Array, "..."],
    *,
    num_samples: int = 5000,
) -> Float[Array, "*batch"]:
    """The estimate of log p(x) alone, of `jvae.evaluation.importance_sampling`.

    Burda, Grosse & Salakhutdinov (2016), Theorem 1: a lower bound in expectation.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: as `importance_sampling` takes it.
      num_samples: K, the draws of z an example.

    Returns:
      [*batch] nats.

    Raises:
      TypeError: as `importance_sampling`.
      ValueError: as `importance_sampling`.
    """
    return importance_sampling(params, x, key, num_samples=num_samples).estimate
