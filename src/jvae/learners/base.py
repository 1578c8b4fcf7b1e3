"""What a learner is."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import PRNGKeyArray

from jvae.models import Params
from jvae.training import Step


class Learner(NamedTuple):
    """A way to fit a model: how to begin, and what to do with each minibatch.

    Every learner is run by `jvae.training.make_epoch(learner.step, batch_size, preprocess)`.

    Attributes:
      init: `(params, key) -> state`, the state before the first step: a `NamedTuple` with at
        least the fields of `jvae.training.TrainState`, its count of steps first.
      step: `(state, x) -> (state, jvae.training.StepInfo)`, jitted.
    """

    init: Callable[[Params, PRNGKeyArray], Any]
    step: Step
