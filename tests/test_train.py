"""`jvae train` on every kind of data, in memory and streamed: results, figures, settings."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import linear_gaussian
import numpy as np
import pytest
from PIL import Image
from runs import last_state, metrics
from tiny_runs import (
    IMAGE_FIGURES,
    KINDS,
    MODEL,
    NUM,
    STEPS,
    pixels,
    run,
    save_csv,
    save_npy,
    save_pngs,
    table,
)

import jvae
from jvae import binarisation, data, plotting
from jvae.experiments import config as common
from jvae.experiments import loop, mnist, run_folder, train
from jvae.experiments.config import ConfigError


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
    assert settings["devices"] == "auto"
    assert settings["hardware"] == result["devices"]
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


@pytest.mark.usefixtures("no_figures")
def test_slow_precision_is_told(
    grey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warning = "WARNING: on a CPU --precision bfloat16 is slower than float32."
    for precision in ("bfloat16", "float32"):
        run(grey, tmp_path / precision, precision=precision, epochs=1, nll_samples=0)
        said = " ".join(capsys.readouterr().out.split())
        assert (warning in said) == (precision == "bfloat16")


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


# Streamed runs.


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


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("stream_above", "over"), [(0.0, "seeds, of one order of examples"), (1.0, "seeds")]
)
def test_a_result_says_what_seeds_differ_in(
    stream_above: float, over: str, grey: Path, tmp_path: Path
) -> None:
    folder, changes = tmp_path / "run", {"epochs": 2, "nll_samples": 0}
    result = run(grey, folder, **changes, seeds=2, stream_above=stream_above)
    assert result["stderr_over"] == over
    # A process compiles in its first epoch.
    speeds = [record["images_per_second"] for record in run_folder.read_metrics(folder)]
    assert result["images_per_second"] == max(speeds) > min(speeds)


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


# Settings.


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


def test_both_commands_have_the_same_defaults() -> None:
    ours, theirs = (
        {field.name: field.default for field in dataclasses.fields(config)}
        for config in (train.Config, mnist.Config)
    )
    shared = {field.name for field in dataclasses.fields(common.Config)}
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
