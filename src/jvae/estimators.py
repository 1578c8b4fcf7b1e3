"""Bounds on log p(x): functions `(params, x, key, *, num_samples=…) -> nats per example`.

Higher is better, and nothing is reduced over the batch. All share one sampling path: x is
encoded once, and the samples of z are a `vmap` over `jax.random.split(key, num_samples)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jvae.checks import check_count, check_key
from jvae.models import Params, check_data, likelihood, posterior, prior

Bound = Callable[..., Float[Array, "*batch"]]


class LogDensities(NamedTuple):
    """log p(x|z), log p(z) and log q(z|x) at one draw z ~ q(z|x), each [*batch] nats."""

    px_z: Float[Array, "*batch"]
    pz: Float[Array, "*batch"]
    qz_x: Float[Array, "*batch"]

    @property
    def weight(self) -> Float[Array, "*batch"]:
        """The log importance weight, log w = log p(x, z) - log q(z|x)."""
        return self.px_z + self.pz - self.qz_x


def log_densities(
    params: Params, q: Any, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray
) -> LogDensities:
    """The three log-densities at one reparameterised draw z ~ q, given q = q(z|x).

    Kingma & Welling (2014), eq. 4: z = g(ε, x) with ε from `key`.

    Args:
      params: from `jvae.init`.
      q: `jvae.posterior(params, x)`, so that many draws encode x once.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.

    Returns:
      `LogDensities`, each [*batch] nats.
    """
    z, log_qz_x = q.sample_and_log_prob(key)
    return LogDensities(
        px_z=likelihood(params, z).log_prob(x), pz=prior(params).log_prob(z), qz_x=log_qz_x
    )


def _sample_log_densities(
    params: Params, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray, num_samples: int
) -> tuple[Any, LogDensities]:
    """q(z|x), and the log-densities at `num_samples` draws, each [num_samples, *batch]."""
    check_key(key)
    keys = jax.random.split(key, check_count("num_samples", num_samples))
    q = posterior(params, x)
    x = check_data(params, x)
    return q, jax.vmap(lambda k: log_densities(params, q, x, k))(keys)


def _closed_form(method: str, q: Any, p: Any) -> Array:
    if not hasattr(q, method):
        raise TypeError(
            f"{type(q).__name__} has no closed-form {method}: use a bound that needs none, such as "
            "jvae.sgvb_a"
        )
    return getattr(q, method)(p)


def sgvb_a(
    params: Params, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray, *, num_samples: int = 1
) -> Float[Array, "*batch"]:
    """The generic SGVB estimator of the ELBO, all by Monte Carlo.

        1/L Σₗ log p(x, zₗ) - log q(zₗ|x),  zₗ = g(εₗ, x)

    Kingma & Welling (2014), eq. 6. It needs no closed-form KL, at the price of more variance
    than `sgvb_b` in most models.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      num_samples: L, the draws of z an example.

    Returns:
      [*batch] nats.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, or `num_samples` is below 1.
    """
    _, logs = _sample_log_densities(params, x, key, num_samples)
    return logs.weight.mean(axis=0)


def sgvb_b(
    params: Params, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray, *, num_samples: int = 1
) -> Float[Array, "*batch"]:
    """The SGVB estimator of the ELBO with its KL in closed form; `jvae.elbo` is this function.

        -KL(q(z|x) ‖ p(z)) + 1/L Σₗ log p(x|zₗ),  zₗ = g(εₗ, x)

    Kingma & Welling (2014), eq. 7; for a diagonal Gaussian q and a standard normal prior, eq. 10.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      num_samples: L, the draws of z an example.

    Returns:
      [*batch] nats.

    Raises:
      TypeError: `x` is not floating point, `key` is no typed key, or q and p(z) have no
        closed-form KL.
      ValueError: `x` has a wrong trailing shape, or `num_samples` is below 1.
    """
    q, logs = _sample_log_densities(params, x, key, num_samples)
    return logs.px_z.mean(axis=0) - _closed_form("kl", q, prior(params))


elbo = sgvb_b


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
    _, logs = _sample_log_densities(params, x, key, num_samples)
    return log_mean_exp(logs.weight)


def log_mean_exp(log_weights: Float[Array, "num *batch"]) -> Float[Array, "*batch"]:
    """The log of the mean weight over the first axis, log 1/K Σₖ wₖ, without overflow."""
    return jax.nn.logsumexp(log_weights, axis=0) - jnp.log(log_weights.shape[0])


def beta_elbo(
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    *,
    beta: float | int | Float[Array, ""],
    num_samples: int = 1,
) -> Float[Array, "*batch"]:
    """The ELBO with its KL weighted: -β KL(q(z|x) ‖ p(z)) + 1/L Σₗ log p(x|zₗ).

    Higgins et al. (2017), eq. 4. A bound on log p(x) only for β ≥ 1; β = 1 is `sgvb_b`. As a
    bound to train on: `functools.partial(jvae.beta_elbo, beta=4.0)`.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      beta: β, may be traced, for a schedule.
      num_samples: L, the draws of z an example.

    Returns:
      [*batch] nats.

    Raises:
      TypeError: as `sgvb_b`.
      ValueError: as `sgvb_b`.
    """
    q, logs = _sample_log_densities(params, x, key, num_samples)
    return logs.px_z.mean(axis=0) - beta * _closed_form("kl", q, prior(params))


def free_bits_elbo(
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    *,
    free_nats: float | int | Float[Array, ""],
    num_samples: int = 1,
) -> Float[Array, "*batch"]:
    """The ELBO with `free_nats` λ of every latent's KL free: -Σⱼ max(λ, KLⱼ) + reconstruction.

    Kingma et al. (2016), eq. 15, with one latent a group and the maximum taken for each example
    rather than for a minibatch's mean. At most the ELBO; λ = 0 is `sgvb_b`.

    Args:
      params: from `jvae.init`; q and p(z) are diagonal Gaussians.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      free_nats: λ, nats a latent dimension.
      num_samples: L, the draws of z an example.

    Returns:
      [*batch] nats.

    Raises:
      TypeError: as `sgvb_b`.
      ValueError: as `sgvb_b`.
    """
    q, logs = _sample_log_densities(params, x, key, num_samples)
    kl = jnp.maximum(free_nats, _closed_form("kl_per_dim", q, prior(params)))
    event_axes = tuple(range(logs.px_z.ndim - 1, kl.ndim))
    return logs.px_z.mean(axis=0) - kl.sum(axis=event_axes)


def minibatch_elbo(
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    *,
    dataset_size: int,
    bound: Bound = elbo,
) -> Float[Array, ""]:
    """The minibatch estimator of the bound on a whole dataset: N/M Σᵢ L̃(xᵢ).

    Kingma & Welling (2014), eq. 8. Unbiased for the sum of `bound` over the dataset when the
    minibatch is drawn uniformly.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape], M examples over all the batch axes.
      key: a typed PRNG key.
      dataset_size: N.
      bound: a function `(params, x, key) -> [*batch] nats`.

    Returns:
      A scalar in nats for the dataset, not for an example.

    Raises:
      TypeError: as `bound`, or `dataset_size` is no static int.
      ValueError: as `bound`, or `dataset_size` is below 1.
    """
    # As a float: N may exceed 32 bits.
    return float(check_count("dataset_size", dataset_size)) * bound(params, x, key).mean()
