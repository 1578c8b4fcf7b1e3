"""Save and restore a training state with Orbax."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jvae.training import TrainState

Checkpoints: TypeAlias = ocp.CheckpointManager


class CheckpointError(RuntimeError):
    """A checkpoint that is missing or does not fit; the message says what to do."""


@contextmanager
def open_checkpoints(directory: Path) -> Iterator[Checkpoints]:
    """The checkpoints in `directory`, of which the latest two stay.

    Saves are atomic and run beside the training; leaving the context waits for them.

    Args:
      directory: made when missing.
    """
    options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True, preservation_policy=checkpoint_managers.LatestN(2)
    )
    with ocp.CheckpointManager(directory.absolute(), options=options) as checkpoints:
        yield checkpoints


def save(checkpoints: Checkpoints, state: TrainState) -> None:
    """Save `state` under its step, unless that step is there already."""
    step = int(state.step)
    if step not in checkpoints.all_steps():
        checkpoints.save(step, args=ocp.args.StandardSave(state))


def restore_latest(checkpoints: Checkpoints, like: TrainState) -> TrainState:
    """The state saved last.

    Args:
      checkpoints: from `open_checkpoints`.
      like: a state of the same model and optimizer, whose values do not matter.

    Raises:
      CheckpointError: there is none, or it is of another model or optimizer.
    """
    step = checkpoints.latest_step()
    if step is None:
        raise CheckpointError(f"no checkpoint in {checkpoints.directory}")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        state: TrainState = checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))
    except (ValueError, KeyError, FileNotFoundError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"checkpoint {step} in {checkpoints.directory} cannot be restored: {error}"
        ) from error
    return state
