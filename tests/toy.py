"""A model of five weights, whose bound is greatest where they are the mean of the data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

import jvae

KEY = jax.random.key(5)


def toy_params(value: float = 0.0) -> jvae.Params:
    """One encoder and one decoder weight; the bounds below need no model."""
    encoder, decoder = ({"w": jnp.full(size, value, jnp.float32)} for size in (2, 3))
    weights = {"encoder": encoder, "decoder": decoder, "prior": {}}
    return jvae.Params(weights, model="toy")


def toy_bound(params: jvae.Params, x: Array, key: PRNGKeyArray) -> Array:
    """-½ Σ (x - w)² over both weights, x [batch, 5]."""
    w = jnp.concatenate([params.weights[name]["w"] for name in ("encoder", "decoder")])
    return -0.5 * ((x - w[None]) ** 2).sum(axis=-1)


def data(num: int, dim: int = 5) -> Array:
    return jnp.asarray(np.random.default_rng(0).normal(1.0, 1.0, (num, dim)), jnp.float32)


def flat(params: jvae.Params) -> np.ndarray:
    """[encoder, decoder] weights of the toy."""
    w = [np.asarray(params.weights[name]["w"]) for name in ("encoder", "decoder")]
    return np.concatenate(w, axis=-1)


def assert_trees_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)
