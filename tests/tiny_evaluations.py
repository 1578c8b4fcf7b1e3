"""Runs of a few small models, evaluated with few of everything, and the fixtures of both."""

import functools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import pixels, save_npy

from jvae import evaluation
from jvae.experiments import assessment, figures, mnist, parts, train

SEED, MODEL_SEED = 7, 3
# Few of everything: every call is compared with the library's own.
ANNEALING: dict[str, Any] = {
    "num_temperatures": 3,
    "num_chains": 5,
    "num_leapfrog": 10,
    "schedule": "linear",
    "start": "posterior",
}
FULL: dict[str, Any] = {
    "num_samples": 12,
    "repeats": 3,
    "ais": 4,
    "bdmc": 3,
    "num_temperatures": 3,
    "num_chains": 5,
    "schedule": "linear",
    "start": "posterior",
    "app_d": 2,
    "inference_gap": 3,
    "mutual_information": 30,
    "seed": SEED,
}
QUICK: dict[str, Any] = {"num_samples": 2, "mutual_information": 3}
DEFAULT = ["importance_sampling", "latents", "train_gap"]
ALL = [*DEFAULT, "ais", "ais_paired", "bdmc", "app_d", "inference_gap"]


@contextmanager
def quickly() -> Iterator[None]:
    """Without the figures of training, and with few steps and samples where any number will do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda job, params: None)
        patch.setattr(parts, "_ASCENT_STEPS", 5)
        patch.setattr(parts, "_ELBO_SAMPLES", 16)
        patch.setattr(evaluation, "app_d", functools.partial(evaluation.app_d, num_transitions=3))
        yield


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def call(folder: Path, **settings: Any) -> dict[str, Any]:
    return assessment.run(assessment.Config(run=folder, **settings))


def train_on(path: Path, folder: Path, **changes: Any) -> Path:
    tiny: dict[str, Any] = {"latent_dim": 2, "hidden": (8,), "batch_size": 6, "epochs": 1}
    tiny["nll_samples"] = 0
    train.run(train.Config(data=str(path), out=folder, **(tiny | changes)))
    return folder


def results(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return content["parts"][name]["results"]


def numbers(folder: Path, name: str) -> dict[str, np.ndarray]:
    content = json.loads((folder / "evaluation.json").read_text())
    with np.load(folder / content["parts"][name]["arrays"]) as file:
        return dict(file)


def order(num: int) -> np.ndarray:
    return np.argsort(np.random.PCG64(0).random_raw(num), kind="stable")


def rows(shown: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in shown.splitlines()
        if "│" in line
    ]


# Fixtures.


@pytest.fixture(scope="module")
def quick_evaluations() -> Iterator[None]:
    """Few steps of everything, in the tests as in the evaluations that they share."""
    with quickly():
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    small: dict[str, Any] = {"hidden": (8,), "latent_dim": 2, "epochs": 1, "nll_samples": 0}
    with quickly():
        mnist.run(mnist.Config(dataset="mnist_5k", seed=MODEL_SEED, out=folder, **small))
    return folder


@pytest.fixture(scope="session")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy(trained, tmp_path_factory.mktemp("evaluated") / "run")
    with quickly():
        call(folder, **FULL)
    return folder


@pytest.fixture(scope="session")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("ensemble")
    path = save_npy(tmp_path / "mine", pixels(3, 2))
    with quickly():
        return train_on(path, tmp_path / "run", seeds=3, seed=5)
