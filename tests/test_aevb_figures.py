"""The studies of the paper's figures: records that can be gone on with, figures made of them."""

import dataclasses
import json
import math
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from faces import frey_like
from matplotlib.colors import to_hex

import jvae
from jvae import checkpoint, data, plotting
from jvae.experiments import (
    aevb_figure2,
    aevb_figure4,
    aevb_figure5,
    curve_figures,
    curves,
    frey_face,
    paper,
    records,
    run_folder,
)
from jvae.experiments.config import ConfigError
from jvae.experiments.curves import Curve, Measured
from jvae.experiments.interrupt import Interrupted
from jvae.experiments.run_folder import RunFolderError

TWO_STEPS: dict[str, Any] = {"max_samples": 200, "trial_steps": 1}


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """Models of 3 hidden units, and faces that are generated."""
    load = data.load
    small = {name: paper.SETTINGS[name]._replace(hidden=3) for name in ("mnist_5k", "frey_face")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "SETTINGS", small)
        patch.setattr(
            data, "load", lambda name, d=None: frey_like() if name == "frey_face" else load(name, d)
        )
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> aevb_figure2.Config:
    """Of a study of two steps a curve, which was run."""
    out = tmp_path_factory.mktemp("figure2")
    config = aevb_figure2.Config(
        datasets=("mnist_5k", "frey_face"), latent_dims=(2,), seeds=3, out=out, **TWO_STEPS
    )
    aevb_figure2.run(config)
    return config


NAMES = [f"{data}-2-{who}" for data in ("mnist_5k", "frey_face") for who in ("aevb", "wake_sleep")]


def folder_of(config: curves.Config) -> Path:
    assert config.out is not None
    return config.out


def copy_of_records(config: curves.Config, out: Path) -> Any:
    shutil.copytree(
        folder_of(config), out, ignore=shutil.ignore_patterns("*.png", "*.md"), dirs_exist_ok=True
    )
    return dataclasses.replace(config, out=out)


def no_training(*arguments: object, **named: object) -> None:
    raise AssertionError("nothing is to be trained")


# Figure 2.


def test_every_curve_has_its_record(config: aevb_figure2.Config) -> None:
    paths = sorted((folder_of(config) / "grey").glob("*.jsonl"))
    assert [path.stem for path in paths] == sorted(NAMES)
    for path in paths:
        header, points, end = records.read(path)
        assert header["study"] == "aevb_figure2"
        assert header["targets"] == "grey"
        assert header["seeds"] == [0, 1, 2]
        assert header["step_size"] in paper.STEP_SIZES
        assert header["step_size_trial"].keys() == {"0.01", "0.02", "0.1"}
        assert header.keys() >= {"command", "commit", "versions", "dataset_sha256"}
        assert end is not None
        (point,) = points
        assert point["samples"] == 200
        for part in ("train", "test"):
            by_seed = point[f"{part}_by_seed"]
            assert len(set(by_seed)) == 3
            assert point[part] == pytest.approx(np.mean(by_seed))
            stderr = np.std(by_seed, ddof=1) / math.sqrt(3)
            assert point[f"{part}_stderr"] == pytest.approx(stderr)


def test_the_bounds_are_those_of_the_models_trained(config: aevb_figure2.Config) -> None:
    """The learners differ, from one beginning, and AEVB's is what the library's parts give."""
    found = curves.read_folder(folder_of(config) / "grey")
    digits = paper.load("mnist_5k", "grey")
    fit = paper.make_fit(paper.LEARNERS["aevb"], paper.make_model("mnist_5k", 2), digits)
    of = found[Curve("mnist_5k", 2, "aevb")]
    keys = [paper.Keys.of(seed) for seed in (0, 1, 2)]
    begun = paper.begin(fit, of.header["step_size"], (0, 1, 2))
    (state,) = paper.train(fit, begun, keys, [2], advance=lambda steps: None)
    expected = paper.measure(digits, state, keys)
    for part, by_seed in of.bounds.items():
        np.testing.assert_allclose(by_seed[0], [v.mean() for v in expected[part]], rtol=1e-5)
    other = found[Curve("mnist_5k", 2, "wake_sleep")]
    assert not np.allclose(of.bounds["test"], other.bounds["test"], rtol=1e-3)


def test_redrawing_trains_nothing(
    config: aevb_figure2.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy_of_records(config, tmp_path)
    before = (folder_of(config) / "grey.md").exists()
    monkeypatch.setattr(paper, "make_fit", no_training)
    monkeypatch.setattr(paper, "load", no_training)
    aevb_figure2.run(dataclasses.replace(config, redraw=True))
    assert not before
    assert {path.name for path in tmp_path.iterdir()} == {"grey", "grey.png", "grey.md"}


def test_a_study_goes_on_with_the_curves_that_it_lacks(
    config: aevb_figure2.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy_of_records(config, tmp_path)
    whole = {name: records.read(tmp_path / "grey" / f"{name}.jsonl") for name in NAMES}
    lost, cut, *kept = NAMES
    (tmp_path / "grey" / f"{lost}.jsonl").unlink()
    path = tmp_path / "grey" / f"{cut}.jsonl"
    path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:-1]), "utf-8")
    before = {name: (tmp_path / "grey" / f"{name}.jsonl").read_bytes() for name in kept}
    made: list[Any] = []
    make_fit = paper.make_fit

    def counted(make_learner: Any, *others: Any) -> paper.Fit:
        made.append(make_learner)
        return make_fit(make_learner, *others)

    monkeypatch.setattr(paper, "make_fit", counted)
    aevb_figure2.run(config)
    assert made == [paper.LEARNERS["aevb"], paper.LEARNERS["wake_sleep"]]
    assert before == {name: (tmp_path / "grey" / f"{name}.jsonl").read_bytes() for name in kept}
    for name in (lost, cut):
        again = records.read(tmp_path / "grey" / f"{name}.jsonl")
        assert again.end is not None
        for a, b in zip(again.points, whole[name].points, strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_samples": 300}, "max_samples was 200, is 300"),
        ({"seed": 1}, r"seeds was \[0, 1, 2\], is \[1, 2, 3\]"),
        ({"trial_steps": 2}, "trial_steps was 1, is 2"),
    ],
)
def test_records_of_other_settings_are_refused(
    changes: dict[str, Any],
    message: str,
    config: aevb_figure2.Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paper, "make_fit", no_training)
    with pytest.raises(ConfigError, match=message):
        aevb_figure2.run(dataclasses.replace(config, **changes))


def test_what_was_measured_before_ctrl_c_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    measure = paper.measure

    def interrupting(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:  # of the second curve, after the trial of its step size
            signal.raise_signal(signal.SIGINT)
        return measure(*arguments)

    monkeypatch.setattr(paper, "measure", interrupting)
    config = aevb_figure2.Config(
        datasets=("frey_face",), latent_dims=(2,), seeds=3, out=tmp_path, **TWO_STEPS
    )
    with pytest.raises(Interrupted, match=r"(?s)1 of 2 curves were trained.*same --out") as caught:
        aevb_figure2.run(config)
    assert caught.value.exit_code == 130
    ends = {p.stem: records.read(p).end for p in (tmp_path / "grey").glob("*.jsonl")}
    assert {name: end is not None for name, end in ends.items()} == {
        "frey_face-2-aevb": True,
        "frey_face-2-wake_sleep": False,
    }
    aevb_figure2.run(dataclasses.replace(config, redraw=True))
    assert (tmp_path / "grey.png").exists()


def test_a_curve_ends_where_a_bound_is_not_finite_and_the_study_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = paper.measure

    def broken(data: Any, state: Any, keys: Sequence[Any], *given: Any) -> Any:
        found = measure(data, state, keys, *given)
        if int(state.step) > 100:
            found["test"][1][3] = math.nan
        return found

    monkeypatch.setattr(paper, "measure", broken)
    config = aevb_figure2.Config(
        datasets=("frey_face",),
        latent_dims=(2,),
        learners=("aevb",),
        seeds=3,
        out=tmp_path,
        max_samples=18_000,
        trial_steps=100,  # and so no program but those of the curve
    )
    aevb_figure2.run(config)
    record = records.read(tmp_path / "grey" / "frey_face-2-aevb.jsonl")
    assert [point["samples"] for point in record.points] == [10_000, 13_000]
    assert record.points[1]["not_finite"] == [1]
    assert record.end is not None
    assert "10,000 (then not finite, seeds [1])" in (tmp_path / "grey.md").read_text("utf-8")
    monkeypatch.setattr(paper, "make_fit", no_training)
    aevb_figure2.run(config)


# Figures and tables.


def synthetic(curve: Curve, level: float, *, targets: str = "grey") -> Measured:
    """Three points and three seeds, whose middle one is the best by far."""
    base = level + np.array([[0.0, 1.0, 5.0], [10.0, 12.0, 11.0], [14.0, 10.0, 16.0]])
    return Measured(
        curve=curve,
        header={"targets": targets, "seeds": [0, 1, 2], "step_size": 0.02},
        samples=np.array([1000, 100_000, 1_000_000]),
        bounds={"train": base + 1, "test": base},
        seconds=np.array([1.0, 10.0, 100.0]),
        not_finite=None,
        is_whole=True,
    )


SYNTHETIC = {
    curve: synthetic(curve, level)
    for curve, level in (
        (Curve("mnist_5k", 3, "aevb"), -150.0),
        (Curve("mnist_5k", 3, "wake_sleep"), -160.0),
        (Curve("mnist_5k", 20, "aevb"), -130.0),
        (Curve("frey_face", 2, "aevb"), 900.0),
    )
}


def test_panels_have_medians_and_bands_over_seeds() -> None:
    figure = curve_figures.panels(SYNTHETIC)
    first, *_ = figure.axes
    assert [axes.get_title() for axes in figure.axes] == [
        "mnist_5k, 3 latents",
        "mnist_5k, 20 latents",
        "Frey Face, 2 latents",
    ]
    assert {axes.get_xscale() for axes in figure.axes} == {"log"}
    drawn = {
        str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in first.get_lines()
    }
    assert drawn.keys() == {
        "AEVB, train", "AEVB, test", "wake-sleep, train", "wake-sleep, test"
    }  # fmt: skip
    assert drawn["AEVB, test"] == [[1e3, -149], [1e5, -139], [1e6, -136]]
    assert drawn["wake-sleep, train"] == [[1e3, -158], [1e5, -148], [1e6, -145]]
    bands = {
        (to_hex(tuple(colour)), round(float(np.asarray(path.vertices)[:, 1].max())))
        for band in first.collections
        for colour in np.asarray(band.get_facecolor())
        for path in band.get_paths()
    }
    aevb, other = plotting.BLUE.lower(), plotting.ORANGE.lower()
    assert bands == {(aevb, -134), (aevb, -133), (other, -144), (other, -143)}
    assert "no likelihood" in str(figure.get_suptitle())
    assert "median and range of 3 seeds" in str(figure.get_suptitle())


def test_a_row_shows_the_ends_however_bad_the_start() -> None:
    worst = Curve("mnist_5k", 20, "aevb")
    bounds = {
        part: np.where(SYNTHETIC[worst].samples[:, None] < 1_000_000, -1e9, values)
        for part, values in SYNTHETIC[worst].bounds.items()
    }
    digits, _, faces = curve_figures.panels(
        SYNTHETIC | {worst: SYNTHETIC[worst]._replace(bounds=bounds)}
    ).axes
    low, high = digits.get_ylim()
    # Medians of the test bounds of wake-sleep and of the train bounds at 20 latents.
    assert -146 - 0.61 * 32 < low < -146 - 0.6 * 31
    assert -115 < high < -115 + 4
    assert faces.get_ylim()[0] > 900


def test_other_targets_have_another_stamp() -> None:
    curve = Curve("mnist_5k", 3, "aevb")
    figure = curve_figures.panels({curve: synthetic(curve, 0.0, targets="dynamic")})
    assert "no likelihood" not in str(figure.get_suptitle())


@pytest.mark.parametrize(
    ("dataset", "targets", "words"),
    [
        ("mnist_5k", "grey", "grey targets as in the paper: of digits no likelihood"),
        ("frey_face", "grey", "grey targets as in the paper: of faces a density without bound"),
        ("mnist_5k", "dynamic", "pixels drawn at each visit"),
        ("frey_face", "dynamic", "frames dequantised at each visit"),
    ],
)
def test_a_figure_says_what_its_targets_are(dataset: str, targets: str, words: str) -> None:
    curve = Curve(dataset, 3, "aevb")
    figure = curve_figures.panels({curve: synthetic(curve, 0.0, targets=targets)})
    assert str(figure.get_suptitle()).splitlines()[0] == words


def test_the_table_has_last_points_and_speeds() -> None:
    text = curve_figures.table(SYNTHETIC)
    line = next(line for line in text.splitlines() if "20 | AEVB" in line)
    # Three seeds, 900,000 samples each in 90 s; 14, 10, 16 have a standard error of 1.76.
    assert line == (
        "| mnist_5k | 20 | AEVB | 0.02 | 1,000,000 | -115.67 ± 1.76 | -116.67 ± 1.76 "
        "| 30,000 | 0.56 |"
    )


def test_the_difference_is_taken_seed_by_seed() -> None:
    aevb, other = Curve("mnist_5k", 3, "aevb"), Curve("mnist_5k", 3, "wake_sleep")
    ours, theirs = SYNTHETIC[aevb], SYNTHETIC[other]
    lower = theirs.bounds["test"] + np.array([[0.0, 0, 0], [20.0, 0, 0], [1.0, 2.0, 3.0]])
    theirs = theirs._replace(bounds={"train": lower, "test": lower})
    text = curve_figures.difference_table([(ours, theirs)])
    # 10 - 1, 10 - 2, 10 - 3: mean 8, standard error 1 / √3; one seed is below at 100,000.
    assert "| mnist_5k | 3 | 1,000,000 | 8.00 ± 0.58 | 2 of 3, with every seed |" in text


def test_a_record_of_another_study_is_no_curve(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"kind": "study"}\n')
    with pytest.raises(RunFolderError, match="no learning curve's"):
        curves.read_folder(tmp_path)


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_samples": 150}, "--max-samples must be a multiple of 100, at least 100, got 150"),
        ({"max_samples": 0}, "--max-samples must be a multiple of 100"),
        ({"trial_steps": 0}, "--trial-steps must be at least 1, got 0"),
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"seed": -1}, "--seed must be from 0"),
        ({"seed": 2**32 - 2}, "--seed must be from 0"),
        ({"latent_dims": ()}, "--latent-dims must be at least 1 each"),
        ({"latent_dims": (2, 0)}, r"--latent-dims must be at least 1 each, got \(2, 0\)"),
        ({"datasets": ()}, "--datasets and --learners need at least one name"),
        ({"learners": ()}, "--datasets and --learners need at least one name"),
        ({"redraw": True}, "--redraw needs --out"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        aevb_figure2.Config(**settings)


def test_the_panels_are_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "SETTINGS", {"mnist": paper._MNIST, "frey_face": paper._FREY_FACE})
    found = list(aevb_figure2.Config().curves)
    assert len(found) == len(set(found)) == 18
    assert [c.latent_dim for c in found if c[::2] == ("mnist", "aevb")] == [3, 5, 10, 20, 200]
    assert [c.latent_dim for c in found if c[::2] == ("frey_face", "aevb")] == [2, 5, 10, 20]


@pytest.mark.parametrize("study", [aevb_figure2, aevb_figure4, aevb_figure5])
def test_a_folder_without_records_is_refused(study: Any, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no"):
        study.run(study.Config(out=tmp_path, redraw=True))


# Figures 4 and 5.


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[jvae.Params, paper.Keys]]:
    """By name, the models that studies train from now on, and the keys of each."""
    found: dict[str, tuple[jvae.Params, paper.Keys]] = {}
    run = curves.run

    def keeping(*arguments: Any, on_trained: Any) -> None:
        def keep(curve: Curve, state: Any, keys: list[paper.Keys]) -> None:
            found[curve.name] = jax.tree.map(lambda leaf: leaf[0], state.params), keys[0]
            assert int(state.step) == 2
            on_trained(curve, state, keys)

        run(*arguments, on_trained=keep)

    monkeypatch.setattr(curves, "run", keeping)
    return found


def assert_same_picture(path: Path, means: Any) -> None:
    """To one step of 255, for rounding."""
    pixels = np.load(path)["pixels"].astype(int)
    np.testing.assert_allclose(pixels, 255 * np.asarray(means).clip(0, 1), atol=0.6)
    assert pixels.std() > 0


def test_manifolds_are_of_the_trained_models_and_redrawn_without_them(
    trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = aevb_figure4.Config(datasets=("frey_face",), out=tmp_path, **TWO_STEPS)
    aevb_figure4.run(config)
    params, _ = trained["frey_face-2-aevb"]
    means = jvae.likelihood(params, plotting.latent_grid(20)).mean
    assert means.shape == (20, 20, 28, 20)
    assert_same_picture(tmp_path / "frey_face-2-aevb.npz", means)
    (tmp_path / "frey_face-2-aevb.png").unlink()
    (tmp_path / "models.md").unlink()
    monkeypatch.setattr(paper, "make_fit", no_training)
    aevb_figure4.run(dataclasses.replace(config, redraw=True))
    assert (tmp_path / "frey_face-2-aevb.png").exists()
    assert "Frey Face | 2 | AEVB" in (tmp_path / "models.md").read_text("utf-8")


def test_samples_are_of_the_trained_models(trained: dict[str, Any], tmp_path: Path) -> None:
    config = aevb_figure5.Config(dataset="mnist_5k", latent_dims=(3,), out=tmp_path, **TWO_STEPS)
    aevb_figure5.run(config)
    params, keys = trained["mnist_5k-3-aevb"]
    means = jvae.sample(params, keys.figures, 100).reshape(10, 10, 28, 28)
    assert_same_picture(tmp_path / "mnist_5k-3-aevb.npz", means)
    assert (tmp_path / "mnist_5k-3-aevb.png").exists()


# The command for Frey Face.


def test_a_run_on_frey_face_has_the_papers_model_and_its_manifold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    result = frey_face.run(frey_face.Config(epochs=1, nll_samples=2, out=folder))
    assert (folder / "figures" / "manifold.png").exists()
    assert result["protocol"]["likelihood"] == "gaussian"
    monkeypatch.setattr(paper, "SETTINGS", {"frey_face": paper._FREY_FACE})
    model = checkpoint.load(folder / "model.safetensors").model
    assert model == paper.make_model("frey_face", 2)
    settings = run_folder.read_settings(folder)
    assert settings["data"] == "frey_face"
    assert json.loads((folder / "result.json").read_text())["steps"] == 2
