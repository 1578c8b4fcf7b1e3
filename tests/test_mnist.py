"""The main job, run for real on the embedded digits."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from runs import assert_same_state, last_state, metrics

import jvae
from jvae import binarisation, evaluation, networks, training
from jvae.data.catalogue import SOURCES
from jvae.experiments import job, mnist, results, run_folder
from jvae.experiments.config import BOUNDS
from jvae.experiments.interrupt import Interrupted

# 784-50-5-50-784: all that the job does, at a tenth of the cost.
SMALL = mnist.Config(
    dataset="mnist_5k", hidden=(50,), latent_dim=5, epochs=4, checkpoint_every=1, nll_samples=20
)


def run_into(folder: Path, config: mnist.Config = SMALL, **changes: Any) -> dict[str, Any]:
    return mnist.run(dataclasses.replace(config, out=folder, **changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_into(folder)
    return folder


def test_two_epochs_of_the_default_model_improve_the_test_elbo(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = mnist.run(mnist.Config(dataset="mnist_5k", epochs=2, nll_samples=10, out=folder))
    first, second = run_folder.read_metrics(folder)
    # Both are on the same 1,000 images: the gain must exceed the errors of two unpaired means.
    error = np.hypot(first["test_elbo_stderr"], second["test_elbo_stderr"])
    assert second["test_elbo"] - first["test_elbo"] > 5 * error
    assert result["test_elbo"] == second["test_elbo"]
    # log p(x) is above its bound, here by tens of nats.
    assert -result["test_nll"] > result["test_elbo"]


def test_the_run_folder_is_complete(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "result.json",
        "model.safetensors",
        "checkpoints",
        "figures",
    }
    assert {path.name for path in (whole / "figures").iterdir()} == {
        "samples.png",
        "reconstructions.png",
        "curves.png",
    }
    settings = json.loads((whole / "config.json").read_text())
    result = json.loads((whole / "result.json").read_text())
    assert settings["protocol"] == result["protocol"]
    assert result["protocol"]["dataset_sha256"] == jvae.data.load("mnist_5k").sha256
    assert result["protocol"]["num_test"] == 1000
    assert settings["seed"] == result["seed"] == 0
    assert settings["versions"]["jax"] == jax.__version__
    assert [record["epoch"] for record in metrics(whole)] == [1, 2, 3, 4]
    assert [record["step"] for record in metrics(whole)] == [40, 80, 120, 160]


def test_nothing_but_the_run_is_left_beside_it(whole: Path) -> None:
    assert list(whole.parent.iterdir()) == [whole]


def test_a_resumed_run_equals_an_uninterrupted_one(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    run_into(folder, epochs=2)
    run_into(folder, resume=True)
    assert metrics(folder) == metrics(whole)
    assert_same_state(last_state(folder, (28, 28), SMALL), last_state(whole, (28, 28), SMALL))
    timings = ("images_per_second", "command")
    ours, theirs = (
        {k: v for k, v in json.loads((f / "result.json").read_text()).items() if k not in timings}
        for f in (folder, whole)
    )
    assert ours == theirs


def test_a_run_stopped_between_checkpoints_goes_on_from_where_it_stopped(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stopped"
    append = run_folder.append_metrics

    def append_and_interrupt(folder: Path, record: dict[str, Any]) -> None:
        append(folder, record)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "append_metrics", append_and_interrupt)
        with pytest.raises(Interrupted, match="saved after epoch 1"):
            run_into(folder, checkpoint_every=100)
    assert [record["epoch"] for record in metrics(folder)] == [1]
    assert not (folder / "result.json").exists()
    run_into(folder, resume=True)
    assert metrics(folder) == metrics(whole)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_after_training_keeps_the_training(
    signum: signal.Signals, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, estimate = tmp_path / "stopped", evaluation.importance_sampling
    groups = 0

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        nonlocal groups
        groups += 1
        if groups == 2:
            signal.raise_signal(signum)
        return estimate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(results, "_DRAWS_A_GROUP", 5000)  # of 20,000
        patch.setattr(evaluation, "importance_sampling", interrupt)
        with pytest.raises(Interrupted, match="--resume --out") as caught:
            run_into(folder)
    assert groups == 2
    assert caught.value.exit_code == 128 + signum
    assert not (folder / "result.json").exists()
    run_into(folder, resume=True)
    assert metrics(folder) == metrics(whole)
    assert (folder / "result.json").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_over(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints")
    run_into(folder, resume=True)
    assert metrics(folder) == metrics(whole)


def test_a_resume_with_fewer_epochs_reports_the_epochs_done(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    result = run_into(folder, resume=True, epochs=1)
    assert (result["epochs"], result["steps"]) == (4, 160)
    settings = run_folder.read_settings(folder)
    assert settings["epochs"] == 4
    assert [resumed["epochs"] for resumed in settings["resumed_with"]] == [1]


def test_lines_after_the_checkpoint_are_written_again(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    run_into(folder, epochs=2)
    # As a process killed in the middle of its third epoch's line leaves it.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 120, "epoch": 3, "test_elbo": -1.0}\n{"step": 16')
    run_into(folder, resume=True)
    assert metrics(folder) == metrics(whole)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_resume(
    signum: signal.Signals, code: int, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "jvae.experiments.mnist",
        "--dataset",
        "mnist_5k",
        "--hidden",
        "50",
        "--epochs",
        "100000",
    ]
    with subprocess.Popen(
        [*command, "--out", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not run_folder.read_metrics(folder):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signum)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    assert f"--resume --out {folder}" in stderr
    saved = last_state(folder, (28, 28), dataclasses.replace(SMALL, latent_dim=20))
    assert int(saved.step) == metrics(folder)[-1]["step"]


def test_the_seed_decides_the_run(whole: Path, tmp_path: Path) -> None:
    run_into(tmp_path / "same", epochs=1, nll_samples=0)
    run_into(tmp_path / "other", epochs=1, nll_samples=0, seed=1)
    assert metrics(tmp_path / "same")[0] == metrics(whole)[0]
    assert metrics(tmp_path / "other")[0]["test_elbo"] != metrics(whole)[0]["test_elbo"]


@pytest.mark.parametrize(
    "changes",
    [
        {"latent_dim": 2},
        {"bound": "iwae", "num_samples": 3},
        {"bound": "sgvb_a", "binarisation": "static"},
        {"bound": "beta_elbo"},
        {"binarisation": "none"},
        {"likelihood": "gaussian"},
        {"stream_above": 0.0},
        {"binarisation": "threshold", "hidden": ()},
        {"optimizer": "adagrad", "learning_rate": 0.02, "map_prior": True},
        {"schedule": "cosine", "clip_norm": 1.0},
        {"initialiser": "lecun", "activation": "gelu", "hidden": (30, 20)},
    ],
    ids=str,
)
def test_every_setting_trains(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_into(folder, epochs=2, nll_samples=0, **changes)
    first, second = metrics(folder)
    name = dataclasses.replace(SMALL, **changes).train_metric
    assert second[name] > first[name]
    assert (folder / "figures" / "manifold.png").exists() == (changes.get("latent_dim") == 2)


def test_a_bound_that_is_not_finite_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    flags = "--dataset mnist_5k --optimizer sgd --learning-rate 1e30 --hidden 50 --out"
    monkeypatch.setattr(sys, "argv", ["mnist", *flags.split(), str(folder)])
    with pytest.raises(SystemExit) as exit_:
        mnist.main()
    assert exit_.value.code == 1
    failure = json.loads((folder / "failure.json").read_text())
    assert failure["last_good_step"] == 0
    assert 0 < failure["step"] < 40
    assert failure["learning_rate"] == pytest.approx(1e30)
    assert f"step {failure['step']}" in capsys.readouterr().err
    assert not (folder / "result.json").exists()
    config = dataclasses.replace(SMALL, latent_dim=20, optimizer="sgd")
    good = last_state(folder, (28, 28), config)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(good.params))
    # From there another learning rate goes on, and the failure is history.
    resumed = run_into(
        folder, config, hidden=(50,), learning_rate=1e-4, epochs=1, checkpoint_every=5, resume=True
    )
    assert resumed["steps"] == 40
    assert not (folder / "failure.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 0", "--epochs must be at least 1, got 0"),
        ("--epochs many", "--epochs"),
        ("--latent-dim -1", "--latent-dim must be at least 1, got -1"),
        ("--hidden 500 0", "--hidden must be at least 1 each"),
        ("--learning-rate 0", "--learning-rate must be positive, got 0.0"),
        ("--learning-rate nan", "--learning-rate must be positive, got nan"),
        ("--clip-norm -1", "--clip-norm must be positive, got -1.0"),
        ("--bound iwae", "--num-samples must be at least 2 with --bound iwae"),
        ("--bound cubo", "cubo"),
        ("--bound vimco", "at least 2 with --bound vimco (with fewer it is another bound, or none"),
        ("--seed -1", "--seed must be between 0 and 2**32 - 1, got -1"),
        ("--binarisation grey", "grey"),
        ("--latents 3", "--latents"),
        ("--resume", "--resume needs --out"),
        ("--stream-above -1", "--stream-above must be at least 0, got -1.0"),
        ("--stream-above inf", "--stream-above must be at least 0, got inf"),
        ("--dataset minst", "minst"),
        (
            "--dataset mnist",
            "error: dataset 'mnist' needs train-images-idx3-ubyte.gz (SHA-256 440f",
        ),
        ("--dataset mnist", "; no network: cannot reach storage.googleapis.com"),
        ("--dataset mnist --data-dir nowhere", "in nowhere/downloads/manual or nowhere/mnist; no"),
        ("--dataset binarized_mnist", "dataset 'binarized_mnist' needs binarized_mnist_train.amat"),
        ("--dataset omniglot", "it is at https://"),
        (
            "--dataset mnist_5k --batch-size 4001",
            "--batch-size must be at most the 4000 training examples, got 4001",
        ),
        (
            "--dataset mnist_5k --binarisation given",
            "--binarisation must be none or dynamic or static or threshold for a bernoulli "
            "likelihood of this data, got given; mnist_5k: uint8 [28, 28], 4,000 training, 1,000 "
            "test examples, values 0 to 255",
        ),
        (
            "--dataset mnist_5k --binarisation static --stream-above 0",
            "--binarisation static draws the training images once, in memory",
        ),
        ("--out nowhere --resume", "nowhere holds no run"),
    ],
)
def test_a_wrong_flag_is_one_message_and_exit_code_2(
    flags: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    reason = "no network: cannot reach storage.googleapis.com (ConnectionError)"
    monkeypatch.setattr("jvae.data.raw_files._unreachable", lambda url: reason)
    monkeypatch.setattr(sys, "argv", ["mnist", *flags.split()])
    with pytest.raises(SystemExit) as exit_:
        mnist.main()
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_into_a_folder_is_refused(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    with pytest.raises(run_folder.RunFolderError, match="add --resume"):
        run_into(whole)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "seed was 0, is 3"),
        ({"hidden": (60,)}, r"hidden was \[50\], is \[60\]"),
        ({"binarisation": "static"}, "binarisation was dynamic, is static"),
        ({"dataset": "auto", "seed": 3}, "seed was 0, is 3"),
    ],
    ids=str,
)
def test_a_resumed_run_keeps_its_settings(
    whole: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(run_folder.RunFolderError, match=message):
        run_into(whole, resume=True, **changes)


def test_a_cosine_schedule_fixes_the_number_of_epochs(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_into(folder, epochs=1, schedule="cosine", nll_samples=0)
    with pytest.raises(run_folder.RunFolderError, match="epochs was 1, is 2"):
        run_into(folder, epochs=2, schedule="cosine", resume=True)


def test_help_explains_every_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mnist", "--help"])
    with pytest.raises(SystemExit) as exit_:
        mnist.main()
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(mnist.Config):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", text)


def test_hidden_layers_without_a_number_are_none() -> None:
    assert tyro.cli(mnist.Config, args=["--hidden"]).hidden == ()


@pytest.mark.parametrize(
    ("field", "table"),
    [
        ("bound", BOUNDS),
        ("optimizer", training.OPTIMIZERS),
        ("activation", networks.ACTIVATIONS),
        ("initialiser", networks.INITIALISERS),
        ("precision", networks.PRECISIONS),
        ("binarisation", {"auto": None, **binarisation.BINARISATIONS}),
        ("likelihood", {"auto": None, **networks.FAMILIES}),
    ],
)
def test_flags_offer_what_the_tables_have(field: str, table: dict[str, object]) -> None:
    offered = typing.get_args(typing.get_type_hints(mnist.Config)[field])
    assert set(offered) == set(table)


def test_the_datasets_offered_are_28_by_28() -> None:
    offered = typing.get_args(typing.get_type_hints(mnist.Config)["dataset"])
    known = {"mnist_5k": (28, 28)} | {name: s.data_shape for name, s in SOURCES.items()}
    expected = {name for name, data_shape in known.items() if data_shape == (28, 28)}
    assert set(offered) == {"auto", *expected}


def test_no_key_of_a_run_is_that_of_the_fixed_draw() -> None:
    fixed = jax.random.split(binarisation.fixed_draw_key())
    for seed in range(50):
        run_keys = jax.random.split(jax.random.key(seed), len(job.Keys._fields))
        both = jax.random.key_data(jnp.concatenate([fixed, run_keys]))
        assert len(np.unique(both, axis=0)) == len(both)
