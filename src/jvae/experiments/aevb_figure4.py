"""Figure 4 of Kingma & Welling (2014): what a decoder of 2 latents makes of the unit square.

python -m jvae.experiments.aevb_figure4 --help
"""

import dataclasses
from pathlib import Path

import tyro
from jaxtyping import Array, Float, PRNGKeyArray

import jvae
from jvae import plotting
from jvae.experiments import command_line, pictures
from jvae.experiments.config import ConfigError
from jvae.experiments.curves import DatasetName

STUDY = "aevb_figure4"
TITLE = "means of p(x|z) at equal steps of prior probability"
SIDE = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(pictures.Config):
    """Manifolds of models with 2 latents, trained by AEVB with the paper's settings."""

    max_samples: int = 10_000_000
    """Training samples that each model is shown, a multiple of 100; the paper's are 10⁸. On Frey
    Face 3,000,000 still leave much of the latent space to noise."""
    datasets: tuple[DatasetName, ...] = ("frey_face", "mnist")
    """A model each; mnist_5k are the 5,000 digits that jvae ships."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
          ConfigError: names the flag.
        """
        super().__post_init__()
        if not self.datasets:
            raise ConfigError("--datasets needs at least one name")


def run(config: Config) -> Path:
    """Train, keep the pictures and draw them; see `jvae.experiments.pictures.run`."""
    models = [(dataset, 2) for dataset in dict.fromkeys(config.datasets)]
    return pictures.run(config, STUDY, models, manifold, TITLE)


def manifold(params: jvae.Params, key: PRNGKeyArray) -> Float[Array, "rows columns ..."]:
    """Means of p(x|z) over a linear grid on the unit square, through the inverse Gaussian CDF.

    Args:
      params: of a model with 2 latents.
      key: not used.

    Returns:
      [20, 20, *data_shape].
    """
    del key
    return jvae.likelihood(params, plotting.latent_grid(SIDE)).mean


def main() -> None:
    """The command line."""
    command_line.run(lambda: run(tyro.cli(Config, prog="python -m jvae.experiments.aevb_figure4")))


if __name__ == "__main__":
    main()
