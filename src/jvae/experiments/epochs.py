"""An epoch over data in memory that can be left in its midst, and gone on with from there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jvae import training
from jvae.training import Epoch, State

# So many steps a compiled call, which a signal waits for; a call costs a fifth of one of them.
STEPS_A_CALL = 100


def stoppable(
    epoch: Epoch, batch_size: int, *, stop: Callable[[], bool], on_step: Callable[[int], object]
) -> Epoch:
    """An epoch in several compiled calls, the same ones whether it is left between them or not.

    Args:
      epoch: from `make_epoch`.
      batch_size: examples a step.
      stop: asked after every call; once it is true, the epoch ends there.
      on_step: told, as each call begins, of the steps done since the run began.

    Returns:
      `epoch(state, data) -> (state, info)`, which begins where `state` is in its epoch. The order
      of the examples is that in which `make_epoch` takes them.
    """

    def run(state: Any, data: Any) -> tuple[Any, Any]:
        infos: list[Any] = []
        step = int(state.step)
        for order in _calls(state, len(data), batch_size):
            on_step(step)
            state, info = epoch(state, data, order)
            infos.append(info)
            # The host runs ahead of the device by one call, so that the device need not wait;
            # of several processes each waits for the others in `stop`.
            jax.block_until_ready(infos[-2:-1])
            step += order.shape[-2]
            if stop():
                break
        return state, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *infos)

    return run


def _calls(state: State, num: int, batch_size: int) -> list[Int[np.ndarray, "..."]]:
    """`order_left` in pieces that end at the same steps wherever in the epoch `state` is."""
    order = order_left(state, num, batch_size)
    steps = training.steps_per_epoch(num, batch_size)
    done = steps - order.shape[-2]
    ends = [end - done for end in range(STEPS_A_CALL, steps, STEPS_A_CALL) if end > done]
    return np.split(order, ends, axis=-2)


def order_left(state: State, num: int, batch_size: int) -> Int[np.ndarray, "*members steps batch"]:
    """The indices of the examples that a state has still to see in its epoch.

    Args:
      state: of one model, or of an ensemble, whose members have orders of their own.
      num: examples in all.
      batch_size: examples a step.

    Raises:
      ValueError: fewer examples than one batch.
    """
    done = int(state.step) % training.steps_per_epoch(num, batch_size)
    start = training.TrainState(state.step - done, params=None, opt_state=None, key=state.key)
    orders = [
        training.shuffled_batches(training.step_keys(one).shuffle, num, batch_size)[done:]
        for one in training.members(start)
    ]
    return np.stack(orders) if state.key.ndim else orders[0]
