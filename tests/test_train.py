"""`jvae train` on every kind of data, `jvae compare`, and how commands end."""

import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import linear_gaussian
import numpy as np
import pytest
from PIL import Image
from runs import assert_same_state, last_state, metrics

import jvae
from jvae import binarisation, checkpoint, data, evaluation, plotting, training
from jvae.experiments import (
    command_line,
    compare,
    figures,
    inputs,
    loop,
    mnist,
    results,
    run_folder,
    train,
)
from jvae.experiments import config as common
from jvae.experiments.config import ConfigError
from jvae.experiments.interrupt import Interrupted
from jvae.experiments.run_folder import RunFolderError

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


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    """LLVM optimises longer than these runs take."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs whose figures are not looked at: they take half of the time."""
    monkeypatch.setattr(figures, "draw", lambda job, params: None)


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return generator().integers(0, 256, (NUM, *shape), np.uint8)


def table() -> np.ndarray:
    """Four columns of very different units."""
    return generator().normal([0, 1e3, -5, 0], [1e-2, 50, 1, 3], (NUM, 4)).astype(np.float32)


# Files of every kind.


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_data_of_every_kind(kind: str, tmp_path: Path) -> None:
    write, data_shape, likelihood, protocol, figures = KINDS[kind]
    path, folder = write(tmp_path / "mine"), tmp_path / "run"
    result = run(path, folder)
    dataset = data.load_path(path)
    settings = run_folder.read_settings(folder)
    assert run_folder.read_result(folder) == run_folder.json_round_trip(result)
    # What was left open is on record as it was resolved.
    assert (settings["likelihood"], settings["binarisation"]) == (likelihood, protocol)
    assert settings["protocol"] == result["protocol"]
    is_pixels = dataset.train.dtype == np.uint8
    assert (
        result["protocol"].items()
        >= {
            "dataset": "mine",
            "dataset_sha256": dataset.sha256,
            "num_train": 36,
            "num_test": 4,
            "likelihood": likelihood,
            "binarisation": protocol,
            "binarisation_meaning": binarisation.BINARISATIONS[protocol].description,
            "evaluated_on": "the whole test set",
            "units": "nats per image" if is_pixels else "nats per example",
        }.items()
    )
    assert dataset.data_shape == data_shape
    assert settings["data"] == str(path)
    rows, tests = (part.reshape(len(part), -1) for part in (dataset.train, dataset.test))
    repeated = (rows[None] == tests[:, None]).all(axis=2).any(axis=1).sum()
    assert (repeated > 0) == (kind == "binary table")  # 64 rows of six bits there are
    for record in (settings, result):
        assert record["dataset_source"] == f"{dataset.source}"
        assert "fallback" not in record
        assert record["test_examples_also_in_train"] == repeated
    assert (result["epochs"], result["steps"], result["seed"]) == (2, 2 * STEPS, 0)
    assert "K = 5" in result["test_nll_estimator"]
    assert {path.stem for path in (folder / "figures").iterdir()} == figures
    for figure in (folder / "figures").iterdir():
        with Image.open(figure) as image:
            low, high = np.asarray(image.convert("L")).min(), np.asarray(image.convert("L")).max()
        assert low < high
    standardised = kind == "table"
    assert ("test_nll_of_the_data_as_given" in result) == standardised
    assert ("standardisation" in result["protocol"]) == standardised
    assert ("columns_of_few_values" in result["protocol"]) == standardised
    # A density of (image + u) / 256 bounds the probability of the image, less log 256 a pixel.
    bits = {"test_bits_per_dimension_at_most"} & result.keys()
    assert bool(bits) == (protocol == "dequantised")
    if bits:
        nats_of_the_image = result["test_nll"] + math.prod(data_shape) * math.log(256)
        assert result["test_bits_per_dimension_at_most"] == pytest.approx(
            nats_of_the_image / math.log(2) / math.prod(data_shape), rel=1e-12
        )
    assert not {path.name for path in folder.iterdir()} & {"failure.json", run_folder.UNFINISHED}


@pytest.mark.usefixtures("no_figures")
def test_a_dataset_by_name(tmp_path: Path) -> None:
    result = run("mnist_5k", tmp_path / "run", epochs=1, batch_size=1000, nll_samples=0)
    assert result["protocol"]["dataset"] == "mnist_5k"
    assert result["protocol"]["dataset_sha256"] == data.load("mnist_5k").sha256
    assert result["dataset_source"] == "embedded in jvae"
    assert result["steps"] == 4
    assert "test_nll" not in result


def test_the_run_is_named_after_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "run", lambda job, **how: {"folder": job.folder})
    (tmp_path / "mine").mkdir()
    save_npy(tmp_path / "mine" / "digits", pixels(6, 5))
    save_pngs(tmp_path / "faces", pixels(6, 5))
    for path, stem in (
        ("mine/digits.npy", "digits"),
        ("faces/", "faces"),
        ("mnist_5k", "mnist_5k"),
    ):
        folder: Path = train.run(train.Config(data=path, batch_size=6))["folder"]
        assert folder.parent == Path("runs")
        assert folder.name.startswith(f"{stem}-2")


def test_the_split_is_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "run", lambda job, **how: job.protocol)
    path = save_npy(tmp_path / "mine", pixels(6, 5))
    protocols = [
        run(path, tmp_path / "run", **changes)
        for changes in ({}, {"test_fraction": 0.25}, {"split_seed": 1})
    ]
    assert [(p["num_train"], p["num_test"]) for p in protocols] == [(36, 4), (30, 10), (36, 4)]
    assert len({p["dataset_sha256"] for p in protocols}) == 3
    assert len({p["test_x_sha256"] for p in protocols}) == 3


# What makes results comparable.


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` gives what its files are to say before a step is taken."""
    monkeypatch.setattr(loop, "run", lambda job, **how: job.settings())


@pytest.mark.usefixtures("no_training")
def test_the_test_data_of_a_run_is_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_pngs(tmp_path / "mine", pixels(6, 5))
    first = run(path, tmp_path / "run")
    dataset = data.load_path(path)
    key = jax.random.split(binarisation.fixed_draw_key())[1]
    x = np.asarray(binarisation.bernoulli(jnp.asarray(dataset.test), key))
    assert first["protocol"]["test_x_sha256"] == data.content_sha256(x)
    same = run(path, tmp_path / "run", seed=1, stream_above=0.0, hidden=(3,))
    compare.check_comparable({"a": first, "b": same})

    def differing(**others: dict[str, Any]) -> str:
        with pytest.raises(RunFolderError) as error:
            compare.check_comparable({"a": first, **others})
        return str(error.value)

    # Another split: the numbers of examples are the same, the examples are not.
    split = run(path, tmp_path / "run", split_seed=1)
    hashes = [
        f'{name} is "{first["protocol"][name]}" and "{split["protocol"][name]}"'
        for name in ("dataset_sha256", "test_x_sha256")
    ]
    assert differing(b=split) == f"a and b do not compare: {'; '.join(hashes)}"
    # Another draw of the same images.
    monkeypatch.setattr(binarisation, "fixed_draw_key", lambda: jax.random.key(5))
    drawn = run(path, tmp_path / "run")
    assert differing(b=same, c=drawn) == (
        f'a and c do not compare: test_x_sha256 is "{first["protocol"]["test_x_sha256"]}" and '
        f'"{drawn["protocol"]["test_x_sha256"]}"'
    )


@pytest.mark.usefixtures("no_training")
def test_test_examples_that_were_trained_on_are_counted_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = table(), table()[:5]
    test[[1, 3]] += 1
    np.savez(tmp_path / "mine.npz", train=train, test=test)
    settings = run(tmp_path / "mine.npz", tmp_path / "run")
    assert settings["test_examples_also_in_train"] == 3
    assert (
        "WARNING: 3 of 5 test examples are in the training part too: where they are copies, "
        "results on them say nothing of new data.\n"
    ) in capsys.readouterr().out
    # Files that are streamed are not looked through.
    same = save_pngs(tmp_path / "same", np.repeat(pixels(6, 5)[:1], NUM, axis=0))
    assert run(same, tmp_path / "run")["test_examples_also_in_train"] == 4
    assert "WARNING: 4 of 4" in capsys.readouterr().out
    assert run(same, tmp_path / "run", stream_above=0.0)["test_examples_also_in_train"] is None
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.usefixtures("no_training")
def test_columns_of_few_values_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At most half of the values are distinct: of twelve, six, and not seven."""
    columns = [np.arange(12) % 6, np.arange(12) % 7, np.arange(12), np.arange(12) % 2]
    np.savez(tmp_path / "mine.npz", train=np.stack(columns, axis=1), test=table()[:4])
    protocol = run(tmp_path / "mine.npz", tmp_path / "run")["protocol"]
    assert protocol["columns_of_few_values"] == [1, 4]
    assert (
        "WARNING: few values, often repeated, in columns [1, 4]: a Gaussian density can be driven "
        "without bound there, and its nats bound no probability.\n"
    ) in capsys.readouterr().out
    continuous = run(save_csv(tmp_path / "table", table()), tmp_path / "run")
    assert continuous["protocol"]["columns_of_few_values"] == []
    assert "WARNING" not in capsys.readouterr().out


def test_a_figure_that_cannot_be_drawn_costs_no_result(
    grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoFigureError(Exception):
        pass

    def fail(*args: object, **how: object) -> None:
        raise NoFigureError

    folder = tmp_path / "run"
    monkeypatch.setattr(plotting, "image_grid", fail)
    with pytest.raises(NoFigureError):
        run(grey, folder, epochs=1)
    result = run_folder.read_result(folder)
    assert result["test_elbo"] == metrics(folder)[-1]["test_elbo"]
    assert math.isfinite(result["test_nll"])
    assert (folder / "model.safetensors").exists()
    assert list((folder / "figures").iterdir()) == []


# A table in its own units.


def test_a_table_has_its_density_in_its_own_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None
) -> None:
    """By hand: a linear-Gaussian model's log N(y; m + s b, s (W Wᵀ + σ² I) s) of the file's y.

    Its q is the posterior, so that each importance weight is p(x) exactly; a step size that no
    float32 weight feels keeps it.
    """
    fixed = linear_gaussian.with_posterior(linear_gaussian.make(4, 2, 0.5))
    output = fixed.weights["decoder"]["params"]["output"]
    # The same with a log-variance of its own, as the run's model has it.
    learned = {
        "kernel": jnp.concatenate([output["kernel"], jnp.zeros((2, 4))], axis=1),
        "bias": jnp.concatenate([output["bias"], jnp.full(4, 2 * math.log(0.5))]),
    }
    weights = {**fixed.weights, "decoder": {"params": {"output": learned}}}
    monkeypatch.setattr(jvae, "init", lambda model, key: jvae.Params(weights, model))
    path = save_csv(tmp_path / "mine", table())
    still = {"optimizer": "sgd", "learning_rate": 1e-30, "epochs": 1, "hidden": ()}
    result = run(path, tmp_path / "run", **still)

    rows = np.loadtxt(path, delimiter=",", skiprows=1)
    chosen, held_out = data.hold_out(NUM, 0.1, 0)
    m, s = rows[chosen].mean(axis=0), rows[chosen].std(axis=0)
    np.testing.assert_allclose(result["protocol"]["mean"], m, rtol=1e-6)
    np.testing.assert_allclose(result["protocol"]["scale"], s, rtol=1e-6)
    model = linear_gaussian.Exact.of(fixed)
    covariance = np.diag(s) @ (model.W @ model.W.T + model.sigma**2 * np.eye(4)) @ np.diag(s)
    r = rows[held_out] - (m + s * model.b)
    square = np.einsum("ni,ij,nj->n", r, np.linalg.inv(covariance), r)
    log_py = -0.5 * (square + np.linalg.slogdet(2 * math.pi * covariance)[1])
    # 1e3 ± 50 in float32 is x to within 1e-6, which the density's slope of up to 10 magnifies.
    assert result["test_nll_of_the_data_as_given"] == pytest.approx(-log_py.mean(), abs=1e-4)
    log_px = model.log_px((rows[held_out] - m) / s)
    assert result["test_nll"] == pytest.approx(-log_px.mean(), abs=1e-4)
    # Not a rounding apart: a density's change of variables.
    scale = np.array(result["protocol"]["scale"])
    assert result["test_nll_of_the_data_as_given"] == result["test_nll"] + np.log(scale).sum()
    assert abs(np.log(scale).sum()) > 0.1


# What is proposed, and what is refused.

RNG = np.random.default_rng(1)
GREY = RNG.integers(0, 256, (9, 4, 3), np.uint8)
BLACK_AND_WHITE = (GREY // 128) * np.uint8(255)
COLOUR = RNG.integers(0, 256, (9, 4, 3, 3), np.uint8)
NUMBERS = RNG.normal(size=(9, 4)).astype(np.float32)
BITS = (NUMBERS > 0).astype(np.float32)


def dataset(examples: Any, name: str = "mine") -> data.Dataset:
    test = np.stack([examples[i] for i in range(4)])
    return data.Dataset(
        name=name, train=examples, test=test, source="memory", sha256="0", licence="ours"
    )


class Files(data.ImageFiles):
    """Images in files, without the files."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        super().__init__([Path(str(i)) for i in range(len(images))], images.shape[1:])

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self.images[index])


DATASETS = {
    "grey": dataset(GREY),
    "flat grey": dataset(GREY.reshape(9, 12)),
    "grey with its channel": dataset(GREY[..., None]),
    "black and white": dataset(BLACK_AND_WHITE),
    "colour": dataset(COLOUR),
    "frey_face": dataset(GREY, "frey_face"),
    "grey files": dataset(Files(GREY)),
    "black and white files": dataset(Files(BLACK_AND_WHITE)),
    "colour files": dataset(Files(COLOUR)),
    "numbers": dataset(NUMBERS),
    "bits": dataset(BITS),
}
BERNOULLI = ("none", "dynamic", "static", "threshold")
GAUSSIAN = ("none", "dequantised")
# Of each: what is proposed, and under each likelihood the default and all that can be asked for.
Fit = tuple[str, dict[str, tuple[str, ...]]]
INK: Fit = (
    "bernoulli",
    {"bernoulli": ("dynamic", *BERNOULLI), "gaussian": ("dequantised", *GAUSSIAN)},
)
LIGHT: Fit = ("gaussian", INK[1])
FITS: dict[str, Fit] = {
    "grey": INK,
    "flat grey": INK,
    "grey with its channel": INK,
    "grey files": INK,
    "black and white files": INK,  # nobody looks into them
    "black and white": (
        "bernoulli",
        {"bernoulli": ("given", "given"), "gaussian": ("dequantised", *GAUSSIAN)},
    ),
    "colour": LIGHT,
    "colour files": LIGHT,
    "frey_face": LIGHT,
    "numbers": ("gaussian", {"gaussian": ("given", "given")}),
    "bits": ("bernoulli", {"bernoulli": ("given", "given"), "gaussian": ("given", "given")}),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_what_fits_the_data(kind: str) -> None:
    proposed, fits = FITS[kind]
    for likelihood in ("auto", "bernoulli", "gaussian"):
        meant = proposed if likelihood == "auto" else likelihood
        for protocol in ("auto", *binarisation.BINARISATIONS):
            asked = train.Config(data="mine", likelihood=likelihood, binarisation=protocol)  # type: ignore[arg-type]
            if meant not in fits:
                with pytest.raises(ConfigError, match=r"--likelihood bernoulli needs data of 0"):
                    inputs.fit_to(DATASETS[kind], asked)
                continue
            default, *fitting = fits[meant]
            if protocol == "auto":
                assert inputs.fit_to(DATASETS[kind], asked) == (meant, default)
            elif protocol in fitting:
                assert inputs.fit_to(DATASETS[kind], asked) == (meant, protocol)
            else:
                with pytest.raises(ConfigError) as error:
                    inputs.fit_to(DATASETS[kind], asked)
                assert str(error.value).startswith(
                    f"--binarisation must be {' or '.join(fitting)} for a {meant} likelihood of "
                    f"this data, got {protocol}; {DATASETS[kind].name}: "
                )


def test_every_kind_of_data_is_in_the_table() -> None:
    assert FITS.keys() == DATASETS.keys()


@pytest.mark.parametrize(
    ("write", "changes", "error", "message"),
    [
        (
            lambda path: save_csv(path, table()),
            {"likelihood": "bernoulli"},
            data.DataError,
            r"mine\.csv: row 1, column 1 \('c0'\) is .*: expected 0 or 1 under a bernoulli",
        ),
        (
            lambda path: save_csv(path, table()),
            {"binarisation": "dynamic"},
            ConfigError,
            "--binarisation must be given for a gaussian likelihood of this data, got dynamic",
        ),
        (
            lambda path: save_csv(path, table() * [1, 1, 0, 1]),
            {},
            data.DataError,
            r"mine\.csv: column 3 \('c2'\) is .*0\.0 in all 36 training rows",
        ),
        (
            lambda path: save_npy(path, pixels(6, 5)),
            {"batch_size": 37},
            ConfigError,
            "--batch-size must be at most the 36 training examples, got 37",
        ),
        (
            lambda path: save_npy(path, pixels(6, 5)),
            {"stream_above": 0.0, "binarisation": "static"},
            ConfigError,
            "--binarisation static draws the training images once, in memory: choose another, "
            "or a larger --stream-above",
        ),
        (lambda path: path, {}, data.DataError, "mine does not exist"),
        (lambda path: path.parent, {}, data.DataError, "no images"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_a_folder_is_made(
    write: Callable[[Path], Path],
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        run(write(tmp_path / "mine"), tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_fraction": 0.0}, r"--test-fraction must be between 0 and 1, got 0\.0"),
        ({"test_fraction": 1.0}, r"--test-fraction must be between 0 and 1, got 1\.0"),
        ({"split_seed": -1}, "--split-seed must be at least 0, got -1"),
        ({"stream_above": -0.5}, r"--stream-above must be at least 0, got -0\.5"),
        ({"stream_above": math.inf}, "--stream-above must be at least 0, got inf"),
        ({"stream_above": math.nan}, "--stream-above must be at least 0, got nan"),
        ({"data": ""}, "--data must be a name or a path, got $"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train.Config(**({"data": "mine"} | changes))


# Streamed runs.


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_npy(tmp_path_factory.mktemp("data") / "mine", pixels(6, 5))


STREAMED = {"stream_above": 0.0, "epochs": 3}
MODEL = common.Config(hidden=TINY["hidden"], latent_dim=TINY["latent_dim"])


@pytest.fixture(scope="module")
def whole(grey: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A streamed run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(grey, folder, **STREAMED)
    return folder


def test_a_streamed_run_is_a_run(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [record["step"] for record in metrics(whole)] == [6, 12, 18]
    assert [record["examples"] for record in metrics(whole)] == [36, 72, 108]
    assert {path.stem for path in (whole / "figures").iterdir()} == IMAGE_FIGURES
    assert not (whole / run_folder.UNFINISHED).exists()
    assert last_state(whole, (6, 5), MODEL).step == 18


@pytest.mark.usefixtures("no_figures")
def test_a_streamed_run_compares_to_one_in_memory(
    whole: Path, grey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is evaluated on the same test set, drawn with the same key."""
    in_memory = run(grey, tmp_path / "run", epochs=3)
    assert "streamed from the disk" not in capsys.readouterr().out
    streamed = run_folder.read_result(whole)
    assert streamed["protocol"] == run_folder.json_round_trip(in_memory["protocol"])
    # The order of the examples is another.
    assert streamed["test_elbo"] != in_memory["test_elbo"]


@pytest.mark.parametrize("kind", ["colour PNG", "table", "binary table"])
@pytest.mark.usefixtures("no_figures")
def test_a_stream_of_every_kind(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, _, likelihood, protocol, _ = KINDS[kind]
    path = write(tmp_path / "mine")
    result = run(path, tmp_path / "run", stream_above=0.0, epochs=1)
    words = f"p(x|z): {likelihood}; binarisation: {protocol}; streamed from the disk"
    assert words in capsys.readouterr().out
    assert result["steps"] == STEPS
    if kind == "table":
        scale = np.array(result["protocol"]["scale"])
        assert result["test_nll_of_the_data_as_given"] == result["test_nll"] + np.log(scale).sum()


def interrupting_before(stop: int, signum: signal.Signals) -> Callable[..., Iterator[np.ndarray]]:
    """`data.batches`, with a signal as the batch of global step `stop` is asked for."""
    read = data.batches

    def batches(*args: Any, step: int, **kwargs: Any) -> Iterator[np.ndarray]:
        for i, batch in enumerate(read(*args, step=step, **kwargs), start=step):
            if i == stop:
                signal.raise_signal(signum)
            yield batch

    return batches


@pytest.mark.parametrize("stops", [(3,), (5,), (7, 9), (17,)], ids=str)
@pytest.mark.usefixtures("no_figures")
def test_a_run_interrupted_within_an_epoch_goes_on_as_if_it_never_was(
    stops: tuple[int, ...], whole: Path, grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, from the very batch."""
    folder = tmp_path / "run"
    for i, stop in enumerate(stops):
        done = stop + 1  # the batch that was asked for is trained on
        said = f"epoch {done // STEPS}" if done % STEPS == 0 else f"step {done}"
        with monkeypatch.context() as patch:
            patch.setattr(data, "batches", interrupting_before(stop, signal.SIGTERM))
            with pytest.raises(
                Interrupted, match=rf"saved after {said}\).*--resume --out"
            ) as caught:
                run(grey, folder, **STREAMED, resume=i > 0)
        assert caught.value.exit_code == 128 + signal.SIGTERM
        assert last_state(folder, (6, 5), MODEL).step == done
        assert [record["epoch"] for record in metrics(folder)] == [*range(1, done // STEPS + 1)]
        assert not (folder / "result.json").exists()
        if done % STEPS:
            assert len(run_folder.read_unfinished(folder, done)) == done % STEPS
    run(grey, folder, **STREAMED, resume=True)
    assert metrics(folder) == metrics(whole)
    assert_same_state(last_state(folder, (6, 5), MODEL), last_state(whole, (6, 5), MODEL))
    assert not (folder / run_folder.UNFINISHED).exists()
    timings = ("images_per_second", "command")
    ours, theirs = (
        {k: v for k, v in run_folder.read_result(f).items() if k not in timings}
        for f in (folder, whole)
    )
    assert ours == theirs


@pytest.mark.usefixtures("no_figures")
def test_a_run_killed_after_it_was_interrupted_goes_back_to_what_was_saved(
    whole: Path, grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies at step 10, an epoch after its checkpoint within the first."""

    class Killed(BaseException):
        pass

    def dying(*args: Any, step: int, **kwargs: Any) -> Iterator[np.ndarray]:
        for i, batch in enumerate(read(*args, step=step, **kwargs), start=step):
            if i == 10:
                raise Killed
            yield batch

    folder, read = tmp_path / "run", data.batches
    with monkeypatch.context() as patch:
        patch.setattr(data, "batches", interrupting_before(2, signal.SIGINT))
        with pytest.raises(Interrupted, match="saved after step 3"):
            run(grey, folder, **STREAMED)
        patch.setattr(data, "batches", dying)
        with pytest.raises(Killed):
            run(grey, folder, **STREAMED, resume=True)
    assert [record["step"] for record in metrics(folder)] == [6]
    run(grey, folder, **STREAMED, resume=True)
    assert metrics(folder) == metrics(whole)
    assert_same_state(last_state(folder, (6, 5), MODEL), last_state(whole, (6, 5), MODEL))


@pytest.mark.usefixtures("no_figures")
def test_a_run_killed_as_it_saves_within_an_epoch_keeps_what_it_had_saved_of_it_before(
    whole: Path, grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted twice in one epoch; the second time the process dies before its checkpoint."""

    class Killed(BaseException):
        pass

    def dying(*args: object) -> None:
        raise Killed

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(data, "batches", interrupting_before(7, signal.SIGTERM))
        with pytest.raises(Interrupted, match="saved after step 8"):
            run(grey, folder, **STREAMED)
    with monkeypatch.context() as patch:
        patch.setattr(data, "batches", interrupting_before(9, signal.SIGTERM))
        patch.setattr(checkpoint, "save_state", dying)
        with pytest.raises(Killed):
            run(grey, folder, **STREAMED, resume=True)
    assert run_folder.read_unfinished(folder, 10)
    run(grey, folder, **STREAMED, resume=True)
    assert metrics(folder) == metrics(whole)
    assert_same_state(last_state(folder, (6, 5), MODEL), last_state(whole, (6, 5), MODEL))


@pytest.mark.usefixtures("no_figures")
def test_a_resume_with_fewer_epochs_keeps_what_the_unfinished_epoch_needs(
    whole: Path, grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(data, "batches", interrupting_before(7, signal.SIGTERM))
        with pytest.raises(Interrupted, match="saved after step 8"):
            run(grey, folder, **STREAMED)
    result = run(grey, folder, **(STREAMED | {"epochs": 1}), resume=True)
    assert (result["epochs"], result["steps"]) == (1, 8)
    run(grey, folder, **STREAMED, resume=True)
    assert metrics(folder) == metrics(whole)


# Resuming.


@pytest.mark.usefixtures("no_figures")
def test_a_run_goes_on_with_its_data_and_no_other(grey: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = Path(shutil.copy(grey, tmp_path / "a"))
    folder = tmp_path / "run"
    run(path, folder, epochs=1)
    # Moved, it is the same.
    moved = path.rename(tmp_path / path.name)
    assert run(moved, folder, epochs=2, resume=True)["epochs"] == 2
    before = (folder / "config.json").read_bytes()
    changed = pixels(6, 5)
    changed[17, 2, 3] ^= 1
    np.save(moved, changed)
    with pytest.raises(RunFolderError, match=r"is a run of other settings: protocol was.*sha256"):
        run(moved, folder, epochs=3, resume=True)
    np.save(moved, pixels(6, 5))
    for changes, message in (
        ({"split_seed": 1}, "split_seed was 0, is 1"),
        ({"binarisation": "static"}, "binarisation was dynamic, is static"),
        ({"likelihood": "gaussian"}, "likelihood was bernoulli, is gaussian"),
    ):
        with pytest.raises(RunFolderError, match=message):
            run(moved, folder, epochs=3, resume=True, **changes)
    assert (folder / "config.json").read_bytes() == before


@pytest.mark.usefixtures("no_figures")
def test_a_test_elbo_that_is_not_finite_frees_the_learning_rate_once(
    grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the run's settings say of the rate is true of its steps."""
    folder = tmp_path / "run"
    elbos, append = evaluation.bound_by_example, run_folder.append_metrics

    def infinite_in_the_second_epoch(*args: Any, **kwargs: Any) -> jax.Array:
        values = elbos(*args, **kwargs)
        return values if not metrics(folder) else values - jnp.inf

    def append_and_interrupt(folder: Path, record: dict[str, Any]) -> None:
        append(folder, record)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(results, "bound_by_example", infinite_in_the_second_epoch)
        message = r"the test ELBO is -inf after step 12"
        with pytest.raises(FloatingPointError, match=message) as error:
            run(grey, folder, learning_rate=0.5, epochs=3)
    (note,) = error.value.__notes__
    assert "The learning rate was 0.5. To go on from the state of step 6: another --learn" in note
    assert run_folder.read_failure(folder) == {
        "step": 11,
        "learning_rate": 0.5,
        "learning_rate_setting": 0.5,
        "last_good_step": 6,
    }
    assert last_state(folder, (6, 5), MODEL).step == 6
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "append_metrics", append_and_interrupt)
        with pytest.raises(Interrupted, match="saved after epoch 2"):
            run(grey, folder, learning_rate=0.01, epochs=3, resume=True)
    for epochs in (3, 4):  # unfinished and finished
        for forgotten in (0.5, 1e-3):
            with pytest.raises(RunFolderError, match=f"learning_rate was 0.01, is {forgotten}"):
                run(grey, folder, learning_rate=forgotten, epochs=epochs, resume=True)
        run(grey, folder, learning_rate=0.01, epochs=epochs, resume=True)
    settings = run_folder.read_settings(folder)
    assert settings["learning_rate"] == 0.01
    assert settings["learning_rates"] == [
        {"from_step": 0, "learning_rate": 0.5},
        {"from_step": 6, "learning_rate": 0.01},
    ]
    assert [record["step"] for record in metrics(folder)] == [6, 12, 18, 24]
    assert not (folder / run_folder.FAILURE).exists()
    # Started over, it has one rate.
    shutil.rmtree(folder / "checkpoints")
    run(grey, folder, learning_rate=0.01, epochs=1, resume=True)
    settings = run_folder.read_settings(folder)
    assert settings["learning_rates"] == [{"from_step": 0, "learning_rate": 0.01}]


@pytest.mark.usefixtures("no_figures")
def test_a_resumed_ensemble_equals_an_uninterrupted_one(grey: Path, tmp_path: Path) -> None:
    run(grey, tmp_path / "whole", seeds=2)
    run(grey, tmp_path / "resumed", seeds=2, epochs=1)
    run(grey, tmp_path / "resumed", seeds=2, resume=True)
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "whole")
    for seed in (0, 1):
        ours, theirs = (
            (tmp_path / name / "models" / f"seed_{seed}.safetensors").read_bytes()
            for name in ("resumed", "whole")
        )
        assert ours == theirs


def test_a_line_that_is_no_metric_is_refused_before_anything_changes(
    whole: Path, grey: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([lines[0], "\0\0\0\n", *lines[2:]]))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 2 is no record of an epoch"):
        run(grey, folder, **STREAMED, resume=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.usefixtures("no_figures")
def test_a_checkpoint_that_cannot_be_written_is_said_and_costs_nothing(
    grey: Path, tmp_path: Path
) -> None:
    """By a limit on files, which the system keeps to as it does to a full disk."""
    folder = tmp_path / "run"
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
from jvae.experiments import command_line
command_line.main()
"""
    flags = ["--latent-dim", "2", "--hidden", "900", "--batch-size", "6", "--nll-samples", "5"]
    words = ["train", "--data", str(grey), *flags, "--epochs", "2", "--checkpoint-every", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--out", str(folder)],
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == (
        f"error: cannot write {folder}/checkpoints: File too large\n"
        f"To go on once that is mended: the same command with --resume --out {folder}\n"
    )
    result = run(grey, folder, hidden=(900,), resume=True)
    assert [record["epoch"] for record in metrics(folder)] == [1, 2]
    assert result["steps"] == 2 * STEPS


@pytest.mark.usefixtures("no_figures")
def test_slow_precision_is_told(
    grey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warning = "WARNING: on a CPU --precision bfloat16 is slower than float32."
    for precision in ("bfloat16", "float32"):
        run(grey, tmp_path / precision, precision=precision, epochs=1, nll_samples=0)
        said = " ".join(capsys.readouterr().out.split())
        assert (warning in said) == (precision == "bfloat16")


def test_a_second_process_is_refused_and_changes_nothing(whole: Path, grey: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    with run_folder.lock(whole):
        for resume, message in ((True, "another process is at work"), (False, "add --resume")):
            with pytest.raises(RunFolderError, match=message):
                run(grey, whole, **(STREAMED | {"epochs": 9}), resume=resume)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_folder_that_cannot_be_written_is_one_message(
    grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "run"
    assert end_of(f"train --data {grey} --batch-size 6 --out {out}", monkeypatch) == 2
    assert capsys.readouterr().err == f"error: cannot write {out}: Not a directory\n"


# The default experiment where MNIST is missing.


SMALL_MNIST: dict[str, Any] = TINY | {"epochs": 1, "batch_size": 1000, "nll_samples": 0}
NO_NETWORK = "no network: cannot reach storage.googleapis.com (ConnectionError)"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None) -> Path:
    """An empty data folder, and no network."""
    monkeypatch.setattr("jvae.data.raw_files._unreachable", lambda url: NO_NETWORK)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def run_mnist(folder: Path, **changes: Any) -> dict[str, Any]:
    return mnist.run(mnist.Config(out=folder, **(SMALL_MNIST | changes)))


def fake_mnist(num: int = 2000) -> data.Dataset:
    """What MNIST would be were it there."""
    digits = data.load("mnist_5k")
    train, test = digits.train[:num], digits.test
    digest = data.content_sha256(train, test)
    return dataclasses.replace(digits, name="mnist", train=train, source="tmp", sha256=digest)


def test_without_mnist_the_default_is_the_embedded_digits_and_says_so(
    offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    result = run_mnist(folder)
    shown = capsys.readouterr().out
    assert "WARNING: MNIST is neither on this machine nor within reach." in shown
    assert "Training on mnist_5k" in shown
    assert NO_NETWORK in shown
    assert result["protocol"]["dataset"] == "mnist_5k"
    assert result["protocol"]["num_train"] == 4000
    settings = run_folder.read_settings(folder)
    assert settings["dataset"] == "mnist_5k"
    for record in (settings, run_folder.read_result(folder)):
        assert record["fallback"].startswith("mnist_5k, not mnist: dataset 'mnist' needs train-")
        assert NO_NETWORK in record["fallback"]
    assert not offline.exists()


def test_a_run_that_was_asked_for_its_dataset_is_no_fallback(
    offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_mnist(tmp_path / "run", dataset="mnist_5k")
    assert "WARNING" not in capsys.readouterr().out
    for name in ("config.json", "result.json"):
        assert "fallback" not in json.loads((tmp_path / "run" / name).read_text())


def test_with_mnist_the_default_is_mnist(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, there_is = [], fake_mnist()

    def load(name: str, data_dir: Path | None = None) -> data.Dataset:
        asked.append((name, data_dir))
        return there_is

    folder, there = tmp_path / "run", tmp_path / "there"
    with monkeypatch.context() as patch:
        patch.setattr(data, "load", load)
        run_mnist(folder, data_dir=there)
        run_mnist(folder, data_dir=there, resume=True, epochs=2)
    assert asked == [("mnist", there)] * 2
    for record in (run_folder.read_settings(folder), run_folder.read_result(folder)):
        assert "fallback" not in record
        assert record["protocol"]["dataset"] == "mnist"
    # Nor does it fall back once it has begun.
    with pytest.raises(data.NoNetworkError, match="dataset 'mnist' needs"):
        run_mnist(folder, resume=True, epochs=3)


def test_a_fallen_back_run_stays_with_the_embedded_digits(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    run_mnist(folder)
    first = run_folder.read_settings(folder)
    with monkeypatch.context() as patch:
        load, appeared = data.load, fake_mnist()
        patch.setattr(
            data, "load", lambda name, *where: appeared if name == "mnist" else load(name)
        )
        result = run_mnist(folder, resume=True, epochs=2)
        assert run_mnist(tmp_path / "new")["protocol"]["dataset"] == "mnist"
    assert result["protocol"] == first["protocol"]
    assert result["fallback"] == first["fallback"]
    assert result["epochs"] == 2
    settings = run_folder.read_settings(folder)
    assert settings["fallback"] == first["fallback"]
    assert [later["fallback"] for later in settings["resumed_with"]] == [first["fallback"]]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist", "omniglot"])
def test_a_dataset_that_is_asked_for_is_never_replaced(
    name: Any, offline: Path, tmp_path: Path
) -> None:
    with pytest.raises(data.NoNetworkError, match=f"dataset '{name}' needs .*{offline}"):
        run_mnist(tmp_path / "run", dataset=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["mnist", "downloads/manual"])
def test_a_corrupt_file_is_not_papered_over(place: str, offline: Path, tmp_path: Path) -> None:
    file = offline / place / "train-images-idx3-ubyte.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"<html>404</html>")
    with pytest.raises(data.DataError, match=rf"{file} has SHA-256 .*replace it") as error:
        run_mnist(tmp_path / "run")
    assert not isinstance(error.value, data.NoNetworkError)
    assert [path.name for path in tmp_path.iterdir()] == ["datasets"]


def test_a_taken_folder_is_refused_before_anything_is_looked_for(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "load", lambda *args: pytest.fail("looked for"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("")
    with pytest.raises(RunFolderError, match="add --resume"):
        run_mnist(tmp_path / "run")
    with pytest.raises(RunFolderError, match="add --resume"):
        run("mnist_5k", tmp_path / "run")


# Comparing.

PROTOCOL = {
    "dataset": "mnist_5k",
    "dataset_sha256": "aa",
    "binarisation": "dynamic",
    "likelihood": "bernoulli",
    "units": "nats per image",
}
RESULT: dict[str, Any] = {
    "test_elbo": -100.125,
    "test_elbo_stderr": 0.5,
    "test_nll": 95.25,
    "test_nll_stderr": 0.25,
    "test_nll_estimator": "importance sampling from q(z|x), K = 5",
    "stderr_over": "test examples",
    "epochs": 20,
    "seed": 3,
    "protocol": PROTOCOL,
}


def save_result(folder: Path, changes: dict[str, Any], protocol: dict[str, Any]) -> Path:
    folder.mkdir()
    result = RESULT | changes | {"protocol": PROTOCOL | protocol}
    kept = {name: value for name, value in result.items() if value is not None}
    run_folder.write_json(folder / "result.json", kept)
    return folder


def compare_runs(*folders: Path) -> None:
    compare.run(compare.Config(runs=folders))


def test_runs_of_one_protocol_share_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    # Another seed, length and name of the same bytes: still the same data.
    save_result(Path("a"), {}, {})
    save_result(Path("b"), {"seed": 4, "epochs": 7, "test_elbo": -99.0}, {"dataset": "mine"})
    compare_runs(Path("a"), Path("b"))
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert rows == [
        ["a", "20", "3", "-100.12 ± 0.50", "95.25 ± 0.25", "test examples"],
        ["b", "7", "4", "-99.00 ± 0.50", "95.25 ± 0.25", "test examples"],
    ]
    assert "nats per image" in "".join(lines)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_every_run_says_what_its_errors_are_over(
    order: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    save_result(Path("a"), {}, {})
    save_result(Path("b"), {"stderr_over": "seeds", "num_seeds": 3}, {})
    compare_runs(*map(Path, order))
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in ln.split("│")[1:-1]] for ln in out.splitlines() if "│" in ln]
    over = {"a": "test examples", "b": "seeds"}
    assert [(row[0], row[-1]) for row in rows] == [(name, over[name]) for name in order]


def test_what_a_result_warns_of_is_said_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_result(Path("a"), {"warnings": ["few [effective] samples"]}, {})
    save_result(Path("b"), {}, {})
    compare_runs(Path("a"), Path("b"))
    warned = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert warned == ["WARNING: a: few [effective] samples"]


def test_runs_without_a_likelihood_share_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without = {"test_nll": None, "test_nll_stderr": None, "test_nll_estimator": None}
    compare_runs(save_result(tmp_path / "a", without, {}), save_result(tmp_path / "b", without, {}))
    assert "-100.12 ± 0.50" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("changes", "protocol", "differing"),
    [
        ({}, {"binarisation": "static"}, 'binarisation is "dynamic" and "static"'),
        ({}, {"dataset_sha256": "bb"}, 'dataset_sha256 is "aa" and "bb"'),
        ({}, {"likelihood": "gaussian"}, 'likelihood is "bernoulli" and "gaussian"'),
        ({}, {"mean": [0.5]}, "mean is null and [0.5]"),
        (
            {"test_nll_estimator": "importance sampling from q(z|x), K = 50"},
            {},
            'test_nll_estimator is "importance sampling from q(z|x), K = 5" and '
            '"importance sampling from q(z|x), K = 50"',
        ),
        (
            {"test_nll_estimator": None, "test_nll": None},
            {"binarisation": "none"},
            'binarisation is "dynamic" and "none"; '
            'test_nll_estimator is "importance sampling from q(z|x), K = 5" and null',
        ),
    ],
)
def test_runs_of_different_protocols_are_refused_by_all_that_differs(
    changes: dict[str, Any],
    protocol: dict[str, Any],
    differing: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a, b = save_result(tmp_path / "a", {}, {}), save_result(tmp_path / "b", {}, {})
    c = save_result(tmp_path / "c", changes, protocol)
    with pytest.raises(RunFolderError) as error:
        compare_runs(a, b, c)
    assert str(error.value) == f"{a} and {c} do not compare: {differing}"
    assert capsys.readouterr().out == ""


def test_what_differs_at_length_is_cut(tmp_path: Path) -> None:
    a, b = (
        save_result(tmp_path / name, {}, {"mean": [value] * 100})
        for name, value in (("a", 0.125), ("b", 0.25))
    )
    with pytest.raises(RunFolderError, match=r"mean is \[0\.125, [^…]*… and \[0\.25, [^…]*…$"):
        compare_runs(a, b)


def test_runs_that_are_none_are_refused(whole: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(whole, unfinished)
    (unfinished / "result.json").unlink()
    with pytest.raises(RunFolderError, match=rf"{unfinished} holds no finished run"):
        compare_runs(whole, unfinished)
    with pytest.raises(RunFolderError, match=r"nowhere holds no finished run"):
        compare_runs(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match="give at least one run"):
        compare_runs()
    compare_runs(whole)


# The command line.


def raising(error: BaseException) -> Callable[[], object]:
    def command() -> object:
        raise error

    return command


def non_finite() -> training.NonFiniteError:
    zero = jnp.zeros((), jnp.int32)
    state = training.TrainState(zero, jvae.Params({}, "none"), (), jax.random.key(0))
    error = training.NonFiniteError(7, math.nan, state)
    error.add_note("The learning rate was 1")
    return error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("--epochs must be 1"), 2, "error: --epochs must be 1\n"),
        (data.DataError("a.csv: row 3"), 2, "error: a.csv: row 3\n"),
        (data.NoNetworkError("mnist needs"), 2, "error: mnist needs\n"),
        (RunFolderError("run exists"), 2, "error: run exists\n"),
        (checkpoint.CheckpointError("of another model"), 2, "error: of another model\n"),
        (FloatingPointError("the ELBO is nan"), 1, "error: the ELBO is nan\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (ImportError("pip install 'jvae[data]'"), 1, "error: pip install 'jvae[data]'\n"),
        (
            non_finite(),
            1,
            "error: the bound was nan at step 7; the last good state is that of step 0\n"
            "The learning rate was 1\n",
        ),
        (subprocess.CalledProcessError(5, "git"), 5, ""),
        (Interrupted("To go on: …", signal.SIGINT), 130, "To go on: …\n"),
        (Interrupted("To go on: …", signal.SIGTERM), 143, "To go on: …\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_are_one_message_and_an_exit_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        command_line.run(raising(error))
    assert exit_.value.code == code
    assert capsys.readouterr() == ("", message)


def test_what_is_no_refusal_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        command_line.run(raising(ZeroDivisionError()))
    command_line.run(lambda: None)


def test_sigterm_before_training_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_path(*args: object, **how: object) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            (Path(folder) / "half").write_text("")
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("went on")

    monkeypatch.setattr(data, "load_path", load_path)
    assert end_of(f"train --data mine.npy --out {tmp_path}/run", monkeypatch) == 143
    assert capsys.readouterr() == ("", "Terminated.\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_enough_is_no_error(unbuffered: str) -> None:
    """As of `jvae train --help | head -1`, met while printing or when the rest is flushed."""
    reader, writer = os.pipe()
    os.close(reader)
    code = "from jvae.experiments import command_line; command_line.main()"
    with open(writer, "wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-c", code, "train", "--help"],
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert (done.returncode, done.stderr) == (0, b"")


def end_of(flags: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["jvae", *shlex.split(flags)])
    with pytest.raises(SystemExit) as exit_:
        command_line.main()
    return exit_.value.code


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "train"),
        ("train", "--data"),
        ("train --data nowhere.csv", "error: nowhere.csv does not exist"),
        ("train --data ./nowhere", "error: nowhere does not exist"),
        ("train --data nowhere/", "error: nowhere does not exist"),
        (
            "train --data minst",
            f"error: unknown dataset 'minst': expected one of {', '.join(data.NAMES)}, or a path "
            "(with a separator: ./data)\n",
        ),
        ("train --data ''", "error: --data must be a name or a path, got \n"),
        ("train --data . --stream-above inf", "error: --stream-above must be at least 0, got inf"),
        ("train --data . --epochs 0", "error: --epochs must be at least 1, got 0"),
        ("train --data . --test-fraction 2", "error: --test-fraction must be between 0 and 1"),
        ("train --data . --out nowhere --resume", "no images"),
        ("compare nowhere", "error: nowhere holds no finished run: no result.json"),
        ("compare", "error: give at least one run to compare"),
        ("paint", "paint"),
    ],
)
def test_a_wrong_command_is_one_message_and_exit_code_2(
    flags: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert end_of(flags, monkeypatch) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--help", ["train", "evaluate", "compare", "replay"]),
        (
            "train --help",
            [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(train.Config)],
        ),
        ("compare --help", ["--help", "Folders of finished runs."]),
    ],
)
def test_help(
    flags: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert end_of(flags, monkeypatch) == 0
    shown = capsys.readouterr().out
    assert [word for word in words if word not in shown] == []


@pytest.mark.usefixtures("no_figures")
def test_the_command_trains_and_compares(
    grey: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--latent-dim 2 --hidden 8 --epochs 1 --batch-size 6 --nll-samples 5 --out"
    argv = ["jvae", "train", "--data", str(grey), *flags.split(), str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", argv)
    command_line.main()
    assert run_folder.read_result(tmp_path / "run")["epochs"] == 1
    monkeypatch.setattr(sys, "argv", ["jvae", "compare", str(tmp_path / "run"), str(whole)])
    command_line.main()


def test_without_the_experiments_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert end_of("train --data mine", monkeypatch) == 1
    assert capsys.readouterr().err == ("error: no module 'tyro': pip install 'jvae[experiments]'\n")


def test_without_grain_a_stream_names_the_extra(
    grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "grain", None)
    flags = f"train --data {grey} --batch-size 6 --hidden 8 --stream-above 0 --out {tmp_path}/run"
    assert end_of(flags, monkeypatch) == 1
    assert "pip install 'jvae[data]'" in capsys.readouterr().err


def test_both_commands_have_the_same_defaults() -> None:
    ours, theirs = (
        {field.name: field.default for field in dataclasses.fields(config)}
        for config in (train.Config, mnist.Config)
    )
    shared = {field.name for field in dataclasses.fields(common.Config)}
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
