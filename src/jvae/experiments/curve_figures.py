"""Figures and tables of learning curves, from their records alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jvae import plotting
from jvae.experiments import paper
from jvae.experiments.curves import Curve, Measured

STYLES: Mapping[str, dict[str, Any]] = {
    "aevb": {"label": "AEVB", "color": plotting.BLUE},
    "wake_sleep": {"label": "wake-sleep", "color": plotting.ORANGE},
    "mcem": {"label": "Monte Carlo EM", "color": plotting.GREEN},
}
LINES = {"train": "-", "test": "--"}
NAMES = {"mnist": "MNIST", "mnist_5k": "mnist_5k", "frey_face": "Frey Face"}


def panels(measured: Mapping[Curve, Measured]) -> Figure:
    """A panel for each dataset and number of latents, laid out as the paper's Figure 2.

    Lines are medians over seeds, bands reach from the lowest seed to the highest. The vertical
    range of a row is that of the ends, with some room: an untrained model can be arbitrarily bad.

    Args:
      measured: the curves, of one kind of targets.
    """
    datasets = [name for name in paper.SETTINGS if any(c.dataset == name for c in measured)]
    rows = [
        sorted({curve.latent_dim for curve in measured if curve.dataset == name})
        for name in datasets
    ]
    across = max(map(len, rows))
    width = max(6.5, 2.6 * across + 0.9)  # of the title and the legend
    figure = Figure(figsize=(width, 2.5 * len(rows) + 1.2), layout="constrained")
    for row, (dataset, latent_dims) in enumerate(zip(datasets, rows, strict=True)):
        first = None
        of_row = [of for curve, of in measured.items() if curve.dataset == dataset]
        for column, latent_dim in enumerate(latent_dims):
            axes: Axes = figure.add_subplot(
                len(rows), across, row * across + column + 1, sharex=first, sharey=first
            )
            first = first or axes
            for of in of_row:
                if of.curve.latent_dim == latent_dim:
                    _draw(axes, of)
            axes.set_title(f"{NAMES[dataset]}, {latent_dim} latents", fontsize="medium")
            axes.tick_params(labelleft=column == 0)
            if column >= max(map(len, rows[row + 1 :]), default=0):  # nothing is below
                axes.set_xlabel("training samples evaluated")
            axes.grid(alpha=0.3)
        if first is not None:
            first.set_xscale("log")
            first.set_ylim(*_range(of_row))
            first.set_ylabel("bound, nats an image")
    figure.suptitle(_title(measured), fontsize="medium")
    handles = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False
    )
    return figure


def _draw(axes: Axes, of: Measured) -> None:
    style = STYLES[of.curve.learner]
    for part, by_seed in of.bounds.items():
        plotting.banded(
            axes,
            of.samples,
            np.median(by_seed, axis=1),
            by_seed,
            color=style["color"],
            linestyle=LINES[part],
            label=f"{style['label']}, {part}",
        )


def _range(of_row: Sequence[Measured]) -> tuple[float, float]:
    """Of the curves' ends, with room below for how they came there."""
    ends = [np.median(by_seed[-1]) for of in of_row for by_seed in of.bounds.values()]
    low, high = float(min(ends)), float(max(ends))
    span = high - low + 1e-3 * abs(high)
    return low - 0.6 * span, high + 0.1 * span


def _title(measured: Mapping[Curve, Measured]) -> str:
    headers = [of.header for of in measured.values()]
    seeds = sorted({len(header["seeds"]) for header in headers})
    is_grey = {header["targets"] for header in headers} == {"grey"}
    faces = {curve.dataset == "frey_face" for curve in measured}
    if is_grey:
        stamps = {False: "of digits no likelihood", True: "of faces a density without bound"}
        what = "grey targets as in the paper: "
    else:
        stamps = {False: "pixels drawn at each visit", True: "frames dequantised at each visit"}
        what = ""
    what += ", ".join(stamps[of_faces] for of_faces in sorted(faces))
    over = " or ".join(map(str, seeds))
    return f"{what}\nmedian and range of {over} seed{'s' if seeds != [1] else ''}"


def table(measured: Mapping[Curve, Measured]) -> str:
    """The last point of every curve, and its speed, in Markdown."""
    lines = [
        "| data | latents | learner | step size | samples | train bound | test bound "
        "| samples/s | min per 10⁶ |",
        "|---" * 9 + "|",
    ]
    for curve, of in sorted(measured.items(), key=lambda item: _place(item[0])):
        speed = of.samples_per_second
        cells = [
            NAMES[curve.dataset],
            str(curve.latent_dim),
            STYLES[curve.learner]["label"],
            f"{of.header['step_size']:g}",
            f"{of.samples[-1]:,}{_remark(of)}",
            *(mean_and_stderr(of.bounds[part][-1]) for part in ("train", "test")),
            "" if math.isnan(speed) else f"{speed:,.0f}",
            "" if math.isnan(speed) else f"{1e6 / speed / 60:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def difference_table(pairs: Iterable[tuple[Measured, Measured]]) -> str:
    """AEVB's test bound less wake-sleep's, seed by seed, at the last checkpoint that both have."""
    lines = [
        "| data | latents | samples | AEVB less wake-sleep, test | checkpoints with AEVB above |",
        "|---" * 5 + "|",
    ]
    for aevb, other in sorted(pairs, key=lambda pair: _place(pair[0].curve)):
        common, i, j = np.intersect1d(aevb.samples, other.samples, return_indices=True)
        if not len(common) or aevb.header["seeds"] != other.header["seeds"]:
            continue
        difference = aevb.bounds["test"][i] - other.bounds["test"][j]
        above = int((difference > 0).all(axis=1).sum())
        cells = [
            NAMES[aevb.curve.dataset],
            str(aevb.curve.latent_dim),
            f"{common[-1]:,}",
            mean_and_stderr(difference[-1]),
            f"{above} of {len(common)}, with every seed",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _place(curve: Curve) -> tuple[Any, ...]:
    return list(paper.SETTINGS).index(curve.dataset), curve.latent_dim, curve.learner


def _remark(of: Measured) -> str:
    if of.not_finite is not None:
        return f" (then not finite, seeds {of.not_finite['not_finite']})"
    return "" if of.is_whole else " (stopped)"


def mean_and_stderr(by_seed: np.ndarray) -> str:
    """The mean over seeds ± its standard error; of one seed its number alone."""
    if len(by_seed) == 1:
        return f"{by_seed[0]:.2f}"
    return f"{by_seed.mean():.2f} ± {by_seed.std(ddof=1) / math.sqrt(len(by_seed)):.2f}"
