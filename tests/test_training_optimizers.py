"""Optimizers by name are their formulas; clipping and the prior of MAP act on gradients."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import KEY, data, flat, toy_bound, toy_params

import jvae
from jvae import training


def updated(optimizer: optax.GradientTransformation, *gradients: list[float]) -> np.ndarray:
    """The toy's weights, from 2, after updates by the given gradients [5]."""
    params = toy_params(2.0)
    state = optimizer.init(params)
    for gradient in gradients:
        g = jnp.array(gradient)
        weights = {"encoder": {"w": g[:2]}, "decoder": {"w": g[2:]}, "prior": {}}
        updates, state = optimizer.update(jvae.Params(weights, params.model), state, params)
        params = optax.apply_updates(params, updates)
    return flat(params)


FIRST = [3.0, -2.0, 50.0, -4.0, 2.0]
SECOND = [4.0, 2.0, -50.0, 3.0, 2.0]
Expected = Callable[[np.ndarray, np.ndarray], np.ndarray]
FORMULAS: dict[str, Expected] = {
    "sgd": lambda g, h: 2 - 0.1 * (g + h),
    # The first step is the learning rate, whatever the gradient's size.
    "adagrad": lambda g, h: 2 - 0.1 * (np.sign(g) + h / np.sqrt(g**2 + h**2)),
    "adam": lambda g, h: (
        2
        - 0.1
        * (
            np.sign(g)
            + (0.09 * g + 0.1 * h) / 0.19 / np.sqrt((0.999e-3 * g**2 + 1e-3 * h**2) / 1.999e-3)
        )
    ),
}


def test_every_optimizer_is_in_the_table() -> None:
    assert FORMULAS.keys() == training.OPTIMIZERS.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_optimizers_are_their_formulas(name: str) -> None:
    expected = FORMULAS[name](np.array(FIRST), np.array(SECOND))
    np.testing.assert_allclose(
        updated(training.make_optimizer(name, 0.1), FIRST, SECOND), expected, rtol=1e-5
    )


def test_a_learning_rate_may_be_a_schedule() -> None:
    optimizer = training.make_optimizer("sgd", lambda step: 0.1 / (1 + step))
    expected = 2 - 0.1 * np.array(FIRST) - 0.05 * np.array(SECOND)
    np.testing.assert_allclose(updated(optimizer, FIRST, SECOND), expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_clipping_is_of_the_global_norm(scale: float) -> None:
    g = scale * np.array(FIRST)
    norm = math.sqrt((g**2).sum())
    step = 2 - updated(training.make_optimizer("sgd", 1.0, clip_norm=0.5), g.tolist())
    np.testing.assert_allclose(step, g * min(1, 0.5 / norm), rtol=1e-4)


def test_the_map_prior_pulls_the_decoder_alone() -> None:
    pull = np.array([0, 0, 1, 1, 1]) * 2.0 / 10
    g = np.array(FIRST)
    optimizer = training.make_optimizer("sgd", 0.1, map_dataset_size=10)
    np.testing.assert_allclose(updated(optimizer, FIRST), 2 - 0.1 * (g + pull), rtol=1e-6)
    # It is part of the criterion: what is clipped includes it.
    clipped = training.make_optimizer("sgd", 1.0, map_dataset_size=10, clip_norm=0.5)
    total = g + pull
    expected = 2 - 0.5 * total / math.sqrt((total**2).sum())
    np.testing.assert_allclose(updated(clipped, FIRST), expected, rtol=1e-5)


def test_the_map_prior_reaches_the_map_optimum() -> None:
    """Σᵢ -½ (xᵢ - w)² - ½ w² is greatest at Σᵢ xᵢ / (N + 1), without the prior at the mean."""
    x = data(4)
    optimizer = training.make_optimizer("sgd", 0.5, map_dataset_size=4)
    state, step = (
        training.init(toy_params(), optimizer, KEY),
        training.make_step(toy_bound, optimizer),
    )
    for _ in range(60):
        state, _ = step(state, x)
    total = np.asarray(x).sum(axis=0)
    expected = total / np.array([4, 4, 5, 5, 5])
    np.testing.assert_allclose(flat(state.params), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"name": "adagard"}, ValueError, "unknown optimizer 'adagard'.*'adagrad'"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm must be positive, got 0.0"),
        ({"clip_norm": math.nan}, ValueError, "clip_norm must be positive, got nan"),
        ({"map_dataset_size": 0}, ValueError, "dataset_size must be at least 1, got 0"),
        ({"map_dataset_size": 5.0}, TypeError, "dataset_size must be a static int, got float"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_of_an_optimizer_that_cannot_be_are_refused(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        training.make_optimizer(**{"name": "sgd", "learning_rate": 0.1, **arguments})
