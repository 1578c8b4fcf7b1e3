"""Figure 5 of Kingma & Welling (2014): draws of models of MNIST with ever more latents.

python -m jvae.experiments.aevb_figure5 --help
"""

import dataclasses
from pathlib import Path

import tyro
from jaxtyping import Array, Float, PRNGKeyArray

import jvae
from jvae.experiments import command_line, curves, pictures
from jvae.experiments.curves import DatasetName

STUDY = "aevb_figure5"
TITLE = "means of p(x|z), z from the prior"
SIDE = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(pictures.Config):
    """Random samples of models trained by AEVB with the paper's settings."""

    dataset: DatasetName = "mnist"
    """mnist_5k are the 5,000 digits that jvae ships."""
    latent_dims: tuple[int, ...] = (2, 5, 10, 20)
    """Sizes of z, a model each."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
          ConfigError: names the flag.
        """
        super().__post_init__()
        curves.check_latent_dims(self.latent_dims)


def run(config: Config) -> Path:
    """Train, keep the pictures and draw them; see `jvae.experiments.pictures.run`."""
    models = [(config.dataset, latent_dim) for latent_dim in dict.fromkeys(config.latent_dims)]
    return pictures.run(config, STUDY, models, samples, TITLE)


def samples(params: jvae.Params, key: PRNGKeyArray) -> Float[Array, "rows columns ..."]:
    """Means of p(x|z) at draws of the prior, [10, 10, *data_shape]."""
    means = jvae.sample(params, key, SIDE**2)
    return means.reshape(SIDE, SIDE, *means.shape[1:])


def main() -> None:
    """The command line."""
    command_line.run(lambda: run(tyro.cli(Config, prog="python -m jvae.experiments.aevb_figure5")))


if __name__ == "__main__":
    main()
