"""Score-function gradients for q: they need no reparameterisation, so that z may be discrete.

    ∇φ E_q[f(z)] = E_q[f(z) ∇φ log q(z|x)]

A baseline that does not depend on z may be taken from f(z) at no bias, since the score has mean
zero; what it saves is variance.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jvae.estimators.sampling import fixed, log_mean_exp, with_gradient_of
from jvae.models import Params


def score_function(
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    *,
    num_samples: int = 1,
    baseline: float | int | Float[Array | np.ndarray, "..."] | Literal["leave_one_out"] = 0.0,
) -> Float[Array, "*batch"]:
    """`sgvb_a` with the naive Monte Carlo gradient for the encoder, with or without a baseline.

        1/L Σₗ log wₗ,  wₗ = p(x, zₗ) / q(zₗ|x);  φ-gradient 1/L Σₗ (log wₗ - bₗ) ∇φ log q(zₗ|x)

    Paisley, Blei & Jordan (2012); Kingma & Welling (2014), Section 2.2. Unbiased for the ELBO's
    gradient whatever the baseline; the θ-gradient is the usual one.

    A moving average is state, which stays with the caller: `jvae.learners.moving_baseline` keeps
    one.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      num_samples: L, the draws of z an example.
      baseline: b, a number or an array [] or [*batch] that does not depend on these draws, may be
        traced, and gets no gradient; or "leave_one_out", the mean of log w over the other draws
        of the example.

    Returns:
      [*batch] nats, the value of `sgvb_a`.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, `num_samples` is below 1, or below 2 for
        "leave_one_out", or `baseline` is of another shape or name.
    """
    logs = fixed(params, x, key, num_samples).logs
    log_w = jax.lax.stop_gradient(logs.weight)
    if isinstance(baseline, str):
        if baseline != "leave_one_out":
            raise ValueError(
                f'baseline must be a number, an array or "leave_one_out", got {baseline!r}'
            )
        _check_several(num_samples, 'with baseline="leave_one_out"')
        centre = _mean_of_others(log_w)
    else:
        given, batch = jnp.asarray(baseline), log_w.shape[1:]
        if given.shape not in ((), batch):
            raise ValueError(f"baseline must have shape () or {batch}, got {given.shape}")
        centre = jax.lax.stop_gradient(jnp.broadcast_to(given, batch))[None]
    surrogate = logs.joint + (log_w - centre) * logs.qz_x
    return with_gradient_of(log_w.mean(axis=0), surrogate.mean(axis=0))


def vimco(
    params: Params, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray, *, num_samples: int = 5
) -> Float[Array, "*batch"]:
    """`iwae` with a score-function gradient whose baselines are the other draws (VIMCO).

        L̂ = log 1/K Σₖ wₖ;  φ-gradient Σₖ (L̂ - L̂₋ₖ) ∇φ log q(zₖ|x) + Σₖ w̃ₖ ∇φ log wₖ

    Mnih & Rezende (2016): L̂₋ₖ is L̂ with wₖ replaced by the geometric mean of the other weights.
    Unbiased for the gradient of the importance-weighted bound; the θ-gradient is that of `iwae`.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      num_samples: K, the draws of z an example, at least 2.

    Returns:
      [*batch] nats, the value of `iwae`.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, or `num_samples` is below 2.
    """
    logs = fixed(params, x, key, num_samples).logs
    _check_several(num_samples, "for a baseline of the other draws")
    bound = log_mean_exp(logs.weight)
    log_w = jax.lax.stop_gradient(logs.weight)
    # A difference of large logs would round.
    log_w = log_w - log_w.max(axis=0, keepdims=True)
    replaced = jnp.logaddexp(_log_sum_of_others(log_w), _mean_of_others(log_w))
    signal = jax.nn.logsumexp(log_w, axis=0, keepdims=True) - replaced
    return with_gradient_of(bound, (signal * logs.qz_x).sum(axis=0) + bound)


def _log_sum_of_others(log_w: Float[Array, "num *batch"]) -> Float[Array, "num *batch"]:
    """For every k the log of Σⱼ≠ₖ wⱼ, by sums from both ends: no difference to lose digits in."""
    none = jnp.full_like(log_w[:1], -jnp.inf)
    before = jnp.concatenate([none, jax.lax.cumlogsumexp(log_w[:-1])])
    after = jnp.concatenate([jax.lax.cumlogsumexp(log_w[1:], reverse=True), none])
    return jnp.logaddexp(before, after)


def _mean_of_others(log_w: Float[Array, "num *batch"]) -> Float[Array, "num *batch"]:
    return (log_w.sum(axis=0, keepdims=True) - log_w) / (len(log_w) - 1)


def _check_several(num_samples: int, why: str) -> None:
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2 {why}, got {num_samples}")
