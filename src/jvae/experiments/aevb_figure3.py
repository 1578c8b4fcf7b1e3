"""Figure 3 of Kingma & Welling (2014): log p(x) under AEVB, wake-sleep and Monte Carlo EM.

python -m jvae.experiments.aevb_figure3 --help

By the estimator of the paper's App. D, beside which annealed importance sampling and importance
sampling from the encoder stand at the end of every curve.
"""

import dataclasses
import functools
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import rich.console
import rich.progress
import tyro
from jaxtyping import Array, Float

import jvae
from jvae import evaluation
from jvae.evaluation import LogLikelihood
from jvae.experiments import (
    command_line,
    curves,
    marginal_figures,
    paper,
    parts,
    records,
    results,
)
from jvae.experiments.config import ConfigError
from jvae.experiments.paper import BATCH_SIZE, Keys
from jvae.learners import mcem

STUDY = "aevb_figure3"
HIDDEN, LATENT_DIM = 100, 3
# Of both estimators that run HMC; the paper's of App. D.
NUM_LEAPFROG = 4
CHECKPOINTS_PER_DECADE = 4
# How many steps take about as long as the estimate of an image, for the progress bar alone.
STEPS_AN_IMAGE = 20

Advance = Callable[[int], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(curves.BandConfig):
    """log p(x) against training samples, for three learners, and how well it is estimated."""

    dataset: Literal["mnist", "mnist_5k"] = "mnist"
    """mnist_5k are the 5,000 digits that jvae ships: numbers on them are not numbers on MNIST."""
    num_examples: tuple[int, ...] = (1000, 50_000)
    """Training images of each panel, the first of a fixed random order."""
    methods: tuple[Literal["aevb", "wake_sleep", "mcem"], ...] = ("aevb", "wake_sleep", "mcem")
    """Who takes part."""
    seeds: int = 1
    """Models of each curve, with SEED, SEED + 1, …"""
    trial_steps: int = paper.TRIAL_STEPS
    """Steps after which the step size of Adagrad is chosen, by log p(x) of training examples."""
    images: int = 1000
    """Training and as many test images whose log p(x) the last point of a curve is of."""
    images_along: int = 50
    """The same of the points before."""
    images_compared: int = 50
    """The same of the other estimators, under the first seed."""
    transitions: int = 25
    """Of HMC in App. D while the step size is tuned, and as many with it tuned."""
    temperatures: int = 500
    """Of annealed importance sampling."""
    chains: int = 16
    """Of annealed importance sampling."""
    importance_samples: int = 5000
    """Of importance sampling from q(z|x)."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
          ConfigError: names the flag.
        """
        if not self.num_examples or min(self.num_examples) < BATCH_SIZE:
            found = f"at least {BATCH_SIZE} each, got {self.num_examples}"
            raise ConfigError(f"--num-examples must be {found}")
        if not self.methods:
            raise ConfigError("--methods needs at least one name")
        least = {"images_along": 2, "images_compared": 2, "transitions": 1}
        least |= {"temperatures": 1, "chains": 2, "importance_samples": 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} must be at least {low}, got {getattr(self, name)}")
        if self.images < self.images_compared:
            expected = f"at least the {self.images_compared} of --images-compared"
            raise ConfigError(f"--images must be {expected}, got {self.images}")
        super().__post_init__()

    @property
    def checkpoints(self) -> list[int]:
        """The counts of steps after which log p(x) is estimated."""
        last = self.max_samples // BATCH_SIZE
        return paper.log_spaced(last, per_decade=CHECKPOINTS_PER_DECADE)


def run(config: Config) -> Path:
    """Train and measure, write the record as it comes, draw and print.

    Returns:
      The folder: OUT/TARGETS.jsonl is the record, beside it are figures and tables.

    Raises:
      ConfigError: the record is there already.
      DataError: the dataset is missing or corrupt, or has fewer training images.
      RunFolderError: no record is there to draw.
      Interrupted: Ctrl-C or SIGTERM came; what was measured stays, and can be drawn.
      FloatingPointError: an estimate is not finite.
    """
    folder = config.folder(STUDY)
    if not config.redraw:
        _measure_into(folder, config)
    marginal_figures.draw_folder(folder, rich.console.Console())
    return folder


def _measure_into(folder: Path, config: Config) -> None:
    path = folder / f"{config.targets}.jsonl"
    records.refuse_taken(path)
    start = time.perf_counter()
    nums = dict.fromkeys(config.num_examples)
    data = [
        paper.load(config.dataset, config.targets, config.data_dir, num_train=num) for num in nums
    ]
    bar = curves.progress_bar(rich.console.Console(stderr=True))
    record = records.recording(path, STUDY, _settings(config), start=start)
    with records.keeping(path), bar, record as write:
        for point in _measured(config, data, bar):
            write(point)


def _settings(config: Config) -> dict[str, Any]:
    return records.settings_of(config, without=("redraw", "out", "data_dir")) | {
        "seeds": list(config.all_seeds),
        "hidden": HIDDEN,
        "latent_dim": LATENT_DIM,
        "stderr_over": "seeds" if config.seeds > 1 else "examples",
        "images_are": "of training and of test, each the first of a fixed random order, drawn once",
        "app_d": "Kingma & Welling (2014), App. D, 50 samples: log p(x) is too high in expectation",
        "ais": "annealed importance sampling from the prior: log p(x) is too low in expectation",
        "num_leapfrog": NUM_LEAPFROG,
        "importance_sampling": "from q(z|x): log p(x) is too low in expectation; MCEM fits no q",
        "own_stderr": "root mean square over images of what an estimate says of its own error",
        "seconds_are": "of training all seeds, without measuring",
    }


def _measured(
    config: Config, data: Sequence[paper.Data], bar: rich.progress.Progress
) -> Iterator[dict[str, Any]]:
    """The points of every curve, and at its end those of the estimators."""
    images = config.images_along * (len(config.checkpoints) - 1) + config.images
    images = 2 * (config.seeds * images + 2 * config.images_compared) + 3 * config.images_along
    work = config.trial_steps + config.checkpoints[-1] + STEPS_AN_IMAGE * images
    methods = list(dict.fromkeys(config.methods))
    task = bar.add_task("", total=work * len(methods) * len(data), status="")
    for done, (of, method) in enumerate((of, method) for of in data for method in methods):
        description = f"{of.num_train:,} images, {method}"
        bar.update(task, description=description, completed=work * done)
        yield from _curve(config, of, method, functools.partial(bar.advance, task))


def make_fit(method: str, data: paper.Data) -> paper.Fit:
    """What trains the model of Figure 3, by `paper.LEARNERS` or by Monte Carlo EM."""
    model = paper.make_model(data.name, LATENT_DIM, hidden=HIDDEN)
    if method != "mcem":
        return paper.make_fit(paper.LEARNERS[method], model, data)
    make_learner = functools.partial(mcem.make_learner, num_examples=data.num_train)
    visits = data._replace(
        train=mcem.visits(data.train), preprocess=mcem.on_images(data.preprocess)
    )
    return paper.make_fit(make_learner, model, visits)


def _curve(
    config: Config, data: paper.Data, method: str, advance: Advance
) -> Iterator[dict[str, Any]]:
    fit = make_fit(method, data)
    examples = {"train": data.shown, "test": data.test[parts.chosen(len(data.test), config.images)]}
    estimate = functools.partial(_app_d, config, advance=advance)

    def of_training(state: Any, keys: Sequence[Keys]) -> list[np.ndarray]:
        x = {"train": data.shown[: config.images_along]}
        return [np.asarray(found.estimate) for found in estimate(state, keys, x)["train"]]

    trial = paper.choose_step_size(
        fit,
        config.seed,
        num_steps=config.trial_steps,
        advance=advance,
        score=of_training,
        criterion="App. D estimate of log p(x) of training examples",
    )
    about = {**data.protocol, "num_examples": data.num_train, "method": method, **trial.settings}
    keys = [Keys.of(seed) for seed in config.all_seeds]
    begun = paper.begin(fit, trial.step_size, config.all_seeds)
    states = paper.train(fit, begun, keys, config.checkpoints, advance=advance)
    seconds, began = 0.0, time.perf_counter()
    for state in states:
        seconds += time.perf_counter() - began
        is_last = int(state.step) == config.checkpoints[-1]
        num = config.images if is_last else config.images_along
        found = estimate(state, keys, {part: x[:num] for part, x in examples.items()})
        point = {
            **about,
            "measure": "curve",
            "samples": int(state.step) * BATCH_SIZE,
            "seconds": round(seconds, 3),
        }
        if isinstance(state, mcem.State):
            point["leapfrog_step_size"] = np.exp(state.log_step_size).tolist()
        for part, by_seed in found.items():
            point[f"num_{part}_images"] = len(by_seed[0].estimate)
            point |= results.summary(part, [one.estimate for one in by_seed])
        yield point
        began = time.perf_counter()
    params = jax.tree.map(operator.itemgetter(0), state.params)
    for part, x in examples.items():
        few = jax.tree.map(lambda leaf: leaf[: config.images_compared], found[part][0])
        own = {"app_d": few} | _others(
            config, method, params, x[: config.images_compared], keys[0], advance
        )
        about = {"num_examples": data.num_train, "method": method, "part": part}
        yield {**about, "measure": "estimators", **_compared(own)}


def _app_d(
    config: Config,
    state: Any,
    keys: Sequence[Keys],
    examples: dict[str, Float[Array, "..."]],
    *,
    advance: Advance,
) -> dict[str, list[LogLikelihood]]:
    """App. D's estimates for the examples of each part, under each member."""
    found: dict[str, list[LogLikelihood]] = {part: [] for part in examples}
    for i, own in enumerate(keys):
        params = jax.tree.map(operator.itemgetter(i), state.params)
        split = jax.random.split(jax.random.fold_in(own.bounds, state.step), len(examples))
        function = functools.partial(
            evaluation.app_d,
            params,
            num_leapfrog=NUM_LEAPFROG,
            num_transitions=config.transitions,
        )
        for (part, x), key in zip(examples.items(), split, strict=True):
            one = parts.in_groups(function, x, key, lambda num: advance(STEPS_AN_IMAGE * num))
            if not np.isfinite(one.estimate).all():
                raise FloatingPointError(
                    f"App. D's estimate of log p(x) is not finite for {part} images after step "
                    f"{int(state.step)}"
                )
            found[part].append(one)
    return found


def _others(
    config: Config,
    method: str,
    params: jvae.Params,
    x: Float[Array, "..."],
    keys: Keys,
    advance: Advance,
) -> dict[str, LogLikelihood]:
    """The estimates that the paper did not have; MCEM has no encoder to propose z."""
    ais_key, importance_key = jax.random.split(keys.figures)
    ais = functools.partial(
        evaluation.ais,
        params,
        num_temperatures=config.temperatures,
        num_chains=config.chains,
        num_leapfrog=NUM_LEAPFROG,
    )
    importance = functools.partial(
        evaluation.importance_sampling, params, num_samples=config.importance_samples
    )
    functions = {"ais": (ais, ais_key)}
    if method != "mcem":
        functions["importance_sampling"] = (importance, importance_key)
    return {
        name: parts.in_groups(function, x, key, lambda num: advance(STEPS_AN_IMAGE * num))
        for name, (function, key) in functions.items()
    }


def _compared(found: dict[str, LogLikelihood]) -> dict[str, Any]:
    """Each estimator's mean, what it says of itself, and its differences from AIS by image."""
    point: dict[str, Any] = {"num_images": len(found["ais"].estimate)}
    for name, one in found.items():
        point |= results.summary(name, [one.estimate])
        point[f"{name}_own_stderr"] = float(np.sqrt(np.square(one.stderr).mean()))
        point[f"{name}_ess"] = {"median": float(np.median(one.ess)), "least": float(one.ess.min())}
        point[f"{name}_by_image"] = np.round(one.estimate, 3).tolist()
        if name != "ais":
            difference = one.estimate - found["ais"].estimate
            point |= results.summary(f"{name}_less_ais", [difference])
            point[f"{name}_less_ais_rms"] = float(np.sqrt(np.square(difference).mean()))
            point[f"{name}_less_ais_most"] = float(np.abs(difference).max())
    return point


def main() -> None:
    """The command line."""
    command_line.run(lambda: run(tyro.cli(Config, prog="python -m jvae.experiments.aevb_figure3")))


if __name__ == "__main__":
    main()
