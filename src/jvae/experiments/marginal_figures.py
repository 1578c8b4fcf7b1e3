"""Figures and tables of log p(x) against samples, and of its estimators, from the record alone."""

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
from jvae.experiments.records import Record
from jvae.experiments.run_folder import RunFolderError

ESTIMATORS = {"app_d": "App. D", "importance_sampling": "importance sampling"}
MARKERS = {"train": "o", "test": "^"}
STARS = {"train": "*", "test": "P"}
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
            if compared := _of(record, "estimators"):
                differences(compared).savefig(folder / f"{path.stem}-estimators.png", dpi=110)
                text = f"{text}\n{estimator_table(compared)}"
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
    """A panel for each number of training images, laid out as the paper's Figure 3.

    Lines are means over images and seeds, bands reach from the lowest seed to the highest. A star
    is a line's end less what App. D gives more than AIS on the images that both have.
    """
    points, compared = _of(record, "curve"), _of(record, "estimators")
    nums = _panels(points)
    figure = Figure(figsize=(4.2 * len(nums) + 0.5, 4.0), layout="constrained")
    first = None
    for column, num in enumerate(nums):
        axes: Axes = figure.add_subplot(1, len(nums), column + 1, sharey=first)
        first = first or axes
        for method, style in curve_figures.STYLES.items():
            own = [p for p in points if (p["num_examples"], p["method"]) == (num, method)]
            for part, linestyle in curve_figures.LINES.items() if own else ():
                by_seed = np.array([p.get(f"{part}_by_seed", [p[part]]) for p in own])
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
                for other in compared:
                    if (other["num_examples"], other["method"], other["part"]) == (
                        num,
                        method,
                        part,
                    ):
                        axes.scatter(
                            own[-1]["samples"],
                            own[-1][part] - other["app_d_less_ais"],
                            marker=STARS[part],
                            s=70,
                            color=style["color"],
                            label=f"{style['label']}, {part}, by AIS",
                        )
        axes.set_xscale("log")
        axes.set_xlabel("training samples evaluated")
        axes.set_title(f"N = {num:,}", fontsize="medium")
        axes.tick_params(labelleft=column == 0)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("log p(x) by App. D, nats an image")
    figure.suptitle(_title(record.header), fontsize="medium")
    _legend(figure)
    return figure


def _title(header: Mapping[str, Any]) -> str:
    grey = "grey targets as in the paper: no likelihood of any data"
    what = grey if header["targets"] == "grey" else "pixels drawn at each visit"
    seeds = len(header["seeds"])
    name = curve_figures.NAMES[header["dataset"]]
    return f"{name}, {what}; {seeds} seed{'s' if seeds > 1 else ''}"


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
    rows = [name for name in ESTIMATORS if any(f"{name}_by_image" in point for point in points)]
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
        "| N | method | step size | samples | log p(x), train | log p(x), test | min per 10⁶ |",
        "|---" * 7 + "|",
    ]
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for point in _of(record, "curve"):
        found.setdefault((point["num_examples"], point["method"]), []).append(point)
    for (num, method), own in sorted(found.items()):
        point, minutes = own[-1], _minutes_per_million(own, len(record.header["seeds"]))
        cells = [
            f"{num:,}",
            curve_figures.STYLES[method]["label"],
            f"{point['step_size']:g}",
            f"{point['samples']:,}",
            *(_with_error(point, part) for part in ("train", "test")),
            "" if math.isnan(minutes) else f"{minutes:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _minutes_per_million(points: Points, num_seeds: int) -> float:
    """After the first checkpoints, in which programs are compiled."""
    middle, last = points[len(points) // 2], points[-1]
    samples = num_seeds * (last["samples"] - middle["samples"])
    seconds = float(last["seconds"] - middle["seconds"])
    return seconds / samples * 1e6 / 60 if samples else math.nan


def estimator_table(points: Points) -> str:
    """How the estimators agree on the same images, in Markdown."""
    lines = [
        "| N | method | images | AIS | its own error | App. D less AIS | rms | most "
        "| its own error | least ESS of 50 | IS less AIS | rms | least ESS |",
        "|---" * 13 + "|",
    ]
    for point in points:
        own = [
            _with_error(point, "app_d_less_ais"),
            f"{point['app_d_less_ais_rms']:.2f}",
            f"{point['app_d_less_ais_most']:.2f}",
            f"{point['app_d_own_stderr']:.2f}",
            f"{point['app_d_ess']['least']:.1f}",
        ]
        importance = ["", "", ""]
        if "importance_sampling" in point:
            importance = [
                _with_error(point, "importance_sampling_less_ais"),
                f"{point['importance_sampling_less_ais_rms']:.2f}",
                f"{point['importance_sampling_ess']['least']:.1f}",
            ]
        cells = [
            f"{point['num_examples']:,}",
            curve_figures.STYLES[point["method"]]["label"],
            f"{point['num_images']} {point['part']}",
            _with_error(point, "ais"),
            f"{point['ais_own_stderr']:.2f}",
            *own,
            *importance,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _with_error(point: Mapping[str, Any], name: str) -> str:
    stderr = point[f"{name}_stderr"]
    return f"{point[name]:.2f}" + ("" if math.isnan(stderr) else f" ± {stderr:.2f}")
