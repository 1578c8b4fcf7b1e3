"""The main job: the VAE of Kingma & Welling (2014) on MNIST's digits.

python -m jvae.experiments.mnist --help
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import rich.console
import tyro

import jvae
from jvae import binarisation, checkpoint, data, training
from jvae.experiments import job, run_folder
from jvae.experiments.interrupt import Interrupted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(job.Config):
    """Train a VAE on MNIST's digits; the defaults are the paper's model, 784-500-20-500-784."""

    dataset: Literal["mnist_5k", "mnist"] = "mnist_5k"
    """mnist_5k: 4,000 training and 1,000 test digits that jvae ships. mnist: all 60,000 and
    10,000, from the four raw files in DATA_DIR/mnist/."""
    data_dir: Path | None = None
    """Folder that holds a folder for each dataset."""
    binarisation: Literal["none", "dynamic", "static", "threshold"] = "dynamic"
    """none: grey pixels as targets, whose bound is no likelihood. dynamic: training pixels drawn
    Bernoulli(value) at each visit, test pixels once. static: all drawn once with a fixed key.
    threshold: 1 where value >= 128. Numbers of two of them never compare."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        if self.dataset == "mnist" and self.data_dir is None:
            raise ValueError("--dataset mnist needs --data-dir, the folder that holds mnist/")


def run(config: Config) -> dict[str, Any]:
    """Train, evaluate and draw as `config` says; see `jvae.experiments.job.run`.

    Raises:
      DataError: the dataset is missing or corrupt.
    """
    console = rich.console.Console()
    dataset = data.load(config.dataset, config.data_dir)
    if dataset.name == "mnist_5k":
        console.print(
            "[bold yellow]mnist_5k: 4,000 training and 1,000 test digits.[/] Numbers on it are "
            "not numbers on MNIST; for those: --dataset mnist --data-dir DIR"
        )
    prepared = binarisation.prepare(
        config.binarisation,
        jnp.asarray(dataset.train),
        jnp.asarray(dataset.test),
        jax.random.key(binarisation.FIXED_DRAW_SEED),
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
        "units": "nats per image",
    }
    folder = config.out or run_folder.default_path(config.dataset)
    return job.run(
        job.Job(
            config, model, prepared.train, prepared.test, prepared.preprocess, protocol, folder
        ),
        console=console,
    )


def main() -> None:
    """The command line."""
    config = tyro.cli(Config, prog="python -m jvae.experiments.mnist")
    refusals = (data.DataError, run_folder.RunFolderError, checkpoint.CheckpointError, ValueError)
    try:
        run(config)
    except Interrupted as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except training.NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except refusals as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
