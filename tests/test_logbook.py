"""Loggers are told what `metrics.jsonl` has, once a step, and what the model looks like."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import event_files
import jax
import numpy as np
import pytest
import safetensors.numpy

from jvae import checkpoint, training
from jvae.experiments import command_line, figures, logbook, run_folder, train
from jvae.experiments.config import ConfigError
from jvae.experiments.logbook import Record

# 36 training examples, 6 steps an epoch; checkpoints after epochs 2 and 3.
STEPS = 6
TINY: dict[str, Any] = {
    "latent_dim": 3,
    "hidden": (8,),
    "epochs": 3,
    "batch_size": 6,
    "nll_samples": 0,
    "checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 grey images."""
    path = tmp_path_factory.mktemp("data") / "grey.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (40, 6, 5), np.uint8))
    return path


def run(path: Path, folder: Path, *loggers: logbook.Logger, **changes: Any) -> dict[str, Any]:
    config = train.Config(data=str(path), out=folder, **(TINY | changes))
    return train.run(config, loggers=loggers)


def numbers(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics without their step."""
    lines = run_folder.read_metrics(folder)
    return [{name: value for name, value in line.items() if name != "step"} for line in lines]


# A function of one's own.


def test_a_function_is_told_of_each_epoch(grey: Path, tmp_path: Path) -> None:
    told: list[Record] = []
    run(grey, tmp_path / "run", told.append, learning_rate=0.1)
    assert [record.step for record in told] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert [record.scalars for record in told] == numbers(tmp_path / "run")
    drawn = {"samples", "reconstructions"}
    assert [set(record.images) for record in told] == [set(), drawn, drawn]
    for image in told[-1].images.values():
        assert image.dtype == np.uint8
        assert image.shape[2:] == (3,)
        assert image.std() > 0
    assert not np.array_equal(told[1].images["samples"], told[2].images["samples"])
    # The last are the very weights of the run.
    saved = safetensors.numpy.load_file(tmp_path / "run" / "model.safetensors")
    assert told[0].histograms == {}
    jax.tree.map(np.testing.assert_array_equal, dict(told[-1].histograms), saved)
    assert not np.array_equal(
        told[1].histograms["encoder/params/output/bias"], saved["encoder/params/output/bias"]
    )


def test_an_ensemble_names_its_seeds(grey: Path, tmp_path: Path) -> None:
    told: list[Record] = []
    run(grey, tmp_path / "run", told.append, seeds=2, seed=5, epochs=1, devices=1)
    (line,) = numbers(tmp_path / "run")
    for name in ("train_elbo_by_seed", "test_elbo_by_seed"):
        by_seed: Any = line.pop(name)
        line |= {f"{name}/5": by_seed[0], f"{name}/6": by_seed[1]}
    assert told[0].scalars == line
    first = safetensors.numpy.load_file(tmp_path / "run" / "models" / "seed_5.safetensors")
    jax.tree.map(np.testing.assert_array_equal, dict(told[0].histograms), first)


def test_a_table_is_shown_by_its_marginals(tmp_path: Path) -> None:
    told: list[Record] = []
    np.save(tmp_path / "table.npy", np.random.default_rng(0).normal(size=(40, 3)))
    run(tmp_path / "table.npy", tmp_path / "run", told.append, epochs=1)
    assert set(told[0].images) == {"marginals"}


def test_a_number_that_is_missing_is_left_out(unchecked: None) -> None:
    """The training bound of an epoch whose every step was skipped."""
    told: list[Record] = []
    job: Any = types.SimpleNamespace(config=types.SimpleNamespace(all_seeds=range(1)))
    state: Any = None
    line = {"step": 6, "train_elbo": None, "skipped_steps": 6}
    logbook.write([told.append], job, state, line, in_full=False)
    assert told[0].scalars == {"skipped_steps": 6}


def test_without_loggers_nothing_is_computed(
    grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*parts: object) -> None:
        pytest.fail("made")

    def draw(*parts: object) -> dict[str, object]:
        drawn.append(parts)
        return {}

    drawn: list[object] = []
    monkeypatch.setattr(logbook, "Record", refuse)
    monkeypatch.setattr(figures, "of_model", draw)
    run(grey, tmp_path / "run")
    assert len(drawn) == 1  # for the figures of the finished run


# TensorBoard.


def test_event_files_hold_numbers_figures_and_weights(grey: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(grey, folder, tensorboard=True)
    steps = [STEPS, 2 * STEPS, 3 * STEPS]
    expected = {
        name: [
            (step, float(np.float32(line[name])))
            for step, line in zip(steps, numbers(folder), strict=True)
        ]
        for name in numbers(folder)[0]
    }
    assert event_files.scalars(folder / "tensorboard") == expected
    values = event_files.values(folder / "tensorboard")
    for name in ("samples", "reconstructions"):
        assert [step for step, _ in values[name]] == steps[1:]
        assert values[name][-1][1].image.encoded_image_string.startswith(b"\x89PNG")
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    assert set(values) == {*expected, "samples", "reconstructions", *weights}
    for name, array in weights.items():
        assert [step for step, _ in values[name]] == steps[1:]
        histogram = values[name][-1][1].histo
        assert sum(histogram.bucket) == histogram.num == array.size
        assert (histogram.min, histogram.max) == (array.min(), array.max())
        assert math.isclose(histogram.sum, array.sum(dtype=np.float64), rel_tol=1e-9)


def test_a_run_that_is_resumed_goes_on_without_a_step_twice(
    grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies after its third epoch is logged, before that is saved."""

    class Killed(BaseException):
        pass

    save = checkpoint.save_state

    def dying(checkpoints: checkpoint.Checkpoints, state: training.TrainState, **how: Any) -> None:
        if state.step == 3 * STEPS:
            raise Killed
        save(checkpoints, state, **how)

    run(grey, tmp_path / "whole", tensorboard=True, epochs=4)
    whole = event_files.values(tmp_path / "whole" / "tensorboard")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_state", dying)
        with pytest.raises(Killed):
            run(grey, folder, tensorboard=True, checkpoint_every=1)
    (first,) = (folder / "tensorboard").iterdir()
    assert 3 * STEPS in {event.step for event in event_files.events(first)}
    run(grey, folder, resume=True, epochs=4, tensorboard=True)
    assert len(list((folder / "tensorboard").iterdir())) == 2
    resumed = event_files.values(folder / "tensorboard")
    for name in ("train_elbo", "test_elbo"):
        assert resumed[name] == whole[name]
        assert [step for step, _ in resumed[name]] == [6, 12, 18, 24]
    # Of the epoch that was logged twice, what the first time had more of is gone.
    assert [step for step, _ in resumed["samples"]] == [6, 12, 24]
    assert resumed["samples"][-1] == whole["samples"][-1]


def test_files_of_one_second_are_several(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        with logbook.tensorboard(tmp_path) as log:
            log(Record(step, {"a": float(step)}, {}, {}))
    assert event_files.scalars(tmp_path) == {"a": [(1, 1.0), (2, 2.0), (3, 3.0)]}


def test_a_record_is_on_the_disk_at_once(tmp_path: Path) -> None:
    with logbook.tensorboard(tmp_path / "a" / "b") as log:
        assert list(tmp_path.iterdir()) == []
        for step in (1, 2):
            log(Record(step, {"a": 0.5}, {}, {}))
            assert len(event_files.scalars(tmp_path / "a" / "b")["a"]) == step


def test_tensorflow_is_never_imported(tmp_path: Path) -> None:
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('imported')")
    code = f"""
from pathlib import Path
import numpy as np
from jvae.experiments import logbook
with logbook.tensorboard(Path({str(tmp_path)!r}, "events")) as log:
    image, weights = np.zeros((2, 2, 3), np.uint8), np.zeros(3)
    log(logbook.Record(1, {{"a": 1.0}}, {{"b": image}}, {{"c": weights}}))
"""
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})
    assert set(event_files.values(tmp_path / "events")) == {"a", "b", "c"}


# Weights & Biases.


class Wandb(types.ModuleType):
    """Stands in for the package: what a run calls of it."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.exit_codes: list[int] = []
        self.refusal: Exception | None = None

    def init(self, **how: Any) -> "Wandb":
        if self.refusal is not None:
            raise self.refusal
        self.inits.append(how)
        return self

    def log(self, values: dict[str, Any], *, step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int = 0) -> None:
        self.exit_codes.append(exit_code)

    Image = Histogram = staticmethod(np.shape)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    """The stand-in."""
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_is_told_the_same(grey: Path, tmp_path: Path, wandb: Wandb) -> None:
    folder = tmp_path / "run"
    told: list[Record] = []
    run(grey, folder, told.append, wandb="digits", epochs=2)
    assert wandb.exit_codes == [0]
    for (step, values), record in zip(wandb.logged, told, strict=True):
        arrays = {**record.images, **record.histograms}
        assert step == record.step
        assert values == {**record.scalars, **{n: a.shape for n, a in arrays.items()}}
    # Resumed, it is the same run there, and the settings that may change do.
    run(grey, folder, wandb="digits", resume=True)
    assert [step for step, _ in wandb.logged] == [6, 12, 18]
    first, second = wandb.inits
    assert first["project"] == second["project"] == "digits"
    assert first["id"] == second["id"]
    assert first["resume"] == second["resume"] == "allow"
    assert (first["config"]["epochs"], second["config"]["epochs"]) == (2, 3)
    assert second["allow_val_change"]
    run(grey, tmp_path / "other", wandb="digits", epochs=1)
    assert wandb.inits[-1]["id"] != first["id"]


def test_a_run_that_fails_ends_as_failed(grey: Path, tmp_path: Path, wandb: Wandb) -> None:
    def failing(record: Record) -> None:
        raise ZeroDivisionError(record.step)

    with pytest.raises(ZeroDivisionError, match="6"):
        run(grey, tmp_path / "run", failing, wandb="digits")
    assert wandb.exit_codes == [1]


def test_what_weights_and_biases_refuses_is_one_line(
    grey: Path, tmp_path: Path, wandb: Wandb
) -> None:
    wandb.refusal = wandb.Error("no API key")
    with pytest.raises(ConfigError, match=r"--wandb digits: no API key"):
        run(grey, tmp_path / "run", wandb="digits")


@pytest.mark.parametrize(
    ("flags", "module", "extra"),
    [("--tensorboard", "tensorboardX", "tensorboard"), ("--wandb digits", "wandb", "wandb")],
)
def test_a_logger_that_is_not_installed_names_its_extra(
    flags: str,
    module: str,
    extra: str,
    grey: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    out = ["--out", str(tmp_path / "run"), "--batch-size", "6"]
    monkeypatch.setattr(sys, "argv", ["jvae", "train", "--data", str(grey), *out, *flags.split()])
    with pytest.raises(SystemExit) as exit_:
        command_line.main()
    assert exit_.value.code == 1
    message = f"error: --{extra}: no module '{module}': pip install 'jvae[{extra}]'\n"
    assert capsys.readouterr().err == message
    assert list(tmp_path.iterdir()) == []


def test_both_flags_may_change_on_resume(grey: Path, tmp_path: Path, wandb: Wandb) -> None:
    folder = tmp_path / "run"
    run(grey, folder, epochs=1)
    run(grey, folder, epochs=2, resume=True, tensorboard=True, wandb="digits")
    assert [step for step, _ in event_files.scalars(folder / "tensorboard")["test_elbo"]] == [12]
    settings = json.loads((folder / "config.json").read_text())
    assert [made["wandb"] for made in settings["resumed_with"]] == ["digits"]
