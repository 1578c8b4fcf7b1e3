"""The step at which a run failed, kept in the run's folder as a bundle."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Shaped

from jvae import bundle, forensics, training
from jvae.checkpoint import CheckpointError
from jvae.experiments import objective, run_folder
from jvae.experiments.config import Config

# What the bound and the optimizer of a run are made from.
SETTINGS = (
    "bound",
    "num_samples",
    "optimizer",
    "learning_rate",
    "schedule",
    "epochs",
    "batch_size",
    "clip_norm",
    "map_prior",
    "on_nonfinite",
)


def write(
    folder: Path,
    error: training.NonFiniteError,
    last_good_state: training.TrainState,
    config: Config,
    num_train: int,
    batches: Iterable[Shaped[Array | np.ndarray, "..."]],
    preprocess: training.Preprocess | None,
) -> str:
    """Find the step at fault, keep it in `folder` and say which tensor went bad.

    Args:
      folder: of the bundle.
      error: of the run.
      last_good_state: of the model that failed, on one device.
      config: the run's settings.
      num_train: training examples.
      batches: from the last good state to the end of its epoch, before `preprocess`.
      preprocess: the run's.

    Returns:
      A few lines for the user.
    """
    bound = objective.make_bound(config)
    optimizer = objective.make_optimizer(config, num_train)
    found = forensics.first_bad_step(
        last_good_state, batches, bound, optimizer, until=error.step, preprocess=preprocess
    )
    if found is None:
        return "Its batch could not be had again: no step is kept."
    state, x = found
    settings = {name: getattr(config, name) for name in SETTINGS} | {"num_train": num_train}
    try:
        bundle.save(folder, state, x, run_folder.json_round_trip(settings))
    except CheckpointError as refusal:
        return f"The step is not kept: {refusal}"
    verdict = forensics.examine(state, x, bound, optimizer).verdict
    what = f"step {state.step} went bad: {verdict}"
    if verdict is None:
        what = f"taken one at a time, the steps up to {state.step} are finite"
    command = f"python -m jvae.experiments.replay {shlex.quote(str(folder))}"
    return f"In a replay, {what}. Its tensors: {command}"


def settings_of(saved: dict[str, Any]) -> tuple[Config, int]:
    """The settings in a bundle, and the number of training examples.

    Raises:
      ConfigError: a value out of range.
      CheckpointError: settings that are missing or unknown.
    """
    try:
        num_train = int(saved["num_train"])
        config = Config(**{name: saved[name] for name in SETTINGS})
        config.check_examples(num_train)
    except KeyError as error:
        raise CheckpointError(f"the bundle is of no run of this command: no {error}") from error
    except TypeError as error:
        raise CheckpointError(f"the bundle is of no run of this command ({error})") from error
    return config, num_train
