"""Tables and figures of the study of estimators, from its records alone."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import rich.box
import rich.console
import rich.table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jvae.experiments import slopes
from jvae.experiments.gradient_moments import NETWORKS, Measures, Squared, from_json
from jvae.experiments.run_folder import RunFolderError

# Slopes are asymptotic: they are fitted to so many of the largest K.
FITTED = 3
# Okabe & Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, BLACK = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#000000"),
)
WORDS = {"phi": "encoder φ", "theta": "decoder θ"}
COLOURS = {"phi": BLUE, "theta": ORANGE}
# The comparison of Rainforth et al. (2018) and the estimator that mends what they found.
COMPARED = {
    "sgvb_a": ("ELBO of K draws", BLACK, "s"),
    "iwae": ("IWAE", RED, "o"),
    "miwae": ("MIWAE", ORANGE, "^"),
    "ciwae": ("CIWAE", GREEN, "D"),
    "piwae": ("PIWAE", PURPLE, "v"),
    "dreg": ("DReG", BLUE, "P"),
}


class Slopes(NamedTuple):
    """Of log SNR against log K as K → ∞; None where the network has no gradient."""

    phi: float | None
    theta: float | None


# The noise of K draws is K^-½. The signal stays where the limit of the estimate depends on the
# network. For the encoder of a bound that tends to log p(x) it falls as 1 / K: Rainforth et al.
# (2018), Theorem 1, and so for VIMCO's scores. DReG's noise is K^-3/2: Tucker et al. (2019).
RISES, FALLS = 0.5, -0.5
THEORY: Mapping[str, Slopes] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                *("elbo", "sgvb_a", "stl", "score_function", "beta_elbo", "free_bits_elbo"),
                *("dreg", "ciwae", "renyi", "tvo", "rws", "cubo"),
            ),
            Slopes(RISES, RISES),
        ),
        **dict.fromkeys(("iwae", "vimco", "miwae", "piwae"), Slopes(FALLS, RISES)),
        "wake_theta": Slopes(None, RISES),
        "wake_phi": Slopes(RISES, None),
        "sleep_phi": Slopes(RISES, None),
    }
)


class Point(NamedTuple):
    """What was measured of an estimator at one K; a network without a gradient has no measures."""

    num_samples: int
    measures: Mapping[str, Measures | None]
    relative_time: float


class Study(NamedTuple):
    """The records of one model.

    Attributes:
      settings: of the study, and what ran.
      points: by estimator, in rising K.
    """

    settings: dict[str, Any]
    points: dict[str, list[Point]]

    @property
    def title(self) -> str:
        """The model, the batch and the number of draws."""
        model = {"exact": "linear-Gaussian model", "mnist": "VAE of MNIST's digits"}
        what = model[self.settings["model"]]
        return (
            f"{what}, mean over {self.settings['batch_size']} examples, "
            f"{self.settings['draws']:,} draws"
        )


def read(path: Path) -> Study:
    """The records in a file; a last line cut short does not count.

    Raises:
      RunFolderError: they are no records of a study.
    """
    lines = path.read_text("utf-8").splitlines(keepends=True)
    try:
        settings, *records = [json.loads(line) for line in lines if line.endswith("\n")]
        points: dict[str, list[Point]] = {}
        for record in records:
            if record["kind"] == "point":
                measures = {n: record[n] and from_json(record[n]) for n in NETWORKS}
                point = Point(record["num_samples"], measures, record["relative_time"])
                points.setdefault(record["estimator"], []).append(point)
        if settings["kind"] != "study":
            raise ValueError("the first line is no study's")
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path} holds no records of a study: {error!r}") from error
    return Study(settings, points)


def draw_folder(folder: Path, console: rich.console.Console) -> None:
    """Print the table of every study in a folder, and write its figures there.

    Raises:
      RunFolderError: there is none.
    """
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise RunFolderError(f"{folder} holds no records: no .jsonl file")
    for path in paths:
        study = read(path)
        console.print(table(study))
        for name, figure in figures(study).items():
            figure.savefig(folder / f"{path.stem}-{name}.png", dpi=130)
    console.print(f"Records and figures are in {folder}", soft_wrap=True)


def fitted_slope(
    points: Iterable[Point], network: str, measure: Callable[[Measures], Squared]
) -> slopes.Slope | None:
    """Of log √measure against log K, over the last `FITTED` points that are resolved."""
    found = [
        (point.num_samples, measure(measures))
        for point in points
        if (measures := point.measures[network]) is not None
    ]
    resolved = [(k, squared) for k, squared in found[-FITTED:] if squared.is_resolved]
    if len(resolved) < 2:
        return None
    ks, squares = zip(*resolved, strict=True)
    return slopes.log_log(ks, [s.root for s in squares], [s.root_stderr for s in squares])


def table(study: Study) -> rich.table.Table:
    """Fitted slopes beside those of theory, in Markdown."""
    columns = [
        heading
        for network in NETWORKS
        for heading in (
            f"{WORDS[network]}: theory",
            "slope of SNR",
            "of ‖E g‖ / noise",
            "SNR, largest K",
        )
    ]
    result = rich.table.Table(
        "estimator", *columns, "time", box=rich.box.MARKDOWN, title=study.title
    )
    for name, points in study.points.items():
        cells = []
        for network in NETWORKS:
            theory = getattr(THEORY.get(name, Slopes(None, None)), network)
            last = points[-1].measures[network]
            if last is None:
                cells += ["–"] * 4
                continue
            cells += [
                "–" if theory is None else f"{theory:+.1f}",
                str(fitted_slope(points, network, lambda m: m.snr) or "not resolved"),
                str(fitted_slope(points, network, lambda m: m.snr_of_length) or "not resolved"),
                _with_error(last.snr),
            ]
        result.add_row(f"`{name}`", *cells, f"{points[-1].relative_time:.1f}")
    return result


def _with_error(squared: Squared) -> str:
    if not squared.is_resolved:
        return f"< {math.sqrt(max(squared.square, 0) + 2 * squared.stderr):.2g}"
    digits = max(0, 1 - math.floor(math.log10(squared.root_stderr)))
    return f"{squared.root:.{digits}f} ± {squared.root_stderr:.{digits}f}"


def figures(study: Study) -> dict[str, Figure]:
    """The figures that the records are enough for, by name."""
    found = {"all": each_estimator(study), "cost": cost(study)}
    if study.points.keys() & COMPARED.keys():
        found["snr"] = comparison(study)
    if any(m and m.bias for p in study.points.values() for m in p[0].measures.values()):
        found["bias"] = bias_and_noise(study)
    return found


def comparison(study: Study) -> Figure:
    """The signal-to-noise ratios of Rainforth et al. (2018), Section 4, against K."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    for i, network in enumerate(NETWORKS):
        axes: Axes = figure.add_subplot(1, 2, i + 1)
        for name, (label, colour, marker) in COMPARED.items():
            points = study.points.get(name, [])
            _curve(axes, points, network, lambda m: m.snr, label=label, color=colour, marker=marker)
        _log_axes(axes, study)
        axes.set_title(WORDS[network])
        axes.set_xlabel("number of samples K")
        _triangle(axes, RISES, (0.06, 0.80))
        if network == "phi":
            _triangle(axes, FALLS, (0.06, 0.06))
    figure.axes[0].set_ylabel("signal-to-noise ratio\nof the gradient")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(COMPARED), frameon=False)
    figure.suptitle(study.title, fontsize="medium")
    return figure


def each_estimator(study: Study) -> Figure:
    """A panel for each estimator: its two signal-to-noise ratios, and the slopes of theory."""
    figure = _panels(study, "SNR")
    for axes, (name, points) in zip(figure.axes, study.points.items(), strict=False):
        for network in NETWORKS:
            colour = COLOURS[network]
            _curve(
                axes,
                points,
                network,
                lambda m: m.snr,
                label=WORDS[network],
                color=colour,
                marker="o",
            )
            slope = getattr(THEORY.get(name, Slopes(None, None)), network)
            last = points[-1].measures[network]
            if slope is None or last is None or not last.snr.is_resolved:
                continue
            ks = [p.num_samples for p in points]
            guide = [last.snr.root * (k / ks[-1]) ** slope for k in ks]
            axes.plot(ks, guide, color=colour, linestyle=":", linewidth=1.2, label="theory's slope")
    return _finished(figure, study)


def bias_and_noise(study: Study) -> Figure:
    """A panel for each estimator: how far its mean and its draws are from the limit, K → ∞."""
    figure = _panels(study, "nats per unit of weight")
    for axes, (_, points) in zip(figure.axes, study.points.items(), strict=False):
        for network in NETWORKS:
            colour, word = COLOURS[network], WORDS[network]
            found = [
                (p.num_samples, m.noise) for p in points if (m := p.measures[network]) is not None
            ]
            if found:
                axes.plot(
                    *zip(*found, strict=True),
                    color=colour,
                    linestyle="--",
                    label=f"noise, {word}",
                    linewidth=1.2,
                )
            _curve(
                axes,
                points,
                network,
                lambda m: m.bias or Squared(0, 0),
                label=f"bias, {word}",
                color=colour,
                marker="o",
            )
    return _finished(figure, study)


def cost(study: Study) -> Figure:
    """The time of a gradient for each estimator and K."""
    names = list(study.points)[::-1]
    figure = Figure(figsize=(7, 1.2 + 0.28 * len(names)), layout="constrained")
    axes: Axes = figure.add_subplot()
    ks = sorted({p.num_samples for points in study.points.values() for p in points})
    for i, k in enumerate(ks):
        shade = str(0.8 - 0.8 * i / max(1, len(ks) - 1))
        found = [
            (p.relative_time, row)
            for row, name in enumerate(names)
            for p in study.points[name]
            if p.num_samples == k
        ]
        axes.plot(
            *zip(*found, strict=True),
            "o",
            color=shade,
            markeredgecolor="black",
            markeredgewidth=0.5,
            label=f"K = {k}",
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_xscale("log")
    axes.set_xlabel("time of a gradient over that of `elbo` with K = 1")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(6, len(ks)), frameon=False)
    figure.suptitle(study.title, fontsize="medium")
    return figure


def _curve(
    axes: Axes,
    points: Iterable[Point],
    network: str,
    measure: Callable[[Measures], Squared],
    **style: Any,
) -> None:
    """The points that are resolved, with two standard errors each way."""
    found = [
        (p.num_samples, squared.root, 2 * squared.root_stderr)
        for p in points
        if (m := p.measures[network]) is not None and (squared := measure(m)).is_resolved
    ]
    if found:
        ks, values, errors = zip(*found, strict=True)
        # On a log axis the lower end must stay above 0.
        low = [min(e, 0.9 * v) for v, e in zip(values, errors, strict=True)]
        axes.errorbar(ks, values, yerr=[low, errors], markersize=5, linewidth=1.5, **style)


def _log_axes(axes: Axes, study: Study) -> None:
    ks = sorted({p.num_samples for points in study.points.values() for p in points})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(ks[0] / 1.4, ks[-1] * 1.4)
    axes.grid(alpha=0.3)


def _triangle(axes: Axes, slope: float, corner: tuple[float, float]) -> None:
    """A short line of that slope, at a place in the axes' own units from 0 to 1."""
    to_data = axes.transAxes + axes.transData.inverted()
    x, y = to_data.transform(corner)
    end = 4 * x
    axes.plot([x, end], [y, y * 4**slope], color="grey", linewidth=3, alpha=0.6, zorder=0)
    axes.annotate(
        f"slope {slope:+.1f}".replace("-", "−"),
        (end, y * 4**slope),
        color="grey",
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
    )


def _panels(study: Study, ylabel: str) -> Figure:
    """Axes for each estimator, all of one scale."""
    num = len(study.points)
    across = min(5, num)
    down = -(-num // across)
    figure = Figure(figsize=(2.4 * across + 0.6, 2.0 * down + 1.2), layout="constrained")
    first = None
    for i, name in enumerate(study.points):
        axes = figure.add_subplot(down, across, i + 1, sharex=first, sharey=first)
        first = first or axes
        axes.set_title(name, fontsize="medium", family="monospace")
        if i % across == 0:
            axes.set_ylabel(ylabel)
        else:
            axes.tick_params(labelleft=False)
        if i + across >= num:
            axes.set_xlabel("K")
        else:
            axes.tick_params(labelbottom=False)
    return figure


def _finished(figure: Figure, study: Study) -> Figure:
    for axes in figure.axes:
        _log_axes(axes, study)
        axes.tick_params(labelsize="small")
    labelled = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labelled.setdefault(label, handle)
    figure.legend(
        labelled.values(), labelled.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.suptitle(study.title, fontsize="medium")
    return figure
