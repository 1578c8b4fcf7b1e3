"""Save and restore a training state with Orbax."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

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
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(
        directory.absolute(), options=options, item_handlers=handler
    ) as checkpoints:
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
    checkpoints.wait_until_finished()
    step = checkpoints.latest_step()
    if step is None:
        raise CheckpointError(f"no checkpoint in {checkpoints.directory}")
    # Looked at first: a restore that fails half-way leaves Orbax's tasks behind.
    metadata = checkpoints.item_metadata(step)
    saved = _shapes(getattr(metadata, "tree", metadata))
    wanted = _shapes(like._replace(key=jax.random.key_data(like.key)))
    if differing := sorted(name for name, _ in saved.items() ^ wanted.items()):
        name = differing[0]
        raise CheckpointError(
            f"checkpoint {step} in {checkpoints.directory} is of another model or optimizer: "
            f"{name} is {saved.get(name, 'missing')}, expected {wanted.get(name, 'nothing')}"
        )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    state: TrainState = checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))
    return state


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf, by the names on the way to it, whatever kinds of node they are of."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }
