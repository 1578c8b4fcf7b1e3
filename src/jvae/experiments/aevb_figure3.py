"""Figure 3 of Kingma & Welling (2014): log p(x) under AEVB, wake-sleep and Monte Carlo EM.

python -m jvae.experiments.aevb_figure3 --help

By the estimator of the paper's App. D, and beside it, on the same images, by annealed importance
sampling and by importance sampling from the encoder, which the paper did not have.
"""

import dataclasses
import functools
import itertools
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
import rich.console
import rich.progress
import tyro
from jaxtyping import Array, Float, Int, PRNGKeyArray

import jvae
from jvae import evaluation
from jvae.evaluation import LogLikelihood
from jvae.experiments import (
    command_line,
    curves,
    marginal_figures,
    paper,
    parts,
    progress_bars,
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
# How many steps take about as long as one estimate of an image, for the progress bar alone.
STEPS_AN_ESTIMATE = 10

Advance = Callable[[int], object]
# `(params, x, key) -> LogLikelihood`.
Estimator = Callable[..., LogLikelihood]


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
    images: int = 50
    """Training and as many test images whose log p(x) every point of a curve is of."""
    images_at_end: int = 1000
    """The same under the first seed's model at the end of its curve; the paper's were as many."""
    transitions: int = 25
    """Of HMC in App. D while the step size is tuned, and as many with it tuned."""
    temperatures: int = 200
    """Of annealed importance sampling."""
    chains: int = 16
    """Of annealed importance sampling."""
    importance_samples: int = 5000
    """Of importance sampling from q(z|x)."""
    out: Path | None = None
    """Folder for TARGETS.jsonl, a line a measurement as they come, its tables and figures; by
    default runs/aevb_figure3-DATE-TIME."""

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
        least = {"images": 2, "transitions": 1, "temperatures": 1, "chains": 2}
        for name, low in (least | {"importance_samples": 2}).items():
            if getattr(self, name) < low:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} must be at least {low}, got {getattr(self, name)}")
        if self.images_at_end < self.images:
            expected = f"at least the {self.images} of --images"
            raise ConfigError(f"--images-at-end must be {expected}, got {self.images_at_end}")
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
      FloatingPointError: no step size keeps log p(x) finite.
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
    bar = progress_bars.of_study(rich.console.Console(stderr=True))
    record = records.recording(path, STUDY, _settings(config), start=start)
    with records.keeping(path), bar, record as write:
        for point in _measured(config, data, bar):
            write(point)


def _settings(config: Config) -> dict[str, Any]:
    return records.settings_of(config, without=("redraw", "out", "data_dir")) | {
        "seeds": list(config.all_seeds),
        "hidden": HIDDEN,
        "latent_dim": LATENT_DIM,
        "optimizer": "adagrad, MAP criterion",
        "stderr_over": "seeds" if config.seeds > 1 else "images",
        "images_are": "of training and of test, each the first of a fixed random order, drawn once",
        "end_is_of": "the first seed, its errors over images",
        "app_d": "Kingma & Welling (2014), App. D, 50 samples: too high in expectation were they "
        "exact, and too low where their chains have not mixed",
        "ais": "annealed importance sampling from the prior: too low in expectation",
        "num_leapfrog": NUM_LEAPFROG,
        "importance_sampling": "from q(z|x): too low in expectation; MCEM fits no q",
        "own_stderr": "root mean square over images of what an estimate says of its own error",
        "samples_are": "training images visited, of which Monte Carlo EM makes 10 leapfrog steps "
        "each and 5 updates of the weights a minibatch",
        "seconds_are": "of training all seeds, without measuring",
    }


def _measured(
    config: Config, data: Sequence[paper.Data], bar: rich.progress.Progress
) -> Iterator[dict[str, Any]]:
    """The points of every curve, and at its end those of the estimators."""
    images = 2 * (len(config.checkpoints) * config.seeds * config.images)
    images += 2 * (config.images_at_end - config.images)
    methods = list(dict.fromkeys(config.methods))
    work = {
        method: config.trial_steps
        + config.checkpoints[-1]
        + STEPS_AN_ESTIMATE * (len(estimators(config, method)) * images + 3 * config.images)
        for method in methods
    }
    task = bar.add_task("", total=sum(work.values()) * len(data), status="")
    done = 0
    for of, method in itertools.product(data, methods):
        description = f"{of.num_train:,} images, {method}"
        bar.update(task, description=description, completed=done, status="")
        for point in _curve(config, of, method, functools.partial(bar.advance, task)):
            yield point
            if point["measure"] == "curve":
                bar.update(task, status=f"log p(x) {point['ais_test']:.1f}")
        done += work[method]


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


def estimators(config: Config, method: str) -> dict[str, Estimator]:
    """What log p(x) is estimated by; MCEM has no encoder to propose z."""
    found: dict[str, Estimator] = {
        "ais": functools.partial(
            evaluation.ais,
            num_temperatures=config.temperatures,
            num_chains=config.chains,
            num_leapfrog=NUM_LEAPFROG,
        ),
        "app_d": functools.partial(
            evaluation.app_d, num_leapfrog=NUM_LEAPFROG, num_transitions=config.transitions
        ),
    }
    if method != "mcem":
        found["importance_sampling"] = functools.partial(
            evaluation.importance_sampling, num_samples=config.importance_samples
        )
    return found


class PartKeys(NamedTuple):
    """The keys of a member's estimates after a step, each of one use."""

    train: PRNGKeyArray
    test: PRNGKeyArray
    trial: PRNGKeyArray

    @classmethod
    def of(cls, keys: Keys, step: Int[Array, ""]) -> "PartKeys":
        """All keys, from those of a seed."""
        return cls(*jax.random.split(jax.random.fold_in(keys.bounds, step), len(cls._fields)))


def _curve(
    config: Config, data: paper.Data, method: str, advance: Advance
) -> Iterator[dict[str, Any]]:
    fit, functions = make_fit(method, data), estimators(config, method)
    chosen = parts.chosen(len(data.test), config.images_at_end)
    examples = {"train": data.shown[: config.images_at_end], "test": data.test[chosen]}

    def of_training(state: Any, keys: Sequence[Keys]) -> list[np.ndarray]:
        x, by_ais = data.shown[: config.images], {"ais": functions["ais"]}
        found = [
            _estimates(by_ais, _member(state, i), x, PartKeys.of(own, state.step).trial, advance)
            for i, own in enumerate(keys)
        ]
        return [np.asarray(one["ais"].estimate) for one in found]

    trial = paper.choose_step_size(
        fit,
        config.seed,
        num_steps=config.trial_steps,
        advance=advance,
        score=of_training,
        criterion="AIS estimate of log p(x) of training examples",
    )
    about = {"num_examples": data.num_train, "method": method}
    yield {**about, "measure": "step size", **data.protocol, **trial.settings}
    keys = [Keys.of(seed) for seed in config.all_seeds]
    begun = paper.begin(fit, trial.step_size, config.all_seeds)
    states = paper.train(fit, begun, keys, config.checkpoints, advance=advance)
    seconds, began = 0.0, time.perf_counter()
    for state in states:
        seconds += time.perf_counter() - began
        point = {
            **about,
            "measure": "curve",
            "samples": int(state.step) * BATCH_SIZE,
            "seconds": round(seconds, 3),
        }
        if isinstance(state, mcem.State):
            point["leapfrog_step_size"] = np.exp(state.log_step_size).tolist()
        is_last = int(state.step) == config.checkpoints[-1]
        found: dict[str, list[dict[str, LogLikelihood]]] = {part: [] for part in examples}
        for i, own in enumerate(keys):
            num = config.images_at_end if is_last and i == 0 else config.images
            part_keys = PartKeys.of(own, state.step)
            for part, x in examples.items():
                key = getattr(part_keys, part)
                one = _estimates(functions, _member(state, i), x[:num], key, advance)
                found[part].append(one)
        bad = [
            seed
            for i, seed in enumerate(config.all_seeds)
            if not all(np.isfinite(e.estimate).all() for p in found.values() for e in p[i].values())
        ]
        if bad:
            yield point | {"measure": "not finite", "not_finite": bad}
            return
        for part, by_seed in found.items():
            point |= _of_part(part, by_seed, config.images)
        yield point
        began = time.perf_counter()
    for part, by_seed in found.items():
        yield {**about, "measure": "end", "part": part, **_compared(by_seed[0])}


def _member(state: Any, i: int) -> jvae.Params:
    params: jvae.Params = jax.tree.map(operator.itemgetter(i), state.params)
    return params


def _estimates(
    functions: Mapping[str, Estimator],
    params: jvae.Params,
    x: Float[Array, "num ..."],
    key: PRNGKeyArray,
    advance: Advance,
) -> dict[str, LogLikelihood]:
    """By each estimator, with a key of its own."""
    keys = jax.random.split(key, len(functions))
    return {
        name: parts.in_groups(
            functools.partial(function, params),
            x,
            own,
            lambda num: advance(STEPS_AN_ESTIMATE * num),
        )
        for (name, function), own in zip(functions.items(), keys, strict=True)
    }


def _of_part(part: str, by_seed: Sequence[Mapping[str, LogLikelihood]], num: int) -> dict[str, Any]:
    """What a curve shows of the first `num` images of a part, by each estimator."""
    found: dict[str, Any] = {}
    for name in by_seed[0]:
        estimates = [one[name].estimate[:num] for one in by_seed]
        found |= results.summary(f"{name}_{part}", estimates)
        found |= _own_account(
            f"{name}_{part}",
            np.stack([one[name].stderr[:num] for one in by_seed]),
            np.stack([one[name].ess[:num] for one in by_seed]),
        )
    return found


def _own_account(name: str, stderr: npt.ArrayLike, ess: npt.ArrayLike) -> dict[str, Any]:
    """What an estimator says of itself."""
    return {
        f"{name}_own_stderr": float(np.sqrt(np.square(stderr).mean())),
        f"{name}_ess": {"median": float(np.median(np.asarray(ess))), "least": float(np.min(ess))},
    }


def _compared(found: Mapping[str, LogLikelihood]) -> dict[str, Any]:
    """Each estimator's mean, what it says of itself, and its differences from AIS by image."""
    point: dict[str, Any] = {"num_images": len(found["ais"].estimate)}
    for name, one in found.items():
        point |= results.summary(name, [one.estimate])
        point |= _own_account(name, one.stderr, one.ess)
        point[f"{name}_by_image"] = np.round(one.estimate, 3).tolist()
        if name != "ais":
            difference = one.estimate - found["ais"].estimate
            own = np.hypot(one.stderr, found["ais"].stderr)
            point |= results.summary(f"{name}_less_ais", [difference])
            point[f"{name}_less_ais_rms"] = float(np.sqrt(np.square(difference).mean()))
            point[f"{name}_less_ais_most"] = float(np.abs(difference).max())
            point[f"{name}_below_ais"] = float(np.mean(difference < -3 * own))
    return point


def main() -> None:
    """The command line."""
    command_line.run(lambda: run(tyro.cli(Config, prog="python -m jvae.experiments.aevb_figure3")))


if __name__ == "__main__":
    main()
