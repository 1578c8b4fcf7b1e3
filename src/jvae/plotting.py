"""Arrays to matplotlib figures, without pyplot: no global state, no window."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Images = Float[np.ndarray, "rows columns height width"] | Float[Array, "rows columns height width"]


def image_grid(images: Images, *, title: str) -> Figure:
    """A grid of grey images [rows, columns, height, width] in [0, 1], black ink on white."""
    rows, columns, height, width = images.shape
    tiled = np.asarray(images).transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
    inches = 0.45
    figure = Figure(
        figsize=(columns * inches, rows * inches * height / width + 0.4), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.imshow(tiled, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize="medium")
    return figure


def reconstructions(
    x: Float[np.ndarray, "num height width"] | Float[Array, "num height width"],
    means: Float[np.ndarray, "num height width"] | Float[Array, "num height width"],
    *,
    columns: int = 10,
) -> Figure:
    """Originals [num, height, width] in odd rows, each above its reconstruction."""
    pairs = np.stack([np.asarray(x), np.asarray(means)], axis=1)
    num, _, height, width = pairs.shape
    rows = num // columns
    grid = pairs[: rows * columns].reshape(rows, columns, 2, height, width)
    grid = grid.transpose(0, 2, 1, 3, 4).reshape(2 * rows, columns, height, width)
    return image_grid(grid, title="Test images, each above its reconstruction")


def learning_curves(records: Sequence[Mapping[str, Any]], *, curves: Mapping[str, str]) -> Figure:
    """Bounds against training examples seen, on a log axis as Fig. 2 of Kingma & Welling (2014).

    Args:
      records: a mapping an epoch, with "examples" and the keys of `curves`.
      curves: the key of each curve and its label.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes: Axes = figure.add_subplot()
    examples = [record["examples"] for record in records]
    for key, label in curves.items():
        axes.plot(examples, [record[key] for record in records], label=label, marker=".")
    axes.set_xscale("log")
    axes.set_xlabel("training examples evaluated")
    axes.set_ylabel("nats per image")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def latent_grid(num: int) -> Float[Array, "num num 2"]:
    """Points [num, num, 2] of a 2-D latent space at equal steps of prior probability.

    A linear grid on the unit square through the inverse Gaussian CDF, first latent to the right
    and second upward. Kingma & Welling (2014), Fig. 4.
    """
    z = jax.scipy.special.ndtri((jnp.arange(num) + 0.5) / num)
    right, up = jnp.meshgrid(z, z[::-1])
    return jnp.stack([right, up], axis=-1)
