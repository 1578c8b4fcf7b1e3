import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jvae.adam import adam

GRADIENTS = {
    "normal": 1.0,
    "tiny, where eps is what counts": 1e-9,
    "huge": 1e15,
    "zero": 0.0,
}


@pytest.mark.parametrize("scale", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("settings", [{}, {"b1": 0.5, "b2": 0.9, "eps": 1e-4}])
def test_adam_is_that_of_optax(scale: float, settings: dict[str, float]) -> None:
    rate = optax.linear_schedule(1e-2, 1e-3, 10)
    params = {"a": jnp.ones((3, 2)), "b": jnp.zeros(4)}
    ours, theirs = adam(rate, **settings), optax.adam(rate, **settings)
    state, other = ours.init(params), theirs.init(params)
    for key in jax.random.split(jax.random.key(0), 12):
        gradient = jax.tree.map(lambda p, key=key: scale * jax.random.normal(key, p.shape), params)
        updates, state = jax.jit(ours.update)(gradient, state, params)
        expected, other = jax.jit(theirs.update)(gradient, other, params)
        jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=2e-6), updates, expected)
    # A map over both refuses trees of two structures.
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-6), state, other)
