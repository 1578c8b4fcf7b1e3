"""Arrays to matplotlib figures, without pyplot: no global state, no window."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Pixels a side of one image of a grid, at most.
MAX_SIDE = 256

# Okabe & Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, BLACK = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#000000"),
)

Images = Float[np.ndarray, "..."] | Float[Array, "..."]


def is_image(data_shape: tuple[int, ...]) -> bool:
    """Whether examples can be shown: [height, width], perhaps with 1 or 3 channels.

    What is more than 8 times as long as wide is taken for something else, such as a series.
    """
    if len(data_shape) not in (2, 3) or data_shape[2:] not in ((), (1,), (3,)):
        return False
    return max(data_shape[:2]) <= 8 * min(data_shape[:2])


def image_grid(images: Images, *, title: str, cmap: str = "gray_r") -> Figure:
    """A grid of images in [0, 1].

    Args:
      images: [rows, columns, height, width], or with 1 or 3 channels after it.
      title: above the grid.
      cmap: matplotlib's colour map of grey images: "gray_r" is black ink on white.
    """
    # Every s-th pixel of images that are larger than a screen has for them.
    s = -(-max(images.shape[2:4]) // MAX_SIDE)
    images = np.asarray(images)[:, :, ::s, ::s]
    rows, columns, height, width, *channels = images.shape
    axes_order = (0, 2, 1, 3, *range(4, images.ndim))
    tiled = images.transpose(axes_order)
    tiled = tiled.reshape(rows * height, columns * width, *channels).clip(0, 1)
    if channels == [1]:
        tiled = tiled[..., 0]
    inches = 0.45
    figure = Figure(
        figsize=(columns * inches, rows * inches * height / width + 0.4), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.imshow(tiled, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize="medium")
    return figure


def reconstructions(x: Images, means: Images, *, columns: int = 10, cmap: str = "gray_r") -> Figure:
    """Originals [num, height, width, ...] in odd rows, each above its reconstruction."""
    pairs = np.stack([np.asarray(x), np.asarray(means)], axis=1)
    columns = min(columns, len(pairs))
    rows = len(pairs) // columns
    grid = pairs[: rows * columns].reshape(rows, columns, *pairs.shape[1:])
    grid = grid.swapaxes(1, 2).reshape(2 * rows, columns, *pairs.shape[2:])
    return image_grid(grid, title="Test images, each above its reconstruction", cmap=cmap)


def marginals(x: Images, drawn: Images, *, num: int = 16) -> Figure:
    """Histograms of the first `num` columns of data and of draws of the model.

    Args:
      x: data [num_examples, *data_shape].
      drawn: draws of p(x) [num_draws, *data_shape].
      num: at most so many columns are shown.
    """
    data, model = (np.asarray(part).reshape(len(part), -1)[:, :num] for part in (x, drawn))
    across = min(4, data.shape[1])
    down = -(-data.shape[1] // across)
    figure = Figure(figsize=(2.2 * across, 1.8 * down), layout="constrained")
    for i in range(data.shape[1]):
        axes: Axes = figure.add_subplot(down, across, i + 1)
        bins = np.histogram_bin_edges(data[:, i], bins=30)
        for values, label in ((data[:, i], "test data"), (model[:, i], "model")):
            axes.hist(values, bins=list(bins), density=True, histtype="step", label=label)
        axes.set_title(f"column {i + 1}", fontsize="small")
        axes.tick_params(labelsize="x-small")
    figure.axes[0].legend(fontsize="x-small")
    return figure


def learning_curves(
    records: Sequence[Mapping[str, Any]],
    *,
    curves: Mapping[str, str],
    unit: str = "nats per example",
) -> Figure:
    """Bounds against training examples seen, on a log axis as Fig. 2 of Kingma & Welling (2014).

    Args:
      records: a mapping an epoch, with "examples" and the keys of `curves`; where a key has one
        with "_by_seed" beside it, a band shows the range of those.
      curves: the key of each curve and its label.
      unit: of the bounds.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes: Axes = figure.add_subplot()
    examples = np.array([record["examples"] for record in records])
    for key, label in curves.items():
        values = np.array([record[key] for record in records], float)  # NaN where there is none
        by_seed = None
        if all(f"{key}_by_seed" in record for record in records):
            by_seed = np.array([record[f"{key}_by_seed"] for record in records])
        banded(axes, examples, values, by_seed, label=label, marker=".")
    axes.set_xscale("log")
    axes.set_xlabel("training examples evaluated")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def banded(
    axes: Axes,
    x: Shaped[np.ndarray, "points"],
    values: Float[np.ndarray, "points"],
    by_seed: Float[np.ndarray, "points seeds"] | None,
    **style: Any,
) -> None:
    """A curve [points], and where there are seeds a band [points, seeds] over their range.

    Args:
      axes: to draw in.
      x: [points].
      values: [points].
      by_seed: [points, seeds], or None.
      **style: of the line.
    """
    (line,) = axes.plot(x, values, **style)
    if by_seed is not None:
        low, high = by_seed.min(axis=1), by_seed.max(axis=1)
        axes.fill_between(x, low, high, alpha=0.25, color=line.get_color(), linewidth=0)


def kl_per_dimension(
    kl: Float[np.ndarray, "models latent"], *, threshold: float, unit: str = "nats"
) -> Figure:
    """The mean KL of every latent, in falling order.

    Args:
      kl: [models, latent], a curve a model.
      threshold: below it a latent counts as collapsed.
      unit: of the KL.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes: Axes = figure.add_subplot()
    for of_one in kl:
        axes.plot(np.arange(1, len(of_one) + 1), np.sort(of_one)[::-1], marker=".")
    axes.axhline(threshold, color="grey", linestyle="--", label="collapsed below")
    axes.set_yscale("log")
    axes.set_xlabel("latents, in falling order")
    axes.set_ylabel(f"mean KL(q(z|x) ‖ p(z)), {unit}")
    axes.legend()
    return figure


def effective_samples(ess: Float[np.ndarray, "..."], *, num_samples: int, least: float) -> Figure:
    """A histogram of effective sample sizes on a log axis.

    Args:
      ess: of any shape, from 1 to `num_samples`.
      num_samples: the most that there can be.
      least: below it an estimate means little.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes: Axes = figure.add_subplot()
    edges = np.geomspace(1, max(num_samples, 2), 41)
    axes.hist(ess.ravel().clip(1, edges[-1]), bins=list(edges))
    axes.axvline(least, color="grey", linestyle="--", label="means little below")
    axes.set_xscale("log")
    axes.set_xlabel(f"effective samples, of {num_samples:,}")
    axes.set_ylabel("examples")
    axes.legend()
    return figure


def sandwich(
    lower: Float[np.ndarray, "num"], upper: Float[np.ndarray, "num"], *, unit: str = "nats"
) -> Figure:
    """Stochastic bounds on log p(x) of simulated examples, sorted by the lower one."""
    order = np.argsort(lower)
    rank = np.arange(1, len(order) + 1)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes: Axes = figure.add_subplot()
    axes.vlines(rank, lower[order], upper[order], color="lightgrey", zorder=1)
    for bound, label, marker in ((upper, "upper", "v"), (lower, "lower", "^")):
        axes.scatter(rank, bound[order], label=label, marker=marker, s=12)
    axes.set_xlabel("simulated examples, sorted")
    axes.set_ylabel(f"log p(x), {unit}")
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
