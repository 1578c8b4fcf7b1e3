"""Bounds from powers of the importance weights w = p(x, z) / q(z|x): Rényi, χ, thermodynamic."""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jvae.checks import check_between, check_count
from jvae.estimators.sampling import fixed, log_power_mean, reparameterised, with_gradient_of
from jvae.models import Params


def renyi(
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    *,
    num_samples: int = 5,
    alpha: float | int | Float[Array, ""] = 0.5,
) -> Float[Array, "*batch"]:
    """The variational Rényi bound.

        1/(1 - α) log 1/K Σₖ wₖ^(1 - α),  wₖ = p(x, zₖ) / q(zₖ|x)

    Li & Turner (2016). α = 0 is `iwae`, α = 1 (the limit) `sgvb_a`; so is K = 1 for every α. In
    expectation a lower bound for α ≥ 0, not increasing in α. For α < 0 the bound itself is an
    upper one, of which the estimate falls short by an amount that vanishes only as K → ∞.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      num_samples: K, the draws of z an example.
      alpha: α, may be traced.

    Returns:
      [*batch] nats.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, `num_samples` is below 1, or `alpha` is not
        finite.
    """
    check_between("alpha", alpha, -math.inf)
    return log_power_mean(reparameterised(params, x, key, num_samples).logs.weight, 1 - alpha)


def cubo(
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    *,
    num_samples: int = 5,
    order: float | int | Float[Array, ""] = 2.0,
) -> Float[Array, "*batch"]:
    """The χ upper bound on log p(x), CUBO: an encoder is trained to make it small.

        1/n log 1/K Σₖ wₖⁿ,  wₖ = p(x, zₖ) / q(zₖ|x)

    Dieng et al. (2017): 1/n log E_q[wⁿ] is at least log p(x) for n ≥ 1, does not decrease in n,
    and is infinite where q has the thinner tails. This Monte Carlo estimate of it is biased low,
    so that with few draws it may lie below log p(x); so is its gradient biased. Both biases vanish
    as K → ∞. n = 1 is `iwae`; `renyi` with α = 1 - n is the same function.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      num_samples: K, the draws of z an example.
      order: n ≥ 1, may be traced.

    Returns:
      [*batch] nats.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, `num_samples` is below 1, or `order` is below 1
        or not finite.
    """
    check_between("order", order, 1.0)
    return log_power_mean(reparameterised(params, x, key, num_samples).logs.weight, order)


def tvo(
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    *,
    num_samples: int = 5,
    partition: int | Iterable[float | int] = 5,
) -> Float[Array, "*batch"]:
    """The thermodynamic variational objective: a left Riemann sum of log p(x)'s path integral.

        log p(x) = ∫₀¹ E_πβ[log w] dβ ≥ Σᵢ (βᵢ₊₁ - βᵢ) E_πβᵢ[log w],  πβ ∝ q(z|x) w^β

    Masrani, Le & Wood (2019). The expectations are taken with self-normalised weights w^β of the
    same K draws of q. At every draw the sum is at most `iwae` of these draws, and grows towards it
    as the partition is refined; with the one point 0, or with K = 1, it is `sgvb_a`.

    The gradient is the paper's covariance estimator, Σₖ w̃ₖ ∇log wₖ + Cov_w̃(log w, ∇log q(z|x) w^β)
    with z fixed, so that z need not be reparameterised. It is unbiased for θ, and for φ as K → ∞.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      num_samples: K, the draws of z an example.
      partition: the points β in [0, 1] where the integrand is taken, or their number, for points
        0, 1/P, …, (P - 1)/P. The ends 0 and 1 belong to every partition.

    Returns:
      [*batch] nats.

    Raises:
      TypeError: `x` is not floating point, `key` is no typed key, or `partition` neither an int
        nor numbers.
      ValueError: `x` has a wrong trailing shape, `num_samples` or the number of points is below
        1, or a point is not in [0, 1].
    """
    points = _points(partition)
    betas, widths = jnp.asarray(points[:-1], jnp.float32), jnp.asarray(np.diff(points), jnp.float32)
    logs = fixed(params, x, key, num_samples).logs
    log_w = logs.weight

    def term(beta: Array) -> tuple[Array, Array]:
        """E_πβ[log w] and what has the gradient of its estimate, each [*batch]."""
        weights = jax.nn.softmax(beta * log_w, axis=0)  # its gradient is the w^β in the covariance
        mean = (weights * log_w).sum(axis=0)
        centred = jax.lax.stop_gradient(weights * (log_w - mean[None]))
        return mean, mean + (centred * logs.qz_x).sum(axis=0)

    value, surrogate = (jnp.tensordot(widths, terms, 1) for terms in jax.vmap(term)(betas))
    return with_gradient_of(value, surrogate)


def _points(partition: int | Iterable[float | int]) -> np.ndarray:
    """The partition's points in rising order, its ends among them."""
    if isinstance(partition, Iterable) and not isinstance(partition, str):
        points = list(partition)
    else:
        count = check_count("partition", partition)
        points = [i / count for i in range(count)]
    for point in points:
        check_between("partition", point, 0.0, 1.0)
    return np.unique([0.0, *points, 1.0])
