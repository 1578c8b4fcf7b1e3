"""log p(x) from samples of the posterior: the estimator of the paper's Appendix D."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jvae.checks import check_count, check_key
from jvae.estimators.sampling import joint_log_densities
from jvae.evaluation import hmc
from jvae.evaluation.estimates import LogLikelihood, from_log_weights
from jvae.evaluation.examples import map_examples
from jvae.evaluation.gaussians import FullGaussian
from jvae.models import Params, check_data, prior

_ACCEPTANCE = 0.9
_MOST_LATENTS = 4


def app_d(
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    *,
    num_samples: int = 50,
    num_leapfrog: int = 4,
    num_transitions: int = 200,
) -> LogLikelihood:
    """Estimate log p(x) by the estimator of Kingma & Welling (2014), App. D.

        p(x) ≈ (1/L Σₗ q(zₗ) / (p(zₗ) p(x|zₗ)))⁻¹,  zₗ ~ p(z|x)

    Of exact and independent samples of p(z|x) the mean in brackets is unbiased for 1 / p(x), so
    that the estimate is an upper bound in expectation, for any density q that does not depend on
    them. Here q is the Gaussian with the mean and the full covariance of L samples, and the zₗ are
    L others. Every one of these 2 L samples is the end of an HMC chain of its own from the prior. A
    chain makes `num_transitions` transitions while one step size for all 2 L is tuned to 90 %
    acceptance by dual averaging, and as many more with that step size.

    So neither holds exactly. Chains of finite length have not quite left the prior, and all 2 L
    depend on each other through the step size that they share: the estimate is no certain bound,
    and its standard error knows of neither. Both vanish as `num_transitions` grows, since a chain
    with a fixed step size forgets where it began; between modes far apart that can take longer than
    anyone waits, and then the estimate is far too low.

    It is for few latents: as a Gaussian misses more of p(z|x), or as its covariance is to be had
    from too few samples, the weights vary without limit.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key; each example has a key of its own.
      num_samples: L, more than there are latents.
      num_leapfrog: leapfrog steps of a transition.
      num_transitions: transitions with a step size being tuned, and as many with it tuned.

    Returns:
      `LogLikelihood(estimate, stderr, ess)`, each [*batch]: nats, nats and a number from 1 to L.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, a count is below 1, or there are not more samples
        than latents.

    Warns:
      UserWarning: the model has more than 4 latents.
    """
    check_key(key)
    x = check_data(params, x)
    num_samples = check_count("num_samples", num_samples)
    z = jax.eval_shape(lambda p: prior(p).sample(jax.random.key(0)), params)
    latents = sum(leaf.size for leaf in jax.tree.leaves(z))
    if num_samples <= latents:
        raise ValueError(
            f"num_samples must be more than the {latents} latents, to have a covariance: got "
            f"{num_samples}"
        )
    if latents > _MOST_LATENTS:
        warnings.warn(
            f"the estimator of App. D means little with more than {_MOST_LATENTS} latents, and "
            f"this model has {latents}: jvae.evaluation.ais has no such limit",
            stacklevel=2,
        )
    return _app_d(
        params,
        x,
        key,
        num_samples,
        check_count("num_leapfrog", num_leapfrog),
        check_count("num_transitions", num_transitions),
    )


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _app_d(
    params: Params,
    x: Array,
    key: PRNGKeyArray,
    num_samples: int,
    num_leapfrog: int,
    num_transitions: int,
) -> LogLikelihood:
    def estimate(x: Array, key: PRNGKeyArray) -> LogLikelihood:
        start_key, chain_key = jax.random.split(key)
        start = jax.vmap(prior(params).sample)(jax.random.split(start_key, 2 * num_samples))
        unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], start))[1]

        def log_joint(z: Array) -> Array:
            log_px_z, log_pz = joint_log_densities(params, x, unravel(z))
            return log_px_z + log_pz

        z = jax.vmap(lambda tree: ravel_pytree(tree)[0])(start)
        z, _ = hmc_samples(log_joint, z, chain_key, num_leapfrog, num_transitions)
        fitted, fresh = jnp.split(z, 2)
        q = FullGaussian.fit(fitted)
        inverse = from_log_weights(jax.vmap(lambda z: q.log_prob(z) - log_joint(z))(fresh))
        return inverse._replace(estimate=-inverse.estimate)

    return map_examples(estimate, params, x, key, rows_per_example=2 * num_samples)


def hmc_samples(
    log_density: Callable[[Array], Array],
    z: Float[Array, "num dim"],
    key: PRNGKeyArray,
    num_leapfrog: int,
    num_transitions: int,
) -> tuple[Float[Array, "num dim"], Float[Array, "transitions"]]:
    """The ends of HMC chains from every z, whose common step size dual averaging tunes first.

    Hoffman & Gelman (2014), Section 3.2, to an acceptance of 90 % as in Kingma & Welling (2014),
    App. E, over `num_transitions` transitions; the step size is then fixed for as many more.

    Returns:
      The samples [num, dim], and the chains' mean acceptance at each transition with the step
      size fixed, [num_transitions].
    """
    from blackjax.adaptation.step_size import dual_averaging_adaptation  # as in `hmc`

    start_tuning, tune, tuned_step_size = dual_averaging_adaptation(_ACCEPTANCE)

    def move(z: Array, key: PRNGKeyArray, step_size: Array) -> tuple[Array, Array]:
        def one(z: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
            z, _, acceptance = hmc.transition(
                lambda z: (log_density(z), None), z, key, step_size, num_leapfrog
            )
            return z, acceptance

        z, acceptance = jax.vmap(one)(z, jax.random.split(key, z.shape[0]))
        return z, acceptance.mean()

    def tuning(carry: tuple[Array, Any], key: PRNGKeyArray) -> tuple[tuple[Array, Any], None]:
        z, state = carry
        z, acceptance = move(z, key, jnp.exp(state.log_step_size))
        tuned = tune(state, acceptance)  # with jax_enable_x64 of wider types than it was given
        return (z, jax.tree.map(lambda new, old: new.astype(old.dtype), tuned, state)), None

    tuning_keys, tuned_keys = jnp.split(jax.random.split(key, 2 * num_transitions), 2)
    untuned = jax.tree.map(jnp.asarray, start_tuning(1.0))
    (z, state), _ = jax.lax.scan(tuning, (z, untuned), tuning_keys)
    step_size = tuned_step_size(state)
    return jax.lax.scan(lambda z, key: move(z, key, step_size), z, tuned_keys)
