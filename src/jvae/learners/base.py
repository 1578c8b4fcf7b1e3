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
      init: `(params, key) -> state`, the `jvae.training.State` before the first step.
      step: `(state, x) -> (state, info)`, jitted; info has at least the fields of
        `jvae.training.StepInfo`.
    """

    init: Callable[[Params, PRNGKeyArray], Any]
    step: Step
