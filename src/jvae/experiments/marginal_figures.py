"""Figures and tables of log p(x) against samples, and of its estimators, from the record alone."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jvae import plotting
from jvae.experiments import curve_figures, records
from jvae.experiments.curves import samples_per_second
from jvae.experiments.records import Record
from jvae.experiments.run_folder import RunFolderError

# In the order of the rows of figures; the last two are compared with the first.
ESTIMATORS = {"ais": "AIS", "app_d": "App. D", "importance_sampling": "importance sampling"}
DRAWN = ("ais", "app_d")
MARKERS = {"train": "o", "test": "^"}
Points = Sequence[Mapping[str, Any]]


def draw_folder(folder: Path, console: rich.console.Console) -> None:
    """Draw and print every record in a folder, TARGETS.jsonl.

    Raises:
      RunFolderError: there is none, or one has no point of such a study.
    """
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise RunFolderError(f"{folder} holds no records: no TARGETS.jsonl")
    for path in paths:
        record = records.read(path)
        try:
            curves(record).savefig(path.with_suffix(".png"), dpi=110)
            text = table(record)
            if ends := _of(record, "end"):
                differences(ends).savefig(folder / f"{path.stem}-estimators.png", dpi=110)
                text = f"{text}\n{estimator_table(ends)}"
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"{path} holds no curves of log p(x): {error!r}") from error
        path.with_suffix(".md").write_text(text, "utf-8")
        console.print(f"{path.stem} targets\n\n{text}", markup=False, soft_wrap=True)
    console.print(f"The record and the figures are in {folder}", soft_wrap=True)


def _of(record: Record, measure: str) -> list[dict[str, Any]]:
    return [point for point in record.points if point["measure"] == measure]


def _panels(points: Points) -> list[int]:
    nums = sorted({point["num_examples"] for point in points})
    if not nums:
        raise ValueError("no points")
    return nums


def curves(record: Record) -> Figure:
    """A column for each number of training images, as in the paper's Figure 3.

    Above by annealed importance sampling, below by App. D as in the paper, of the same images.
    Lines are means over images and seeds, bands reach from the lowest seed to the highest.
    """
    points = _of(record, "curve")
    nums = _panels(points)
    figure = Figure(figsize=(4.2 * len(nums) + 0.5, 6.4), layout="constrained")
    first = None
    for place, (name, num) in enumerate(itertools.product(DRAWN, nums), start=1):
        axes: Axes = figure.add_subplot(len(DRAWN), len(nums), place, sharex=first, sharey=first)
        first = first or axes
        for method, style in curve_figures.STYLES.items():
            own = [p for p in points if (p["num_examples"], p["method"]) == (num, method)]
            for part, linestyle in curve_figures.LINES.items() if own else ():
                by_seed = _by_seed(own, f"{name}_{part}")
                plotting.banded(
                    axes,
                    np.array([p["samples"] for p in own]),
                    by_seed.mean(axis=1),
                    by_seed,
                    color=style["color"],
                    linestyle=linestyle,
                    marker=".",
                    label=f"{style['label']}, {part}",
                )
        axes.set_xscale("log")
        axes.set_title(f"N = {num:,}", fontsize="medium")
        axes.grid(alpha=0.3)
        is_left, is_lowest = num == nums[0], name == DRAWN[-1]
        axes.tick_params(labelleft=is_left, labelbottom=is_lowest)
        axes.set_xlabel("training samples evaluated" if is_lowest else "")
        axes.set_ylabel(f"log p(x) by {ESTIMATORS[name]}, nats" if is_left else "")
    figure.axes[0].set_ylim(*_range(points))
    figure.suptitle(_title(record.header), fontsize="medium")
    _legend(figure)
    return figure


def _by_seed(points: Points, name: str) -> np.ndarray:
    """[points, seeds]."""
    return np.array([point.get(f"{name}_by_seed", [point[name]]) for point in points])


def _range(points: Points) -> tuple[float, float]:
    """All of AIS, and of App. D as much as is near: where it fails it can be anywhere."""
    parts = curve_figures.LINES
    ais = np.concatenate([_by_seed(points, f"ais_{part}").ravel() for part in parts])
    app_d = np.concatenate([_by_seed(points, f"app_d_{part}").ravel() for part in parts])
    low, high = ais.min(), ais.max()
    near = app_d[np.abs(app_d - (low + high) / 2) < high - low]
    low, high = min([low, *near]), max([high, *near])
    room = 0.05 * (high - low) + 1e-3 * abs(high)
    return float(low - room), float(high + room)


def _title(header: Mapping[str, Any]) -> str:
    grey = "grey targets as in the paper: no likelihood of any data"
    what = grey if header["targets"] == "grey" else "pixels drawn at each visit"
    seeds = len(header["seeds"])
    name, images = curve_figures.NAMES[header["dataset"]], header["images"]
    return (
        f"{name}, {what}; {seeds} seed{'s' if seeds > 1 else ''}\n"
        f"means over {images} training and {images} other test images"
    )


def _legend(figure: Figure) -> None:
    handles = {
        str(label): handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=3, frameon=False
    )


def differences(points: Points) -> Figure:
    """Each image's estimate less that of AIS, against the latter: a row for each estimator."""
    nums = _panels(points)
    rows = [name for name in ESTIMATORS if any(f"{name}_less_ais" in point for point in points)]
    figure = Figure(figsize=(4.2 * len(nums) + 0.5, 2.6 * len(rows) + 0.9), layout="constrained")
    for row, name in enumerate(rows):
        for column, num in enumerate(nums):
            axes: Axes = figure.add_subplot(len(rows), len(nums), row * len(nums) + column + 1)
            for point in points:
                if point["num_examples"] == num and f"{name}_by_image" in point:
                    _scatter(axes, point, name)
            axes.axhline(0, color=plotting.BLACK, linewidth=0.8)
            axes.set_yscale("symlog", linthresh=1)
            axes.set_xlabel("log p(x) by AIS, nats" if row == len(rows) - 1 else "")
            axes.grid(alpha=0.3)
            axes.set_title(f"{ESTIMATORS[name]}, N = {num:,}", fontsize="medium")
    figure.supylabel("less that of AIS, nats", fontsize="medium")
    _legend(figure)
    return figure


def _scatter(axes: Axes, point: Mapping[str, Any], name: str) -> None:
    style = curve_figures.STYLES[point["method"]]
    ais = np.array(point["ais_by_image"])
    axes.scatter(
        ais,
        np.array(point[f"{name}_by_image"]) - ais,
        s=12,
        alpha=0.6,
        color=style["color"],
        marker=MARKERS[point["part"]],
        linewidths=0,
        label=f"{style['label']}, {point['part']}",
    )


def table(record: Record) -> str:
    """The last point of every curve, in Markdown."""
    lines = [
        "| N | method | step size | samples | AIS, train | AIS, test "
        "| App. D, train | App. D, test | min per 10⁶ |",
        "|---" * 9 + "|",
    ]
    sizes = {_curve(point): point["step_size"] for point in _of(record, "step size")}
    not_finite = {_curve(point) for point in _of(record, "not finite")}
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for point in _of(record, "curve"):
        found.setdefault(_curve(point), []).append(point)
    for curve, own in sorted(found.items()):
        num, method = curve
        speed = samples_per_second(
            [point["samples"] for point in own],
            [point["seconds"] for point in own],
            len(record.header["seeds"]),
        )
        cells = [
            f"{num:,}",
            curve_figures.STYLES[method]["label"],
            f"{sizes[curve]:g}",
            f"{own[-1]['samples']:,}" + (" (then not finite)" if curve in not_finite else ""),
            *(_with_error(own[-1], f"{name}_{part}") for name in DRAWN for part in MARKERS),
            "" if math.isnan(speed) else f"{1e6 / speed / 60:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    num, over = record.header["images"], record.header["stderr_over"]
    return "\n".join([*lines, "", f"Of {num} images; ± is the standard error over {over}.", ""])


def _curve(point: Mapping[str, Any]) -> tuple[int, str]:
    return point["num_examples"], point["method"]


def estimator_table(points: Points) -> str:
    """How the estimators agree on the same images, and methods by AIS, in Markdown."""
    lines = [
        "| N | method | images | AIS | its own error | its median ESS | less AEVB's "
        "| App. D less AIS | rms | most | its own error | median ESS of 50 | too low, 3 errors "
        "| IS less AIS | rms | median ESS |",
        "|---" * 16 + "|",
    ]
    by_image = {(_curve(point), point["part"]): point["ais_by_image"] for point in points}
    for point in points:
        of_aevb = by_image.get(((point["num_examples"], "aevb"), point["part"]))
        cells = [
            f"{point['num_examples']:,}",
            curve_figures.STYLES[point["method"]]["label"],
            f"{point['num_images']} {point['part']}",
            _with_error(point, "ais"),
            f"{point['ais_own_stderr']:.2f}",
            f"{point['ais_ess']['median']:.1f}",
            "" if of_aevb is None or point["method"] == "aevb" else _less(point, of_aevb),
            _with_error(point, "app_d_less_ais"),
            f"{point['app_d_less_ais_rms']:.2f}",
            f"{point['app_d_less_ais_most']:.2f}",
            f"{point['app_d_own_stderr']:.2f}",
            f"{point['app_d_ess']['median']:.1f}",
            f"{100 * point['app_d_below_ais']:.0f} %",
        ]
        importance = ["", "", ""]
        if "importance_sampling" in point:
            importance = [
                _with_error(point, "importance_sampling_less_ais"),
                f"{point['importance_sampling_less_ais_rms']:.2f}",
                f"{point['importance_sampling_ess']['median']:.1f}",
            ]
        lines.append(f"| {' | '.join([*cells, *importance])} |")
    key = (
        "Under the first seed; ± is the standard error over images. Its own error: root mean "
        "square over images of what an estimate says of itself. Rms, most: of differences by "
        "image. Too low, 3 errors: share of images below AIS by more than 3 errors of both."
    )
    return "\n".join([*lines, "", key, ""])


def _less(point: Mapping[str, Any], of_aevb: Sequence[float]) -> str:
    """The mean difference of log p(x) of the same images, with its error."""
    difference = np.subtract(point["ais_by_image"], of_aevb)
    stderr = difference.std(ddof=1) / math.sqrt(len(difference))
    return f"{difference.mean():.2f} ± {stderr:.2f}"


def _with_error(point: Mapping[str, Any], name: str) -> str:
    stderr = point[f"{name}_stderr"]
    return f"{point[name]:.2f}" + ("" if math.isnan(stderr) else f" ± {stderr:.2f}")
