"""Runs that are interrupted, and what a run left in its folder, for tests that compare two."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jvae
from jvae import checkpoint, training
from jvae.experiments import epochs, job, run_folder
from jvae.experiments.config import Config


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines without their timings."""
    return [
        {name: value for name, value in record.items() if name != "images_per_second"}
        for record in run_folder.read_metrics(folder)
    ]


def last_state(folder: Path, data_shape: tuple[int, ...], config: Config) -> training.TrainState:
    """The state of the latest checkpoint of a Bernoulli run."""
    model = jvae.VAE.mlp(data_shape, hidden=config.hidden, latent_dim=config.latent_dim)
    optimizer = training.make_optimizer(config.optimizer, config.learning_rate)
    keys = job.Keys(*jax.random.split(jax.random.key(config.seed), len(job.Keys._fields)))
    like = training.init(jvae.init(model, jax.random.key(9)), optimizer, keys.train)
    with checkpoint.open_checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoint.restore_latest(checkpoints, like)


def assert_same_state(a: training.TrainState, b: training.TrainState) -> None:
    """Bit for bit."""
    a, b = (state._replace(key=jax.random.key_data(state.key)) for state in (a, b))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def signalled_at(step: int) -> Callable[..., training.Epoch]:
    """`epochs.stoppable`, with SIGTERM as the compiled call from that step begins."""
    stoppable = epochs.stoppable

    def signalled(*args: Any, **kwargs: Any) -> training.Epoch:
        def on_step(begun: int) -> None:
            if begun == step:
                signal.raise_signal(signal.SIGTERM)

        return stoppable(*args, **kwargs | {"on_step": on_step})

    return signalled
