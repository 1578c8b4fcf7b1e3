"""What keeps the ELBO from log p(x): the family of q, or the encoder."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jvae.checks import check_count, check_key
from jvae.chunks import map_in_chunks
from jvae.estimators.sampling import LogDensities, draw, joint_log_densities
from jvae.evaluation.examples import map_examples
from jvae.models import Params, check_data, posterior

# Draws of z at once for one example: those of a step of the ascent.
_DRAWS = 16
_LEARNING_RATE = 0.05


class InferenceGap(NamedTuple):
    """log p(x) - ELBO in two parts.

    Attributes:
      approximation: [*batch] nats, what the best q of the family leaves.
      amortisation: [*batch] nats, what the encoder's q is worse than the best. It is the
        amortisation gap of Cremer et al. within the encoder's own family alone; beside the best q
        of a wider one it also holds what the encoder's family lacks.
    """

    approximation: Float[Array, "*batch"]
    amortisation: Float[Array, "*batch"]


def encoder_family(q: Any) -> Any:
    """The encoder's own family: q itself, to begin with."""
    return q


def inference_gap(
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    log_px: Float[Array, "*batch"] | Float[np.ndarray, "*batch"],
    *,
    family: Callable[[Any], Any] = encoder_family,
    num_steps: int = 1000,
    num_samples: int = 1000,
) -> InferenceGap:
    """Split log p(x) - ELBO into the approximation gap and the amortisation gap.

        log p(x) - ELBO(q*)  and  ELBO(q*) - ELBO(q(z|x)),  q* = argmax of a family

    Cremer, Li & Duvenaud (2018). q* is found for every example by ascending its ELBO from
    the encoder's q: Adam with a step size that falls to 0, along the path derivative of Roeder, Wu
    & Duvenaud (2017), which has no noise where q* is the posterior. Both ELBOs are then means over
    the same fresh noise.

    Two errors of the approximation gap go opposite ways. The ascent never ends quite at the top,
    so that with an exact log p(x) the gap is in expectation not too small. But estimates of
    log p(x) by importance sampling and AIS are too low in expectation, and the gap is too small by
    as much; it may be below 0, which no true gap is. Look at the effective sample size of `log_px`
    (`warn_if_unreliable`) and at the sign of the means (`warn_if_negative`).

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key; each example has a key of its own.
      log_px: [*batch] nats, an estimate of log p(x), such as that of `ais`.
      family: from the encoder's q(z|x) of one example to the first q of the family, whose leaves
        are ascended: `encoder_family`, `full_covariance`, or your own.
      num_steps: steps of the ascent, of 16 draws each.
      num_samples: draws of z for each of the two ELBOs.

    Returns:
      `InferenceGap(approximation, amortisation)`, each [*batch] nats.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, `log_px` another shape than the batch, or a count
        is below 1.
    """
    check_key(key)
    x = check_data(params, x)
    batch = x.shape[: x.ndim - len(params.model.data_shape)]
    log_px = jnp.asarray(log_px)
    if log_px.shape != batch:
        raise ValueError(f"log_px must have the shape {batch} of the batch, got {log_px.shape}")
    num_steps = check_count("num_steps", num_steps)
    num_samples = check_count("num_samples", num_samples)
    best, encoders = _elbos(params, x, key, family, num_steps, num_samples)
    return InferenceGap(approximation=log_px - best, amortisation=best - encoders)


def warn_if_negative(gap: InferenceGap, *, family: str = "the encoder's family") -> None:
    """Warn where a mean gap is below 0, which no true gap is.

    For use outside `jax.jit`, on results.

    Args:
      gap: from `inference_gap`, of one example or more.
      family: what to call the family of q*.

    Warns:
      UserWarning: for each of the two gaps whose mean is below 0 or no number: what it is, with
        its standard error over examples, and what makes it so.
    """
    reasons = {
        "approximation": "log_px is too low, as estimates of it are in expectation: take one of "
        "more samples or temperatures",
        "amortisation": "the ascent ended below where it began: take more num_steps",
    }
    for name, values in gap._asdict().items():
        array = np.ravel(np.asarray(values, np.float64))
        if not array.mean() >= 0:
            error = array.std(ddof=1) / math.sqrt(array.size) if array.size > 1 else math.inf
            warnings.warn(
                f"the mean {name} gap of {family} is {array.mean():.3g} ± {error:.2g} nats, and "
                f"no true gap is below 0: {reasons[name]}",
                stacklevel=2,
            )


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _elbos(
    params: Params,
    x: Array,
    key: PRNGKeyArray,
    family: Callable[[Any], Any],
    num_steps: int,
    num_samples: int,
) -> tuple[Array, Array]:
    """The ELBO of the best q of the family, and of the encoder's."""
    schedule = optax.cosine_decay_schedule(_LEARNING_RATE, num_steps)
    optimizer = optax.adam(schedule)

    def both(x: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        ascent_key, elbo_key = jax.random.split(key)

        def negative_elbo(q: Any, key: PRNGKeyArray) -> Array:
            def weight(key: PRNGKeyArray) -> Array:
                z = q.sample(key)
                log_qz_x = jax.lax.stop_gradient(q).log_prob(z)
                return LogDensities(*joint_log_densities(params, x, z), log_qz_x).weight

            return -jax.vmap(weight)(jax.random.split(key, _DRAWS)).mean()

        def step(carry: tuple[Any, Any], key: PRNGKeyArray) -> tuple[tuple[Any, Any], None]:
            q, state = carry
            updates, state = optimizer.update(jax.grad(negative_elbo)(q, key), state)
            return (optax.apply_updates(q, updates), state), None

        def elbo(q: Any) -> Array:
            keys = jax.random.split(elbo_key, num_samples)
            return map_in_chunks(
                lambda some: draw(params, q, x, some)[1].weight, keys, _DRAWS
            ).mean()

        q = posterior(params, x)
        first = family(q)
        keys = jax.random.split(ascent_key, num_steps)
        (best, _), _ = jax.lax.scan(step, (first, optimizer.init(first)), keys)
        return elbo(best), elbo(q)

    return map_examples(both, params, x, key, rows_per_example=_DRAWS)
