"""The paper's SGVB estimators of the ELBO, and the ELBO with another weight on its KL."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jvae.checks import check_count
from jvae.estimators.sampling import Bound, reparameterised
from jvae.models import Params, prior


def closed_form(method: str, q: Any, p: Any) -> Array:
    """`q.method(p)`, such as the KL; TypeError where q has none."""
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
    logs = reparameterised(params, x, key, num_samples).logs
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
    q, _, logs = reparameterised(params, x, key, num_samples)
    return logs.px_z.mean(axis=0) - closed_form("kl", q, prior(params))


elbo = sgvb_b


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
    q, _, logs = reparameterised(params, x, key, num_samples)
    return logs.px_z.mean(axis=0) - beta * closed_form("kl", q, prior(params))


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
    q, _, logs = reparameterised(params, x, key, num_samples)
    kl = jnp.maximum(free_nats, closed_form("kl_per_dim", q, prior(params)))
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
