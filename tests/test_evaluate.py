"""`jvae evaluate`: a call after another, and what is refused."""

import dataclasses
import json
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tiny_evaluations import ALL, DEFAULT, FULL, QUICK, SEED, call, copy, numbers, results

import jvae
from jvae import checkpoint, evaluation
from jvae.experiments import assessment, command_line, compare, evaluate, run_folder
from jvae.experiments.interrupt import Interrupted
from jvae.experiments.run_folder import RunFolderError

pytestmark = pytest.mark.usefixtures("quick_evaluations")

# A call after another.


def written(folder: Path) -> list[str]:
    return list(json.loads((folder / "evaluation.json").read_text())["parts"])


def test_the_same_command_goes_on_after_ctrl_c(
    trained: Path, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(trained, tmp_path / "run")

    def interrupted(*args: Any, **how: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "ais", interrupted)
        with pytest.raises(Interrupted, match=r"what was done is in .*evaluation\.json") as stopped:
            call(folder, **FULL)
    assert stopped.value.exit_code == 130
    assert written(folder) == DEFAULT

    def again(*args: Any, **how: Any) -> None:
        pytest.fail("this was done")

    monkeypatch.setattr(evaluation, "importance_sampling", again)
    monkeypatch.setattr(evaluation, "kl_decomposition", again)
    call(folder, **FULL)
    assert written(folder) == ALL
    for name in ALL:
        assert results(folder, name) == results(evaluated, name)


def test_other_settings_take_the_place_of_a_part_and_leave_the_others(
    evaluated: Path, tmp_path: Path
) -> None:
    folder = copy(evaluated, tmp_path / "run")
    call(folder, num_samples=2, mutual_information=30, seed=SEED)
    settings = {
        name: part["settings"]
        for name, part in json.loads((folder / "evaluation.json").read_text())["parts"].items()
    }
    assert settings.keys() == set(ALL)
    assert settings["importance_sampling"]["num_samples"] == 2
    assert settings["train_gap"]["num_samples"] == 2
    for name in ("latents", "ais", "ais_paired", "bdmc", "app_d", "inference_gap"):
        assert results(folder, name) == results(evaluated, name)
    assert len(list((folder / "evaluation").iterdir())) == len(ALL)
    assert numbers(folder, "importance_sampling")["log_px"].shape == (1, 1, 1000)
    assert "nll_sd_over_repeats" not in results(folder, "importance_sampling")


def test_parts_of_other_weights_are_dropped(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(evaluated, tmp_path / "run")
    params = checkpoint.load(folder / "model.safetensors")
    weights = jax.tree.map(lambda leaf: leaf * 0.9, params.weights)
    checkpoint.save(folder / "model.safetensors", jvae.Params(weights, params.model))
    compare.run(compare.Config(runs=(folder,)))
    assert "importance_sampling" not in capsys.readouterr().out
    call(folder, **QUICK)
    assert "The run's weights have changed: earlier parts are dropped." in capsys.readouterr().out
    assert written(folder) == DEFAULT
    assert len(list((folder / "evaluation").iterdir())) == len(DEFAULT)
    assert not (folder / "figures" / "sandwich.png").exists()


def test_a_number_that_is_not_finite_ends_it_and_leaves_what_was_done(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(trained, tmp_path / "run")

    def diverged(*args: Any, **how: Any) -> evaluation.LogLikelihood:
        return evaluation.LogLikelihood(jnp.array([1.0, jnp.nan]), jnp.ones(2), jnp.ones(2))

    monkeypatch.setattr(evaluation, "app_d", diverged)
    with pytest.raises(FloatingPointError, match="app_d: log_px is not finite in 1 places"):
        call(folder, **QUICK, app_d=2)
    assert written(folder) == DEFAULT


def test_one_process_at_a_time(trained: Path) -> None:
    with run_folder.lock(trained), pytest.raises(RunFolderError, match="another process"):
        call(trained, **QUICK)


# What is refused.


def spoil_data(folder: Path) -> None:
    settings = run_folder.read_settings(folder)
    settings["protocol"]["dataset_sha256"] = "aa"
    run_folder.write_json(folder / "config.json", settings)


def spoil_draw(folder: Path) -> None:
    settings = run_folder.read_settings(folder)
    settings["protocol"]["test_x_sha256"] = "aa"
    run_folder.write_json(folder / "config.json", settings)


def lose_data(folder: Path) -> None:
    settings = run_folder.read_settings(folder)
    run_folder.write_json(folder / "config.json", {**settings, "dataset": "gone/mine.npy"})


def lose_settings(folder: Path) -> None:
    settings = run_folder.read_settings(folder)
    del settings["likelihood"]
    run_folder.write_json(folder / "config.json", settings)


def many_latents(folder: Path) -> None:
    settings = run_folder.read_settings(folder)
    run_folder.write_json(folder / "config.json", settings | {"latent_dim": 50})


def unchanged(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (shutil.rmtree, "", "error: run holds no run: it has no config.json"),
        (
            lambda run: (run / "result.json").unlink(),
            "",
            "error: run holds no finished run: no result.json",
        ),
        (
            lambda run: (run / "model.safetensors").unlink(),
            "",
            "error: run/model.safetensors does not exist",
        ),
        (
            lambda run: (run / "model.safetensors").write_bytes(b"half"),
            "",
            "error: run/model.safetensors: not a whole file of weights",
        ),
        (
            lambda run: (run / "evaluation.json").write_text("{}"),
            "",
            "error: run/evaluation.json holds no evaluation: delete it",
        ),
        (lose_settings, "", "error: run/config.json is of no run: no 'likelihood'"),
        (lose_data, "", "error: gone/mine.npy does not exist (the data of run; if it was moved:"),
        (spoil_data, "", "error: embedded in jvae is not the data of run: dataset_sha256 is"),
        (spoil_draw, "", "error: embedded in jvae is not the data of run: test_x_sha256 is"),
        (unchanged, "--ais 1001", "error: --ais must be at most the 1000 test examples, got 1001"),
        (unchanged, "--app-d 1001", "error: --app-d must be at most the 1000 test examples"),
        (unchanged, "--inference-gap 1001", "error: --inference-gap must be at most the 1000"),
        (unchanged, "--mutual-information 1001", "error: --mutual-information must be at most"),
        (many_latents, "--app-d 2", "error: --app-d must be 0 for a model of 50 latents or more"),
        (unchanged, "--ais 1", "error: --ais must be 0 or at least 2, to have an error, got 1"),
        (unchanged, "--bdmc -1", "error: --bdmc must be 0 or at least 2"),
        (unchanged, "--mutual-information 1", "error: --mutual-information must be at least 2"),
        (unchanged, "--num-samples 0", "error: --num-samples must be at least 1, got 0"),
        (unchanged, "--repeats 0", "error: --repeats must be at least 1, got 0"),
        (unchanged, "--num-temperatures 0", "error: --num-temperatures must be at least 1"),
        (unchanged, "--num-chains 0", "error: --num-chains must be at least 1"),
        (unchanged, "--seed -1", "error: --seed must be between 0 and 2**32 - 1, got -1"),
        (unchanged, "--start nowhere", "--start"),
        (unchanged, "--paint", "--paint"),
    ],
)
@pytest.mark.parametrize("main", [command_line.main, evaluate.main], ids=["jvae", "python -m"])
def test_what_cannot_be_is_one_message_and_exit_code_2(
    main: Callable[[], None],
    spoil: Callable[[Path], object],
    flags: str,
    message: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(trained, "run")
    spoil(Path("run"))
    words = ["jvae", "evaluate"] if main is command_line.main else ["evaluate"]
    monkeypatch.setattr(sys, "argv", [*words, "run", *shlex.split(flags)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    if message.startswith("error:"):
        assert err.startswith(message)
        assert err.count("\n") == 1
    assert not (Path("run") / "evaluation").exists()


@pytest.mark.parametrize("main", [command_line.main, evaluate.main], ids=["jvae", "python -m"])
def test_help(
    main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["jvae", "evaluate"] if main is command_line.main else ["evaluate"]
    monkeypatch.setattr(sys, "argv", [*words, "--help"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    flags = [field.name for field in dataclasses.fields(assessment.Config) if field.name != "run"]
    assert [f for f in flags if f"--{f.replace('_', '-')}" not in shown] == []
    assert "after Ctrl-C the same command goes on" in shown
