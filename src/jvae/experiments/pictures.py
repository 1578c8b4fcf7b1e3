"""Pictures of the paper's models, trained by AEVB: what each draws is kept as an array."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
from jaxtyping import Array, PRNGKeyArray

import jvae
from jvae import plotting
from jvae.experiments import curve_figures, curves
from jvae.experiments.curves import Curve
from jvae.experiments.paper import Keys
from jvae.experiments.run_folder import RunFolderError

# From a model and a key to means of p(x|z), [rows, columns, *data_shape].
Draw = Callable[[jvae.Params, PRNGKeyArray], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(curves.Config):
    """Settings that the studies of pictures share."""

    max_samples: int = 3_000_000
    """Training samples that each model is shown, a multiple of 100; the paper's are 10⁸."""


def run(
    config: Config, study: str, models: Sequence[tuple[str, int]], draw: Draw, title: str
) -> Path:
    """Train what is missing, keep what it draws, make the figures.

    Args:
      config: the settings.
      study: its name.
      models: a dataset and a number of latents each.
      draw: from a model to its picture.
      title: of the figures, which data and latents are added to.

    Returns:
      The folder: NAME.jsonl has the learning curve of a model, NAME.npz its picture, NAME.png the
      figure.

    Raises:
      ConfigError: a record that is there is of other settings.
      DataError: a dataset is missing or corrupt.
      RunFolderError: no pictures are there to draw.
      Interrupted: Ctrl-C or SIGTERM came.
    """
    folder = config.folder(study)

    def keep(curve: Curve, state: Any, keys: list[Keys]) -> None:
        params = jax.tree.map(lambda leaf: leaf[0], state.params)
        means = np.asarray(jax.jit(draw)(params, keys[0].figures))
        pixels = np.round(255 * means.clip(0, 1)).astype(np.uint8)
        np.savez_compressed(folder / f"{curve.name}.npz", pixels=pixels)

    if not config.redraw:
        wanted = [Curve(dataset, latent_dim, "aevb") for dataset, latent_dim in models]
        curves.run(config, study, folder, wanted, on_trained=keep)
    draw_folder(folder, title, rich.console.Console())
    return folder


def draw_folder(folder: Path, title: str, console: rich.console.Console) -> None:
    """Make the figure of every picture in a folder there, and the table of the models.

    Raises:
      RunFolderError: there is none, or one has no record beside it.
    """
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise RunFolderError(f"{folder} holds no pictures: no .npz file")
    measured = {}
    for path in paths:
        of = curves.read(path.with_suffix(".jsonl"))
        measured[of.curve] = of
        with np.load(path, allow_pickle=False) as arrays:
            pixels = arrays["pixels"]
        what = f"{curve_figures.NAMES[of.curve.dataset]}, {of.curve.latent_dim} latents"
        figure = plotting.image_grid(
            pixels / np.float32(255),
            title=f"{what}: {title}",
            # Digits are ink, faces are light.
            cmap="gray" if of.curve.dataset == "frey_face" else "gray_r",
        )
        figure.savefig(path.with_suffix(".png"), dpi=110)
    text = curve_figures.table(measured)
    (folder / "models.md").write_text(text, "utf-8")
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"Records and figures are in {folder}", soft_wrap=True)
