"""One step of training in a folder, to be taken again elsewhere: its state, batch and settings."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from jaxtyping import Array, Float

from jvae import checkpoint
from jvae.checkpoint import CheckpointError, UnwritableError
from jvae.leaves import named
from jvae.training import TrainState

_FORMAT = "jvae step, 1"
_WEIGHTS, _OPTIMIZER, _BATCH = "weights.safetensors", "optimizer.safetensors", "batch.npy"
_KEY = "key"


class Bundle(NamedTuple):
    """A step that is about to be taken.

    Attributes:
      state: at its start.
      x: its batch, preprocessed.
      settings: what its bound and optimizer are made from, for whoever saved it to say.
    """

    state: TrainState
    x: Float[Array, "..."]
    settings: dict[str, Any]


def save(
    path: str | os.PathLike[str],
    state: TrainState,
    x: Float[Array | np.ndarray, "..."],
    settings: Mapping[str, Any],
) -> None:
    """Write a step to a folder, whole or not at all, in place of an earlier bundle.

    A kill at the worst moment leaves the earlier one beside it, under the name `.NAME.old`.

    Args:
      path: the folder.
      state: at the start of the step, of a model that `jvae.checkpoint.save` can describe.
      x: the batch, after preprocessing.
      settings: JSON, from which bound and optimizer can be made again.

    Raises:
      CheckpointError: a model that a file cannot describe, or a folder of something else.
      UnwritableError: the folder cannot be written.
    """
    path = Path(path)
    draft, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("tmp", "old"))
    if path.exists() and not (path / "step.json").exists():
        raise CheckpointError(f"{path} exists and is no bundle of a step")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        checkpoint.save(draft / _WEIGHTS, state.params)
        arrays = {name: np.asarray(leaf) for name, leaf in _named_optimizer(state).items()}
        (draft / _OPTIMIZER).write_bytes(safetensors.numpy.save(arrays))
        np.save(draft / _BATCH, np.asarray(x), allow_pickle=False)
        description = {
            "format": _FORMAT,
            "step": int(state.step),
            "key_impl": str(jax.random.key_impl(state.key)),
            "settings": settings,
            "sha256": {name: _sha256(draft / name) for name in (_WEIGHTS, _OPTIMIZER, _BATCH)},
        }
        (draft / "step.json").write_text(json.dumps(description, indent=2, allow_nan=False) + "\n")
        if path.exists():  # no folder takes the place of another that is not empty
            shutil.rmtree(old, ignore_errors=True)
            path.replace(old)
        draft.replace(path)
    except OSError as error:
        raise UnwritableError(f"cannot write {path}: {error.strerror}") from error
    finally:
        if old.exists() and not path.exists():
            old.replace(path)
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)


def load(
    path: str | os.PathLike[str],
    make_optimizer: Callable[[dict[str, Any]], optax.GradientTransformation],
) -> Bundle:
    """Read what `save` wrote; nothing in it is executed.

    Args:
      path: the folder.
      make_optimizer: from the settings to the optimizer whose state was saved.

    Raises:
      CheckpointError: no bundle, a damaged one, or one of another optimizer.
    """
    path = Path(path)
    try:
        description = json.loads((path / "step.json").read_text())
        if description["format"] != _FORMAT:
            raise CheckpointError(f"{path}: its format is {description['format']!r}")
        for name, sha256 in description["sha256"].items():
            if _sha256(path / name) != sha256:
                raise CheckpointError(f"{path}: {name} is damaged")
        params = checkpoint.load(path / _WEIGHTS)
        found = safetensors.numpy.load_file(path / _OPTIMIZER)
        x = jnp.asarray(np.load(path / _BATCH, allow_pickle=False))
        key = jax.random.wrap_key_data(jnp.asarray(found.pop(_KEY)), impl=description["key_impl"])
        step, settings = int(description["step"]), dict(description["settings"])
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise CheckpointError(f"{path} is no bundle of a step: no {missing}") from error
    except KeyError as error:
        raise CheckpointError(f"{path} is no bundle of a step: {error} is missing") from error
    except (OSError, ValueError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is no whole bundle of a step ({reason})") from error
    like = jax.eval_shape(make_optimizer(settings).init, params)
    opt_state = checkpoint.fill(like, found, f"{path / _OPTIMIZER}", "its optimizer")
    state = TrainState(jnp.asarray(step, jnp.int32), params, opt_state, key)
    return Bundle(state, x, settings)


def _named_optimizer(state: TrainState) -> dict[str, Any]:
    """The optimizer's leaves and the run's key as data."""
    return {**named(state.opt_state), _KEY: jax.random.key_data(state.key)}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
