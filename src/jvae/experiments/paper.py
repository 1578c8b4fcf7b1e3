"""What the studies of Kingma & Welling (2014) share: the settings of its Section 5, and a fit.

Data, models, Adagrad with the step size that does best at the start, and a learner trained for
several seeds at once to counts of samples that are even on a logarithmic axis.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

import jvae
from jvae import binarisation, data, training
from jvae.evaluation import bound_by_example
from jvae.experiments.parts import chosen
from jvae.learners import Learner, aevb, wake_sleep
from jvae.networks import Family

BATCH_SIZE = 100
STEP_SIZES = (0.01, 0.02, 0.1)
# "The first few iterations", of which the paper says no number.
TRIAL_STEPS = 300
# An epoch is compiled for each of its lengths: few serve for every count of steps.
CHUNKS = (100, 10, 1)
# The key of the training images that bounds are shown on, in a domain of its own.
_SHOWN = 20131221

MakeLearner = Callable[[optax.GradientTransformation], Learner]
MakeOptimizer = Callable[[float, int], optax.GradientTransformation]
# `(params, x, key) -> [num] nats`.
ByExample = Callable[[Any, Array, PRNGKeyArray], Array]
# SGVB B with one draw of z.
ELBO: ByExample = functools.partial(bound_by_example, bound=jvae.elbo)
LEARNERS: Mapping[str, MakeLearner] = MappingProxyType(
    {"aevb": aevb.make_learner, "wake_sleep": wake_sleep.make_learner}
)


class Setting(NamedTuple):
    """What the paper takes for a dataset.

    Attributes:
      data_shape: shape of one example x.
      hidden: units of the one hidden layer, in the encoder as in the decoder.
      family: of p(x|z).
      latent_dims: of the panels of Figure 2.
      protocols: by the name of the targets, that of `jvae.binarisation.BINARISATIONS`.
    """

    data_shape: tuple[int, ...]
    hidden: int
    family: Family
    latent_dims: tuple[int, ...]
    protocols: Mapping[str, str]


_MNIST = Setting(
    data_shape=(28, 28),
    hidden=500,
    family=jvae.Bernoulli(),
    latent_dims=(3, 5, 10, 20, 200),
    protocols=MappingProxyType({"grey": "none", "dynamic": "dynamic"}),
)
_FREY_FACE = Setting(
    data_shape=(28, 20),
    hidden=200,
    family=jvae.Gaussian(sigmoid_mean=True),
    latent_dims=(2, 5, 10, 20),
    protocols=MappingProxyType({"grey": "none", "dynamic": "dequantised"}),
)
SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {"mnist": _MNIST, "mnist_5k": _MNIST, "frey_face": _FREY_FACE}
)


class Data(NamedTuple):
    """A dataset as the learners see it.

    Attributes:
      name: of the dataset.
      train: what an epoch takes: uint8 [num_train, *data_shape].
      preprocess: from a batch of `train` and a key to x.
      num_train: how many training examples there are.
      shown: float [num_test, *data_shape], training examples on which bounds are measured: the
        first of a fixed random order, as many as there are test examples where there are so many,
        drawn once.
      test: float [num_test, *data_shape], drawn once.
      protocol: what makes two results comparable.
    """

    name: str
    train: Any
    preprocess: training.Preprocess
    num_train: int
    shown: Float[Array, "..."]
    test: Float[Array, "..."]
    protocol: dict[str, Any]


def load(
    name: str, targets: str, data_dir: Path | None = None, *, num_train: int | None = None
) -> Data:
    """A dataset of the paper, or the digits that jvae ships.

    Args:
      name: "mnist", "frey_face" (the split of `jvae.data`: 1,565 training and 200 test frames; the
        200 of its validation part are left out) or "mnist_5k".
      targets: "grey", pixels / 255 as in the paper, under which a Bernoulli bound is no likelihood
        of any data and a Gaussian one can be driven without bound; or "dynamic": pixels drawn at
        each visit, for Frey Face dequantised.
      data_dir: as `jvae.data.load` takes it.
      num_train: only so many, the first of a fixed random order; by default all.

    Raises:
      DataError: the data is missing or corrupt, or has fewer training examples.
    """
    try:
        dataset = data.load(name, data_dir)
    except data.NoNetworkError as error:
        if name != "mnist":
            raise
        instead = "or take the 5,000 digits that jvae ships: --datasets mnist_5k"
        raise data.NoNetworkError(f"{error}\n({instead})") from error
    images = np.asarray(dataset.train)
    if num_train is not None:
        if not 1 <= num_train <= len(images):
            raise data.DataError(f"{name} has {len(images)} training examples, not {num_train}")
        images = images[chosen(len(images), num_train)]
    return of_images(dataset, images, targets)


def of_images(dataset: data.Dataset, images: np.ndarray, targets: str) -> Data:
    """`Data` of a dataset of which `images` are the training part."""
    protocol, key = SETTINGS[dataset.name].protocols[targets], binarisation.fixed_draw_key()
    known = binarisation.BINARISATIONS[protocol]
    x = binarisation.prepare(protocol, images, dataset.test, key)
    shown = known.test_once(
        x.train[chosen(len(images), len(dataset.test))], jax.random.fold_in(key, _SHOWN)
    )
    return Data(
        name=dataset.name,
        train=x.train,
        preprocess=x.preprocess,
        num_train=len(images),
        shown=shown,
        test=x.test,
        protocol={
            "dataset": dataset.name,
            "dataset_sha256": dataset.sha256,
            "targets": targets,
            "targets_meaning": known.description,
            "num_train": len(images),
            "num_train_shown": len(shown),
            "num_test": len(dataset.test),
        },
    )


def make_model(name: str, latent_dim: int, *, hidden: int | None = None) -> jvae.VAE:
    """The paper's model of a dataset, every weight from N(0, variance 0.01).

    Args:
      name: of the dataset, a name in `SETTINGS`.
      latent_dim: size of z.
      hidden: units of the hidden layers; by default those of Figure 2.
    """
    setting = SETTINGS[name]
    return jvae.VAE.mlp(
        setting.data_shape,
        latent_dim=latent_dim,
        hidden=(setting.hidden if hidden is None else hidden,),
        likelihood=setting.family,
        initialiser="paper",
    )


def make_optimizer(step_size: float, num_train: int | None) -> optax.GradientTransformation:
    """Adagrad on the paper's MAP criterion, with the step size in its state.

    So states of several step sizes make one ensemble, and one program trains any of them.

    Args:
      step_size: the global one.
      num_train: N, beside which the one prior on the generative weights stands; None for no prior.
    """

    def adagrad(learning_rate: Any) -> optax.GradientTransformation:
        return training.make_optimizer("adagrad", learning_rate, map_dataset_size=num_train)

    return optax.inject_hyperparams(adagrad)(learning_rate=step_size)


class Keys(NamedTuple):
    """The keys of a seed, each of one use; learners that are compared share them."""

    init: PRNGKeyArray
    train: PRNGKeyArray
    order: PRNGKeyArray
    bounds: PRNGKeyArray
    figures: PRNGKeyArray

    @classmethod
    def of(cls, seed: int) -> "Keys":
        """All keys, from a seed."""
        return cls(*jax.random.split(jax.random.key(seed), len(cls._fields)))


class Fit(NamedTuple):
    """A learner, a model and data: what trains one, for any step size and any seeds.

    Attributes:
      init: from a step size and the keys of a seed to the state before the first step.
      epoch: as `jvae.training.make_epoch` makes.
      data: the data.
      by_example: what a step size is chosen by, a bound on each example under a member's `params`.
    """

    init: Callable[[float, Keys], Any]
    epoch: training.Epoch
    data: Data
    by_example: ByExample = ELBO


def make_fit(
    make_learner: MakeLearner,
    model: jvae.VAE,
    data: Data,
    *,
    optimizer: MakeOptimizer = make_optimizer,
    by_example: ByExample = ELBO,
) -> Fit:
    """What trains `model` on `data` by a learner.

    Args:
      make_learner: from an optimizer to a learner, such as those of `LEARNERS`.
      model: from `make_model`.
      data: from `load`. A learner that keeps something of each example beside it is given that by
        `data._replace(train=…, preprocess=…)`, in what an epoch takes.
      optimizer: from a step size and N to an optimizer with the step size in its state.
      by_example: as `Fit` has it.
    """

    def learner(step_size: float) -> Learner:
        return make_learner(optimizer(step_size, data.num_train))

    def init(step_size: float, keys: Keys) -> Any:
        return learner(step_size).init(jvae.init(model, keys.init), keys.train)

    # A step takes the step size from the state.
    step = learner(STEP_SIZES[0]).step
    epoch = training.make_epoch(step, BATCH_SIZE, data.preprocess)
    return Fit(init, epoch, data, by_example)


class Trial(NamedTuple):
    """The choice of a step size.

    Attributes:
      num_steps: how many each was tried for.
      step_size: the one that did best.
      bounds: of each step size, the mean bound of training examples, in nats; None where it is not
        finite.
      criterion: which bound, or what else, of which examples.
    """

    num_steps: int
    step_size: float
    bounds: dict[float, float | None]
    criterion: str = "bound on the training examples shown"

    @property
    def settings(self) -> dict[str, Any]:
        """For the header of a record."""
        return {
            "step_size": self.step_size,
            "step_size_rule": f"of those tried the one with the highest mean {self.criterion} "
            f"after {self.num_steps} steps of the first seed",
            "step_size_trial": {str(size): bound for size, bound in self.bounds.items()},
        }


def choose_step_size(
    fit: Fit,
    seed: int,
    *,
    num_steps: int,
    advance: Callable[[int], object],
    score: Callable[[Any, Sequence[Keys]], Sequence[np.ndarray]] | None = None,
    criterion: str = Trial._field_defaults["criterion"],
) -> Trial:
    """The step size that does best on training data in the first few iterations.

    Kingma & Welling (2014), Section 5. All start from the weights of `seed` and see the same
    examples and noise.

    Args:
      fit: what is to be trained.
      seed: the seed.
      num_steps: how many iterations.
      advance: told how many steps were done.
      score: from an ensemble and its keys to what the mean of is compared, [num] of each member;
        by default the bound on the training examples shown.
      criterion: what `score` is, in words.

    Raises:
      FloatingPointError: the bound is finite with none of them.
    """
    keys = [Keys.of(seed)] * len(STEP_SIZES)
    states = [fit.init(size, Keys.of(seed)) for size in STEP_SIZES]
    (state,) = train(fit, training.ensemble(states), keys, [num_steps], advance=advance)
    if score is None:

        def score(state: Any, keys: Sequence[Keys]) -> Sequence[np.ndarray]:
            return measure(fit.data, state, keys, fit.by_example)["train"]

    found = [float(of_one.mean()) for of_one in score(state, keys)]
    bounds = dict(zip(STEP_SIZES, found, strict=True))
    finite = {size: bound for size, bound in bounds.items() if math.isfinite(bound)}
    if not finite:
        raise FloatingPointError(f"no step size of {STEP_SIZES} keeps the bound finite")
    best = max(finite, key=lambda size: finite[size])
    return Trial(num_steps, best, {size: finite.get(size) for size in bounds}, criterion)


def begin(fit: Fit, step_size: float, seeds: Sequence[int]) -> Any:
    """The state before the first step of a model for each seed, an ensemble even of one."""
    return training.ensemble([fit.init(step_size, Keys.of(seed)) for seed in seeds])


def train(
    fit: Fit,
    state: Any,
    keys: Sequence[Keys],
    checkpoints: Sequence[int],
    *,
    advance: Callable[[int], object],
) -> Iterator[Any]:
    """The states after so many steps each; every seed goes through the data in its own order.

    Args:
      fit: what is to be trained.
      state: an ensemble.
      keys: of each member.
      checkpoints: counts of steps, in rising order.
      advance: told how many steps were done.
    """
    orders = [batches(k.order, fit.data.num_train) for k in keys]
    done = 0
    for checkpoint in checkpoints:
        for length in chunks(checkpoint - done):
            order = np.stack([list(itertools.islice(own, length)) for own in orders])
            state, _ = fit.epoch(state, fit.data.train, order)
            jax.block_until_ready(state)
            advance(length)
        done = checkpoint
        yield state


def batches(key: PRNGKeyArray, num: int) -> Iterator[Int[np.ndarray, "batch"]]:
    """Indices of minibatches for ever: one shuffled pass over `num` examples after the other."""
    for number in itertools.count():
        yield from training.shuffled_batches(jax.random.fold_in(key, number), num, BATCH_SIZE)


def chunks(steps: int) -> Iterator[int]:
    """Lengths among `CHUNKS` that add up to `steps`, the longest first."""
    for length in CHUNKS:
        num, steps = divmod(steps, length)
        yield from itertools.repeat(length, num)


def log_spaced(last: int, *, first: int = 100, per_decade: int = 8) -> list[int]:
    """Counts of steps, even on a logarithmic axis to two digits, from `first` to `last` itself."""
    powers = range(round(per_decade * math.log10(last)) + 1)
    even = {float(f"{10 ** (power / per_decade):.1e}") for power in powers}
    return [*sorted(int(n) for n in even if n.is_integer() and first <= n < last), last]


def measure(
    data: Data, state: Any, keys: Sequence[Keys], by_example: ByExample = ELBO
) -> dict[str, list[np.ndarray]]:
    """A bound on each training example shown and each test example, under each member.

    Args:
      data: the data.
      state: an ensemble.
      keys: of each member.
      by_example: the bound; by default the ELBO, SGVB B with one draw of z.

    Returns:
      "train" and "test": of each member [num] nats.
    """
    found: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for i, own in enumerate(keys):
        params = jax.tree.map(operator.itemgetter(i), state.params)
        train_key, test_key = jax.random.split(jax.random.fold_in(own.bounds, state.step))
        for part, x, key in (("train", data.shown, train_key), ("test", data.test, test_key)):
            values = by_example(params, x, key)
            found[part].append(np.asarray(values, np.float64))
    return found
