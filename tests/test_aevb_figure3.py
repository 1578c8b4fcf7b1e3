"""The study of Figure 3 records log p(x) of the models that it trains, and how it is estimated."""

import dataclasses
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jvae import evaluation
from jvae.experiments import aevb_figure3, marginal_figures, paper, parts, records
from jvae.experiments.aevb_figure3 import Config
from jvae.experiments.config import ConfigError
from jvae.experiments.interrupt import Interrupted
from jvae.experiments.run_folder import RunFolderError
from jvae.learners import mcem

METHODS = ("aevb", "wake_sleep", "mcem")
SETTINGS: dict[str, Any] = {
    "dataset": "mnist_5k",
    "num_examples": (150,),
    "seeds": 3,  # as there are step sizes to try: one program trains both
    "max_samples": 200,
    "trial_steps": 1,
    "images": 3,
    "images_along": 3,
    "images_compared": 3,
    "transitions": 2,
    "temperatures": 3,
    "chains": 2,
    "importance_samples": 4,
}


@pytest.fixture(scope="module", autouse=True)
def _small_and_compiled_quickly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aevb_figure3, "HIDDEN", 3)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a study of two steps a curve, which was run."""
    config = Config(out=tmp_path_factory.mktemp("figure3"), **SETTINGS)
    aevb_figure3.run(config)
    return config


def record_of(config: Config) -> records.Record:
    assert config.out is not None
    return records.read(config.out / "grey.jsonl")


def points_of(record: records.Record, measure: str) -> list[dict[str, Any]]:
    return [point for point in record.points if point["measure"] == measure]


def test_the_record_says_what_its_numbers_depend_on(config: Config) -> None:
    header, _, end = record_of(config)
    assert header["study"] == "aevb_figure3"
    assert (header["targets"], header["seeds"], header["stderr_over"]) == (
        "grey",
        [0, 1, 2],
        "seeds",
    )
    assert header.keys() >= {"command", "commit", "versions", "transitions", "temperatures"}
    assert end is not None
    assert [point["method"] for point in points_of(record_of(config), "curve")] == list(METHODS)
    for point in points_of(record_of(config), "curve"):
        assert (point["samples"], point["num_examples"]) == (200, 150)
        assert (point["num_train_images"], point["num_test_images"]) == (3, 3)
        assert point["step_size"] in paper.STEP_SIZES
        assert point["step_size_trial"].keys() == {"0.01", "0.02", "0.1"}
        assert "App. D estimate of log p(x)" in point["step_size_rule"]
        assert ("leapfrog_step_size" in point) == (point["method"] == "mcem")
        for part in ("train", "test"):
            by_seed = point[f"{part}_by_seed"]
            assert len(set(by_seed)) == 3
            assert point[f"{part}_stderr"] == pytest.approx(np.std(by_seed, ddof=1) / math.sqrt(3))


def test_log_px_is_of_the_models_trained(config: Config) -> None:
    """What the library's parts give, for the learner whose data is another's."""
    curve = points_of(record_of(config), "curve")[2]
    data = paper.load("mnist_5k", "grey", num_train=150)
    fit = aevb_figure3.make_fit("mcem", data)
    begun = paper.begin(fit, curve["step_size"], (0, 1, 2))
    keys = [paper.Keys.of(seed) for seed in (0, 1, 2)]
    (state,) = paper.train(fit, begun, keys, [2], advance=lambda steps: None)
    assert isinstance(state, mcem.State)
    np.testing.assert_allclose(curve["leapfrog_step_size"], np.exp(state.log_step_size), rtol=1e-5)
    x = data.test[parts.chosen(1000, 3)]
    for i, own in enumerate(keys):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], state.params)
        key = jax.random.split(jax.random.fold_in(own.bounds, 2))[1]
        (group,) = jax.random.split(key, 1)
        expected = evaluation.app_d(params, x, group, num_transitions=2).estimate
        assert curve["test_by_seed"][i] == pytest.approx(float(expected.mean()), rel=1e-4)
        if not i:
            compared = points_of(record_of(config), "estimators")[5]
            assert (compared["method"], compared["part"]) == ("mcem", "test")
            np.testing.assert_allclose(compared["app_d_by_image"], expected, atol=2e-3)


def test_estimators_are_compared_on_the_same_images(config: Config) -> None:
    points = points_of(record_of(config), "estimators")
    assert [(p["method"], p["part"]) for p in points] == [
        (method, part) for method in METHODS for part in ("train", "test")
    ]
    for point in points:
        ais = np.array(point["ais_by_image"])
        assert point["num_images"] == len(ais) == 3
        assert ("importance_sampling" in point) == (point["method"] != "mcem")
        for name in ("app_d", "importance_sampling"):
            if name in point:
                difference = np.array(point[f"{name}_by_image"]) - ais
                assert point[f"{name}_less_ais"] == pytest.approx(difference.mean(), abs=2e-3)
                stderr = difference.std(ddof=1) / math.sqrt(3)
                assert point[f"{name}_less_ais_stderr"] == pytest.approx(stderr, abs=2e-3)
                rms = math.sqrt((difference**2).mean())
                assert point[f"{name}_less_ais_rms"] == pytest.approx(rms, abs=2e-3)
                most = np.abs(difference).max()
                assert point[f"{name}_less_ais_most"] == pytest.approx(most, abs=2e-3)


def test_figures_and_tables_are_of_the_record(config: Config, tmp_path: Path) -> None:
    record = record_of(config)
    (axes,) = marginal_figures.curves(record).axes
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.get_lines()}
    assert len(lines) == 6
    mcem_point = points_of(record, "curve")[2]
    np.testing.assert_allclose(lines["Monte Carlo EM, test"], [mcem_point["test"]])
    compared = points_of(record, "estimators")
    ends = {
        str(found.get_label()): np.asarray(found.get_offsets(), np.float64)
        for found in axes.collections
    }
    expected = mcem_point["test"] - compared[5]["app_d_less_ais"]
    np.testing.assert_allclose(ends["Monte Carlo EM, test, by AIS"], [[200, expected]])
    both = marginal_figures.differences(compared).axes
    assert [len(axes.collections) for axes in both] == [6, 4]
    offsets = np.asarray(both[0].collections[1].get_offsets())
    expected = np.subtract(compared[1]["app_d_by_image"], compared[1]["ais_by_image"])
    np.testing.assert_allclose(offsets[:, 1], expected)

    text = marginal_figures.table(record)
    assert f"{mcem_point['test']:.2f} ± {mcem_point['test_stderr']:.2f}" in text.splitlines()[3]
    assert f"{compared[0]['app_d_less_ais']:.2f} ±" in marginal_figures.estimator_table(compared)

    # From the record alone, and of one that was stopped.
    assert config.out is not None
    whole = (config.out / "grey.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "grey.jsonl").write_text("".join(whole[:2]), "utf-8")
    aevb_figure3.run(dataclasses.replace(config, out=tmp_path, redraw=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grey.jsonl", "grey.md", "grey.png"]
    names = {"grey.jsonl", "grey.md", "grey.png", "grey-estimators.png"}
    assert {path.name for path in config.out.iterdir()} == names


@pytest.mark.parametrize("num", [0, 1])
def test_ctrl_c_keeps_what_was_measured(
    num: int, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object) -> Iterator[dict[str, Any]]:
        for point in record_of(config).points[:num]:
            yield {name: value for name, value in point.items() if name != "kind"}
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(aevb_figure3, "_curve", stopped)
    with pytest.raises(Interrupted, match="1 measurements are in" if num else "before the first"):
        aevb_figure3.run(dataclasses.replace(config, out=tmp_path))
    record = records.read(tmp_path / "grey.jsonl")
    assert record.points == record_of(config).points[:num]
    assert record.end is None


def test_what_cannot_be_drawn_or_would_be_lost_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"grey.jsonl exists: choose another --out"):
        aevb_figure3.run(config)
    with pytest.raises(RunFolderError, match="holds no records"):
        aevb_figure3.run(dataclasses.replace(config, out=tmp_path, redraw=True))
    lines = [{"kind": "study", "study": "another"}, {"kind": "point", "bound": 1.0}]
    (tmp_path / "grey.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunFolderError, match=r"holds no curves of log p\(x\)"):
        aevb_figure3.run(dataclasses.replace(config, out=tmp_path, redraw=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_examples": ()}, "--num-examples must be at least 100 each"),
        ({"num_examples": (1000, 99)}, "--num-examples must be at least 100 each"),
        ({"methods": ()}, "--methods needs at least one name"),
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"images_along": 1}, "--images-along must be at least 2, got 1"),
        ({"images": 49}, "--images must be at least the 50 of --images-compared, got 49"),
        ({"chains": 1}, "--chains must be at least 2, got 1"),
        ({"max_samples": 150}, "--max-samples must be a multiple of 100"),
        ({"redraw": True}, "--redraw needs --out"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(**settings)
