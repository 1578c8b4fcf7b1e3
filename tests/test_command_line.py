"""The `jvae` command: a wrong one is one message and an exit code, and so is every error."""

import dataclasses
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jvae
from jvae import checkpoint, data, training
from jvae.experiments import command_line, train
from jvae.experiments.config import ConfigError
from jvae.experiments.interrupt import Interrupted
from jvae.experiments.run_folder import RunFolderError


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


def test_a_folder_that_cannot_be_written_is_one_message(
    grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "run"
    assert end_of(f"train --data {grey} --batch-size 6 --out {out}", monkeypatch) == 2
    assert capsys.readouterr().err == f"error: cannot write {out}: Not a directory\n"


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
