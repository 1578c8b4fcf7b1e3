"""Figure and table of the study of full variational Bayes, from its record alone."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import rich.console
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jvae import plotting
from jvae.experiments import records
from jvae.experiments.curve_figures import LINES, NAMES, mean_and_stderr
from jvae.experiments.curves import samples_per_second
from jvae.experiments.run_folder import RunFolderError

STYLES: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "map": {"label": "MAP", "color": plotting.BLUE},
        "full_bayes": {"label": "full Bayes", "color": plotting.ORANGE},
        "local_full_bayes": {"label": "full Bayes, local", "color": plotting.GREEN},
    }
)
# The vertical range is that of the last so many times more samples.
SHOWN = 10
_GAP = "train less test"


class Measured(NamedTuple):
    """A curve as it was recorded.

    Attributes:
      num_train: training examples.
      method: a name in `STYLES`.
      step_size: of Adagrad.
      samples: [points].
      seconds: [points], of training all seeds up to there.
      bounds: "train", "test" and, of q(θ), "train_at_mean" and "test_at_mean", each
        [points, seeds] nats an example.
      kl: KL(q(θ) ‖ p(θ)) [points, seeds] nats, or None.
    """

    num_train: int
    method: str
    step_size: float
    samples: np.ndarray
    seconds: np.ndarray
    bounds: dict[str, np.ndarray]
    kl: np.ndarray | None

    @property
    def seconds_a_sample(self) -> float:
        """Of training."""
        num_seeds = self.bounds["test"].shape[1]
        return 1 / samples_per_second(self.samples, self.seconds, num_seeds)

    @property
    def gap(self) -> np.ndarray:
        """By how much training examples are better than new ones, [points, seeds] nats."""
        return self.bounds["train"] - self.bounds["test"]

    @property
    def objective(self) -> np.ndarray | None:
        """The bound on log p(X) over N, on the training examples shown: [points, seeds] nats."""
        return None if self.kl is None else self.bounds["train"] - self.kl / self.num_train


class Study(NamedTuple):
    """The record of a study: its header, and its curves in their order."""

    header: dict[str, Any]
    curves: list[Measured]

    @property
    def title(self) -> str:
        """The data, the model and the seeds."""
        of = self.header
        stamp = "grey targets, no likelihood of any data"
        what = stamp if of["targets"] == "grey" else "pixels drawn at each visit"
        seeds = "1 seed" if of["seeds"] == 1 else f"median and range of {of['seeds']} seeds"
        return (
            f"{NAMES[of['dataset']]}, {of['latent_dim']} latents, {of['hidden']} hidden units; "
            f"{what}; {seeds}"
        )


def read(path: Path) -> Study:
    """The curves in a record that have points.

    Raises:
      RunFolderError: it is no record of this study, or has no points.
    """
    if not path.exists():
        raise RunFolderError(f"{path.parent} holds no record: no {path.name}")
    record = records.read(path)
    try:
        curves = [
            _measured(of, points)
            for of in record.header["curves"]
            if (points := [p for p in record.points if _is_of(p, of)])
        ]
        study = Study(record.header, curves)
        str(study.title)
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{path} holds no record of full Bayes: {error!r}") from error
    if not curves:
        raise RunFolderError(f"{path} holds no measurement")
    return study


def _is_of(point: Mapping[str, Any], curve: Mapping[str, Any]) -> bool:
    return all(point[name] == curve[name] for name in ("num_train", "method"))


def _measured(curve: Mapping[str, Any], points: list[dict[str, Any]]) -> Measured:
    def by_seed(name: str) -> np.ndarray:
        rows = [point.get(f"{name}_by_seed", [point.get(name)]) for point in points]
        return np.array(rows, np.float64).reshape(len(points), -1)

    parts = ("train", "test", "train_at_mean", "test_at_mean")
    return Measured(
        num_train=curve["num_train"],
        method=curve["method"],
        step_size=curve["step_size"],
        samples=np.array([point["samples"] for point in points], np.int64),
        seconds=np.array([point["seconds"] for point in points], np.float64),
        bounds={part: by_seed(part) for part in parts if part in points[0]},
        kl=by_seed("kl_of_weights") if "kl_of_weights_by_seed" in points[0] else None,
    )


def draw(path: Path, console: rich.console.Console) -> None:
    """Write the figure and the table of a record beside it, and print the table.

    Raises:
      RunFolderError: as `read`.
    """
    study = read(path)
    text = f"{study.title}\n\n{table(study)}"
    path.with_suffix(".md").write_text(text, "utf-8")
    console.print(text, markup=False, soft_wrap=True)
    figure(study).savefig(path.with_suffix(".png"), dpi=110)
    console.print(f"Record and figure are in {path.parent}", soft_wrap=True)


def figure(study: Study) -> Figure:
    """Above the bounds against training samples, below what training examples are better by.

    A column for each size of the training set. Lines are medians over seeds, bands reach from the
    lowest to the highest. The vertical ranges hold both for the last decade.
    """
    sizes = list(dict.fromkeys(of.num_train for of in study.curves))
    result = Figure(figsize=(4.2 * len(sizes) + 0.9, 7), layout="constrained")
    first: dict[int, Axes] = {}
    for column, num_train in enumerate(sizes):
        of_column = [of for of in study.curves if of.num_train == num_train]
        for row in range(2):
            place = row * len(sizes) + column + 1
            axes: Axes = result.add_subplot(2, len(sizes), place, sharex=first.get(0))
            first.setdefault(row, axes)
            shown: list[np.ndarray] = []
            for of in of_column:
                curves = of.bounds if row == 0 else {_GAP: of.gap}
                for part, line in (LINES | {_GAP: ":"}).items():
                    if part in curves:
                        shown.append(_draw(axes, of, curves[part], line, part))
            axes.set_xscale("log")
            axes.set_ylim(*_range([*shown, np.zeros(row)]))
            axes.grid(alpha=0.3)
            if row == 0:
                axes.set_title(f"{num_train:,} training examples", fontsize="medium")
            else:
                axes.set_xlabel("training samples evaluated")
    first[0].set_ylabel("bound, nats an image")
    first[1].set_ylabel(f"{_GAP}, nats an image")
    result.suptitle(study.title, fontsize="medium")
    lines = [line for axes in result.axes for line in axes.get_lines()]
    handles = {str(line.get_label()): line for line in lines}
    by_method = sorted(handles, key=lambda label: label.rpartition(", ")[0])
    result.legend(
        [handles[label] for label in by_method],
        by_method,
        loc="outside lower center",
        ncols=len(STYLES),
        frameon=False,
    )
    return result


def _draw(axes: Axes, of: Measured, by_seed: np.ndarray, line: str, part: str) -> np.ndarray:
    """A curve with its band; the values of its last decade."""
    style = STYLES[of.method]
    median = np.median(by_seed, axis=1)
    label = f"{style['label']}, {part}"
    plotting.banded(
        axes, of.samples, median, by_seed, color=style["color"], linestyle=line, label=label
    )
    return by_seed[of.samples * SHOWN >= of.samples[-1]].ravel()


def _range(shown: Iterable[np.ndarray]) -> tuple[float, float]:
    values = np.concatenate(list(shown))
    low, high = float(values.min()), float(values.max())
    room = 0.08 * (high - low) + 1e-3 * abs(high) + 1e-6
    return low - room, high + room


def table(study: Study) -> str:
    """The last point of every curve, in Markdown: mean ± standard error over seeds."""
    header = [
        *("examples", "method", "step size", "samples", "train bound", "test bound"),
        *(_GAP, "best test bound, chosen on test", "test at mean θ"),
        *("KL(q(θ) ‖ p(θ)) / N", "bound of App. F / N", "time, of MAP's"),
    ]
    rows = [header, ["---"] * len(header)]
    seconds = {of.num_train: of.seconds_a_sample for of in study.curves if of.method == "map"}
    for of in study.curves:
        kl = None if of.kl is None else of.kl / of.num_train
        best = int(np.argmax(of.bounds["test"].mean(axis=1)))
        slower = of.seconds_a_sample / seconds.get(of.num_train, math.nan)
        rows.append(
            [
                f"{of.num_train:,}",
                STYLES[of.method]["label"],
                f"{of.step_size:g}",
                f"{of.samples[-1]:,}",
                *(_last(values) for values in (of.bounds["train"], of.bounds["test"], of.gap)),
                f"{of.bounds['test'][best].mean():.2f} at {of.samples[best]:,}",
                *(_last(values) for values in (of.bounds.get("test_at_mean"), kl, of.objective)),
                "" if math.isnan(slower) else f"{slower:.1f}",
            ]
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _last(by_seed: np.ndarray | None) -> str:
    return "" if by_seed is None else mean_and_stderr(by_seed[-1])
