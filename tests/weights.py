"""Weights for tests without the compilation of `jvae.init`, and larger than the paper's."""

import jax
import jax.numpy as jnp
import numpy as np

import jvae


def random_params(model: jvae.VAE, *, seed: int = 0, scale: float = 0.5) -> jvae.Params:
    """Every weight from N(0, scale²), so that units leave their linear range."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: jvae.init(model, jax.random.key(0)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * generator.normal(size=leaf.shape), leaf.dtype), shapes
    )
