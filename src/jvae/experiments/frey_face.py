"""The paper's model of Frey Face: 1,965 frames of one face, 28×20 pixels each.

python -m jvae.experiments.frey_face --help
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import tyro

from jvae.experiments import command_line, train
from jvae.experiments import config as common
from jvae.experiments.logbook import Logger


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """Train the paper's Frey Face model, 560-200-2-200-560 with a Gaussian decoder.

    The mean of p(x|z) goes through a sigmoid. With 2 latents the run draws the manifold of the
    paper's Figure 4. Results are of the weights of the best ELBO on the 200 validation frames.
    """

    latent_dim: int = 2
    """Size of z; with 2, the run also draws the latent manifold."""
    hidden: tuple[int, ...] = (200,)
    """Hidden layers of the encoder; the decoder has them in reverse. No number: affine maps."""
    epochs: int = 1000
    """Passes over the 1,565 training frames."""
    checkpoint_every: int = 50
    """Epochs between checkpoints. The latest two are kept, and the best of all."""


def run(config: Config, *, loggers: Sequence[Logger] = ()) -> dict[str, Any]:
    """Train, evaluate and draw as `config` says; see `jvae.experiments.loop.run`.

    Args:
      config: the settings.
      loggers: functions to be told of each epoch, beside what the settings ask for.

    Raises:
      DataError: the frames are missing or corrupt.
    """
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return train.run(train.Config(data="frey_face", **settings), loggers=loggers)


def main() -> None:
    """The command line."""
    command_line.run(lambda: run(tyro.cli(Config, prog="python -m jvae.experiments.frey_face")))


if __name__ == "__main__":
    main()
