"""Train a VAE on any data: a dataset by name, or your own files.

jvae train --help
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import jvae
from jvae import binarisation, data, distributed, plotting
from jvae.experiments import config as common
from jvae.experiments import devices, loop, run_folder
from jvae.experiments.config import ConfigError
from jvae.experiments.job import Job
from jvae.experiments.logbook import Logger
from jvae.networks import Family
from jvae.training import Preprocess

# Images whose grey values are light, not ink: the paper's Frey Face decoder is Gaussian.
_LIGHT = ("frey_face",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """Train a VAE on a dataset or on your own data."""

    data: str
    """A name (mnist, fashion_mnist, kmnist, binarized_mnist, omniglot, frey_face, cifar10,
    svhn_cropped, celeb_a, mnist_5k) or a path: .npy, .npz, a table of numbers (.csv, .tsv,
    .parquet), a folder of images."""
    test_fraction: float = 0.1
    """Of your own data, how much is held out where it has no test part."""
    split_seed: int = 0
    """Of the split that holds it out."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
          ConfigError: names the flag.
        """
        super().__post_init__()
        self._refuse_unless(bool(self.data), "data", "a name or a path")
        self._refuse_unless(0 < self.test_fraction < 1, "test_fraction", "between 0 and 1")
        self._refuse_unless(self.split_seed >= 0, "split_seed", "at least 0")


def run(config: Config, *, loggers: Sequence[Logger] = ()) -> dict[str, Any]:
    """Train, evaluate and draw as `config` says; see `jvae.experiments.loop.run`.

    Args:
      config: the settings.
      loggers: functions to be told of each epoch, beside what the settings ask for.

    Raises:
      DataError: the data is missing, corrupt or not to be trained on.
    """
    devices.start(config)
    path = Path(config.data)
    named = config.data in data.NAMES or not (path.suffix or path.parent.name or path.exists())
    folder = config.out or run_folder.default_path(path.stem)
    if not config.resume:
        distributed.on_first_process(lambda: run_folder.refuse_taken(folder))
    if named:
        dataset = data.load(config.data, config.data_dir)
    else:
        dataset = data.load_path(
            config.data,
            test_fraction=config.test_fraction,
            split_seed=config.split_seed,
            likelihood=None if config.likelihood == "auto" else config.likelihood,
            stream_above=round(config.stream_above * 2**30),
        )
    return train_on(dataset, config, folder, loggers=loggers)


def train_on(
    dataset: data.Dataset,
    config: common.Config,
    folder: Path,
    *,
    remarks: Mapping[str, Any] | None = None,
    loggers: Sequence[Logger] = (),
) -> dict[str, Any]:
    """Train on `dataset`; what `config` leaves open is proposed from the data.

    Args:
      dataset: the data.
      config: the settings.
      folder: the run's folder.
      remarks: what else `config.json` and `result.json` are to say.
      loggers: functions to be told of each epoch, beside what the settings ask for.

    Raises:
      ConfigError: settings that do not fit the data.
      DataError: data without a density under the likelihood.
    """
    console = devices.console()
    config.check_examples(len(dataset.train))
    if len(dataset.test) < 2:
        raise data.DataError(f"{dataset.source}: {len(dataset.test)} test example, expected 2")
    likelihood, protocol = fit_to(dataset, config)
    config = dataclasses.replace(config, likelihood=likelihood, binarisation=protocol)
    streamed = (
        not isinstance(dataset.train, np.ndarray)
        or dataset.train.nbytes > config.stream_above * 2**30
    )
    console.print(dataset.describe(), soft_wrap=True)
    console.print(
        f"p(x|z): {likelihood}; binarisation: {protocol}"
        + ("; streamed from the disk" if streamed else ""),
        soft_wrap=True,
    )
    is_pixels = dataset.train.dtype == np.uint8
    repeated = dataset.count_repeated()
    if repeated:
        console.print(
            f"[bold yellow]WARNING: {repeated} of {len(dataset.test)} test examples are in the "
            "training part too: where they are copies, results on them say nothing of new data.[/]",
            soft_wrap=True,
        )
    x = (_pixels if is_pixels else _numbers)(dataset, config, streamed=streamed)
    description = {
        "dataset": dataset.name,
        "dataset_sha256": dataset.sha256,
        "num_train": len(dataset.train),
        "num_test": len(dataset.test),
        "likelihood": likelihood,
        "binarisation": protocol,
        "binarisation_meaning": binarisation.BINARISATIONS[protocol].description,
        **x.protocol,
        "test_x_sha256": data.content_sha256(np.asarray(x.test)),
        "evaluated_on": "the whole test set",
        "test_elbo_estimator": "SGVB B with one sample of z an example",
        "units": "nats per image" if is_pixels else "nats per example",
    }
    model = jvae.VAE.mlp(
        data_shape=dataset.data_shape,
        latent_dim=config.latent_dim,
        hidden=config.hidden,
        activation=config.activation,
        initialiser=config.initialiser,
        likelihood=x.family,
    )
    return loop.run(
        Job(
            config,
            model,
            x.train,
            x.test,
            x.preprocess,
            description,
            folder,
            remarks={
                "dataset_source": dataset.source,
                "test_examples_also_in_train": repeated,
                **(remarks or {}),
            },
            log_volume=x.log_volume,
            shown=x.shown if plotting.is_image(dataset.data_shape) else None,
        ),
        console=console,
        loggers=loggers,
    )


def fit_to(dataset: data.Dataset, config: common.Config) -> tuple[Any, Any]:
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
        default = "dynamic" if likelihood == "bernoulli" else "dequantised"
        fitting = [
            name
            for name, known in binarisation.BINARISATIONS.items()
            if likelihood in known.likelihoods and name != "given"
        ]
    else:
        if likelihood == "bernoulli" and not is_binary:
            raise ConfigError(
                "--likelihood bernoulli needs data of 0 and 1, or 8-bit images to be binarised; "
                f"{dataset.describe()}"
            )
        default, fitting = "given", ["given"]
    if protocol == "auto":
        return likelihood, default
    if protocol not in fitting:
        raise ConfigError(
            f"--binarisation must be {' or '.join(fitting)} for a {likelihood} likelihood of this "
            f"data, got {protocol}; {dataset.describe()}"
        )
    return likelihood, protocol


class _X(NamedTuple):
    """Data as a model sees it; `Job` says what the parts are."""

    train: Any
    test: Float[Array, "..."]
    preprocess: Preprocess | None
    family: str | Family
    protocol: Mapping[str, Any] = MappingProxyType({})
    log_volume: float | None = None
    shown: Callable[[Array], Array] = jnp.asarray


def _pixels(dataset: data.Dataset, config: common.Config, *, streamed: bool) -> _X:
    name, key = config.binarisation, binarisation.fixed_draw_key()
    family: str | Family = "bernoulli"
    if config.likelihood == "gaussian":
        family = jvae.Gaussian(sigmoid_mean=True)
    if not streamed:
        return _X(*binarisation.prepare(name, dataset.train, dataset.test, key), family)
    known = binarisation.BINARISATIONS[name]
    if known.train_once is not None:
        raise ConfigError(
            f"--binarisation {name} draws the training images once, in memory: choose another, "
            "or a larger --stream-above"
        )
    prepared = binarisation.prepare(name, dataset.test[:0], dataset.test, key)
    return _X(dataset.train, prepared.test, prepared.preprocess, family)


def _numbers(dataset: data.Dataset, config: common.Config, *, streamed: bool) -> _X:
    train, test = dataset.train, dataset.test
    if config.likelihood == "bernoulli":
        train = train if streamed else jnp.asarray(train)
        return _X(train, jnp.asarray(test), None, "bernoulli")
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

    return _X(
        train=train if streamed else jnp.asarray(train),
        test=standardise(jnp.asarray(test), jnp.zeros(())),
        preprocess=standardise,
        family="gaussian",
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
