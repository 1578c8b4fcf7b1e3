"""Many models trained side by side: each goes the way that it would go alone."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, PRNGKeyArray
from runs import assert_same_state
from weights import random_params

import jvae
from jvae import distributed, training
from jvae.training import TrainState

MODEL = jvae.VAE.mlp(data_shape=(3, 4), latent_dim=2, hidden=(5,))
OPTIMIZER = training.make_optimizer("adam", 0.01)
STEP = training.make_step(jvae.elbo, OPTIMIZER)
IMAGES = np.random.default_rng(0).integers(0, 256, (50, 3, 4), np.uint8)
SEEDS = range(4)


def noisy(images: Array, key: PRNGKeyArray) -> Array:
    return (jax.random.uniform(key, images.shape) < images / jnp.float32(255)).astype(jnp.float32)


def alone(seed: int) -> TrainState:
    key = jax.random.key(seed)
    return training.init(random_params(MODEL, seed=seed), OPTIMIZER, key)


def together() -> TrainState:
    return training.ensemble([alone(seed) for seed in SEEDS])


def assert_close(a: TrainState, b: TrainState) -> None:
    """To the rounding of ten steps of Adam, which may divide a gradient by its own size."""
    a, b = (state._replace(key=jax.random.key_data(state.key)) for state in (a, b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def batches(step: int) -> Iterator[np.ndarray]:
    return iter(IMAGES.reshape(5, 10, 3, 4)[step % 5 :])


EPOCHS: dict[str, tuple[training.Epoch, Any]] = {
    "in memory": (training.make_epoch(STEP, 10, noisy), IMAGES),
    "streamed": (training.make_streamed_epoch(STEP, noisy), batches),
}


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("kind", EPOCHS)
def test_a_member_trains_as_it_does_alone(kind: str, num_devices: int) -> None:
    epoch, data = EPOCHS[kind]
    state = together()
    if num_devices > 1:
        state = distributed.place_members(state, distributed.make_mesh(num_devices))
    for _ in range(2):
        state, infos = epoch(state, data)
    assert infos.bound.shape == (5, len(SEEDS))
    assert int(state.step) == 10
    assert len(state.key.sharding.device_set) == num_devices
    for seed, member in zip(SEEDS, training.members(state), strict=True):
        one = alone(seed)
        for _ in range(2):
            one, info = epoch(one, data)
        assert_close(member, one)
        np.testing.assert_allclose(infos.bound[:, seed], info.bound, rtol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_members_may_share_an_order_or_be_given_their_own(shared: bool) -> None:
    epoch, _ = EPOCHS["in memory"]
    orders = [np.arange(20, dtype=np.int32).reshape(2, 10) + (0 if shared else s) for s in SEEDS]
    state, infos = epoch(together(), IMAGES, orders[0] if shared else np.stack(orders))
    for seed, member in zip(SEEDS, training.members(state), strict=True):
        one, info = epoch(alone(seed), IMAGES, orders[seed])
        assert_close(member, one)
        np.testing.assert_allclose(infos.bound[:, seed], info.bound, rtol=1e-4)


def test_members_draw_orders_of_their_own() -> None:
    def which(state: TrainState, x: Array) -> tuple[TrainState, training.StepInfo]:
        return state._replace(step=state.step + 1), training.StepInfo(bound=x.sum())

    epoch = training.make_epoch(which, 1)
    _, infos = epoch(together(), np.arange(50.0, dtype=np.float32))
    orders = np.asarray(infos.bound).T
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(50), (4, 1)))
    assert len({order.tobytes() for order in orders}) == 4


def test_other_hardware_gets_one_batched_program() -> None:
    """On CPU members take turns; elsewhere each product is one over all members."""
    state = together()
    run = jax.jit(training.over_members(lambda state, x: STEP(state, x)))
    x = jnp.zeros((10, 3, 4))
    traced = run.trace(state, x)
    forms = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    batched = {platform: "batching_dims = [0] x [0]" in text for platform, text in forms.items()}
    assert batched == {"cpu": False, "cuda": True, "tpu": True}


def test_an_ensemble_starts_at_one_step() -> None:
    later = alone(1)._replace(step=jnp.asarray(3, jnp.int32))
    with pytest.raises(ValueError, match=r"states at one step, got 2 at \[0, 3\]"):
        training.ensemble([alone(0), later])
    with pytest.raises(ValueError, match="got 0"):
        training.ensemble([])


def test_a_single_model_is_an_ensemble_of_itself() -> None:
    state = alone(0)
    (member,) = training.members(state)
    assert_same_state(member, state)


def test_members_stay_where_their_ensemble_lies() -> None:
    there = jax.local_devices()[3]
    spread = distributed.place_members(together(), distributed.make_mesh(2))
    for state, device in ((jax.device_put(together(), there), there), (spread, jax.devices()[0])):
        for seed, member in zip(SEEDS, training.members(state), strict=True):
            assert {d for leaf in jax.tree.leaves(member) for d in leaf.devices()} == {device}
            assert_same_state(member, alone(seed))


def test_a_member_that_is_not_finite_stops_all() -> None:
    epoch, data = EPOCHS["in memory"]
    broken = alone(2)
    params = jax.tree.map(lambda leaf: leaf * jnp.inf, broken.params)
    state = training.ensemble([alone(0), alone(1), broken._replace(params=params)])
    with pytest.raises(training.NonFiniteError) as caught:
        training.fit(state, epoch, data, num_epochs=1)
    assert caught.value.step == 0
    assert_same_state(caught.value.last_good_state, state)
