"""Learning curves of the paper's models: bounds against training samples evaluated, each recorded.

A curve is a learner on a dataset with a number of latents, for all seeds at once; it has a record
of its own, so that a study that was stopped goes on with the curves that it lacks.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import rich.console
import rich.progress

from jvae.experiments import paper, progress_bars, records, results, run_folder
from jvae.experiments.config import ConfigError
from jvae.experiments.interrupt import Interrupted, catch_interrupt
from jvae.experiments.paper import BATCH_SIZE, Keys

DatasetName = Literal["mnist", "frey_face", "mnist_5k"]
LearnerName = Literal["aevb", "wake_sleep"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings that the studies of learning curves share."""

    targets: Literal["grey", "dynamic"] = "grey"
    """grey: pixels / 255 as in the paper, where a Bernoulli bound is no likelihood of any data.
    dynamic: pixels drawn at each visit; frames of Frey Face are dequantised."""
    max_samples: int = 1_000_000
    """Training samples that each model is shown, a multiple of 100; the paper's are 10⁸."""
    trial_steps: int = paper.TRIAL_STEPS
    """Steps after which the step size of Adagrad is chosen, by the bound on training examples."""
    seed: int = 0
    """Of weights, order and all noise; the first of several seeds."""
    data_dir: Path | None = None
    """Folder of all datasets; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    out: Path | None = None
    """Folder for the records and the figures, by default runs/STUDY-DATE-TIME. Into the folder of a
    study that was stopped, the same command trains the curves that it lacks."""
    redraw: bool = False
    """Train nothing: draw the figures of all records in OUT."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
          ConfigError: names the flag.
        """
        if self.max_samples < BATCH_SIZE or self.max_samples % BATCH_SIZE:
            expected = f"a multiple of {BATCH_SIZE}, at least {BATCH_SIZE}"
            raise ConfigError(f"--max-samples must be {expected}, got {self.max_samples}")
        if self.trial_steps < 1:
            raise ConfigError(f"--trial-steps must be at least 1, got {self.trial_steps}")
        if not 0 <= self.seed <= 2**32 - len(self.all_seeds):
            expected = f"from 0 to 2**32 - {len(self.all_seeds)}"
            raise ConfigError(f"--seed must be {expected}, got {self.seed}")
        if self.redraw and self.out is None:
            raise ConfigError("--redraw needs --out, the folder of the records")

    @property
    def all_seeds(self) -> range:
        """The seed of each model."""
        return range(self.seed, self.seed + 1)

    def folder(self, study: str) -> Path:
        """Where records and figures go."""
        return self.out or run_folder.default_path(study)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BandConfig(Config):
    """Settings that the studies with several models a curve share."""

    seeds: int = 3
    """Models of each curve, with SEED, SEED + 1, …"""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
          ConfigError: names the flag.
        """
        if self.seeds < 1:
            raise ConfigError(f"--seeds must be at least 1, got {self.seeds}")
        super().__post_init__()

    @property
    def all_seeds(self) -> range:
        """The seed of each model."""
        return range(self.seed, self.seed + self.seeds)


class Curve(NamedTuple):
    """What a curve is of."""

    dataset: str
    latent_dim: int
    learner: str

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.dataset}-{self.latent_dim}-{self.learner}"

    @property
    def title(self) -> str:
        """In words."""
        return f"{self.dataset}, {self.latent_dim} latents, {self.learner}"


def check_latent_dims(latent_dims: Sequence[int]) -> None:
    """Refuse none, and sizes below 1.

    Raises:
      ConfigError: names the flag.
    """
    if not latent_dims or min(latent_dims) < 1:
        raise ConfigError(f"--latent-dims must be at least 1 each, got {tuple(latent_dims)}")


def run(
    config: Config,
    study: str,
    folder: Path,
    curves: Sequence[Curve],
    *,
    on_trained: Callable[[Curve, Any, list[Keys]], None] | None = None,
) -> None:
    """Train and measure every curve that `folder` lacks.

    Args:
      config: the settings.
      study: the name of the study.
      folder: for the records, `folder/NAME.jsonl`.
      curves: what is to be trained.
      on_trained: called with each curve, its last state and the keys of its members, before its
        record is ended.

    Raises:
      ConfigError: a record in `folder` is of other settings.
      DataError: a dataset is missing or corrupt.
      Interrupted: Ctrl-C or SIGTERM came; what was measured stays.
      FloatingPointError: no step size keeps the bound finite.
    """
    console = rich.console.Console(stderr=True)
    names = dict.fromkeys(curve.dataset for curve in curves)
    data = {name: paper.load(name, config.targets, config.data_dir) for name in names}
    missing = [c for c in curves if not _is_done(folder, c, _settings(config, c, data[c.dataset]))]
    bar = progress_bars.of_study(console)
    steps = config.trial_steps + config.max_samples // BATCH_SIZE
    done = 0
    try:
        with catch_interrupt(), bar:
            task = bar.add_task("", total=steps * len(missing), status="")
            for done, curve in enumerate(missing):
                bar.update(task, description=curve.title, completed=steps * done, status="compiles")
                points = _measured(
                    config,
                    study,
                    folder / f"{curve.name}.jsonl",
                    curve,
                    data[curve.dataset],
                    on_trained,
                    advance=lambda n: bar.update(task, advance=n),
                )
                for point in points:
                    bar.update(task, status=_status(point))
                console.print(f"{curve.title}: {_status(point)}", soft_wrap=True)
    except Interrupted as error:
        raise Interrupted(
            f"Interrupted: {done} of {len(missing)} curves were trained. The same command with "
            f"the same --out goes on; --redraw draws what is in {folder}.",
            error.signum,
        ) from error


def _is_done(folder: Path, curve: Curve, settings: dict[str, Any]) -> bool:
    path = folder / f"{curve.name}.jsonl"
    if not path.exists() or not path.stat().st_size:
        return False
    record = records.read(path)
    ours = run_folder.json_round_trip(settings)
    changed = [
        f"{name} was {record.header.get(name)}, is {value}"
        for name, value in ours.items()
        if record.header.get(name) != value
    ]
    if changed:
        raise ConfigError(
            f"{path} is of other settings ({'; '.join(changed)}): choose another --out or delete it"
        )
    return record.end is not None


def _settings(config: Config, curve: Curve, data: paper.Data) -> dict[str, Any]:
    """All that a curve's numbers depend on, beside what is measured."""
    return {
        **curve._asdict(),
        **data.protocol,
        "optimizer": "adagrad, MAP criterion",
        "max_samples": config.max_samples,
        "trial_steps": config.trial_steps,
        "seeds": list(config.all_seeds),
        "stderr_over": "seeds" if len(config.all_seeds) > 1 else "examples",
        "bound": "SGVB B with one draw of z an example, nats",
        "seconds_are": "of training all seeds, without measuring",
    }


def _measured(
    config: Config,
    study: str,
    path: Path,
    curve: Curve,
    data: paper.Data,
    on_trained: Callable[[Curve, Any, list[Keys]], None] | None,
    *,
    advance: Callable[[int], object],
) -> Iterator[dict[str, Any]]:
    """Train a curve and record it; the points as they come."""
    start = time.perf_counter()
    path.unlink(missing_ok=True)  # of a study that was stopped in the midst of this curve
    model = paper.make_model(curve.dataset, curve.latent_dim)
    fit = paper.make_fit(paper.LEARNERS[curve.learner], model, data)
    trial = paper.choose_step_size(fit, config.seed, num_steps=config.trial_steps, advance=advance)
    settings = _settings(config, curve, data) | trial.settings
    keys = [Keys.of(seed) for seed in config.all_seeds]
    state = paper.begin(fit, trial.step_size, config.all_seeds)
    checkpoints = paper.log_spaced(config.max_samples // BATCH_SIZE)
    states = paper.train(fit, state, keys, checkpoints, advance=advance)
    seconds, began = 0.0, time.perf_counter()
    with records.recording(path, study, settings, start=start) as write:
        for state in states:
            seconds += time.perf_counter() - began
            point: dict[str, Any] = {
                "samples": int(state.step) * BATCH_SIZE,
                "seconds": round(seconds, 3),
            }
            measured = paper.measure(data, state, keys)
            bad = [
                seed
                for seed, *parts in zip(config.all_seeds, *measured.values(), strict=True)
                if not all(np.isfinite(values).all() for values in parts)
            ]
            if bad:
                point["not_finite"] = bad
            else:
                for part, values in measured.items():
                    point |= results.summary(part, values)
            write(point)
            yield point
            if bad:
                break
            began = time.perf_counter()
        if on_trained is not None and not bad:
            on_trained(curve, state, keys)


def _status(point: dict[str, Any]) -> str:
    if "not_finite" in point:
        return f"after {point['samples']:,} samples not finite for seeds {point['not_finite']}"
    return f"test bound {point['test']:.1f} after {point['samples']:,} samples"


class Measured(NamedTuple):
    """A curve as it was recorded.

    Attributes:
      curve: what it is of.
      header: of its record.
      samples: [points].
      bounds: "train" and "test", each [points, seeds] in nats.
      seconds: [points], of training all seeds up to there.
      not_finite: the point at which it ended because a bound was not, or None.
      is_whole: whether its record was ended.
    """

    curve: Curve
    header: dict[str, Any]
    samples: np.ndarray
    bounds: dict[str, np.ndarray]
    seconds: np.ndarray
    not_finite: dict[str, Any] | None
    is_whole: bool

    @property
    def samples_per_second(self) -> float:
        """Of all seeds together."""
        return samples_per_second(self.samples, self.seconds, self.bounds["test"].shape[1])


def samples_per_second(
    samples: Sequence[int] | np.ndarray, seconds: Sequence[float] | np.ndarray, num_seeds: int
) -> float:
    """Of all seeds together, over the later half of a curve's points; NaN of a curve of one.

    Programs are compiled before its earlier points.
    """
    middle = len(samples) // 2
    if middle == len(samples) - 1:
        return math.nan
    more = num_seeds * (samples[-1] - samples[middle])
    return float(more / (seconds[-1] - seconds[middle]))


def read(path: Path) -> Measured:
    """The record of a curve.

    Raises:
      RunFolderError: it is none.
    """
    record = records.read(path)
    try:
        curve = Curve(*(record.header[name] for name in Curve._fields))
        num_seeds = len(record.header["seeds"])
        points = [point for point in record.points if "not_finite" not in point]
        bounds = {
            part: np.array([p.get(f"{part}_by_seed", [p[part]]) for p in points], np.float64)
            for part in ("train", "test")
        }
        return Measured(
            curve=curve,
            header=record.header,
            samples=np.array([p["samples"] for p in points], np.int64),
            bounds={part: of.reshape(len(points), num_seeds) for part, of in bounds.items()},
            seconds=np.array([p["seconds"] for p in points], np.float64),
            not_finite=next((p for p in record.points if "not_finite" in p), None),
            is_whole=record.end is not None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise run_folder.RunFolderError(f"{path} is no learning curve's: {error!r}") from error


def read_folder(folder: Path) -> dict[Curve, Measured]:
    """The curves in a folder that have points.

    Raises:
      RunFolderError: there is none, or a record is no curve's.
    """
    found = [read(path) for path in sorted(folder.glob("*.jsonl"))]
    measured = {of.curve: of for of in found if len(of.samples)}
    if not measured:
        raise run_folder.RunFolderError(f"{folder} holds no measurement: no .jsonl file has points")
    return measured
