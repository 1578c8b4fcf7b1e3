from pathlib import Path

import jax
import numpy as np
import pytest

import jvae
from jvae import checkpoint, training


def make_state(
    seed: int = 0, latent_dim: int = 3, optimizer: str = "adam", step: int = 0
) -> training.TrainState:
    model = jvae.VAE.mlp(data_shape=(4,), latent_dim=latent_dim, hidden=())
    key = jax.random.key(seed)
    state = training.init(jvae.init(model, key), training.make_optimizer(optimizer, 0.1), key)
    return state._replace(step=state.step + step)


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    optimizer = training.make_optimizer("adam", 0.1)
    step = training.make_step(jvae.elbo, optimizer)
    state, _ = step(make_state(), jax.random.uniform(jax.random.key(1), (5, 4)))
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        restored = checkpoint.restore_latest(checkpoints, make_state(seed=1))
    # Trees of different structure cannot be mapped over together.
    a, b = (s._replace(key=jax.random.key_data(s.key)) for s in (restored, state))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_latest_two_stay(tmp_path: Path) -> None:
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoint.save(checkpoints, make_state(step=step))
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        assert sorted(checkpoints.all_steps()) == [3, 4]
        assert int(checkpoint.restore_latest(checkpoints, make_state()).step) == 4


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, make_state(seed=0))
        checkpoint.save(checkpoints, make_state(seed=1))
        restored = checkpoint.restore_latest(checkpoints, make_state(seed=2))
    first = make_state(seed=0)
    jax.tree.map(np.testing.assert_array_equal, restored.params, first.params)


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    with (
        checkpoint.open_checkpoints(tmp_path / "none") as checkpoints,
        pytest.raises(checkpoint.CheckpointError, match="no checkpoint in"),
    ):
        checkpoint.restore_latest(checkpoints, make_state())


@pytest.mark.parametrize("other", [{"latent_dim": 4}, {"optimizer": "sgd"}], ids=str)
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, other: dict[str, int]) -> None:
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, make_state())
        with pytest.raises(
            checkpoint.CheckpointError, match="is of another model or optimizer: opt_state/"
        ):
            checkpoint.restore_latest(checkpoints, make_state(**other))  # type: ignore[arg-type]
