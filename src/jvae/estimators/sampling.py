"""What bounds are made of: draws of z with their log-densities, and means of weights.

x is encoded once, the draws of z are a `vmap` over `jax.random.split(key, num_samples)`, and the
decoder takes all of them as one batch: its gradient is then one matrix product a layer, where a
`vmap` of decoders would have to transpose every activation first. Two ways to differentiate a draw
are here: `reparameterised`, where z moves with q's parameters, and `fixed`, where it does not and
log q(z|x) alone does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray, Shaped

from jvae.checks import check_count, check_key
from jvae.chunks import map_in_chunks
from jvae.models import Params, check_data, likelihood, posterior, prior

# What p(x|z) of the draws that are worked on together may take, an array of it.
BYTES_AT_ONCE = 2**28

Bound = Callable[..., Float[Array, "*batch"]]


class LogDensities(NamedTuple):
    """log p(x|z), log p(z) and log q(z|x) at one draw z ~ q(z|x), each [*batch] nats."""

    px_z: Float[Array, "*batch"]
    pz: Float[Array, "*batch"]
    qz_x: Float[Array, "*batch"]

    @property
    def joint(self) -> Float[Array, "*batch"]:
        """The log of p(x, z), [*batch] nats."""
        return self.px_z + self.pz

    @property
    def weight(self) -> Float[Array, "*batch"]:
        """The log importance weight, log w = log p(x, z) - log q(z|x)."""
        return self.joint - self.qz_x


class Draws(NamedTuple):
    """Draws z ~ q(z|x) of every example.

    Attributes:
      q: q(z|x), with batch shape [*batch].
      z: [num_samples, *batch, latent], or a pytree of such arrays.
      logs: the log-densities at z, each [num_samples, *batch] nats.
    """

    q: Any
    z: Any
    logs: LogDensities


def draw(
    params: Params, q: Any, x: Shaped[Array | np.ndarray, "..."], keys: Key[Array, "num"]
) -> tuple[Any, LogDensities]:
    """A draw of z for each key, and the log-densities there: [num, *batch, latent], [num, *batch].

    Args:
      params: from `jvae.init`.
      q: q(z|x), with batch shape [*batch].
      x: float [*batch, *data_shape].
      keys: typed PRNG keys.
    """
    z, log_qz_x = jax.vmap(q.sample_and_log_prob)(keys)
    return z, LogDensities(*joint_log_densities(params, x, z), log_qz_x)


def joint_log_densities(
    params: Params, x: Shaped[Array | np.ndarray, "..."], z: Any
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """The terms of log p(x, z): log p(x|z) and log p(z), each of z's batch shape, in nats.

    The batch axes of x may be fewer, which then are the last of z's.
    """
    return likelihood(params, z).log_prob(x), prior(params).log_prob(z)


def reparameterised(
    params: Params, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray, num_samples: int
) -> Draws:
    """`num_samples` draws z = g(ε, x), through which gradients reach q's parameters."""
    q, x, keys = encode(params, x, key, num_samples)
    return Draws(q, *draw_each(params, q, x, keys))


def fixed(
    params: Params, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray, num_samples: int
) -> Draws:
    """The draws and values of `reparameterised`, with z a constant to every gradient.

    q's parameters are then reached through log q(z|x) alone, so that z need not be
    reparameterised: it may be discrete.
    """
    q, x, keys = encode(params, x, key, num_samples)
    z, logs = draw_each(params, stopped(q), x, keys)
    # The draw's own log q is exact where log_prob(z) rounds, but has no gradient here.
    log_qz_x = with_gradient_of(logs.qz_x, jax.vmap(q.log_prob)(z))
    return Draws(q, z, logs._replace(qz_x=log_qz_x))


def encode(
    params: Params, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray, num_samples: int
) -> tuple[Any, Float[Array, "..."], Key[Array, "num"]]:
    """q(z|x), x as an array, and a key a draw."""
    check_key(key)
    keys = jax.random.split(key, check_count("num_samples", num_samples))
    return posterior(params, x), check_data(params, x), keys


def draw_each(
    params: Params, q: Any, x: Shaped[Array | np.ndarray, "..."], keys: Key[Array, "num"]
) -> tuple[Any, LogDensities]:
    """`draw`, in chunks where the draws are too many for one."""
    return over_draws(lambda keys: draw(params, q, x, keys), keys, x)


def over_draws(
    function: Callable[[Any], Any], draws: Any, x: Shaped[Array | np.ndarray, "..."]
) -> Any:
    """`function(draws)`, in chunks where it has too many values of x in hand for one.

    A chunk is computed again for its gradient, so that memory holds one at a time there too.

    Args:
      function: from a pytree of arrays [num, ...] to one of arrays [num, ...].
      draws: a pytree of arrays [num, ...].
      x: [*batch, *data_shape], of which there is one a draw.
    """
    at_once = max(1, BYTES_AT_ONCE // (x.dtype.itemsize * max(1, x.size)))
    if len(jax.tree.leaves(draws)[0]) <= at_once:
        return function(draws)
    return map_in_chunks(jax.checkpoint(function), draws, at_once)


def stopped(tree: Any) -> Any:
    """The pytree, a distribution or `Params` say, as constants: no gradient passes its leaves."""
    return jax.tree.map(jax.lax.stop_gradient, tree)


def with_gradient_of(
    value: Float[Array, "*shape"], surrogate: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """`value`, differentiated as `surrogate`."""
    return jax.lax.stop_gradient(value) + (surrogate - jax.lax.stop_gradient(surrogate))


def normalised_weights(log_weights: Float[Array, "num *batch"]) -> Float[Array, "num *batch"]:
    """w̃ₖ = wₖ / Σⱼ wⱼ over the first axis, as constants."""
    return jax.lax.stop_gradient(jax.nn.softmax(log_weights, axis=0))


def log_mean_exp(log_weights: Float[Array, "num *batch"]) -> Float[Array, "*batch"]:
    """The log of the mean weight over the first axis, log 1/K Σₖ wₖ, without overflow."""
    return jax.nn.logsumexp(log_weights, axis=0) - jnp.log(log_weights.shape[0])


def log_power_mean(
    log_weights: Float[Array, "num *batch"], power: float | int | Float[Array, ""]
) -> Float[Array, "*batch"]:
    """The log of the power mean of weights over the first axis, 1/c log 1/K Σₖ wₖᶜ.

    c = 1 is `log_mean_exp`; c = 0 is the mean of log w, to which it is continuous: it neither
    overflows for large c nor loses digits for small.
    """
    power = jnp.asarray(power, log_weights.dtype)
    is_zero = power == 0
    divisor = jnp.where(is_zero, 1, power)  # a branch not taken must have a finite gradient
    scaled = divisor * log_weights
    largest = jax.lax.stop_gradient(scaled.max(axis=0))
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    below = scaled - largest[None]
    mean = jnp.exp(below).mean(axis=0)
    # Near 1 the log would round in units of 1, which 1 / c then enlarges.
    is_near = mean > 0.5
    less_one = jnp.where(is_near, jnp.expm1(below).mean(axis=0), 0)
    log_mean = jnp.where(is_near, jnp.log1p(less_one), jnp.log(jnp.where(is_near, 1, mean)))
    return jnp.where(is_zero, log_weights.mean(axis=0), (largest + log_mean) / divisor)
