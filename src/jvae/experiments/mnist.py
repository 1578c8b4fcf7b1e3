"""The main job: the VAE of Kingma & Welling (2014) on MNIST's digits.

python -m jvae.experiments.mnist --help
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn

import rich.console
import tyro

import jvae
from jvae import binarisation, data
from jvae.checkpoint import CheckpointError
from jvae.experiments import config as common
from jvae.experiments import job, run_folder
from jvae.experiments.config import ConfigError
from jvae.experiments.interrupt import Interrupted
from jvae.experiments.run_folder import RunFolderError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """Train a VAE on MNIST's digits; the defaults are the paper's model, 784-500-20-500-784."""

    dataset: Literal["mnist_5k", "mnist"] = "mnist_5k"
    """mnist_5k: 5,000 digits that jvae ships. mnist: all, from raw files in DATA_DIR/mnist/."""
    data_dir: Path | None = None
    """Folder that holds a folder for each dataset."""
    binarisation: Literal["none", "dynamic", "static", "threshold"] = "dynamic"
    """none: grey. dynamic: drawn at each visit. static: drawn once. threshold: 1 from 128 up."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
          ConfigError: names the flag.
        """
        super().__post_init__()
        if self.dataset == "mnist" and self.data_dir is None:
            raise ConfigError("--dataset mnist needs --data-dir, the folder that holds mnist/")


def run(config: Config) -> dict[str, Any]:
    """Train, evaluate and draw as `config` says; see `jvae.experiments.job.run`.

    Raises:
      DataError: the dataset is missing or corrupt.
    """
    folder = config.out or run_folder.default_path(config.dataset)
    if not config.resume:
        run_folder.refuse_taken(folder)
    dataset = data.load(config.dataset, config.data_dir)
    config.check_examples(len(dataset.train))
    console = rich.console.Console()
    if dataset.name == "mnist_5k":
        console.print(
            "[bold yellow]mnist_5k: 4,000 training and 1,000 test digits.[/] Numbers on it are "
            "not numbers on MNIST; for those: --dataset mnist --data-dir DIR"
        )
    prepared = binarisation.prepare(
        config.binarisation,
        dataset.train,
        dataset.test,
        binarisation.fixed_draw_key(),
    )
    model = jvae.VAE.mlp(
        data_shape=dataset.data_shape,
        latent_dim=config.latent_dim,
        hidden=config.hidden,
        activation=config.activation,
        initialiser=config.initialiser,
    )
    protocol = {
        "dataset": dataset.name,
        "dataset_sha256": dataset.sha256,
        "num_train": len(dataset.train),
        "num_test": len(dataset.test),
        "binarisation": config.binarisation,
        "binarisation_meaning": binarisation.BINARISATIONS[config.binarisation].description,
        "evaluated_on": "the whole test set, never trained on",
        "test_elbo_estimator": "SGVB B with one sample of z an image",
        "units": "nats per image",
    }
    return job.run(
        job.Job(
            config, model, prepared.train, prepared.test, prepared.preprocess, protocol, folder
        ),
        console=console,
    )


def main() -> None:
    """The command line."""
    refusals = (ConfigError, data.DataError, RunFolderError, CheckpointError)
    try:
        run(tyro.cli(Config, prog="python -m jvae.experiments.mnist"))
    except refusals as error:
        _end(f"error: {error}", 2)
    except FloatingPointError as error:
        _end("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]), 1)
    except Interrupted as error:
        _end(str(error), error.exit_code)
    except KeyboardInterrupt:
        _end("Interrupted before training.", 130)


def _end(message: str, exit_code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
