"""Auto-encoding variational Bayes: the paper's own learner."""

import optax

from jvae import training
from jvae.estimators import Bound, elbo
from jvae.learners.base import Learner


def make_learner(optimizer: optax.GradientTransformation, *, bound: Bound = elbo) -> Learner:
    """Ascend a bound in the generative model and the encoder at once.

    Kingma & Welling (2014), Algorithm 1.

    Args:
      optimizer: as `jvae.training.make_step` takes it.
      bound: a function `(params, x, key) -> [*batch] nats`.

    Returns:
      A learner whose state is a `jvae.training.TrainState`.
    """
    return Learner(
        init=lambda params, key: training.init(params, optimizer, key),
        step=training.make_step(bound, optimizer),
    )
