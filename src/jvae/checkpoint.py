"""Save and restore: a training state with Orbax, the weights of a model in one portable file."""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from orbax.checkpoint import checkpoint_managers

from jvae import models, networks, priors
from jvae.models import Params
from jvae.training import State, StateT

Checkpoints: TypeAlias = ocp.CheckpointManager

# The parts that a description in a file may name.
_PARTS = {
    part.__name__: part
    for part in (
        models.VAE,
        networks.MLP,
        networks.Bernoulli,
        networks.Gaussian,
        priors.StandardNormal,
    )
}


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


def save_state(checkpoints: Checkpoints, state: State) -> None:
    """Save `state` under its step, unless that step is there already."""
    step = int(state.step)
    if step not in checkpoints.all_steps():
        checkpoints.save(step, args=ocp.args.StandardSave(state))


def restore_latest(
    checkpoints: Checkpoints,
    like: StateT,
    *,
    on_damaged: Callable[[str], object] = warnings.warn,
) -> StateT:
    """The state saved last, or where its files are damaged the one before it.

    Args:
      checkpoints: from `open_checkpoints`.
      like: a state of the same model and optimizer, whose values do not matter.
      on_damaged: told in one line of each damaged checkpoint, which is deleted once an earlier
        one was read.

    Raises:
      CheckpointError: there is none, it is of another model or optimizer, or all are damaged.
    """
    checkpoints.wait_until_finished()
    directory = checkpoints.directory
    damaged: dict[int, str] = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            state = _restore(checkpoints, step, like)
        except CheckpointError:
            raise
        except Exception as error:  # tensorstore and json raise what the bytes trip over
            damaged[step] = str(error).partition("\n")[0]
            continue
        for later, reason in damaged.items():
            on_damaged(
                f"checkpoint {later} in {directory} is damaged ({reason}): going on from {step}"
            )
            checkpoints.delete(later)
        return state
    if damaged:
        step, reason = next(iter(damaged.items()))
        raise CheckpointError(f"every checkpoint in {directory} is damaged: {step} ({reason})")
    raise CheckpointError(f"no checkpoint in {directory}")


def _restore(checkpoints: Checkpoints, step: int, like: StateT) -> StateT:
    # Looked at first: a restore that fails half-way leaves Orbax's tasks behind.
    metadata = checkpoints.item_metadata(step)
    saved = _shapes(getattr(metadata, "tree", metadata))
    if not saved:
        raise ValueError("its description is missing")
    wanted = _shapes(like._replace(key=jax.random.key_data(like.key)))
    if differing := sorted(name for name, _ in saved.items() ^ wanted.items()):
        name = differing[0]
        raise CheckpointError(
            f"checkpoint {step} in {checkpoints.directory} is of another model or optimizer: "
            f"{name} is {saved.get(name, 'missing')}, expected {wanted.get(name, 'nothing')}"
        )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    state: StateT = checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))
    return state


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf, by the names on the way to it, whatever kinds of node they are of."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }


def save(path: str | os.PathLike[str], params: Params) -> None:
    """Write weights and the description of their model to one file, in the safetensors format.

    The file is written whole or not at all, and equal weights make equal files. It needs no code
    of a training run to be read, and nothing in it is executed.

    Args:
      path: the file; by convention it ends in `.safetensors`.
      params: of a model made of jvae's own networks, as `VAE.mlp` makes.

    Raises:
      CheckpointError: a part of the model that a file cannot describe, such as an activation
        given as a function, or a file that cannot be written.
    """
    path = Path(path)
    description = json.dumps(_describe(params.model, "model"))
    content = safetensors.numpy.save(
        {name: np.asarray(leaf) for name, leaf in named(params.weights).items()},
        metadata={"model": description},  # of several, safetensors writes the order at random
    )
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def load(path: str | os.PathLike[str]) -> Params:
    """Read what `save` wrote.

    Returns:
      The model with its weights.

    Raises:
      CheckpointError: no such file, a damaged one, or one of something else.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = _build(json.loads(metadata["model"]))
        if not isinstance(model, models.VAE):
            raise TypeError("it describes no model")
        abstract = jax.eval_shape(lambda: models.init(model, jax.random.key(0)))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except KeyError as error:
        raise CheckpointError(f"{path}: no weights of jvae, {error} is missing") from error
    except (OSError, ValueError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole file of weights ({error})") from error
    return Params(weights=fill(abstract.weights, found, f"{path}", "its model"), model=model)


def fill(like: Any, found: Mapping[str, np.ndarray], where: str, owner: str) -> Any:
    """The tree `like` with the arrays `found` under the names on the way to its leaves.

    Args:
      like: a tree of arrays or of their shapes.
      found: the arrays by name.
      where: they were found, for the message.
      owner: of the tree, for the message.

    Raises:
      CheckpointError: names the first array that is missing, too many or of another form.
    """
    wanted, given = _forms(named(like)), _forms(found)
    if differing := sorted(name for name, _ in wanted.items() ^ given.items()):
        name = differing[0]
        raise CheckpointError(
            f"{where}: {name} is {given.get(name, 'missing')}, {owner} has "
            f"{wanted.get(name, 'none')}"
        )
    leaves = [jnp.asarray(found[name]) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _forms(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{array.dtype} {array.shape}" for name, array in arrays.items()}


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by the names on the way to them, in the tree's order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _describe(value: Any, where: str) -> Any:
    """`value` as JSON: parts by their name and fields."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [_describe(item, where) for item in value]
    if _PARTS.get(type(value).__name__) is type(value):
        fields = {
            field.name: _describe(getattr(value, field.name), f"{where}.{field.name}")
            for field in dataclasses.fields(value)
            if field.init and field.name not in ("parent", "name")  # Linen's own
        }
        return {"part": type(value).__name__, **fields}
    raise CheckpointError(
        f"{where} is {value!r}: a file can hold numbers, names and {', '.join(_PARTS)} only"
    )


def _build(description: Any) -> Any:
    if isinstance(description, list):
        return tuple(_build(item) for item in description)
    if isinstance(description, dict):
        fields = {name: _build(value) for name, value in description.items() if name != "part"}
        return _PARTS[description["part"]](**fields)
    return description
