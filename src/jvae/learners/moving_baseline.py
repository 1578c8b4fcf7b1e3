"""The naive Monte Carlo gradient, with a moving average as its baseline."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from jvae import estimators, training
from jvae.checks import check_between, check_count
from jvae.learners.base import Learner
from jvae.models import Params


class State(NamedTuple):
    """A `jvae.training.State` with a baseline.

    Attributes:
      step: steps done, int32 [].
      params: the model's `Params`.
      opt_state: the optimizer's state.
      key: the run's key.
      baseline: the moving average of the bound, in nats per example; 0 before the first step.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    key: PRNGKeyArray
    baseline: Float[Array, ""]


def make_learner(
    optimizer: optax.GradientTransformation, *, num_samples: int = 1, decay: float = 0.9
) -> Learner:
    """Ascend the ELBO by `jvae.score_function`, less a moving average of the bound.

        bₜ₊₁ = bₜ + max(1 - decay, 1 / (t + 1)) (L̂ₜ - bₜ),  b₀ = 0

    L̂ₜ is the bound of step t, so that the first ones are averaged equally. bₜ depends on no draw
    of step t: the gradient stays unbiased. A step that is skipped (`training.skip_non_finite`)
    leaves no trace in the average, nor in t. Paisley, Blei & Jordan (2012); the moving average is
    that of Mnih & Gregor (2014), Section 2.3.

    Args:
      optimizer: as `jvae.training.make_step` takes it.
      num_samples: L, the draws of z an example.
      decay: what the average keeps of itself in a step, between 0 and 1.

    Returns:
      A learner whose state is a `State`.

    Raises:
      TypeError: `num_samples` is no static int, or `decay` no number.
      ValueError: `num_samples` is below 1, or `decay` out of range.
    """
    num_samples = check_count("num_samples", num_samples)
    check_between("decay", decay, 0.0, 1.0)
    update = optax.with_extra_args_support(optimizer).update

    def init(params: Params, key: PRNGKeyArray) -> State:
        dtype = jnp.result_type(*jax.tree.leaves(params))
        return State(*training.init(params, optimizer, key), baseline=jnp.zeros((), dtype))

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, x: Shaped[Array | np.ndarray, "..."]) -> tuple[State, training.StepInfo]:
        bound = partial(estimators.score_function, num_samples=num_samples, baseline=state.baseline)
        negative = training.loss(bound, state, x)
        params, opt_state, value = training.descend(negative, update, state.params, state.opt_state)
        averaged = state.step - training.num_skipped(state)
        rate = jnp.maximum(1 - decay, 1 / (averaged + 1).astype(state.baseline.dtype))
        baseline = state.baseline + rate * (-value - state.baseline)
        after = State(state.step + 1, params, opt_state, state.key, baseline)
        skipped = training.last_skipped(after)
        if skipped is not None:
            after = after._replace(baseline=jnp.where(skipped, state.baseline, baseline))
        return after, training.StepInfo(bound=-value, skipped=skipped)

    return Learner(init, step)
