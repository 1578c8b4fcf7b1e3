"""The main job: the VAE of Kingma & Welling (2014) on MNIST's digits.

python -m jvae.experiments.mnist --help
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import tyro

from jvae import data, distributed
from jvae.experiments import command_line, devices, inputs, run_folder, train
from jvae.experiments import config as common
from jvae.experiments.logbook import Logger


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """Train a VAE on MNIST's digits; the defaults are the paper's model, 784-500-20-500-784."""

    dataset: Literal[
        "auto", "mnist", "mnist_5k", "fashion_mnist", "kmnist", "binarized_mnist", "omniglot"
    ] = "auto"
    """28×28 images. auto: mnist, or where it is neither on the disk nor to be downloaded mnist_5k,
    the 5,000 digits that jvae ships. One that is asked for is never replaced."""


def run(config: Config, *, loggers: Sequence[Logger] = ()) -> dict[str, Any]:
    """Train, evaluate and draw as `config` says; see `jvae.experiments.loop.run`.

    Args:
      config: the settings.
      loggers: functions to be told of each epoch, beside what the settings ask for.

    Raises:
      DataError: the dataset is missing or corrupt.
      ConfigError: a part is to be held out of data that has it.
    """
    devices.start(config)
    remarks: dict[str, Any] = {}
    name: str = config.dataset
    if name == "auto" and config.resume and config.out is not None:
        saved = run_folder.read_settings(config.out)
        name = saved.get("dataset", name)
        remarks = {key: saved[key] for key in ("fallback",) if key in saved}
    folder = config.out or run_folder.default_path("mnist" if name == "auto" else name)
    if not config.resume:
        distributed.on_first_process(lambda: run_folder.refuse_taken(folder))
    dataset, fallback = distributed.on_every_process(lambda: _load(name, config))
    chosen: Any = dataset.name
    config = dataclasses.replace(config, dataset=chosen)
    return train.train_on(dataset, config, folder, remarks=remarks | fallback, loggers=loggers)


def _load(name: str, config: Config) -> tuple[data.Dataset, dict[str, str]]:
    """A dataset by its name, and the remark that it is not the one that was meant."""
    try:
        return inputs.load("mnist" if name == "auto" else name, config), {}
    except data.NoNetworkError as error:
        if name != "auto":
            raise
        devices.console().print(
            "[bold yellow]WARNING: MNIST is neither on this machine nor within reach. Training on "
            "mnist_5k, 4,000 training and 1,000 test digits that come with jvae: numbers on it "
            f"are not numbers on MNIST.[/]\n({error})",
            soft_wrap=True,
        )
        return inputs.load("mnist_5k", config), {"fallback": f"mnist_5k, not mnist: {error}"}


def main() -> None:
    """The command line."""
    command_line.run(lambda: run(tyro.cli(Config, prog="python -m jvae.experiments.mnist")))


if __name__ == "__main__":
    main()
