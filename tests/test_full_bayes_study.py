"""The study of full Bayes against MAP: two steps of it, its record, its figure."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jvae.experiments import full_bayes, full_bayes_figures, paper, records
from jvae.experiments.config import ConfigError
from jvae.experiments.full_bayes import Config, Curve
from jvae.experiments.interrupt import Interrupted
from jvae.experiments.paper import Keys
from jvae.experiments.run_folder import RunFolderError
from jvae.learners.full_bayes import held_out_bound, kl_of_weights, weight_posterior

METHODS = ("map", "full_bayes", "local_full_bayes")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a study of two steps a curve, which was run."""
    config = Config(
        dataset="mnist_5k",
        num_examples=(150,),
        hidden=3,
        latent_dim=2,
        max_samples=200,
        trial_steps=1,
        out=tmp_path_factory.mktemp("full_bayes"),
    )
    assert full_bayes.run(config) == config.out
    return config


def path_of(config: Config) -> Path:
    assert config.out is not None
    return config.out / "full_bayes.jsonl"


def test_a_study_of_two_steps(config: Config) -> None:
    record = records.read(path_of(config))
    assert record.end is not None
    assert [(p["method"], p["samples"]) for p in record.points] == [(m, 200) for m in METHODS]
    assert record.header["study"] == "full_bayes"
    for curve in record.header["curves"]:
        trial = curve["step_size_trial"]
        assert trial[str(curve["step_size"])] == max(trial.values())
        assert curve["protocol"]["num_train"] == 150
    for point in record.points:
        for part in ("train", "test"):
            by_seed = point[f"{part}_by_seed"]
            assert point[part] == pytest.approx(np.mean(by_seed))
            error = np.std(by_seed, ddof=1) / np.sqrt(3)
            assert point[f"{part}_stderr"] == pytest.approx(error)
        assert ("kl_of_weights_by_seed" in point) == (point["method"] != "map")
    assert {path.name for path in path_of(config).parent.iterdir()} == {
        f"full_bayes.{suffix}" for suffix in ("jsonl", "md", "png")
    }


def test_points_are_bounds_under_q_and_at_its_mean() -> None:
    data = paper.load("mnist_5k", "dynamic", num_train=100)
    config = Config(dataset="mnist_5k", num_examples=(100,), hidden=3, latent_dim=2, seeds=2)
    fit = full_bayes._fit(config, Curve(100, "full_bayes"), data)
    keys = [Keys.of(0), Keys.of(1)]
    state = paper.begin(fit, 0.02, (0, 1))
    posterior = jax.tree.map(lambda leaf: leaf[1], state.params)
    key = jax.random.split(jax.random.fold_in(keys[1].bounds, 0))[0]
    elbo = held_out_bound(posterior, data.shown, key, num_weights=4).mean(axis=0)
    found = {
        name: paper.measure(data, state, keys, by_example)["train"][1]
        for name, by_example in {
            "q": full_bayes._expected_elbo,
            "mean": full_bayes._elbo_at_mean,
            "objective": fit.by_example,
        }.items()
    }
    np.testing.assert_allclose(found["q"], elbo, rtol=1e-5)
    np.testing.assert_allclose(found["objective"], elbo - kl_of_weights(posterior) / 100, rtol=1e-5)
    at_mean = paper.ELBO(posterior.mean, data.shown, key)
    np.testing.assert_allclose(found["mean"], at_mean, rtol=1e-5)
    # MAP's has the prior of the same weights.
    of_map = full_bayes._fit(config, Curve(100, "map"), data)
    theta = ravel_pytree(posterior.mean.weights["decoder"])[0]
    np.testing.assert_allclose(
        of_map.by_example(posterior.mean, data.shown, key), at_mean - theta @ theta / 200, rtol=1e-5
    )
    start = weight_posterior(posterior.mean, scale=config.initial_scale)
    jax.tree.map(np.testing.assert_allclose, posterior.log_scale, start.log_scale)


def test_the_figure_and_the_table_are_of_the_record(config: Config) -> None:
    study = full_bayes_figures.read(path_of(config))
    figure = full_bayes_figures.figure(study)
    top, bottom = figure.axes
    assert top.get_title() == "150 training examples"
    assert len(top.get_lines()) == 2 * len(METHODS)
    of_map, full, _ = study.curves
    np.testing.assert_array_equal(
        bottom.get_lines()[0].get_ydata(),
        np.median(of_map.bounds["train"] - of_map.bounds["test"], axis=1),
    )
    assert full.kl is not None
    assert full.objective is not None
    np.testing.assert_allclose(full.objective, full.bounds["train"] - full.kl / 150)
    assert "3 seeds" in study.title
    rows = full_bayes_figures.table(study).splitlines()
    assert len(rows) == 2 + len(METHODS)
    assert f"{of_map.bounds['test'][-1].mean():.2f} ± " in rows[2]
    assert f"{full.objective[-1].mean():.2f} ± " in rows[3]


def test_a_record_is_drawn_again_and_never_written_over(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper, "load", None)
    shutil.copy(path_of(config), tmp_path)
    full_bayes.run(dataclasses.replace(config, out=tmp_path, redraw=True))
    table = path_of(config).with_suffix(".md").read_text("utf-8")
    assert (tmp_path / "full_bayes.md").read_text("utf-8") == table
    with pytest.raises(ConfigError, match="choose another --out, or add --redraw"):
        full_bayes.run(dataclasses.replace(config, out=tmp_path))


def points_until(error: BaseException) -> Any:
    def measured(*arguments: object) -> Iterator[dict[str, Any]]:
        curve: Any = arguments[1]
        yield {**curve._asdict(), "samples": 100, "seconds": 1.0, "train": -2.0, "test": -3.0}
        raise error

    return measured


def test_an_interrupted_study_keeps_what_was_measured(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper, "choose_step_size", lambda *a, **k: paper.Trial(1, 0.1, {0.1: -1.0}))
    monkeypatch.setattr(full_bayes, "_measured", points_until(Interrupted("", 2)))
    one_seed = dataclasses.replace(config, out=tmp_path, seeds=1)
    with pytest.raises(Interrupted, match=r"1 measurements are in .*; --redraw draws them"):
        full_bayes.run(one_seed)
    full_bayes.run(dataclasses.replace(one_seed, redraw=True))
    (row,) = full_bayes_figures.table(full_bayes_figures.read(path_of(one_seed))).splitlines()[2:]
    assert "| 150 | MAP | 0.1 | 100 | -2.00 | -3.00 | 1.00 | -3.00 at 100 |" in row


def test_a_bound_that_is_not_finite_ends_the_study(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = paper.Trial(1, 0.1, {0.1: -1.0})
    monkeypatch.setattr(paper, "choose_step_size", lambda *arguments, **settings: trial)
    monkeypatch.setattr(paper, "train", lambda fit, state, *rest, **more: iter([state]))
    bad = {"train": [np.zeros(2)], "test": [np.array([0.0, np.nan])]}
    monkeypatch.setattr(paper, "measure", lambda *arguments: bad)
    with pytest.raises(FloatingPointError, match="map, 150 examples: a bound is not finite"):
        full_bayes.run(dataclasses.replace(config, out=tmp_path, methods=("map",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_samples": 150}, "--max-samples must be a multiple of 100, at least 100, got 150"),
        ({"num_examples": ()}, "--num-examples must be at least 100 each, a minibatch, got"),
        ({"num_examples": (99,)}, "--num-examples must be at least 100 each"),
        ({"methods": ()}, "--methods needs at least one name"),
        ({"hidden": 0}, "--hidden must be at least 1, got 0"),
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"initial_scale": 0.0}, "--initial-scale must be positive, got 0"),
        ({"seed": -1}, "--seed must be from 0"),
        ({"redraw": True}, "--redraw needs --out"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no record: no full_bayes.jsonl"),
        ('{"kind": "study"}\n', "holds no record of full Bayes"),
    ],
)
def test_a_folder_without_a_record_is_refused(
    text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "full_bayes.jsonl").write_text(text)
    with pytest.raises(RunFolderError, match=message):
        full_bayes.run(Config(out=tmp_path, redraw=True))
