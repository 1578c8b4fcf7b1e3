"""An estimate of log p(x) with what it says of its own error."""

import math
import warnings
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jvae.estimators import log_mean_exp

_MORE_SAMPLES = "take more samples, or annealed importance sampling (jvae.evaluation.ais)"
# What gives each estimator a larger effective sample.
_REMEDIES = {
    "importance_sampling": _MORE_SAMPLES,
    "ais": "take more temperatures, or more chains",
    "app_d": _MORE_SAMPLES,
}


class LogLikelihood(NamedTuple):
    """An estimate of log p(x) for every example.

    Attributes:
      estimate: [*batch] nats.
      stderr: [*batch] nats, its standard error; infinite where one weight alone tells of none.
      ess: [*batch], the effective sample size: how many equal weights would do as well.
    """

    estimate: Float[Array, "*batch"]
    stderr: Float[Array, "*batch"]
    ess: Float[Array, "*batch"]


def from_log_weights(log_w: Float[Array, "num *batch"]) -> LogLikelihood:
    """The log of the mean weight over the first axis, with its error and effective sample size.

        log 1/K Σₖ wₖ,  standard error sd(w) / (√K mean(w)),  ESS (Σ w)² / Σ w²

    The standard error is that of the delta method: it is honest where ESS is large, and too
    small where a few weights outweigh all the others. ESS as in Kong (1992).

    Args:
      log_w: [num, *batch] logs of weights, independent of each other along the first axis.

    Returns:
      `LogLikelihood`, each [*batch]. Where every weight is zero: -∞, ∞ and 0.
    """
    num = log_w.shape[0]
    top = log_w.max(axis=0, keepdims=True)
    w = jnp.exp(log_w - jnp.where(jnp.isneginf(top), 0, top))  # the largest is 1
    total = w.sum(axis=0)
    none = total == 0
    total = jnp.where(none, 1, total)
    deviation = w * (num / total)[None] - 1
    # As a float: of 46,342 samples on, the product is no int32.
    error = jnp.sqrt(jnp.square(deviation).sum(axis=0) / float(num * max(num - 1, 1)))
    return LogLikelihood(
        estimate=log_mean_exp(log_w),
        stderr=jnp.where(none | (num == 1), jnp.inf, error),
        ess=jnp.where(none, 0, jnp.square(total) / jnp.maximum(jnp.square(w).sum(axis=0), 1)),
    )


def warn_if_unreliable(
    result: LogLikelihood,
    *,
    min_ess: float | int = 5.0,
    estimator: Literal["importance_sampling", "ais", "app_d"] = "importance_sampling",
) -> None:
    """Warn where the effective sample size says that an estimate means little.

    The squared standard error is 1/ESS - 1/K: with an ESS below 5 it may pass 0.4 nats by its
    own account, which is then the least of it. For use outside `jax.jit`, on results.

    Args:
      result: from `importance_sampling`, `ais` or `app_d`.
      min_ess: the effective sample size to ask for.
      estimator: the name of the function that `result` is from, for what to do about it.

    Raises:
      ValueError: `estimator` is none of the three.

    Warns:
      UserWarning: an example's ESS is below `min_ess` or no number; says how many are.
    """
    if estimator not in _REMEDIES:
        raise ValueError(f"estimator must be one of {', '.join(_REMEDIES)}, got {estimator!r}")
    ess = np.ravel(np.asarray(result.ess))
    few = ~(ess >= min_ess)
    if few.any():
        least = math.nan if np.isnan(ess).any() else ess.min()
        warnings.warn(
            f"the estimates of log p(x) of {few.sum()} of {ess.size} examples rest on fewer than "
            f"{min_ess:g} effective samples (the least {least:.3g}): {_REMEDIES[estimator]}",
            stacklevel=2,
        )
