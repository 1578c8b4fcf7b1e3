"""Bias, noise and cost of every estimator's gradient against the number of samples K.

python -m jvae.experiments.estimators --help

After Rainforth et al. (2018), "Tighter variational bounds are not necessarily better": the
signal-to-noise ratio of the encoder's gradient falls with K where the bound tends to log p(x), on
which the encoder has no influence.
"""

import dataclasses
import functools
import inspect
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import rich.console
import rich.progress
import tyro
from jaxtyping import Array, Float

import jvae
from jvae import binarisation, checkpoint, data, training
from jvae.checkpoint import CheckpointError
from jvae.estimators import TABLE, Bound
from jvae.experiments import (
    command_line,
    estimator_figures,
    gaussian_targets,
    gradient_moments,
    records,
    run_folder,
)
from jvae.experiments.config import ConfigError

NUM_BLOCKS = 10
# Of values that a chunk of draws may hold in an activation, and in its gradients: these fit into
# caches and memory.
VALUES_IN_A_CHUNK, GRADIENTS_IN_A_CHUNK = 2**20, 2**24
REFERENCE = "elbo"
# Of the model that is trained where none is given.
HIDDEN, LATENT_DIM, EPOCHS, TRAINING_BATCH = (200,), 20, 50, 100


class Default(NamedTuple):
    """What a model takes where the settings say nothing."""

    draws: int
    batch_size: int


DEFAULTS = {"exact": Default(2000, 16), "mnist": Default(200, 8)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Signal and noise of every estimator's gradients against K, with the time that each takes."""

    model: Literal["exact", "mnist"] = "exact"
    """exact: the linear-Gaussian model of Rainforth et al. (2018), 20 dimensions, near its optimum,
    where biases are known. mnist: a VAE trained on mnist_5k."""
    estimators: tuple[str, ...] = tuple(TABLE)
    """Names of README's table."""
    num_samples: tuple[int, ...] = (1, 4, 16, 64, 256)
    """The K to take. An estimator that needs more of them starts later."""
    draws: int | None = None
    """Gradients for each estimator and K, a multiple of 10; by default 2,000, for mnist 200."""
    batch_size: int | None = None
    """Examples that a gradient is the mean of, always the same; by default 16, for mnist 8."""
    trained: Path | None = None
    """Folder of a finished run on 28×28 images, whose model.safetensors is taken; by default a
    784-200-20-200-784 model is trained first, in seconds."""
    rounds: int = 7
    """Interleaved timings of each gradient."""
    seed: int = 0
    """Of data, weights and all draws."""
    out: Path | None = None
    """Folder for MODEL.jsonl, a line for each estimator and K as they come, and the figures; by
    default runs/estimators-DATE-TIME. Both models may share one."""
    redraw: bool = False
    """Compute nothing: draw the figures and print the tables of all records in OUT."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
          ConfigError: names the flag.
        """
        unknown = [name for name in self.estimators if name not in TABLE]
        if unknown or not self.estimators:
            raise ConfigError(f"--estimators must be among {list(TABLE)}, got {unknown}")
        if not self.num_samples or min(self.num_samples) < 1:
            raise ConfigError(f"--num-samples must be at least 1 each, got {self.num_samples}")
        if not list(self.points):
            needed = min(TABLE[name].num_samples_needed for name in self.estimators)
            raise ConfigError(f"--num-samples must be at least {needed} for {self.estimators}")
        if self.num_draws < 2 * NUM_BLOCKS or self.num_draws % NUM_BLOCKS:
            expected = f"a multiple of {NUM_BLOCKS}, at least {2 * NUM_BLOCKS}"
            raise ConfigError(f"--draws must be {expected}, got {self.draws}")
        most = {"exact": gaussian_targets.NUM_DATA, "mnist": 1000}[self.model]
        if not 1 <= self.num_examples <= most:
            raise ConfigError(f"--batch-size must be from 1 to {most}, got {self.batch_size}")
        if self.rounds < 1:
            raise ConfigError(f"--rounds must be at least 1, got {self.rounds}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed must be from 0 to 2**32 - 1, got {self.seed}")
        if self.trained is not None and self.model != "mnist":
            raise ConfigError("--trained needs --model mnist")
        if self.redraw and self.out is None:
            raise ConfigError("--redraw needs --out, the folder of the records")

    @property
    def num_draws(self) -> int:
        """The draws of each gradient."""
        return DEFAULTS[self.model].draws if self.draws is None else self.draws

    @property
    def num_examples(self) -> int:
        """The examples of the batch."""
        return DEFAULTS[self.model].batch_size if self.batch_size is None else self.batch_size

    @property
    def points(self) -> Iterator[tuple[int, list[str]]]:
        """Each K in rising order, with the estimators that can be had with so many samples."""
        for num_samples in sorted(set(self.num_samples)):
            names = [
                name
                for name in dict.fromkeys(self.estimators)
                if TABLE[name].num_samples_needed <= num_samples
            ]
            if names:
                yield num_samples, names


class Keys(NamedTuple):
    """The keys of a study, each of one use."""

    model: Array
    draws: Array
    timing: Array


def run(config: Config) -> Path:
    """Measure as `config` says, write the records as they come, draw and print.

    Returns:
      The folder.

    Raises:
      ConfigError: the records of this model are there already, or there are none to draw.
      CheckpointError: no model of 28×28 images in the folder given.
      Interrupted: Ctrl-C or SIGTERM came; what was measured stays, and can be drawn.
      FloatingPointError: a gradient is not finite.
    """
    folder = config.out or run_folder.default_path("estimators")
    if not config.redraw:
        _measure_into(folder, config)
    estimator_figures.draw_folder(folder, rich.console.Console())
    return folder


def _measure_into(folder: Path, config: Config) -> None:
    path = folder / f"{config.model}.jsonl"
    records.refuse_taken(path)
    start = time.perf_counter()
    with records.keeping(path):
        keys = Keys(*jax.random.split(jax.random.key(config.seed), len(Keys._fields)))
        params, x, description = SUBJECTS[config.model](config, keys.model)
        settings = _settings(config) | description
        with records.recording(path, "estimators", settings, start=start) as write:
            for point in _measured(config, params, x, keys):
                write(point)


def _settings(config: Config) -> dict[str, Any]:
    own = records.settings_of(config, without=("redraw",))
    return own | {"draws": config.num_draws, "batch_size": config.num_examples}


Subject = tuple[jvae.Params, Float[Array, "..."], dict[str, Any]]


def _exact(config: Config, key: Array) -> Subject:
    study = gaussian_targets.near_the_optimum(key)
    return study.params, study.x[: config.num_examples], {"subject": "linear-Gaussian"}


def _mnist(config: Config, key: Array) -> Subject:
    """The trained model, and the first test images in the one draw that all seeds share."""
    digits = data.load("mnist_5k")
    x = binarisation.prepare("dynamic", digits.train, digits.test, binarisation.fixed_draw_key())
    if config.trained is not None:
        path = config.trained / "model.safetensors"
        params, source = checkpoint.load(path), str(path)
        if params.model.data_shape != digits.data_shape:
            raise CheckpointError(
                f"{path} is a model of {params.model.data_shape}, expected {digits.data_shape}"
            )
    else:
        init_key, train_key = jax.random.split(key)
        model = jvae.VAE.mlp(digits.data_shape, latent_dim=LATENT_DIM, hidden=HIDDEN)
        optimizer = training.make_optimizer("adam", 1e-3)
        state = training.init(jvae.init(model, init_key), optimizer, train_key)
        step = training.make_step(jvae.elbo, optimizer)
        epoch = training.make_epoch(step, TRAINING_BATCH, x.preprocess)
        params = training.fit(state, epoch, x.train, num_epochs=EPOCHS).params
        source = f"{EPOCHS} epochs of the ELBO on mnist_5k by Adam, 1e-3, dynamic binarisation"
    test_elbo = float(jax.jit(jvae.elbo)(params, x.test, key).mean())
    return params, x.test[: config.num_examples], {"subject": source, "test_elbo": test_elbo}


SUBJECTS: dict[str, Callable[[Config, Array], Subject]] = {"exact": _exact, "mnist": _mnist}


def _measured(
    config: Config, params: jvae.Params, x: Float[Array, "..."], keys: Keys
) -> Iterator[dict[str, Any]]:
    """A point for each estimator and K."""
    targets: dict[str, Any] = dict.fromkeys(config.estimators)
    if config.model == "exact":
        targets = {
            name: gaussian_targets.limit_of_gradient(name, TABLE[name], params, x)
            for name in targets
        }
    num_weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    most_gradients = GRADIENTS_IN_A_CHUNK // num_weights
    work = sum(k * _num_outer(name) for k, names in config.points for name in names)
    # No thread draws the bar while a gradient is timed.
    progress = rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.TimeElapsedColumn(),
        console=rich.console.Console(stderr=True),
        auto_refresh=False,
    )
    task = progress.add_task("", total=work * config.num_draws)

    def advance(draws_of_z: int, draws: int) -> None:
        progress.update(task, advance=draws * draws_of_z, refresh=True)

    with progress:
        for num_samples, names in config.points:
            progress.update(task, description=f"timing, K = {num_samples}", refresh=True)
            times = _times(config, params, x, keys.timing, num_samples, names)
            for name in names:
                progress.update(task, description=f"{name}, K = {num_samples}", refresh=True)
                draws_of_z = num_samples * _num_outer(name)
                most = min(VALUES_IN_A_CHUNK // (draws_of_z * x.size), most_gradients)
                blocks = gradient_moments.of_gradient(
                    _bound(name, num_samples),
                    params,
                    x,
                    _key_of(keys.draws, name, num_samples),
                    num_draws=config.num_draws,
                    num_blocks=NUM_BLOCKS,
                    chunk=max(1, most),
                    on_chunk=functools.partial(advance, draws_of_z),
                )
                yield {
                    "estimator": name,
                    "num_samples": num_samples,
                    "draws_of_z": draws_of_z,
                    **_measures(blocks, targets[name], f"{name} with K = {num_samples}"),
                    **times[name],
                }


def _num_outer(name: str) -> int:
    """M of the estimators that take K draws M times."""
    outer = inspect.signature(TABLE[name].bound).parameters.get("num_outer")
    return 1 if outer is None else int(outer.default)


def _bound(name: str, num_samples: int) -> Bound:
    return functools.partial(TABLE[name].bound, num_samples=num_samples)


def _key_of(key: Array, name: str, num_samples: int) -> Array:
    """Of an estimator and K, whichever others take part."""
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), num_samples)


def _measures(
    blocks: dict[str, list[gradient_moments.Moments]],
    target: dict[str, np.ndarray] | None,
    what: str,
) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for network, moments in blocks.items():
        if not all(np.isfinite(block.square).all() for block in moments):
            raise FloatingPointError(f"the {network} gradient of {what} is not finite")
        measures = gradient_moments.measure(moments, None if target is None else target[network])
        record[network] = None if measures is None else gradient_moments.to_json(measures)
    return record


def _times(
    config: Config,
    params: jvae.Params,
    x: Float[Array, "..."],
    key: Array,
    num_samples: int,
    names: list[str],
) -> dict[str, dict[str, Any]]:
    """Seconds of a gradient, and over those of the ELBO's with K = 1 in the same round."""

    def compiled(bound: Bound) -> Callable[[], object]:
        gradient = jax.jit(functools.partial(gradient_moments.gradient, bound))

        def run() -> object:
            return jax.block_until_ready(gradient(params, x, key))

        run()
        return run

    runs = {name: compiled(_bound(name, num_samples)) for name in names}
    reference = compiled(_bound(REFERENCE, 1))
    generator = np.random.default_rng(num_samples)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(config.rounds):
        reference_seconds = statistics.median(_seconds(reference) for _ in range(3))
        for name in generator.permutation(names).tolist():
            seconds[name].append(_seconds(runs[name]))
            ratios[name].append(seconds[name][-1] / reference_seconds)
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "relative_time": statistics.median(ratios[name]),
            "relative_time_range": [min(ratios[name]), max(ratios[name])],
        }
        for name in names
    }


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """The command line."""
    command_line.run(lambda: run(tyro.cli(Config, prog="python -m jvae.experiments.estimators")))


if __name__ == "__main__":
    main()
