"""The importance-weighted bound, and what mixes or nests it to train the encoder better."""

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jvae.checks import check_between, check_count
from jvae.estimators.sampling import (
    draw_each,
    encode,
    log_mean_exp,
    reparameterised,
    stopped,
    with_gradient_of,
)
from jvae.models import Params


def iwae(
    params: Params, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray, *, num_samples: int = 5
) -> Float[Array, "*batch"]:
    """The importance-weighted bound, at least the ELBO and non-decreasing in K in expectation.

        log 1/K Σₖ wₖ,  wₖ = p(x, zₖ) / q(zₖ|x)

    Burda, Grosse & Salakhutdinov (2016), eq. 8. With K = 1 it is `sgvb_a`.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      num_samples: K, the draws of z an example.

    Returns:
      [*batch] nats.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, or `num_samples` is below 1.
    """
    return log_mean_exp(reparameterised(params, x, key, num_samples).logs.weight)


def miwae(
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    *,
    num_samples: int = 5,
    num_outer: int = 5,
) -> Float[Array, "*batch"]:
    """The mean of M independent importance-weighted bounds of K draws each (MIWAE).

        1/M Σₘ log 1/K Σₖ wₘₖ,  wₘₖ = p(x, zₘₖ) / q(zₘₖ|x)

    Rainforth et al. (2018). A lower bound as tight as `iwae` with K draws, at M K draws: the
    encoder's signal-to-noise ratio, which falls with K, rises with √M. With M = 1 it is `iwae`,
    with K = 1 `sgvb_a`.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      num_samples: K, the draws of z in each inner bound.
      num_outer: M, the inner bounds an example.

    Returns:
      [*batch] nats.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, or a number of draws is below 1.
    """
    total = _total(num_samples, num_outer)
    return _nested(reparameterised(params, x, key, total).logs.weight, num_outer)


def ciwae(
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    *,
    num_samples: int = 5,
    beta: float | int | Float[Array, ""] = 0.5,
) -> Float[Array, "*batch"]:
    """A combination of the ELBO and the importance-weighted bound of the same draws (CIWAE).

        β 1/K Σₖ log wₖ + (1 - β) log 1/K Σₖ wₖ

    Rainforth et al. (2018). A lower bound; β = 0 is `iwae`, β = 1 `sgvb_a`.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      num_samples: K, the draws of z an example.
      beta: β in [0, 1], the share of the ELBO; may be traced, for a schedule.

    Returns:
      [*batch] nats.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, `num_samples` is below 1, or `beta` is not in
        [0, 1].
    """
    check_between("beta", beta, 0.0, 1.0)
    log_w = reparameterised(params, x, key, num_samples).logs.weight
    return beta * log_w.mean(axis=0) + (1 - beta) * log_mean_exp(log_w)


def piwae(
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    *,
    num_samples: int = 5,
    num_outer: int = 5,
) -> Float[Array, "*batch"]:
    """The importance-weighted bound of M K draws, whose encoder learns by `miwae` (PIWAE).

        value and θ-gradient: log 1/MK Σₘₖ wₘₖ;  φ-gradient: 1/M Σₘ log 1/K Σₖ wₘₖ

    Rainforth et al. (2018): the tighter bound for the generative weights θ, the one of less noise
    for the encoder's φ, from the same draws. With M = 1 it is `iwae`.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      num_samples: K, the draws of z in each of the bounds that the encoder learns by.
      num_outer: M, the number of those bounds.

    Returns:
      [*batch] nats, the value of `iwae` with M K draws.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, or a number of draws is below 1.
    """
    q, x, keys = encode(params, x, key, _total(num_samples, num_outer))
    theta_log_w = draw_each(params, stopped(q), x, keys)[1].weight
    phi_log_w = draw_each(stopped(params), q, x, keys)[1].weight
    value = log_mean_exp(theta_log_w)
    return with_gradient_of(value, value + _nested(phi_log_w, num_outer))


def _total(num_samples: int, num_outer: int) -> int:
    return check_count("num_samples", num_samples) * check_count("num_outer", num_outer)


def _nested(log_w: Float[Array, "num *batch"], num_outer: int) -> Float[Array, "*batch"]:
    """The mean over `num_outer` groups of each group's log mean weight."""
    groups = log_w.reshape(num_outer, len(log_w) // num_outer, *log_w.shape[1:])
    return jax.vmap(log_mean_exp)(groups).mean(axis=0)
