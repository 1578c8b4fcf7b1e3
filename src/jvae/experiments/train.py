"""Train a VAE on any data: a dataset by name, or your own files.

jvae train --help
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console

import jvae
from jvae import binarisation, data, distributed, plotting
from jvae.experiments import config as common
from jvae.experiments import devices, inputs, loop, run_folder
from jvae.experiments.job import Job
from jvae.experiments.logbook import Logger


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """Train a VAE on a dataset or on your own data."""

    data: str
    """A name (mnist, fashion_mnist, kmnist, binarized_mnist, omniglot, frey_face, cifar10,
    svhn_cropped, celeb_a, mnist_5k) or a path: .npy, .npz, a table of numbers (.csv, .tsv,
    .parquet), a folder of images."""
    test_fraction: float = 0.1
    """Of your own data, how much is held out where it has no test part."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
          ConfigError: names the flag.
        """
        super().__post_init__()
        self._refuse_unless(bool(self.data), "data", "a name or a path")
        self._refuse_unless(0 < self.test_fraction < 1, "test_fraction", "between 0 and 1")


def run(config: Config, *, loggers: Sequence[Logger] = ()) -> dict[str, Any]:
    """Train, evaluate and draw as `config` says; see `jvae.experiments.loop.run`.

    Args:
      config: the settings.
      loggers: functions to be told of each epoch, beside what the settings ask for.

    Raises:
      DataError: the data is missing, corrupt or not to be trained on.
      ConfigError: a part is to be held out of data that has it.
    """
    devices.start(config)
    folder = config.out or run_folder.default_path(Path(config.data).stem)
    if not config.resume:
        distributed.on_first_process(lambda: run_folder.refuse_taken(folder))
    dataset = distributed.on_every_process(
        lambda: inputs.load(config.data, config, test_fraction=config.test_fraction)
    )
    return train_on(dataset, config, folder, loggers=loggers)


def train_on(
    dataset: data.Dataset,
    config: common.Config,
    folder: Path,
    *,
    remarks: Mapping[str, Any] | None = None,
    loggers: Sequence[Logger] = (),
) -> dict[str, Any]:
    """Train on `dataset`; what `config` leaves open is proposed from the data.

    Args:
      dataset: the data.
      config: the settings.
      folder: the run's folder.
      remarks: what else `config.json` and `result.json` are to say.
      loggers: functions to be told of each epoch, beside what the settings ask for.

    Raises:
      ConfigError: settings that do not fit the data.
      DataError: data without a density under the likelihood.
    """
    console = devices.console()
    job = distributed.on_every_process(lambda: _job(dataset, config, folder, remarks, console))
    return loop.run(job, console=console, loggers=loggers)


def _job(
    dataset: data.Dataset,
    config: common.Config,
    folder: Path,
    remarks: Mapping[str, Any] | None,
    console: rich.console.Console,
) -> Job:
    config.check_examples(len(dataset.train))
    for part, examples in (("test", dataset.test), ("validation", dataset.valid)):
        if examples is not None and len(examples) < 2:
            raise data.DataError(f"{dataset.source}: {len(examples)} {part} example, expected 2")
    likelihood, protocol = inputs.fit_to(dataset, config)
    config = dataclasses.replace(config, likelihood=likelihood, binarisation=protocol)
    console.print(dataset.describe(), soft_wrap=True)
    console.print(
        f"p(x|z): {likelihood}; binarisation: {protocol}"
        + ("; streamed from the disk" if inputs.is_streamed(dataset, config) else ""),
        soft_wrap=True,
    )
    repeated = dataset.count_repeated()
    if repeated:
        console.print(
            f"[bold yellow]WARNING: {repeated} of {len(dataset.test)} test examples are in the "
            "training part too: where they are copies, results on them say nothing of new data.[/]",
            soft_wrap=True,
        )
    if config.precision == "bfloat16" and jax.default_backend() == "cpu":
        console.print(
            "[bold yellow]WARNING: on a CPU --precision bfloat16 is slower than float32.[/]"
        )
    x = inputs.prepare(dataset, config)
    is_pixels = dataset.train.dtype == np.uint8
    description = {
        "dataset": dataset.name,
        "dataset_sha256": dataset.sha256,
        "num_train": len(dataset.train),
        "num_test": len(dataset.test),
        "likelihood": likelihood,
        "binarisation": protocol,
        "binarisation_meaning": binarisation.BINARISATIONS[protocol].description,
        **x.protocol,
        "test_x_sha256": data.content_sha256(np.asarray(x.test)),
        "evaluated_on": "the whole test set",
        "test_elbo_estimator": "SGVB B with one sample of z an example",
        "units": "nats per image" if is_pixels else "nats per example",
    }
    if dataset.valid is not None:
        own = config.validation_fraction == 0
        split = f"fraction {config.validation_fraction:g}, split seed {config.split_seed}"
        description |= {
            "num_validation": len(dataset.valid),
            "validation_part": "the data's own" if own else f"held out of the rest ({split})",
            "weights": "of the best validation ELBO",
        }
    model = jvae.VAE.mlp(
        data_shape=dataset.data_shape,
        latent_dim=config.latent_dim,
        hidden=config.hidden,
        activation=config.activation,
        initialiser=config.initialiser,
        likelihood=x.family,
        precision=config.precision,
    )
    return Job(
        config,
        model,
        x.train,
        x.test,
        x.preprocess,
        description,
        folder,
        remarks={
            "dataset_source": dataset.source,
            "test_examples_also_in_train": repeated,
            **(remarks or {}),
        },
        valid=x.valid,
        log_volume=x.log_volume,
        shown=x.shown if plotting.is_image(dataset.data_shape) else None,
    )
