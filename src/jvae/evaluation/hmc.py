"""Hamiltonian Monte Carlo transitions by BlackJAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

LogDensity = Callable[[Any], tuple[Float[Array, ""], Any]]


def transition(
    log_density: LogDensity, z: Any, key: PRNGKeyArray, step_size: Any, num_leapfrog: int
) -> tuple[Any, Any, Float[Array, ""]]:
    """One transition that leaves `log_density` invariant, whatever the step size.

    Neal (2011), Section 3: momenta from N(0, I), leapfrog steps, a Metropolis test.

    Args:
      log_density: from z to an unnormalised log-density in nats and anything else beside it.
      z: one latent, any pytree.
      key: a typed PRNG key.
      step_size: ε > 0, for all of z.
      num_leapfrog: leapfrog steps.

    Returns:
      The next z; what `log_density` gave beside its value at the z it came from; and the
      probability with which the proposal is accepted, of the type of z.
    """
    import blackjax.mcmc.hmc as hmc  # adds a third to the time that `import jvae` takes

    (value, aside), gradient = jax.value_and_grad(log_density, has_aux=True)(z)
    size, dtype = sum(leaf.size for leaf in jax.tree.leaves(z)), dtype_of(z)
    state, info = hmc.build_kernel()(
        key,
        hmc.HMCState(z, value, gradient),
        lambda z: log_density(z)[0],
        jnp.asarray(step_size, dtype),
        jnp.ones(size, dtype),
        num_leapfrog,
    )
    return state.position, aside, info.acceptance_rate.astype(dtype)


def dtype_of(z: Any) -> np.dtype[Any]:
    """The type of latents, any pytree: that of their chains' step size too."""
    return np.dtype(jnp.result_type(*jax.tree.leaves(z)))
