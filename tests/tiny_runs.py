"""Short runs of `jvae train` on forty examples of a user's own, and the fixtures of such runs."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jvae import data
from jvae.experiments import config as common
from jvae.experiments import figures, loop, train
from jvae.experiments.job import Job

# 40 examples, of which 4 are held out: 6 steps an epoch.
NUM, STEPS = 40, 6
TINY: dict[str, Any] = {
    "latent_dim": 2,
    "hidden": (8,),
    "epochs": 2,
    "batch_size": 6,
    "nll_samples": 5,
    "checkpoint_every": 100,
}


def run(path: Path | str, folder: Path, **changes: Any) -> dict[str, Any]:
    return train.run(train.Config(data=str(path), out=folder, **(TINY | changes)))


def interrupting_before(stop: int, signum: signal.Signals) -> Callable[..., Iterator[np.ndarray]]:
    """`data.batches`, with a signal as the batch of global step `stop` is asked for."""
    read = data.batches

    def batches(*args: Any, step: int, **kwargs: Any) -> Iterator[np.ndarray]:
        for i, batch in enumerate(read(*args, step=step, **kwargs), start=step):
            if i == stop:
                signal.raise_signal(signum)
            yield batch

    return batches


# Forty examples in files of every kind.


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return generator().integers(0, 256, (NUM, *shape), np.uint8)


def table() -> np.ndarray:
    """Four columns of very different units."""
    return generator().normal([0, 1e3, -5, 0], [1e-2, 50, 1, 3], (NUM, 4)).astype(np.float32)


def save_pngs(path: Path, images: np.ndarray) -> Path:
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:02}.png")
    return path


def save_npy(path: Path, array: np.ndarray) -> Path:
    np.save(path.with_suffix(".npy"), array)
    return path.with_suffix(".npy")


def save_csv(path: Path, rows: np.ndarray) -> Path:
    header = ",".join(f"c{i}" for i in range(rows.shape[1]))
    np.savetxt(path.with_suffix(".csv"), rows, "%.9g", ",", header=header, comments="")
    return path.with_suffix(".csv")


IMAGE_FIGURES = {"samples", "reconstructions", "manifold", "curves"}
TABLE_FIGURES = {"marginals", "curves"}
# How it is written, data_shape, likelihood, binarisation, figures.
Kind = tuple[Callable[[Path], Path], tuple[int, ...], str, str, set[str]]
KINDS: dict[str, Kind] = {
    "grey PNG": (
        lambda path: save_pngs(path, pixels(6, 5)),
        (6, 5),
        "bernoulli",
        "dynamic",
        IMAGE_FIGURES,
    ),
    "colour PNG": (
        lambda path: save_pngs(path, pixels(6, 5, 3)),
        (6, 5, 3),
        "gaussian",
        "dequantised",
        IMAGE_FIGURES,
    ),
    "uint8": (
        lambda path: save_npy(path, pixels(6, 5)),
        (6, 5),
        "bernoulli",
        "dynamic",
        IMAGE_FIGURES,
    ),
    "boolean": (
        lambda path: save_npy(path, pixels(6, 5) > 127),
        (6, 5),
        "bernoulli",
        "given",
        IMAGE_FIGURES,
    ),
    "table": (lambda path: save_csv(path, table()), (4,), "gaussian", "given", TABLE_FIGURES),
    "binary table": (
        lambda path: save_csv(path, pixels(6) > 127),
        (6,),
        "bernoulli",
        "given",
        TABLE_FIGURES,
    ),
}


# Fixtures.


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs whose figures are not looked at: they take half of the time."""
    monkeypatch.setattr(figures, "draw", lambda job, params: None)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` gives what its files are to say before a step is taken."""
    monkeypatch.setattr(loop, "run", lambda job, **how: job.settings())


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """What the test would run, in place of running it."""
    given: list[Job] = []

    def keep(job: Job, **how: object) -> dict[str, Any]:
        given.append(job)
        return {}

    monkeypatch.setattr(loop, "run", keep)
    return given


STREAMED = {"stream_above": 0.0, "epochs": 3}
MODEL = common.Config(hidden=TINY["hidden"], latent_dim=TINY["latent_dim"])


@pytest.fixture(scope="session")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_npy(tmp_path_factory.mktemp("data") / "mine", pixels(6, 5))


@pytest.fixture(scope="session")
def whole(grey: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A streamed run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(grey, folder, **STREAMED)
    return folder
