"""With a validation part a run's result is of the weights of its best epoch, and says so."""

import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from runs import metrics
from tiny_evaluations import QUICK, call, rows
from tiny_runs import STEPS, interrupting_before, pixels, run, save_npy

import jvae
from jvae import checkpoint, data, evaluation
from jvae.experiments import figures, finished, results, run_folder, train
from jvae.experiments.config import ConfigError
from jvae.experiments.interrupt import Interrupted
from jvae.experiments.job import Job, Keys
from jvae.experiments.run_folder import RunFolderError

pytestmark = pytest.mark.usefixtures("no_figures")

# Of the images to learn every pixel is white, of those that choose four in five: the chance of
# white that the model learns goes from a half to one, and has to pass by what suits them best.
WHITE = 0.8
EVERY, EPOCHS = 2, 9
OVERSHOOTING: dict[str, Any] = {
    "learning_rate": 0.01,
    "epochs": EPOCHS,
    "checkpoint_every": EVERY,
    "stream_above": 0.0,
}
TIMINGS = ("images_per_second", "command")


@pytest.fixture(scope="module")
def overshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, `mine.npz`, and the run that nothing interrupted, `run`."""
    folder = tmp_path_factory.mktemp("overshot")
    rng = np.random.default_rng(0)
    valid, test = 255 * (rng.random((2, 40, 6, 5)) < WHITE).astype(np.uint8)
    np.savez(folder / "mine.npz", train=np.full((36, 6, 5), 255, np.uint8), valid=valid, test=test)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda job, params: None)
        run(folder / "mine.npz", folder / "run", **OVERSHOOTING)
    return folder


def validation_elbos(folder: Path) -> dict[int, float]:
    return {record["epoch"]: record["validation_elbo"] for record in metrics(folder)}


def best_of(elbos: dict[int, float], every: int = EVERY) -> int:
    candidates = {epoch: elbo for epoch, elbo in elbos.items() if epoch % every == 0}
    return max(candidates, key=candidates.__getitem__)


def checkpoint_steps(folder: Path) -> list[int]:
    return [int(path.name) for path in (folder / "checkpoints").iterdir() if path.is_dir()]


def kept(folder: Path) -> set[int]:
    """The epochs of the checkpoints."""
    return {step // STEPS for step in checkpoint_steps(folder)}


def without_timings(folder: Path) -> dict[str, Any]:
    result = run_folder.read_result(folder)
    return {name: value for name, value in result.items() if name not in TIMINGS}


def assert_same_result(a: Path, b: Path) -> None:
    """Metrics, weights and results, bit for bit."""
    assert metrics(a) == metrics(b)
    weights = "model.safetensors"
    assert (a / weights).read_bytes() == (b / weights).read_bytes()
    assert without_timings(a) == without_timings(b)


def test_the_best_epoch_is_kept_and_is_the_result(
    overshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = overshot / "run"
    best = best_of(validation_elbos(folder))
    assert EVERY < best < EPOCHS - 1
    assert kept(folder) == {best, EPOCHS - 1, EPOCHS}
    result = run_folder.read_result(folder)
    assert result["weights"] == f"of the best validation ELBO, at epoch {best}"
    assert (result["best_epoch"], result["epochs"]) == (best, EPOCHS)
    expected = {"num_validation": 40, "validation_part": "the data's own"}
    assert result["protocol"].items() >= expected.items()
    # A run that ended there has the same weights and the same numbers.
    other = run(overshot / "mine.npz", tmp_path / "run", **(OVERSHOOTING | {"epochs": best}))
    assert metrics(tmp_path / "run") == metrics(folder)[:best]
    of_runs = (f / "model.safetensors" for f in (folder, tmp_path / "run"))
    assert len({file.read_bytes() for file in of_runs}) == 1
    for name in ("test_elbo", "test_nll", "validation_elbo", "validation_elbo_stderr"):
        assert result[name] == other[name]
    shown = capsys.readouterr().out
    assert f"The weights are of the best validation ELBO, at epoch {best}." in shown
    (row,) = (
        row for row in rows(shown) if row[:1] == ["for comparison: ELBO of the validation part"]
    )
    assert row[1] == f"{other['validation_elbo']:.2f}"


def test_the_numbers_are_those_of_the_weights_on_file(overshot: Path) -> None:
    result = run_folder.read_result(overshot / "run")
    record = metrics(overshot / "run")[result["best_epoch"] - 1]
    params = checkpoint.load(overshot / "run" / "model.safetensors")
    dataset = data.load_path(overshot / "mine.npz")
    keys = Keys(*jax.random.split(jax.random.key(0), len(Keys._fields)))
    key_of = {"test": keys.elbo, "validation": jax.random.fold_in(keys.elbo, 2**32 - 1)}
    for part, images in (("test", dataset.test), ("validation", dataset.valid)):
        key = jax.random.fold_in(key_of[part], record["step"])
        x = np.asarray(images, np.float32) / 255
        elbos = np.asarray(evaluation.bound_by_example(params, x, key, bound=jvae.elbo), np.float64)
        expected = (elbos.mean(), elbos.std(ddof=1) / len(elbos) ** 0.5)
        for found in (result, record):
            numbers = (found[f"{part}_elbo"], found[f"{part}_elbo_stderr"])
            assert numbers == pytest.approx(expected, rel=1e-6)
    x = np.asarray(dataset.test, np.float32) / 255
    log_px = evaluation.importance_sampling(params, x, keys.nll, num_samples=5).estimate
    assert result["test_nll"] == pytest.approx(-float(log_px.mean()), rel=1e-6)


@pytest.mark.parametrize("stops", [(5,), (4,), (2.5, 7.5)], ids=str)
def test_a_stop_changes_nothing(
    stops: tuple[float, ...], overshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After these epochs, at a checkpoint or not, at the end of an epoch or within one."""
    folder = tmp_path / "run"
    for i, stop in enumerate(stops):
        with monkeypatch.context() as patch:
            before = interrupting_before(round(stop * STEPS) - 1, signal.SIGTERM)
            patch.setattr(data, "batches", before)
            with pytest.raises(Interrupted, match="saved after"):
                run(overshot / "mine.npz", folder, **OVERSHOOTING, resume=i > 0)
    run(overshot / "mine.npz", folder, **OVERSHOOTING, resume=True)
    assert_same_result(folder, overshot / "run")
    assert kept(folder) >= {run_folder.read_result(folder)["best_epoch"], EPOCHS}


def test_a_run_that_ended_before_goes_on_as_one_that_did_not(
    overshot: Path, tmp_path: Path
) -> None:
    """Its last weights, which were the best, were of no checkpoint that the longer run has."""
    folder = tmp_path / "run"
    elbos = validation_elbos(overshot / "run")
    end = max((e for e in elbos if e % EVERY), key=elbos.__getitem__)
    assert elbos[end] > elbos[best_of(elbos)]
    result = run(overshot / "mine.npz", folder, **(OVERSHOOTING | {"epochs": end}))
    assert (result["best_epoch"], result["epochs"]) == (end, end)
    run(overshot / "mine.npz", folder, **OVERSHOOTING, resume=True)
    assert_same_result(folder, overshot / "run")


def test_fewer_epochs_choose_among_what_there_is(
    overshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is within an epoch, and has no checkpoint to choose from, has its last state."""
    with monkeypatch.context() as patch:
        patch.setattr(data, "batches", interrupting_before(7, signal.SIGTERM))
        with pytest.raises(Interrupted, match="saved after step 8"):
            run(overshot / "mine.npz", tmp_path / "run", **OVERSHOOTING)
    fewer = OVERSHOOTING | {"epochs": 1}
    result = run(overshot / "mine.npz", tmp_path / "run", **fewer, resume=True)
    assert (result["best_step"], result["steps"]) == (8, 8)
    assert result["best_epoch"] == pytest.approx(8 / 6)


def remove(path: Path) -> None:
    shutil.rmtree(path)


def cut(path: Path) -> None:
    file = path / "default" / "_METADATA"
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "reason"), [(remove, "is missing"), (cut, r"is damaged \(.*\)")]
)
def test_a_best_checkpoint_that_is_lost_is_said_and_costs_nothing_else(
    damage: Any,
    reason: str,
    overshot: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(overshot / "run", folder)
    step = run_folder.read_result(folder)["best_step"]
    lost = folder / "checkpoints" / str(step)
    damage(lost)
    more = OVERSHOOTING | {"epochs": EPOCHS + 1}
    message = rf"^checkpoint {step} in .* {reason}, and its validation ELBO is the best: put a copy"
    with pytest.raises(checkpoint.LostError, match=message) as error:
        run(overshot / "mine.npz", folder, **more, resume=True)
    assert isinstance(error.value, checkpoint.CheckpointError)
    # What a listing shows is said before the epochs that it may cost.
    early = f"WARNING: checkpoint {step}, of the best validation ELBO so far, is missing"
    assert (early in capsys.readouterr().out) == (damage is remove)
    (note,) = error.value.__notes__
    assert note.startswith("To go on once that is mended: the same command with --resume --out")
    # Nothing of it was written, and a copy mends it.
    assert without_timings(folder) == without_timings(overshot / "run")
    shutil.copytree(overshot / "run" / "checkpoints" / str(step), lost, dirs_exist_ok=True)
    result = run(overshot / "mine.npz", folder, **more, resume=True)
    assert (result["best_step"], result["epochs"]) == (step, EPOCHS + 1)


def test_each_seed_has_a_best_epoch_of_its_own(tmp_path: Path) -> None:
    """Where little is learned, the noise of few validation images chooses."""
    path = save_npy(tmp_path / "mine", pixels(6, 5))
    settings = {"validation_fraction": 0.1, "epochs": 6, "checkpoint_every": 1}
    result = run(path, tmp_path / "both", **settings, seeds=2, devices=2)
    by_epoch = np.array([r["validation_elbo_by_seed"] for r in metrics(tmp_path / "both")])
    best = (1 + by_epoch.argmax(axis=0)).tolist()
    assert result["best_epoch_by_seed"] == best
    assert len(set(best)) == 2
    assert "best_epoch" not in result
    words = f"of each seed's best validation ELBO, at epochs {best[0]}, {best[1]}"
    assert result["weights"] == words
    assert result["validation_elbo_by_seed"] == by_epoch.max(axis=0).tolist()
    assert result["validation_elbo"] == by_epoch.max(axis=0).mean()
    steps = {step // 5 for step in checkpoint_steps(tmp_path / "both")}
    assert steps == {*best, 5, 6}
    for seed in (0, 1):
        alone = run(path, tmp_path / str(seed), **settings, seed=seed)
        assert alone["best_epoch"] == best[seed]
        for name in ("test_elbo", "test_nll", "validation_elbo"):
            assert result[f"{name}_by_seed"][seed] == pytest.approx(alone[name], rel=1e-4)
        files = (f"{seed}/model.safetensors", f"both/models/seed_{seed}.safetensors")
        weights = [checkpoint.load(tmp_path / file) for file in files]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *weights)


def test_three_devices_choose_as_one(overshot: Path, tmp_path: Path) -> None:
    """They share 40 validation examples, the last of them two less than the others."""
    run(overshot / "mine.npz", tmp_path / "run", **OVERSHOOTING, devices=3)
    for one, three in zip(metrics(overshot / "run"), metrics(tmp_path / "run"), strict=True):
        assert three == pytest.approx(one, rel=1e-4)
    one, three = (run_folder.read_result(folder) for folder in (overshot / "run", tmp_path / "run"))
    assert three["best_epoch"] == one["best_epoch"]
    assert three["test_nll"] == pytest.approx(one["test_nll"], rel=1e-4)


@pytest.mark.usefixtures("no_training")
def test_what_cannot_be_is_refused(overshot: Path, tmp_path: Path) -> None:
    own = overshot / "mine.npz"
    message = r"--validation-fraction must be 0 for data with a validation part, got 0\.1: .*40"
    with pytest.raises(ConfigError, match=message):
        run(own, tmp_path / "run", validation_fraction=0.1)
    for fraction in (-0.1, 1.0, float("nan")):
        message = f"--validation-fraction must be at least 0 and below 1, got {fraction}"
        with pytest.raises(ConfigError, match=message):
            run(own, tmp_path / "run", validation_fraction=fraction)
    grey = save_npy(tmp_path / "grey", pixels(6, 5))
    message = "--batch-size must be at most the 18 training examples, got 20"
    with pytest.raises(ConfigError, match=message):
        run(grey, tmp_path / "run", validation_fraction=0.5, batch_size=20)
    images = pixels(6, 5)
    np.savez(tmp_path / "one.npz", train=images, valid=images[:1], test=images[:4])
    with pytest.raises(data.DataError, match="1 validation example, expected 2"):
        run(tmp_path / "one.npz", tmp_path / "run")


def test_a_resume_keeps_to_the_checkpoints_that_are_chosen_from(overshot: Path) -> None:
    folder = overshot / "run"
    for changes, message in (
        ({"checkpoint_every": 5}, f"checkpoint_every was {EVERY}, is 5"),
        ({"split_seed": 1}, "split_seed was 0, is 1"),
    ):
        with pytest.raises(RunFolderError, match=message):
            run(overshot / "mine.npz", folder, **(OVERSHOOTING | changes), resume=True)


def test_a_validation_elbo_that_is_not_finite_is_a_failure(
    overshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elbos = results.elbos

    def broken(job: Job, states: Any, part: str) -> Any:
        found = elbos(job, states, part)
        return [values - np.inf for values in found] if part == "validation" else found

    monkeypatch.setattr(results, "elbos", broken)
    message = "the validation ELBO is -inf after step 6"
    with pytest.raises(FloatingPointError, match=message):
        run(overshot / "mine.npz", tmp_path / "run", **OVERSHOOTING)
    failure = run_folder.read_failure(tmp_path / "run")
    assert failure is not None
    assert failure["last_good_step"] == 0


# Once it is finished.


def test_an_evaluation_has_the_weights_and_the_training_part_of_the_run(tmp_path: Path) -> None:
    path = save_npy(tmp_path / "mine", pixels(6, 5))
    held_out = {"test_fraction": 0.5, "validation_fraction": 0.5, "split_seed": 2}
    run(path, tmp_path / "run", **held_out, epochs=1)
    found = finished.load(tmp_path / "run", finished.read(tmp_path / "run"))
    train = data.hold_out(40, 0.5, 2)[0][data.hold_out(20, 0.5, 3)[0]]
    np.testing.assert_array_equal(found.inputs.train, pixels(6, 5)[train])
    evaluated = call(tmp_path / "run", **QUICK)
    assert evaluated["parts"]["train_gap"]["settings"]["num_examples"] == 10
    assert evaluated["protocol"]["weights"] == "of the best validation ELBO"


def test_the_learning_curves_show_it(jobs: list[Job], overshot: Path, tmp_path: Path) -> None:
    for path in (overshot / "mine.npz", save_npy(tmp_path / "mine", pixels(6, 5))):
        train.run(train.Config(data=str(path), out=overshot / "run", batch_size=6, resume=True))
    for job, expected in zip(jobs, (["test", "validation"], ["test"]), strict=True):
        figure = figures.curves(job)["curves"]
        labels = [line.get_label() for line in figure.axes[0].get_lines()]
        assert labels[1:] == [f"{part} elbo, after the epoch" for part in expected]
