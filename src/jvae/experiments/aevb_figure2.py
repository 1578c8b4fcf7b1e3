"""Figure 2 of Kingma & Welling (2014): the bound against training samples, AEVB and wake-sleep.

python -m jvae.experiments.aevb_figure2 --help
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import rich.console
import tyro

from jvae.experiments import command_line, curve_figures, curves, paper
from jvae.experiments.config import ConfigError
from jvae.experiments.curves import Curve, DatasetName, LearnerName
from jvae.experiments.run_folder import RunFolderError

STUDY = "aevb_figure2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(curves.BandConfig):
    """Learning curves of AEVB and wake-sleep by the paper's settings, with bands over seeds."""

    datasets: tuple[DatasetName, ...] = ("mnist", "frey_face")
    """mnist_5k are the 5,000 digits that jvae ships: numbers on them are not numbers on MNIST."""
    latent_dims: tuple[int, ...] | None = None
    """Sizes of z; by default the paper's: 3, 5, 10, 20, 200, and 2, 5, 10, 20 of Frey Face."""
    learners: tuple[LearnerName, ...] = ("aevb", "wake_sleep")
    """Who takes part."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
          ConfigError: names the flag.
        """
        if not self.datasets or not self.learners:
            raise ConfigError("--datasets and --learners need at least one name each")
        if self.latent_dims is not None:
            curves.check_latent_dims(self.latent_dims)
        super().__post_init__()

    @property
    def curves(self) -> Iterator[Curve]:
        """What is to be trained, panel by panel."""
        for dataset in dict.fromkeys(self.datasets):
            for latent_dim in self.latent_dims or paper.SETTINGS[dataset].latent_dims:
                for learner in dict.fromkeys(self.learners):
                    yield Curve(dataset, latent_dim, learner)


def run(config: Config) -> Path:
    """Train what is missing, draw and print.

    Returns:
      The folder: OUT/TARGETS/ has the records, OUT the figures and tables.

    Raises:
      ConfigError: a record that is there is of other settings.
      DataError: a dataset is missing or corrupt.
      RunFolderError: no records are there to draw.
      Interrupted: Ctrl-C or SIGTERM came; what was measured stays.
    """
    folder = config.folder(STUDY)
    if not config.redraw:
        curves.run(config, STUDY, folder / config.targets, list(config.curves))
    draw(folder, rich.console.Console())
    return folder


def draw(folder: Path, console: rich.console.Console) -> None:
    """Draw the figure and write the table of each kind of targets, from the records alone.

    Raises:
      RunFolderError: there are none.
    """
    parts = sorted(path.parent for path in folder.glob("*/*.jsonl"))
    if not parts:
        raise RunFolderError(f"{folder} holds no records: no TARGETS/NAME.jsonl")
    for part in dict.fromkeys(parts):
        measured = curves.read_folder(part)
        curve_figures.panels(measured).savefig(folder / f"{part.name}.png", dpi=110)
        text = "\n".join([curve_figures.table(measured), *_comparison(measured)])
        (folder / f"{part.name}.md").write_text(text, "utf-8")
        console.print(f"{part.name} targets\n\n{text}", markup=False, soft_wrap=True)
    console.print(f"Records and figures are in {folder}", soft_wrap=True)


def _comparison(measured: Mapping[Curve, curves.Measured]) -> Iterator[str]:
    """AEVB less wake-sleep, where a panel has both."""
    pairs = [
        (of, measured[other])
        for curve, of in measured.items()
        if curve.learner == "aevb" and (other := curve._replace(learner="wake_sleep")) in measured
    ]
    if pairs:
        yield curve_figures.difference_table(pairs)


def main() -> None:
    """The command line."""
    command_line.run(lambda: run(tyro.cli(Config, prog="python -m jvae.experiments.aevb_figure2")))


if __name__ == "__main__":
    main()
