"""Tables and figures of the study of estimators, from its records alone."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import rich.console
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from jvae.estimators import TABLE
from jvae.experiments import records, slopes
from jvae.experiments.gradient_moments import NETWORKS, Measures, Squared, from_json
from jvae.experiments.run_folder import RunFolderError
from jvae.plotting import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED

# Slopes are asymptotic: they are fitted to so many of the largest K.
FITTED = 3
WORDS = {"phi": "encoder φ", "theta": "decoder θ"}
SYMBOLS = {"phi": "φ", "theta": "θ"}
COLOURS = {"phi": BLUE, "theta": ORANGE}
# The comparison of Rainforth et al. (2018) and the estimator that mends what they found.
COMPARED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sgvb_a": {"label": "ELBO of K draws", "color": BLACK, "marker": "s"},
        # Its decoder's curve lies under DReG's.
        "iwae": {
            "label": "IWAE",
            "color": RED,
            "marker": "o",
            "markersize": 11,
            "markerfacecolor": "none",
        },
        "miwae": {"label": "MIWAE", "color": ORANGE, "marker": "^"},
        "ciwae": {"label": "CIWAE", "color": GREEN, "marker": "D"},
        "piwae": {"label": "PIWAE", "color": PURPLE, "marker": "v"},
        "dreg": {"label": "DReG", "color": BLUE, "marker": "P"},
    }
)


class Slopes(NamedTuple):
    """Of log SNR against log K as K → ∞; None where the network has no gradient."""

    phi: float | None
    theta: float | None


UNKNOWN = Slopes(None, None)
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
      points: by estimator, in the order of README's table and in rising K.
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
      RunFolderError: they are no records of this study.
    """
    record = records.read(path)
    points: dict[str, list[Point]] = {}
    try:
        for found in record.points:
            measures = {n: found[n] and from_json(found[n]) for n in NETWORKS}
            point = Point(found["num_samples"], measures, found["relative_time"])
            points.setdefault(found["estimator"], []).append(point)
    except (KeyError, TypeError) as error:
        raise RunFolderError(f"{path} holds no records of estimators: {error!r}") from error
    known = [name for name in TABLE if name in points]
    return Study(record.header, {name: points[name] for name in [*known, *(points.keys() - known)]})


def draw_folder(folder: Path, console: rich.console.Console) -> None:
    """Write the table and the figures of every study in a folder there, and print the tables.

    Raises:
      RunFolderError: there is none.
    """
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise RunFolderError(f"{folder} holds no records: no .jsonl file")
    for path in paths:
        study = read(path)
        if not study.points:
            raise RunFolderError(f"{path} holds no measurement")
        text = f"{study.title}\n\n{table(study)}"
        path.with_suffix(".md").write_text(text, "utf-8")
        console.print(text, markup=False, soft_wrap=True)
        for name, figure in figures(study).items():
            figure.savefig(folder / f"{path.stem}-{name}.png", dpi=110)
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


def table(study: Study) -> str:
    """Fitted slopes beside those of theory, in Markdown."""
    header = ["estimator"]
    for network in NETWORKS:
        header += [f"{SYMBOLS[network]}: theory", "slope of SNR", "slope of ‖E g‖ / noise", "SNR"]
    rows = [[*header, "time"], ["---"] * (len(header) + 1)]
    for name, points in study.points.items():
        cells = [f"`{name}`"]
        for network in NETWORKS:
            theory = getattr(THEORY.get(name, UNKNOWN), network)
            last = points[-1].measures[network]
            if last is None:
                cells += [""] * 4
                continue
            cells += [
                "?" if theory is None else _sign(f"{theory:+.1f}"),
                *(
                    _sign(str(fitted_slope(points, network, measure) or "not resolved"))
                    for measure in (_snr, _snr_of_length)
                ),
                _with_error(last.snr),
            ]
        rows.append([*cells, f"{points[-1].relative_time:.1f}"])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _snr(measures: Measures) -> Squared:
    return measures.snr


def _snr_of_length(measures: Measures) -> Squared:
    return measures.snr_of_length


def _bias(measures: Measures) -> Squared:
    return measures.bias or Squared(0.0, 0.0)


def _sign(number: str) -> str:
    return number.replace("-", "−")


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
    figure = Figure(figsize=(10, 5), layout="constrained")
    first = None
    for i, network in enumerate(NETWORKS):
        axes: Axes = figure.add_subplot(1, 2, i + 1, sharey=first)
        first = first or axes
        for name, style in COMPARED.items():
            _curve(axes, study.points.get(name, []), network, _snr, **style)
        _log_axes(axes, study)
        axes.set_title(WORDS[network])
        axes.set_xlabel("number of samples K")
    low, high = figure.axes[0].get_ylim()
    figure.axes[0].set_ylim(low / 3, high * 2)  # room for the guides
    for axes in figure.axes:
        _guide(axes, RISES, 0.94)
    _guide(figure.axes[0], FALLS, 0.05)
    figure.axes[0].set_ylabel("signal-to-noise ratio of the gradient")
    _finish(figure, study, across=len(COMPARED))
    return figure


def each_estimator(study: Study) -> Figure:
    """A panel for each estimator: its two signal-to-noise ratios, and the slopes of theory."""
    figure = _panels(study, "signal-to-noise ratio")
    for axes, (name, points) in zip(figure.axes, study.points.items(), strict=True):
        for network in NETWORKS:
            style = {"color": COLOURS[network], "label": WORDS[network], "marker": "o"}
            _curve(axes, points, network, _snr, **style)
            slope = getattr(THEORY.get(name, UNKNOWN), network)
            last = points[-1].measures[network]
            if slope is None or last is None or not last.snr.is_resolved:
                continue
            ks = [point.num_samples for point in points]
            line = [last.snr.root * (k / ks[-1]) ** slope for k in ks]
            axes.plot(ks, line, color="black", linestyle=":", label="slope in theory", zorder=3)
    _finish(figure, study, across=3)
    return figure


def bias_and_noise(study: Study) -> Figure:
    """A panel for each estimator: how far its mean and its draws are from the limit, K → ∞."""
    figure = _panels(study, "length, nats per unit of weight")
    for axes, points in zip(figure.axes, study.points.values(), strict=True):
        resolved = False
        for network in NETWORKS:
            colour, word = COLOURS[network], WORDS[network]
            noise = [
                (point.num_samples, measures.noise)
                for point in points
                if (measures := point.measures[network]) is not None
            ]
            if noise:
                label = f"noise of {word}"
                axes.plot(*zip(*noise, strict=True), color=colour, linestyle="--", label=label)
            style = {"color": colour, "label": f"bias of {word}", "marker": "o"}
            resolved |= _curve(axes, points, network, _bias, **style)
        if not resolved:
            axes.text(0.05, 0.06, "no bias seen", transform=axes.transAxes)
    _finish(figure, study, across=4)
    return figure


def cost(study: Study) -> Figure:
    """The time of a gradient for each estimator and K."""
    names = list(study.points)[::-1]
    figure = Figure(figsize=(7, 1.4 + 0.28 * len(names)), layout="constrained")
    axes: Axes = figure.add_subplot()
    ks = _all_num_samples(study)
    for i, k in enumerate(ks):
        found = [
            (point.relative_time, row)
            for row, name in enumerate(names)
            for point in study.points[name]
            if point.num_samples == k
        ]
        shade = str(0.9 - 0.9 * i / max(1, len(ks) - 1))
        style: dict[str, Any] = {"color": shade, "markeredgecolor": "black", "label": f"K = {k}"}
        axes.plot(*zip(*found, strict=True), "o", **style)
    axes.set_yticks(range(len(names)), names, family="monospace")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(PLAIN)
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("time of a gradient over that of elbo with K = 1")
    axes.grid(alpha=0.3)
    _finish(figure, study, across=6)
    return figure


PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def _all_num_samples(study: Study) -> list[int]:
    return sorted({point.num_samples for points in study.points.values() for point in points})


def _curve(
    axes: Axes,
    points: Iterable[Point],
    network: str,
    measure: Callable[[Measures], Squared],
    **style: Any,
) -> bool:
    """Draw the points that are resolved, with two standard errors each way; whether any is."""
    found = [
        (point.num_samples, squared.root, 2 * squared.root_stderr)
        for point in points
        if (measures := point.measures[network]) is not None
        and (squared := measure(measures)).is_resolved
    ]
    if found:
        ks, values, errors = zip(*found, strict=True)
        # On a log axis the lower end must stay above 0.
        low = [min(error, 0.9 * value) for value, error in zip(values, errors, strict=True)]
        axes.errorbar(ks, values, yerr=[low, errors], **style)
    return bool(found)


def _log_axes(axes: Axes, study: Study) -> None:
    ks = _all_num_samples(study)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_minor_formatter("")
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(ks[0] / 1.4, ks[-1] * 1.4)
    axes.grid(alpha=0.3)


def _guide(axes: Axes, slope: float, height: float) -> None:
    """A short line of that slope, which ends at a height in the axes' own units, 0 to 1."""
    x, y = (axes.transAxes + axes.transData.inverted()).transform((0.06, height))
    end = (4 * x, y)
    axes.plot([x, end[0]], [y / 4**slope, y], color="grey", linewidth=4, alpha=0.5, zorder=0)
    offset: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(_sign(f"slope {slope:+.1f}"), end, color="grey", **offset)


def _panels(study: Study, ylabel: str) -> Figure:
    """Axes for each estimator, all of one scale."""
    num = len(study.points)
    across = min(5, num)
    down = -(-num // across)
    figure = Figure(figsize=(2.3 * across + 0.7, 1.9 * down + 1.2), layout="constrained")
    first = None
    for i, name in enumerate(study.points):
        axes: Axes = figure.add_subplot(down, across, i + 1, sharex=first, sharey=first)
        first = first or axes
        _log_axes(axes, study)
        axes.set_title(name, fontsize="medium", family="monospace")
        axes.tick_params(labelleft=i % across == 0, labelbottom=i + across >= num)
        if i + across >= num:
            axes.set_xlabel("K")
    figure.supylabel(ylabel, fontsize="medium")
    return figure


def _finish(figure: Figure, study: Study, *, across: int) -> None:
    """One legend for all axes, and the title."""
    labelled: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labelled.setdefault(label, handle)
    handles, labels = list(labelled.values()), list(labelled)
    figure.legend(handles, labels, loc="outside lower center", ncols=across, frameon=False)
    figure.suptitle(study.title, fontsize="medium")
