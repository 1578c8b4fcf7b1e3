"""Wake-sleep, the learner that the paper compares its own with."""

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jvae.estimators.sampling import with_gradient_of
from jvae.estimators.wake_sleep import sleep_phi, wake_theta
from jvae.learners import aevb
from jvae.learners.base import Learner
from jvae.models import Params


def make_learner(optimizer: optax.GradientTransformation) -> Learner:
    """Fit the generative model to data with draws of q(z|x), the encoder to dreams of the model.

    Hinton et al. (1995); the baseline of Kingma & Welling (2014), Section 5. A step takes both
    phases: a gradient of log p(x, z) in the generative weights, z ~ q(z|x), and one of
    log q(z|x) in the encoder's, (x, z) ~ p.

    Args:
      optimizer: as `jvae.training.make_step` takes it.

    Returns:
      A learner whose state is a `jvae.training.TrainState`; the `bound` that its steps report is
      an unbiased estimate of the ELBO, which they do not ascend in the encoder.
    """
    return aevb.make_learner(optimizer, bound=_both_phases)


def _both_phases(
    params: Params, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray
) -> Float[Array, "*batch"]:
    wake_key, sleep_key = jax.random.split(key)
    wake = wake_theta(params, x, wake_key, num_samples=1)
    return with_gradient_of(wake, wake + sleep_phi(params, x, sleep_key))
