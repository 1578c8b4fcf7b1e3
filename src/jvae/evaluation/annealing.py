"""log p(x) by annealed importance sampling, and the sandwich of bidirectional Monte Carlo.

Both anneal along the geometric path from a start s(z) to p(x, z),

    log f_β(z) = log s(z) + β r(z),  r(z) = log p(x, z) - log s(z),  β from 0 to 1.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jvae.checks import check_count, check_key
from jvae.chunks import map_in_chunks
from jvae.estimators import log_mean_exp
from jvae.estimators.sampling import joint_log_densities
from jvae.evaluation import hmc
from jvae.evaluation.estimates import LogLikelihood, from_log_weights
from jvae.evaluation.examples import map_examples, rows_at_once
from jvae.models import Params, check_data, likelihood, prior

# From (params, x) to the distribution s(z) that the path begins at, as `jvae.posterior` is.
Start = Callable[[Params, Array], Any]
Betas = Float[np.ndarray, "temperatures"] | Float[Array, "temperatures"] | Sequence[float]
Schedule = Callable[[int], Betas]
# From (β, z) to log f_β(z), and r(z) beside it.
_Path = Callable[[Array, Any], tuple[Array, Array]]

# The acceptance that gives HMC the most for its cost: Beskos et al. (2013).
_ACCEPTANCE = 0.65
# Step sizes are found by a few chains of their own, which first find that of the path's start.
_PILOT_CHAINS = 4
_PILOT_WARMUP = 50
_PILOT_GAIN = 0.5


class Sandwich(NamedTuple):
    """Stochastic bounds on log p(x): E[lower] ≤ log p(x) ≤ E[upper].

    Attributes:
      lower: [num_examples] nats.
      upper: [num_examples] nats.
    """

    lower: Float[Array, "num_examples"]
    upper: Float[Array, "num_examples"]


class _Settings(NamedTuple):
    """What is static of a path and its chains."""

    num_chains: int
    num_leapfrog: int
    start: Start


def prior_start(params: Params, x: Float[Array, "..."]) -> Any:
    """The prior p(z) as the start of a path, whatever x [*data_shape] is.

    `jvae.posterior` is another start.
    """
    return prior(params)


def linear_schedule(num_temperatures: int) -> Float[np.ndarray, "temperatures"]:
    """βₜ = t / T for t = 0, …, T: [T + 1].

    Raises:
      TypeError: `num_temperatures` is no static int.
      ValueError: it is below 1.
    """
    T = check_count("num_temperatures", num_temperatures)
    return np.linspace(0.0, 1.0, T + 1, dtype=np.float32)


def sigmoid_schedule(num_temperatures: int) -> Float[np.ndarray, "temperatures"]:
    """The logistic function of t from -4 to 4, scaled to go from 0 to 1: [T + 1].

    Grosse, Ghahramani & Adams (2015): close steps at both ends, where the
    distributions of a path change most.

    Raises:
      TypeError: `num_temperatures` is no static int.
      ValueError: it is below 1.
    """
    T = check_count("num_temperatures", num_temperatures)
    curve = 1 / (1 + np.exp(-4 * np.linspace(-1.0, 1.0, T + 1)))
    betas = (curve - curve[0]) / (curve[-1] - curve[0])
    return betas.astype(np.float32)


def ais(
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    *,
    num_temperatures: int = 1000,
    num_chains: int = 16,
    num_leapfrog: int = 10,
    schedule: Schedule | Betas = sigmoid_schedule,
    start: Start = prior_start,
) -> LogLikelihood:
    """Estimate log p(x) by annealed importance sampling, which needs no good q(z|x).

        log 1/C Σ w,  log w = Σₜ (βₜ - βₜ₋₁) r(zₜ₋₁),  z₀ ~ s,  zₜ ~ HMC at f_βₜ from zₜ₋₁

    Neal (2001), Section 2; for decoders Wu et al. (2017): a lower bound in expectation,
    exact as T → ∞ or C → ∞. A chain makes T - 1 HMC transitions; T = 1 is importance sampling
    from s. The step size at every temperature is found beforehand for each example by four pilot
    chains, which seek an acceptance of 65 % along the same path. The chains that count have keys
    of their own and keep those step sizes: E[w] = p(x) holds exactly.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key; each example has a key of its own.
      num_temperatures: T, the steps from β = 0 to 1.
      num_chains: C.
      num_leapfrog: leapfrog steps of a transition.
      schedule: from T to betas [T + 1], such as `sigmoid_schedule` and `linear_schedule`; or the
        betas themselves, which rise from 0 to 1 and take the place of `num_temperatures`.
      start: from (params, x) to s, such as `prior_start` and `jvae.posterior`.

    Returns:
      `LogLikelihood(estimate, stderr, ess)`, each [*batch], over the chains: nats, nats and a
      number from 1 to C. Of few chains the standard error is itself a rough estimate.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, a count is below 1, or betas are not as above.
    """
    check_key(key)
    settings = _settings(num_chains, num_leapfrog, start)
    return _ais(params, check_data(params, x), key, _betas(schedule, num_temperatures), settings)


@functools.partial(jax.jit, static_argnums=4)
def _ais(
    params: Params, x: Float[Array, "..."], key: PRNGKeyArray, betas: Array, settings: _Settings
) -> LogLikelihood:
    def estimate(x: Array, key: PRNGKeyArray) -> LogLikelihood:
        return from_log_weights(_forward(params, x, key, betas, settings).log_w)

    return map_examples(estimate, params, x, key, rows_per_example=settings.num_chains)


def bdmc(
    params: Params,
    key: PRNGKeyArray,
    *,
    num_examples: int = 100,
    num_temperatures: int = 1000,
    num_chains: int = 16,
    num_leapfrog: int = 10,
    schedule: Schedule | Betas = sigmoid_schedule,
    start: Start = prior_start,
) -> Sandwich:
    """Bound log p(x) from both sides on data of the model itself, where that is possible.

    Bidirectional Monte Carlo, Grosse, Ghahramani & Adams (2015); for decoders Wu et al.
    (2017). A simulated pair (z, x) ~ p(z) p(x|z) holds an exact draw of p(z|x). From it, chains
    anneal from β = 1 to 0 through the same transitions as `ais` in reverse order, and the mean of
    their weights is 1 / p(x) in expectation:

        lower = log 1/C Σ w,  upper = -log 1/C Σ w',  E[w] = p(x),  E[w'] = 1 / p(x)

    The chains of an example share its one exact draw: they depend on each other, which leaves the
    mean of their weights unbiased and so the bound one. The gap between the two means bounds the
    error of `ais` under the same settings on data that are like the model's.

    Args:
      params: from `jvae.init`.
      key: a typed PRNG key; each example has a key of its own.
      num_examples: simulated examples.
      num_temperatures: as `ais`.
      num_chains: C, in each direction.
      num_leapfrog: as `ais`.
      schedule: as `ais`.
      start: as `ais`.

    Returns:
      `Sandwich(lower, upper)`, each [num_examples] nats; it is their means that are in order.

    Raises:
      TypeError: `key` is no typed key.
      ValueError: a count is below 1, or betas are not as `ais` takes them.
    """
    check_key(key)
    settings = _settings(num_chains, num_leapfrog, start)
    num = check_count("num_examples", num_examples)
    return _bdmc(params, key, _betas(schedule, num_temperatures), num, settings)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _bdmc(
    params: Params, key: PRNGKeyArray, betas: Array, num_examples: int, settings: _Settings
) -> Sandwich:
    def bounds(key: PRNGKeyArray) -> Sandwich:
        latent_key, data_key, forward_key, reverse_key = jax.random.split(key, 4)
        z = prior(params).sample(latent_key)
        x = likelihood(params, z).sample(data_key)
        # The pilot sees x and not z, so that given x and the step sizes z is still from p(z|x).
        log_w, path, steps = _forward(params, x, forward_key, betas, settings)
        copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * settings.num_chains), z)
        log_v = _chains(params, path, copies, reverse_key, betas[::-1], steps[::-1], settings)
        return Sandwich(lower=log_mean_exp(log_w), upper=-log_mean_exp(log_v))

    keys = jax.random.split(key, num_examples)
    return map_in_chunks(jax.vmap(bounds), keys, rows_at_once(params) // settings.num_chains)


class _Forward(NamedTuple):
    """[C] log w of chains from the start to p(z|x), their path, and its step sizes [T - 1]."""

    log_w: Array
    path: _Path
    steps: Array


def _forward(
    params: Params, x: Array, key: PRNGKeyArray, betas: Array, settings: _Settings
) -> _Forward:
    pilot_start_key, pilot_key, start_key, chain_key = jax.random.split(key, 4)
    s = settings.start(params, x)
    path = _path(params, x, s)
    z = _draws(s, pilot_start_key, _PILOT_CHAINS)
    steps = _pilot(path, z, pilot_key, betas, settings.num_leapfrog)
    z = _draws(s, start_key, settings.num_chains)
    log_w = _chains(params, path, z, chain_key, betas, steps, settings)
    return _Forward(log_w, path, steps)


def _path(params: Params, x: Array, s: Any) -> _Path:
    """The function (β, z) -> log f_β(z), and r(z) beside it, for one example and its start s."""

    def log_density(beta: Array, z: Any) -> tuple[Array, Array]:
        log_start = s.log_prob(z)
        log_px_z, log_pz = joint_log_densities(params, x, z)
        log_ratio = log_px_z + log_pz - log_start
        return log_start + beta * log_ratio, log_ratio

    return log_density


def _draws(s: Any, key: PRNGKeyArray, num: int) -> Any:
    return jax.vmap(s.sample)(jax.random.split(key, num))


def _pilot(path: _Path, z: Any, key: PRNGKeyArray, betas: Array, num_leapfrog: int) -> Array:
    """The step size of the transition at each inner temperature, [T - 1], by chains from z."""
    num = jax.tree.leaves(z)[0].shape[0]
    if betas.size == 2:  # no transition to find a step size for
        return jnp.zeros(0, hmc.dtype_of(z))

    def body(carry: tuple[Any, Array], at: tuple[Array, Array]) -> tuple[Any, Array]:
        (z, log_step), (index, beta) = carry, at
        step = jnp.exp(log_step)
        keys = jax.random.split(jax.random.fold_in(key, index), num)
        z, _, acceptance = jax.vmap(
            lambda z, key: hmc.transition(functools.partial(path, beta), z, key, step, num_leapfrog)
        )(z, keys)
        return (z, log_step + _PILOT_GAIN * (acceptance.mean() - _ACCEPTANCE)), step

    betas = jnp.concatenate([jnp.repeat(betas[1], _PILOT_WARMUP), betas[1:-1]])
    start = z, jnp.zeros((), hmc.dtype_of(z))
    _, steps = jax.lax.scan(body, start, (jnp.arange(betas.size), betas))
    return steps[_PILOT_WARMUP:]


def _chains(
    params: Params,
    path: _Path,
    z: Any,
    key: PRNGKeyArray,
    betas: Array,
    steps: Array,
    settings: _Settings,
) -> Array:
    """[C] log w of chains from z [C, *latent] along betas [T + 1], up or down.

    Σₜ (βₜ - βₜ₋₁) r(zₜ₋₁), with zₜ from zₜ₋₁ by the transition at βₜ with the step size of its
    place in `steps` [T - 1].
    """
    rises = jnp.diff(betas)
    inner = (jnp.arange(steps.size), betas[1:-1], rises[:-1], steps)

    def chain(start: tuple[Any, PRNGKeyArray]) -> Array:
        z, key = start

        def body(carry: tuple[Any, Array], at: tuple[Array, ...]) -> tuple[tuple[Any, Array], None]:
            (z, log_w), (index, beta, rise, step) = carry, at
            moved, log_ratio, _ = hmc.transition(
                functools.partial(path, beta),
                z,
                jax.random.fold_in(key, index),
                step,
                settings.num_leapfrog,
            )
            return (moved, log_w + rise * log_ratio), None

        zero = jnp.zeros((), jax.eval_shape(path, betas[0], z)[1].dtype)
        (z, log_w), _ = jax.lax.scan(body, (z, zero), inner)
        return log_w + rises[-1] * path(betas[-1], z)[1]

    keys = jax.random.split(key, settings.num_chains)
    return map_in_chunks(jax.vmap(chain), (z, keys), rows_at_once(params))


def _settings(num_chains: int, num_leapfrog: int, start: Start) -> _Settings:
    return _Settings(
        check_count("num_chains", num_chains), check_count("num_leapfrog", num_leapfrog), start
    )


def _betas(schedule: Schedule | Betas, num_temperatures: int) -> Array:
    betas = schedule(num_temperatures) if callable(schedule) else schedule
    if not isinstance(betas, jax.Array):
        betas = np.asarray(betas)
    if betas.ndim != 1 or betas.size < 2:
        raise ValueError(f"betas must have shape [T + 1] with T at least 1, got {betas.shape}")
    if not isinstance(betas, jax.core.Tracer):
        betas = np.asarray(betas)
        if not (betas[0] == 0 and betas[-1] == 1 and (np.diff(betas) >= 0).all()):
            raise ValueError(f"betas must rise from 0 to 1, got {betas}")
    return jnp.asarray(betas, jnp.float32)
