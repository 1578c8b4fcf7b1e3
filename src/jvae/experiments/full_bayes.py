"""App. F of Kingma & Welling (2014) on MNIST: full variational Bayes against MAP.

python -m jvae.experiments.full_bayes --help

Learning curves on many training examples and on few, where a distribution over the weights
should overfit less than a point.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import tyro
from jaxtyping import Array, Float, PRNGKeyArray

import jvae
from jvae.estimators import Bound
from jvae.experiments import (
    command_line,
    curves,
    full_bayes_figures,
    paper,
    progress_bars,
    records,
    results,
)
from jvae.experiments.config import ConfigError
from jvae.experiments.paper import BATCH_SIZE, Keys
from jvae.learners import aevb, full_bayes
from jvae.learners.full_bayes import WeightPosterior

STUDY = "full_bayes"
# Draws of θ that a point of a curve is the mean over, each for all examples.
NUM_WEIGHTS = 4
CHECKPOINTS_PER_DECADE = 4

MethodName = Literal["map", "full_bayes", "local_full_bayes"]
BOUNDS: Mapping[str, Bound] = MappingProxyType(
    {
        "full_bayes": full_bayes.full_bayes_bound,
        "local_full_bayes": full_bayes.local_full_bayes_bound,
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(curves.BandConfig):
    """Learning curves of full variational Bayes and of MAP, with bands over seeds."""

    dataset: Literal["mnist", "mnist_5k"] = "mnist"
    """mnist_5k are the 5,000 digits that jvae ships: numbers on them are not numbers on MNIST."""
    targets: Literal["dynamic", "grey"] = "dynamic"
    """dynamic: pixels drawn at each visit. grey: pixels / 255 as in the paper, whose bound is no
    likelihood of any data."""
    num_examples: tuple[int, ...] = (1_000, 50_000)
    """Training examples, a panel each: the two sizes of the paper's Figure 3."""
    methods: tuple[MethodName, ...] = ("map", "full_bayes", "local_full_bayes")
    """map: AEVB with a prior N(0, I) on the decoder's weights. full_bayes: q(θ), one θ a minibatch.
    local_full_bayes: q(θ) by local reparameterisation."""
    latent_dim: int = 3
    """Size of z; by default that of Figure 3, as the paper names no model for App. F."""
    hidden: int = 100
    """Units of the hidden layers."""
    initial_scale: float = full_bayes.INITIAL_SCALE
    """σ of every weight under q(θ) before the first step."""
    trial_steps: int = paper.TRIAL_STEPS
    """Steps after which the step size of Adagrad is chosen by what the method maximises."""
    out: Path | None = None
    """Folder for full_bayes.jsonl, a line a checkpoint as they come, its table and figure; by
    default runs/full_bayes-DATE-TIME."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
          ConfigError: names the flag.
        """
        if not self.num_examples or min(self.num_examples) < BATCH_SIZE:
            expected = f"at least {BATCH_SIZE} each, a minibatch"
            raise ConfigError(f"--num-examples must be {expected}, got {self.num_examples}")
        if not self.methods:
            raise ConfigError("--methods needs at least one name")
        for name in ("latent_dim", "hidden"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.initial_scale < np.inf:
            raise ConfigError(f"--initial-scale must be positive, got {self.initial_scale}")
        super().__post_init__()

    @property
    def curves(self) -> Iterator["Curve"]:
        """What is to be trained, panel by panel."""
        for num_train in dict.fromkeys(self.num_examples):
            for method in dict.fromkeys(self.methods):
                yield Curve(num_train, method)


class Curve(NamedTuple):
    """What a curve is of."""

    num_train: int
    method: str

    @property
    def title(self) -> str:
        """In words."""
        return f"{self.method}, {self.num_train:,} examples"


def run(config: Config) -> Path:
    """Train and measure as `config` says, write the record as it comes, draw and print.

    Returns:
      The folder.

    Raises:
      ConfigError: there is a record already, or none to draw.
      DataError: the dataset is missing or corrupt, or has fewer training examples.
      RunFolderError: there is no record to draw.
      Interrupted: Ctrl-C or SIGTERM came; what was measured stays, and can be drawn.
      FloatingPointError: a bound is not finite.
    """
    folder = config.folder(STUDY)
    path = folder / f"{STUDY}.jsonl"
    if not config.redraw:
        _measure_into(path, config)
    full_bayes_figures.draw(path, rich.console.Console())
    return folder


def _measure_into(path: Path, config: Config) -> None:
    records.refuse_taken(path)
    start = time.perf_counter()
    bar = progress_bars.of_study(rich.console.Console(stderr=True))
    steps = len(list(config.curves)) * (config.trial_steps + config.max_samples // BATCH_SIZE)
    with records.keeping(path), bar:
        task = bar.add_task("step sizes", total=steps, status="")
        advance = functools.partial(bar.advance, task)
        data = {
            num: paper.load(config.dataset, config.targets, config.data_dir, num_train=num)
            for num in dict.fromkeys(config.num_examples)
        }
        fits = {c: _fit(config, c, data[c.num_train]) for c in config.curves}
        trials = {
            curve: paper.choose_step_size(
                fit,
                config.seed,
                num_steps=config.trial_steps,
                advance=advance,
                criterion="objective on the training examples shown",
            )
            for curve, fit in fits.items()
        }
        settings = _settings(config, fits, trials)
        with records.recording(path, STUDY, settings, start=start) as write:
            for curve, fit in fits.items():
                bar.update(task, description=curve.title, status="")
                step_size = trials[curve].step_size
                for point in _measured(config, curve, fit, step_size, advance):
                    write(point)
                    bar.update(task, status=f"test bound {point['test']:.1f}")


def _fit(config: Config, curve: Curve, data: paper.Data) -> paper.Fit:
    model = paper.make_model(config.dataset, config.latent_dim, hidden=config.hidden)
    if curve.method == "map":
        objective = functools.partial(_map_objective, dataset_size=curve.num_train)
        return paper.make_fit(aevb.make_learner, model, data, by_example=objective)
    make_learner = functools.partial(
        full_bayes.make_learner,
        dataset_size=curve.num_train,
        bound=BOUNDS[curve.method],
        initial_scale=config.initial_scale,
    )
    return paper.make_fit(
        make_learner,
        model,
        data,
        optimizer=lambda step_size, _: paper.make_optimizer(step_size, None),
        by_example=functools.partial(_objective, dataset_size=curve.num_train),
    )


def _map_objective(
    params: jvae.Params, x: Float[Array, "num ..."], key: PRNGKeyArray, *, dataset_size: int
) -> Float[Array, "num"]:
    """The ELBO with the share of log p(θ), to a constant, of the generative weights."""
    generative = {name: part for name, part in params.weights.items() if name != "encoder"}
    log_p_theta = -sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(generative)) / 2
    return paper.ELBO(params, x, key) + log_p_theta / dataset_size


def _expected_elbo(
    posterior: WeightPosterior, x: Float[Array, "num ..."], key: PRNGKeyArray
) -> Float[Array, "num"]:
    """E_q(θ)[ELBO] of each example."""
    return full_bayes.held_out_bound(posterior, x, key, num_weights=NUM_WEIGHTS).mean(axis=0)


def _objective(
    posterior: WeightPosterior, x: Float[Array, "num ..."], key: PRNGKeyArray, *, dataset_size: int
) -> Float[Array, "num"]:
    """The bound of App. F over N: with the share of KL(q(θ) ‖ p(θ)) taken off."""
    return _expected_elbo(posterior, x, key) - full_bayes.kl_of_weights(posterior) / dataset_size


def _elbo_at_mean(
    posterior: WeightPosterior, x: Float[Array, "num ..."], key: PRNGKeyArray
) -> Float[Array, "num"]:
    return paper.ELBO(posterior.mean, x, key)


def _settings(
    config: Config, fits: Mapping[Curve, paper.Fit], trials: Mapping[Curve, paper.Trial]
) -> dict[str, Any]:
    """All that the numbers depend on."""
    own = records.settings_of(config, without=("redraw", "out", "data_dir"))
    return own | {
        "all_seeds": list(config.all_seeds),
        "batch_size": BATCH_SIZE,
        "optimizer": "adagrad; MAP prior N(0, I) with map, KL(q(θ) ‖ N(0, I)) in the others",
        "bound": f"SGVB B with one draw of z an example, nats; of q(θ) the mean over {NUM_WEIGHTS} "
        "draws of θ, or at its mean",
        "stderr_over": "seeds" if config.seeds > 1 else "examples, with the same draws of θ",
        "seconds_are": "of training all seeds, without measuring",
        "curves": [
            curve._asdict() | {"protocol": fits[curve].data.protocol} | trial.settings
            for curve, trial in trials.items()
        ],
    }


def _measured(
    config: Config,
    curve: Curve,
    fit: paper.Fit,
    step_size: float,
    advance: Callable[[int], object],
) -> Iterator[dict[str, Any]]:
    """Train a curve; a point a checkpoint.

    Raises:
      FloatingPointError: a bound is not finite.
    """
    shown: dict[str, paper.ByExample] = {"": paper.ELBO}
    if curve.method != "map":
        shown = {"": _expected_elbo, "_at_mean": _elbo_at_mean}
    keys = [Keys.of(seed) for seed in config.all_seeds]
    checkpoints = paper.log_spaced(
        config.max_samples // BATCH_SIZE, per_decade=CHECKPOINTS_PER_DECADE
    )
    start = paper.begin(fit, step_size, config.all_seeds)
    seconds, began = 0.0, time.perf_counter()
    for state in paper.train(fit, start, keys, checkpoints, advance=advance):
        seconds += time.perf_counter() - began
        samples = int(state.step) * BATCH_SIZE
        point: dict[str, Any] = {
            **curve._asdict(),
            "samples": samples,
            "seconds": round(seconds, 3),
        }
        for name, by_example in shown.items():
            for part, values in paper.measure(fit.data, state, keys, by_example).items():
                if not all(np.isfinite(of_one).all() for of_one in values):
                    raise FloatingPointError(
                        f"{curve.title}: a bound is not finite after {samples:,} samples"
                    )
                point |= results.summary(f"{part}{name}", values)
        if curve.method != "map":
            kl = jax.vmap(full_bayes.kl_of_weights)(state.params)
            point["kl_of_weights_by_seed"] = np.asarray(kl).tolist()
        yield point
        began = time.perf_counter()


def main() -> None:
    """The command line."""
    command_line.run(lambda: run(tyro.cli(Config, prog="python -m jvae.experiments.full_bayes")))


if __name__ == "__main__":
    main()
