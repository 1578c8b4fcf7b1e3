"""The study of Figure 3 records log p(x) of the models that it trains, and how it is estimated."""

import dataclasses
import functools
import itertools
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
    "images_at_end": 4,
    "transitions": 2,
    "temperatures": 3,
    "chains": 2,
    "importance_samples": 4,
}


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aevb_figure3, "HIDDEN", 3)
        patch.setattr(Config, "checkpoints", property(lambda config: [1, 2]))
        yield


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
    trials = points_of(record_of(config), "step size")
    assert [point["method"] for point in trials] == list(METHODS)
    for point in trials:
        assert (point["num_examples"], point["num_train"]) == (150, 150)
        assert point["step_size"] in paper.STEP_SIZES
        assert point["step_size_trial"].keys() == {"0.01", "0.02", "0.1"}
        assert "AIS estimate of log p(x)" in point["step_size_rule"]


def test_a_curve_is_of_the_same_images_all_along(config: Config) -> None:
    points = points_of(record_of(config), "curve")
    assert [(p["method"], p["samples"]) for p in points] == [
        (method, samples) for method in METHODS for samples in (100, 200)
    ]
    for point in points:
        assert ("leapfrog_step_size" in point) == (point["method"] == "mcem")
        assert ("importance_sampling_test" in point) == (point["method"] != "mcem")
        for name in ("ais_train", "ais_test", "app_d_train", "app_d_test"):
            by_seed = point[f"{name}_by_seed"]
            assert len(set(by_seed)) == 3
            assert point[f"{name}_stderr"] == pytest.approx(np.std(by_seed, ddof=1) / math.sqrt(3))
    for end in points_of(record_of(config), "end"):
        (last,) = (p for p in points if (p["method"], p["samples"]) == (end["method"], 200))
        for name in ("ais", "app_d"):
            of_seed_0 = last[f"{name}_{end['part']}_by_seed"][0]
            assert of_seed_0 == pytest.approx(np.mean(end[f"{name}_by_image"][:3]), abs=1e-3)


def test_log_px_is_of_the_models_trained(config: Config) -> None:
    """What the library's parts give, for the learner whose data is another's."""
    about = points_of(record_of(config), "step size")[2]
    curve = points_of(record_of(config), "curve")[5]
    data = paper.load("mnist_5k", "grey", num_train=150)
    fit = aevb_figure3.make_fit("mcem", data)
    begun = paper.begin(fit, about["step_size"], (0, 1, 2))
    keys = [paper.Keys.of(seed) for seed in (0, 1, 2)]
    (state,) = paper.train(fit, begun, keys, [2], advance=lambda steps: None)
    assert isinstance(state, mcem.State)
    np.testing.assert_allclose(curve["leapfrog_step_size"], np.exp(state.log_step_size), rtol=1e-5)
    x = data.test[parts.chosen(1000, 4)]
    functions = {
        "ais": functools.partial(evaluation.ais, num_temperatures=3, num_chains=2, num_leapfrog=4),
        "app_d": functools.partial(evaluation.app_d, num_transitions=2),
    }
    for i, own in enumerate(keys):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], state.params)
        part_key = jax.random.split(jax.random.fold_in(own.bounds, 2), 3)[1]
        of_model = x if i == 0 else x[:3]
        for (name, function), key in zip(
            functions.items(), jax.random.split(part_key), strict=True
        ):
            (group,) = jax.random.split(key, 1)
            expected = np.asarray(function(params, of_model, group).estimate)
            found = curve[f"{name}_test_by_seed"][i]
            assert found == pytest.approx(float(expected[:3].mean()), rel=1e-4)
            if not i:
                end = points_of(record_of(config), "end")[5]
                assert (end["method"], end["part"]) == ("mcem", "test")
                np.testing.assert_allclose(end[f"{name}_by_image"], expected, atol=2e-3)


def test_no_two_estimates_share_noise() -> None:
    seeds = [paper.Keys.of(seed) for seed in (0, 1)]
    found = [
        jax.random.key_data(key).tolist()
        for own in seeds
        for step in (1, 2)
        for part in aevb_figure3.PartKeys.of(own, jnp.asarray(step))
        for key in jax.random.split(part, 3)
    ]
    assert len(set(map(tuple, found))) == 2 * 2 * 3 * 3


def test_estimators_are_compared_on_the_same_images(config: Config) -> None:
    points = points_of(record_of(config), "end")
    assert [(p["method"], p["part"]) for p in points] == [
        (method, part) for method in METHODS for part in ("train", "test")
    ]
    for point in points:
        ais = np.array(point["ais_by_image"])
        assert point["num_images"] == len(ais) == 4
        assert ("importance_sampling" in point) == (point["method"] != "mcem")
        for name in ("app_d", "importance_sampling"):
            if name in point:
                difference = np.array(point[f"{name}_by_image"]) - ais
                assert point[f"{name}_less_ais"] == pytest.approx(difference.mean(), abs=2e-3)
                stderr = difference.std(ddof=1) / 2
                assert point[f"{name}_less_ais_stderr"] == pytest.approx(stderr, abs=2e-3)
                rms = math.sqrt((difference**2).mean())
                assert point[f"{name}_less_ais_rms"] == pytest.approx(rms, abs=2e-3)
                most = np.abs(difference).max()
                assert point[f"{name}_less_ais_most"] == pytest.approx(most, abs=2e-3)


def test_what_is_too_low_beyond_its_own_error_is_counted() -> None:
    ais, app_d = jnp.full(4, -3.0), jnp.array([-3.0, -3.4, -3.6, 9.0])
    own = {"stderr": jnp.full(4, 0.1), "ess": jnp.full(4, 7.0)}
    found = aevb_figure3._compared(
        {
            "ais": evaluation.LogLikelihood(estimate=ais, **own),
            "app_d": evaluation.LogLikelihood(estimate=app_d, **own),
        }
    )
    assert found["app_d_below_ais"] == 0.25  # three errors of a difference are 0.42
    assert found["app_d_less_ais_most"] == 12
    assert found["ais_ess"] == {"median": 7, "least": 7}


@pytest.mark.parametrize("bad", ["0.1", "all"])
def test_a_step_size_that_diverges_is_not_chosen(
    bad: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a curve that does ends there, on record."""
    estimate, sizes = aevb_figure3._estimates, itertools.cycle(paper.STEP_SIZES)

    def diverging(functions: Any, params: Any, *rest: Any) -> Any:
        found = estimate({"ais": functions["ais"]}, params, *rest)
        is_trial = len(functions) == 1
        if not is_trial or bad == "all" or str(next(sizes)) == bad:
            found = {"ais": found["ais"]._replace(estimate=jnp.array([jnp.nan]))}
        return found

    monkeypatch.setattr(aevb_figure3, "_estimates", diverging)
    study = dataclasses.replace(config, out=tmp_path, methods=("aevb",))
    if bad == "all":
        with pytest.raises(FloatingPointError, match="no step size"):
            aevb_figure3.run(study)
        return
    with pytest.raises(RunFolderError, match="holds no curves"):  # there is nothing to draw
        aevb_figure3.run(study)
    trial, end = record_of(study).points
    assert trial["step_size_trial"]["0.1"] is None
    assert trial["step_size"] in (0.01, 0.02)
    assert (end["measure"], end["not_finite"], end["samples"]) == ("not finite", [0, 1, 2], 100)


def test_figures_and_tables_are_of_the_record(config: Config, tmp_path: Path) -> None:
    record = record_of(config)
    by_ais, by_app_d = marginal_figures.curves(record).axes
    own = points_of(record, "curve")[4:]
    for axes, name in ((by_ais, "ais_test"), (by_app_d, "app_d_test")):
        lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.get_lines()}
        assert len(lines) == 6
        np.testing.assert_allclose(lines["Monte Carlo EM, test"], [point[name] for point in own])
    ends = points_of(record, "end")
    both = marginal_figures.differences(ends).axes
    assert [len(axes.collections) for axes in both] == [6, 4]
    offsets = np.asarray(both[0].collections[1].get_offsets())
    expected = np.subtract(ends[1]["app_d_by_image"], ends[1]["ais_by_image"])
    np.testing.assert_allclose(offsets[:, 1], expected)

    row = marginal_figures.table(record).splitlines()[3]
    assert "| Monte Carlo EM |" in row
    assert f"{own[-1]['ais_test']:.2f} ± {own[-1]['ais_test_stderr']:.2f}" in row
    rows = marginal_figures.estimator_table(ends).splitlines()[2:]
    assert f"{ends[0]['app_d_less_ais']:.2f} ±" in rows[0]
    less = np.mean(np.subtract(ends[4]["ais_by_image"], ends[0]["ais_by_image"]))
    assert f"| {less:.2f} ± " in rows[4]

    # From the record alone, and of one that was stopped.
    assert config.out is not None
    whole = (config.out / "grey.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "grey.jsonl").write_text("".join(whole[:3]), "utf-8")
    aevb_figure3.run(dataclasses.replace(config, out=tmp_path, redraw=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grey.jsonl", "grey.md", "grey.png"]
    names = {"grey.jsonl", "grey.md", "grey.png", "grey-estimators.png"}
    assert {path.name for path in config.out.iterdir()} == names


@pytest.mark.parametrize("num", [0, 2])
def test_ctrl_c_keeps_what_was_measured(
    num: int, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object) -> Iterator[dict[str, Any]]:
        for point in record_of(config).points[:num]:
            yield {name: value for name, value in point.items() if name != "kind"}
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(aevb_figure3, "_curve", stopped)
    with pytest.raises(Interrupted, match="2 measurements are in" if num else "before the first"):
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
        ({"images": 1}, "--images must be at least 2, got 1"),
        ({"images_at_end": 49}, "--images-at-end must be at least the 50 of --images, got 49"),
        ({"chains": 1}, "--chains must be at least 2, got 1"),
        ({"max_samples": 150}, "--max-samples must be a multiple of 100"),
        ({"redraw": True}, "--redraw needs --out"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(**settings)
