"""The data of a run: from a name or a path to what its model sees."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import jvae
from jvae import binarisation, data
from jvae.experiments import config as common
from jvae.experiments import devices
from jvae.experiments.config import ConfigError
from jvae.networks import Family
from jvae.training import Preprocess

# Images whose grey values are light, not ink: the paper's Frey Face decoder is Gaussian.
_LIGHT = ("frey_face",)
# What is proposed for grey images, where the likelihood has a density of it.
_DRAWN = ("dynamic", "dequantised")


class Inputs(NamedTuple):
    """Data as a model sees it; `Job` says what the parts are, `family` is the decoder's."""

    train: Any
    test: Float[Array, "..."]
    preprocess: Preprocess | None
    family: str | Family
    valid: Float[Array, "..."] | None = None
    protocol: Mapping[str, Any] = MappingProxyType({})
    log_volume: float | None = None
    shown: Callable[[Array], Array] = jnp.asarray


def load(name: str, config: common.Config, *, test_fraction: float = 0.1) -> data.Dataset:
    """A dataset by its name or path, with the parts that are to be held out.

    Args:
      name: as `--data` takes it.
      config: says where, for which likelihood, above which size to stream, and how much of the
        training part to hold out for validation.
      test_fraction: of your own data, where it has no test part.

    Raises:
      DataError: the data is missing, corrupt or not to be trained on.
      ConfigError: it has a validation part, and one is to be held out.
    """
    dataset = _load(name, config, test_fraction)
    fraction = config.validation_fraction
    if fraction == 0:
        return dataset
    if dataset.valid is not None:
        raise ConfigError(
            f"--validation-fraction must be 0 for data with a validation part, got {fraction}: "
            f"{dataset.describe()}, of {dataset.source}"
        )
    return data.hold_out_validation(dataset, fraction, config.split_seed)


def _load(name: str, config: common.Config, test_fraction: float) -> data.Dataset:
    if not data.is_path(name):
        return data.load(name, config.data_dir)
    return data.load_path(
        name,
        test_fraction=test_fraction,
        split_seed=config.split_seed,
        likelihood=None if config.likelihood == "auto" else config.likelihood,
        stream_above=round(config.stream_above * 2**30),
    )


def is_streamed(dataset: data.Dataset, config: common.Config) -> bool:
    """Whether training data goes to the device batch by batch."""
    in_memory = isinstance(dataset.train, np.ndarray)
    return not in_memory or dataset.train.nbytes > config.stream_above * 2**30


def prepare(dataset: data.Dataset, config: common.Config) -> Inputs:
    """The data as the model sees it.

    Args:
      dataset: the data.
      config: with the likelihood and the binarisation that `fit_to` gives.

    Raises:
      ConfigError: a binarisation that a stream cannot have.
      DataError: data without a density under the likelihood.
    """
    of_kind = _pixels if dataset.train.dtype == np.uint8 else _numbers
    return of_kind(dataset, config, streamed=is_streamed(dataset, config))


def fit_to(dataset: data.Dataset, config: common.Config) -> tuple[str, str]:
    """The likelihood and the binarisation of a run: those asked for, or what the data suggests.

    Raises:
      ConfigError: what is asked for does not fit the data; the message says what does.
    """
    is_pixels, is_binary = dataset.train.dtype == np.uint8, dataset.is_binary
    likelihood, protocol = config.likelihood, config.binarisation
    if likelihood == "auto":
        grey = dataset.data_shape[2:] in ((), (1,))
        ink = is_pixels and grey and dataset.name not in _LIGHT
        likelihood = "bernoulli" if is_binary or ink else "gaussian"
    if is_pixels and not (is_binary and likelihood == "bernoulli"):
        fitting = [
            name
            for name, known in binarisation.BINARISATIONS.items()
            if likelihood in known.likelihoods and name != "given"
        ]
        default = next((name for name in _DRAWN if name in fitting), "none")
    else:
        if likelihood == "bernoulli" and not is_binary:
            raise ConfigError(
                "--likelihood bernoulli needs data of 0 and 1, or 8-bit images to be binarised; "
                f"{dataset.describe()}"
            )
        default, fitting = "given", ["given"]
    if protocol == "auto":
        protocol = default
    if protocol not in fitting:
        raise ConfigError(
            f"--binarisation must be {' or '.join(fitting)} for a {likelihood} likelihood of this "
            f"data, got {protocol}; {dataset.describe()}"
        )
    return likelihood, protocol


def _pixels(dataset: data.Dataset, config: common.Config, *, streamed: bool) -> Inputs:
    name, key = config.binarisation, binarisation.fixed_draw_key()
    family: str | Family = config.likelihood
    if family == "gaussian":
        family = jvae.Gaussian(sigmoid_mean=True)
    known = binarisation.BINARISATIONS[name]
    valid = None
    if dataset.valid is not None:
        valid_key = binarisation.fixed_draw_key("validation")
        valid = known.test_once(jnp.asarray(dataset.valid), valid_key)
    if not streamed:
        prepared = binarisation.prepare(name, dataset.train, dataset.test, key)
        return Inputs(*prepared, family, valid)
    if known.train_once is not None:
        raise ConfigError(
            f"--binarisation {name} draws the training images once, in memory: choose another, "
            "or a larger --stream-above"
        )
    prepared = binarisation.prepare(name, dataset.test[:0], dataset.test, key)
    return Inputs(dataset.train, prepared.test, prepared.preprocess, family, valid)


def _numbers(dataset: data.Dataset, config: common.Config, *, streamed: bool) -> Inputs:
    train, test = dataset.train, jnp.asarray(dataset.test)
    valid = None if dataset.valid is None else jnp.asarray(dataset.valid)
    if config.likelihood != "gaussian":  # whose mean and scale are free
        train = train if streamed else jnp.asarray(train)
        return Inputs(train, test, None, config.likelihood, valid)
    whole = np.asarray(train)
    data.check_varied(whole, dataset.source)
    coarse = _coarse_columns(whole)
    if coarse:
        devices.console().print(
            f"[bold yellow]WARNING: few values, often repeated, in columns {coarse}: a Gaussian "
            "density can be driven without bound there, and its nats bound no probability.[/]",
            soft_wrap=True,
        )
    mean = whole.mean(axis=0, dtype=np.float64)
    scale = whole.std(axis=0, dtype=np.float64)
    shift, factor = mean.astype(np.float32), (1 / scale).astype(np.float32)

    def standardise(x: Array, key: Array) -> Array:
        del key
        return (x - shift[None]) * factor[None]

    low, high = dataset.values

    def shown(x: Array) -> Array:
        return (x / factor[None] + shift[None] - low) / (high - low)

    return Inputs(
        train=train if streamed else jnp.asarray(train),
        test=standardise(test, jnp.zeros(())),
        preprocess=standardise,
        family="gaussian",
        valid=None if valid is None else standardise(valid, jnp.zeros(())),
        protocol={
            "standardisation": "x is the data less the training part's mean, divided by its "
            "standard deviation, in each column; nats are of x",
            "columns_of_few_values": coarse,
            "mean": mean.tolist(),
            "scale": scale.tolist(),
        },
        log_volume=float(np.log(scale).sum()),
        shown=shown,
    )


def _coarse_columns(train: Float[np.ndarray, "num ..."]) -> list[int]:
    """The columns, from 1, in which at most half of the values are distinct."""
    rows = train.reshape(len(train), -1)
    return [i + 1 for i in range(rows.shape[1]) if 2 * len(np.unique(rows[:, i])) <= len(rows)]
