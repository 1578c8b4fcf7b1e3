"""An epoch that is left in its midst and gone on with is the one that nobody left, bit for bit."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jaxtyping import Array, PRNGKeyArray
from runs import assert_same_state, last_state, metrics, signalled_at
from weights import random_params

import jvae
from jvae import distributed, training
from jvae.experiments import config, epochs, figures, run_folder, train
from jvae.experiments.interrupt import Interrupted

NUM, BATCH_SIZE, STEPS = 37, 5, 7
IMAGES = np.random.default_rng(0).integers(0, 256, (NUM, 3, 4), np.uint8)
OPTIMIZER = training.make_optimizer("adam", 0.01)


def noisy(images: Array, key: PRNGKeyArray) -> Array:
    return (jax.random.uniform(key, images.shape) < images / np.float32(255)).astype(np.float32)


EPOCH = training.make_epoch(training.make_step(jvae.elbo, OPTIMIZER), BATCH_SIZE, noisy)


def begun(seeds: int, devices: int = 1) -> training.TrainState:
    """A state at the start of the second epoch, where orders depend on the step."""
    model = jvae.VAE.mlp(data_shape=(3, 4), latent_dim=2, hidden=(5,))
    states = [
        training.init(random_params(model, seed=seed), OPTIMIZER, jax.random.key(seed))
        for seed in range(seeds)
    ]
    state = states[0] if seeds == 1 else training.ensemble(states)
    state = state._replace(step=state.step + STEPS)
    return (
        state if devices == 1 else distributed.place_members(state, distributed.make_mesh(devices))
    )


def run(
    state: training.TrainState, answers: list[bool]
) -> tuple[training.TrainState, np.ndarray, list[int]]:
    """The state, the bounds and what was told of steps, where `stop` answers so, and then no."""
    told: list[int] = []
    left = iter(answers)
    epoch = epochs.stoppable(EPOCH, BATCH_SIZE, stop=lambda: next(left, False), on_step=told.append)
    devices = len(state.key.sharding.device_set)
    images = (
        IMAGES if devices == 1 else distributed.replicate(IMAGES, distributed.make_mesh(devices))
    )
    state, info = epoch(state, images)
    return state, np.asarray(info.bound), told


@pytest.fixture
def two_steps_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epochs, "STEPS_A_CALL", 2)


@pytest.mark.parametrize(("seeds", "devices"), [(1, 1), (2, 1), (4, 2)])
@pytest.mark.usefixtures("two_steps_a_call")
def test_a_stop_changes_nothing(seeds: int, devices: int) -> None:
    whole, bounds, told = run(begun(seeds, devices), [])
    assert whole.step == 2 * STEPS
    assert told == [7, 9, 11, 13]
    for calls, ended_at in ((1, 9), (2, 11), (3, 13)):
        first, before, _ = run(begun(seeds, devices), [*[False] * (calls - 1), True])
        assert first.step == ended_at
        last, after, told = run(first, [])
        assert told == list(range(ended_at, 2 * STEPS, 2))
        np.testing.assert_array_equal(np.concatenate([before, after]), bounds)
        assert_same_state(last, whole)


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
def test_the_calls_are_the_epoch(steps: int, seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding: a loop over other numbers of steps is another program."""
    monkeypatch.setattr(epochs, "STEPS_A_CALL", steps)
    state, bounds, told = run(begun(seeds), [])
    assert len(told) == -(-STEPS // steps)
    expected, info = EPOCH(begun(seeds), IMAGES)
    np.testing.assert_allclose(bounds, info.bound, rtol=1e-5)
    for ours, theirs in zip(*map(jax.tree.leaves, (state.params, expected.params)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("two_steps_a_call")
def test_what_is_left_from_between_two_calls_ends_where_they_end() -> None:
    """Such as a state that was saved by another number of steps a call."""
    state = begun(1)
    ends = np.cumsum([len(part) for part in epochs._calls(state, NUM, BATCH_SIZE)])
    assert ends.tolist() == [2, 4, 6, 7]
    inside = epochs._calls(state._replace(step=state.step + 3), NUM, BATCH_SIZE)
    assert (3 + np.cumsum([len(part) for part in inside])).tolist() == [4, 6, 7]
    np.testing.assert_array_equal(
        np.concatenate(inside), epochs.order_left(state, NUM, BATCH_SIZE)[3:]
    )


@pytest.mark.usefixtures("two_steps_a_call")
def test_a_signal_ends_a_run_within_an_epoch_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "draw", lambda job, params: None)
    path = tmp_path / "mine.npy"
    np.save(path, IMAGES)
    # Of 37 images 33 are trained on.
    settings = config.Config(hidden=(4,), latent_dim=2)
    flags: dict[str, Any] = {"data": str(path), "batch_size": 6, "epochs": 3, "nll_samples": 0}
    flags |= {"hidden": settings.hidden, "latent_dim": settings.latent_dim}

    def train_into(folder: Path, **changes: Any) -> None:
        train.run(train.Config(out=folder, **flags, **changes))

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_into(whole)
    with monkeypatch.context() as patch:
        patch.setattr(epochs, "stoppable", signalled_at(7))
        with pytest.raises(Interrupted, match=r"saved after step 9\).*--resume --out"):
            train_into(stopped)
    assert last_state(stopped, (3, 4), settings).step == 9
    assert len(run_folder.read_unfinished(stopped, 9)) == 4
    train_into(stopped, resume=True)
    assert metrics(stopped) == metrics(whole)
    assert_same_state(*(last_state(folder, (3, 4), settings) for folder in (whole, stopped)))
