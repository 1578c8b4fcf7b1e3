"""Path derivatives: gradients for q from the movement of z alone, its score left out.

The score has mean zero in the ELBO's gradient, and can be turned into movement in that of the
importance-weighted bound. Where q is the posterior, nothing remains to be noisy.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jvae.estimators.sampling import (
    LogDensities,
    joint_log_densities,
    log_mean_exp,
    normalised_weights,
    over_draws,
    reparameterised,
    stopped,
    with_gradient_of,
)
from jvae.models import Params, check_data


def stl(
    params: Params, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray, *, num_samples: int = 1
) -> Float[Array, "*batch"]:
    """`sgvb_a` with the path derivative of the ELBO: sticking the landing.

        1/L Σₗ log p(x, zₗ) - log q(zₗ|x),  differentiated with q's parameters constant in log q

    Roeder, Wu & Duvenaud (2017), Section 3. The gradient is unbiased and, where q(z|x) is p(z|x),
    exactly zero for the encoder at every draw. z must be reparameterised.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      num_samples: L, the draws of z an example.

    Returns:
      [*batch] nats, the value of `sgvb_a`.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, or `num_samples` is below 1.
    """
    q, z, logs = reparameterised(params, x, key, num_samples)
    log_qz_x = with_gradient_of(logs.qz_x, jax.vmap(stopped(q).log_prob)(z))
    return logs._replace(qz_x=log_qz_x).weight.mean(axis=0)


def dreg(
    params: Params, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray, *, num_samples: int = 5
) -> Float[Array, "*batch"]:
    """`iwae` with the doubly reparameterised gradient for the encoder.

        log 1/K Σₖ wₖ;  φ-gradient Σₖ w̃ₖ² ∂log wₖ/∂zₖ ∂zₖ/∂φ,  w̃ₖ = wₖ / Σⱼ wⱼ

    Tucker et al. (2019): value and θ-gradient are those of `iwae`; the φ-gradient is unbiased for
    the same bound, and its signal-to-noise ratio does not fall with K. With K = 1 it is `stl`.
    z must be reparameterised.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      num_samples: K, the draws of z an example.

    Returns:
      [*batch] nats, the value of `iwae`.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, or `num_samples` is below 1.
    """
    q, z, logs = reparameterised(params, x, key, num_samples)
    weights = normalised_weights(logs.weight)
    # The sum below gives each path one factor w̃ₖ, this the other.
    z = jax.tree.map(lambda leaf: _scale_gradient(leaf, _like(weights, leaf)), z)
    constant_q, x = stopped(q), check_data(params, x)

    def log_weights(z: Any) -> Array:
        log_qz_x = jax.vmap(constant_q.log_prob)(z)
        return LogDensities(*joint_log_densities(params, x, z), log_qz_x).weight

    log_w = over_draws(log_weights, z, x)
    return with_gradient_of(log_mean_exp(logs.weight), (weights * log_w).sum(axis=0))


# Not sg(z) + scale (z - sg(z)): with z itself, the compiler sees that both log w are one.
@jax.custom_jvp
def _scale_gradient(z: Array, scale: Array) -> Array:
    """z, with `scale` times its derivative; `scale` is a constant."""
    del scale
    return z


_scale_gradient.defjvps(lambda tangent, _, z, scale: scale * tangent, None)


def _like(weights: Array, leaf: Array) -> Array:
    """[num, *batch] with axes of size 1 for the event of `leaf`."""
    return weights.reshape(*weights.shape, *(1,) * (leaf.ndim - weights.ndim))
