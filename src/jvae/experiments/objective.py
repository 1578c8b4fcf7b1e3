"""What the settings of a run say is to be maximised, and by which steps."""

import functools

import optax

from jvae import training
from jvae.estimators import Bound
from jvae.experiments.config import BOUNDS, Config


def make_bound(config: Config) -> Bound:
    """The bound `(params, x, key) -> [*batch] nats`."""
    return functools.partial(BOUNDS[config.bound].bound, num_samples=config.num_samples)


def make_learning_rate(config: Config, num_train: int) -> optax.ScalarOrSchedule:
    """The learning rate, or a function from the step to it."""
    if config.schedule == "cosine":
        steps = config.epochs * training.steps_per_epoch(num_train, config.batch_size)
        return optax.cosine_decay_schedule(config.learning_rate, steps)
    return config.learning_rate


def make_optimizer(config: Config, num_train: int) -> optax.GradientTransformation:
    """The optimizer, for `num_train` training examples."""
    optimizer = training.make_optimizer(
        config.optimizer,
        make_learning_rate(config, num_train),
        clip_norm=config.clip_norm,
        map_dataset_size=num_train if config.map_prior else None,
    )
    return training.skip_non_finite(optimizer) if config.on_nonfinite == "skip" else optimizer
