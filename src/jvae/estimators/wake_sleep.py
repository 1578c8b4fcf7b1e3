"""Reweighted wake-sleep: the generative model and the encoder each have an update of their own.

Each is a function to ascend. The wake updates look at data x, with draws of q(z|x) weighted
towards p(z|x); the sleep update looks at dreams (x, z) ~ p. z is a constant to all of them, and so
may be discrete. A sum of them trains both networks, such as

    wake_theta(params, x, key) + sleep_phi(params, x, other_key)

which with one sample is wake-sleep itself (Hinton et al., 1995).
"""

import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray, Shaped

from jvae.checks import check_count, check_key
from jvae.estimators.sampling import (
    fixed,
    log_mean_exp,
    normalised_weights,
    over_draws,
    stopped,
    with_gradient_of,
)
from jvae.models import Params, check_data, likelihood, posterior, prior


def rws(
    params: Params, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray, *, num_samples: int = 5
) -> Float[Array, "*batch"]:
    """`iwae` with the two wake-phase updates of reweighted wake-sleep, from the same draws.

        log 1/K Σₖ wₖ;  gradient Σₖ w̃ₖ (∇θ log p(x, zₖ) + ∇φ log q(zₖ|x)),  w̃ₖ = wₖ / Σⱼ wⱼ

    Bornschein & Bengio (2015). `wake_theta` and `wake_phi` together.

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
    logs = fixed(params, x, key, num_samples).logs
    weights = normalised_weights(logs.weight)
    surrogate = (weights * (logs.joint + logs.qz_x)).sum(axis=0)
    return with_gradient_of(log_mean_exp(logs.weight), surrogate)


def wake_theta(
    params: Params, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray, *, num_samples: int = 5
) -> Float[Array, "*batch"]:
    """The wake-phase update of the generative model: `iwae` with no gradient for the encoder.

        log 1/K Σₖ wₖ;  θ-gradient Σₖ w̃ₖ ∇θ log p(x, zₖ),  w̃ₖ = wₖ / Σⱼ wⱼ

    Bornschein & Bengio (2015), the wake phase p-update. Unbiased for the importance-weighted
    bound's θ-gradient.

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
    logs = fixed(params, x, key, num_samples).logs
    return log_mean_exp(logs.joint - jax.lax.stop_gradient(logs.qz_x))


def wake_phi(
    params: Params, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray, *, num_samples: int = 5
) -> Float[Array, "*batch"]:
    """The wake-phase update of the encoder, with no gradient for the generative model.

        Σₖ w̃ₖ log q(zₖ|x),  w̃ₖ = wₖ / Σⱼ wⱼ constant

    Bornschein & Bengio (2015), the wake phase q-update: an estimate of E_p(z|x)[log q(z|x)], whose
    gradient is that of -KL(p(z|x) ‖ q(z|x)), consistent as K → ∞. It bounds nothing.

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
    logs = fixed(params, x, key, num_samples).logs
    return (normalised_weights(logs.weight) * logs.qz_x).sum(axis=0)


def sleep_phi(
    params: Params, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray, *, num_samples: int = 1
) -> Float[Array, "*batch"]:
    """The sleep-phase update of the encoder, with no gradient for the generative model.

        1/L Σₗ log q(zₗ|xₗ),  zₗ ~ p(z), xₗ ~ p(x|zₗ)

    Hinton et al. (1995); Bornschein & Bengio (2015), the sleep phase q-update. Unbiased for the
    gradient of -E_p(x)[KL(p(z|x) ‖ q(z|x))]. It bounds nothing.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape], of which only the batch shape matters.
      key: a typed PRNG key.
      num_samples: L, the dreams in place of each example.

    Returns:
      [*batch] nats.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, or `num_samples` is below 1.
    """
    check_key(key)
    x = check_data(params, x)
    batch = x.shape[: x.ndim - len(params.model.data_shape)]

    def dream(key: PRNGKeyArray) -> tuple[Any, Array]:
        z_key, x_key = jax.random.split(key)
        z = jax.vmap(prior(params).sample)(jax.random.split(z_key, math.prod(batch)))
        return stopped(z), stopped(likelihood(params, z).sample(x_key))

    def log_qz_x(keys: Key[Array, "num"]) -> Array:
        z, dreams = jax.vmap(dream)(keys)
        return posterior(params, dreams).log_prob(z).reshape(len(keys), *batch)

    keys = jax.random.split(key, check_count("num_samples", num_samples))
    return over_draws(log_qz_x, keys, x).mean(axis=0)
