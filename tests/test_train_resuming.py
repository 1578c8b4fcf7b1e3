"""A run of `jvae train` that was interrupted, killed or failed goes on as if it never was."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import assert_same_state, last_state, metrics
from tiny_runs import MODEL, STEPS, STREAMED, interrupting_before, pixels, run

from jvae import checkpoint, data, evaluation
from jvae.experiments import results, run_folder
from jvae.experiments.interrupt import Interrupted
from jvae.experiments.run_folder import RunFolderError

# Within a streamed epoch.


@pytest.mark.parametrize("stops", [(3,), (5,), (7, 9), (17,)], ids=str)
@pytest.mark.usefixtures("no_figures")
def test_a_run_interrupted_within_an_epoch_goes_on_as_if_it_never_was(
    stops: tuple[int, ...], whole: Path, grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, from the very batch."""
    folder = tmp_path / "run"
    for i, stop in enumerate(stops):
        done = stop + 1  # the batch that was asked for is trained on
        said = f"epoch {done // STEPS}" if done % STEPS == 0 else f"step {done}"
        with monkeypatch.context() as patch:
            patch.setattr(data, "batches", interrupting_before(stop, signal.SIGTERM))
            with pytest.raises(
                Interrupted, match=rf"saved after {said}\).*--resume --out"
            ) as caught:
                run(grey, folder, **STREAMED, resume=i > 0)
        assert caught.value.exit_code == 128 + signal.SIGTERM
        assert last_state(folder, (6, 5), MODEL).step == done
        assert [record["epoch"] for record in metrics(folder)] == [*range(1, done // STEPS + 1)]
        assert not (folder / "result.json").exists()
        if done % STEPS:
            assert len(run_folder.read_unfinished(folder, done)) == done % STEPS
    run(grey, folder, **STREAMED, resume=True)
    assert metrics(folder) == metrics(whole)
    assert_same_state(last_state(folder, (6, 5), MODEL), last_state(whole, (6, 5), MODEL))
    assert not (folder / run_folder.UNFINISHED).exists()
    timings = ("images_per_second", "command")
    ours, theirs = (
        {k: v for k, v in run_folder.read_result(f).items() if k not in timings}
        for f in (folder, whole)
    )
    assert ours == theirs


@pytest.mark.usefixtures("no_figures")
def test_a_run_killed_after_it_was_interrupted_goes_back_to_what_was_saved(
    whole: Path, grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies at step 10, an epoch after its checkpoint within the first."""

    class Killed(BaseException):
        pass

    def dying(*args: Any, step: int, **kwargs: Any) -> Iterator[np.ndarray]:
        for i, batch in enumerate(read(*args, step=step, **kwargs), start=step):
            if i == 10:
                raise Killed
            yield batch

    folder, read = tmp_path / "run", data.batches
    with monkeypatch.context() as patch:
        patch.setattr(data, "batches", interrupting_before(2, signal.SIGINT))
        with pytest.raises(Interrupted, match="saved after step 3"):
            run(grey, folder, **STREAMED)
        patch.setattr(data, "batches", dying)
        with pytest.raises(Killed):
            run(grey, folder, **STREAMED, resume=True)
    assert [record["step"] for record in metrics(folder)] == [6]
    run(grey, folder, **STREAMED, resume=True)
    assert metrics(folder) == metrics(whole)
    assert_same_state(last_state(folder, (6, 5), MODEL), last_state(whole, (6, 5), MODEL))


@pytest.mark.usefixtures("no_figures")
def test_a_run_killed_as_it_saves_within_an_epoch_keeps_what_it_had_saved_of_it_before(
    whole: Path, grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted twice in one epoch; the second time the process dies before its checkpoint."""

    class Killed(BaseException):
        pass

    def dying(*args: object, **kwargs: object) -> None:
        raise Killed

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(data, "batches", interrupting_before(7, signal.SIGTERM))
        with pytest.raises(Interrupted, match="saved after step 8"):
            run(grey, folder, **STREAMED)
    with monkeypatch.context() as patch:
        patch.setattr(data, "batches", interrupting_before(9, signal.SIGTERM))
        patch.setattr(checkpoint, "save_state", dying)
        with pytest.raises(Killed):
            run(grey, folder, **STREAMED, resume=True)
    assert run_folder.read_unfinished(folder, 10)
    run(grey, folder, **STREAMED, resume=True)
    assert metrics(folder) == metrics(whole)
    assert_same_state(last_state(folder, (6, 5), MODEL), last_state(whole, (6, 5), MODEL))


@pytest.mark.usefixtures("no_figures")
def test_a_resume_with_fewer_epochs_keeps_what_the_unfinished_epoch_needs(
    whole: Path, grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(data, "batches", interrupting_before(7, signal.SIGTERM))
        with pytest.raises(Interrupted, match="saved after step 8"):
            run(grey, folder, **STREAMED)
    result = run(grey, folder, **(STREAMED | {"epochs": 1}), resume=True)
    assert (result["epochs"], result["steps"]) == (1, 8)
    run(grey, folder, **STREAMED, resume=True)
    assert metrics(folder) == metrics(whole)


# From one epoch to the next.


@pytest.mark.usefixtures("no_figures")
def test_a_run_goes_on_with_its_data_and_no_other(grey: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = Path(shutil.copy(grey, tmp_path / "a"))
    folder = tmp_path / "run"
    run(path, folder, epochs=1)
    # Moved, and by another name, it is the same.
    moved = path.rename(tmp_path / "b.npy")
    assert run(moved, folder, epochs=2, resume=True)["epochs"] == 2
    before = (folder / "config.json").read_bytes()
    changed = pixels(6, 5)
    changed[17, 2, 3] ^= 1
    np.save(moved, changed)
    message = r"of other settings: dataset was mine, is b; dataset_sha256 was \w{64}, is \w{64}$"
    with pytest.raises(RunFolderError, match=message):
        run(moved, folder, epochs=3, resume=True)
    np.save(moved, pixels(6, 5))
    for changes, message in (
        ({"split_seed": 1}, "split_seed was 0, is 1"),
        ({"binarisation": "static"}, "binarisation was dynamic, is static"),
        ({"likelihood": "gaussian"}, "likelihood was bernoulli, is gaussian"),
    ):
        with pytest.raises(RunFolderError, match=message):
            run(moved, folder, epochs=3, resume=True, **changes)
    assert (folder / "config.json").read_bytes() == before


@pytest.mark.usefixtures("no_figures")
def test_a_refusal_is_short_whatever_differs(tmp_path: Path) -> None:
    """The means and scales of a table's columns, say, are of its protocol."""
    rows = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    path, folder = tmp_path / "mine.npy", tmp_path / "run"
    np.save(path, rows)
    run(path, folder, epochs=1, nll_samples=0)
    np.save(path, rows + 1)
    with pytest.raises(RunFolderError, match=r"mean was .* …, is .* …") as error:
        run(path, folder, epochs=2, nll_samples=0, resume=True)
    assert len(str(error.value)) < 1000


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("epochs", "left", "lost"), [(4, 1, "2, 3"), (3, 0, "1, 2, 3")])
def test_lines_of_metrics_that_are_lost_are_told(
    epochs: int,
    left: int,
    lost: str,
    whole: Path,
    grey: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:left]))
    result = run(grey, folder, **(STREAMED | {"epochs": epochs}), resume=True)
    kept = [record["epoch"] for record in metrics(folder)]
    assert kept == [*range(1, left + 1), *range(4, epochs + 1)]
    assert ("images_per_second" in result) == bool(kept)
    words = f"metrics.jsonl has lost the lines of epochs {lost}: they cannot be made again"
    out = capsys.readouterr().out
    assert "".join(words.split()) in "".join(out.split())


@pytest.mark.usefixtures("no_figures")
def test_a_disk_that_is_full_is_said_with_its_folder(
    grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "append_metrics", full)
    with pytest.raises(checkpoint.UnwritableError) as error:
        run(grey, tmp_path / "run")
    assert str(error.value) == f"cannot write {tmp_path / 'run'}: No space left on device"
    assert "--resume" in error.value.__notes__[0]


@pytest.mark.usefixtures("no_figures")
def test_a_test_elbo_that_is_not_finite_frees_the_learning_rate_once(
    grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the run's settings say of the rate is true of its steps."""
    folder = tmp_path / "run"
    elbos, append = evaluation.bound_by_example, run_folder.append_metrics

    def infinite_in_the_second_epoch(*args: Any, **kwargs: Any) -> jax.Array:
        values = elbos(*args, **kwargs)
        return values if not metrics(folder) else values - jnp.inf

    def append_and_interrupt(folder: Path, record: dict[str, Any]) -> None:
        append(folder, record)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(results, "bound_by_example", infinite_in_the_second_epoch)
        message = r"the test ELBO is -inf after step 12"
        with pytest.raises(FloatingPointError, match=message) as error:
            run(grey, folder, learning_rate=0.5, epochs=3)
    (note,) = error.value.__notes__
    assert "The learning rate was 0.5. To go on from the state of step 6: another --learn" in note
    assert run_folder.read_failure(folder) == {
        "step": 11,
        "learning_rate": 0.5,
        "learning_rate_setting": 0.5,
        "last_good_step": 6,
    }
    assert last_state(folder, (6, 5), MODEL).step == 6
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "append_metrics", append_and_interrupt)
        with pytest.raises(Interrupted, match="saved after epoch 2"):
            run(grey, folder, learning_rate=0.01, epochs=3, resume=True)
    for epochs in (3, 4):  # unfinished and finished
        for forgotten in (0.5, 1e-3):
            with pytest.raises(RunFolderError, match=f"learning_rate was 0.01, is {forgotten}"):
                run(grey, folder, learning_rate=forgotten, epochs=epochs, resume=True)
        run(grey, folder, learning_rate=0.01, epochs=epochs, resume=True)
    settings = run_folder.read_settings(folder)
    assert settings["learning_rate"] == 0.01
    assert settings["learning_rates"] == [
        {"from_step": 0, "learning_rate": 0.5},
        {"from_step": 6, "learning_rate": 0.01},
    ]
    assert [record["step"] for record in metrics(folder)] == [6, 12, 18, 24]
    assert not (folder / run_folder.FAILURE).exists()
    # Started over, it has one rate.
    shutil.rmtree(folder / "checkpoints")
    run(grey, folder, learning_rate=0.01, epochs=1, resume=True)
    settings = run_folder.read_settings(folder)
    assert settings["learning_rates"] == [{"from_step": 0, "learning_rate": 0.01}]


@pytest.mark.parametrize(("seeds", "of_seed"), [(1, ""), (2, " of seed 0")])
@pytest.mark.usefixtures("no_figures")
def test_a_log_likelihood_that_is_not_finite_is_told_and_can_be_left_out(
    seeds: int, of_seed: str, grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    sampled = evaluation.importance_sampling

    def infinite_for_the_third(*args: Any, **kwargs: Any) -> evaluation.LogLikelihood:
        found = sampled(*args, **kwargs)
        return found._replace(estimate=found.estimate.at[2].set(-jnp.inf))

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "importance_sampling", infinite_for_the_third)
        message = (
            rf"not finite for {seeds} of {4 * seeds} test examples: of example 2{of_seed} it is "
            rf"-inf\. To leave it out: .* --nll-samples 0 --resume --out {folder}$"
        )
        with pytest.raises(FloatingPointError, match=message):
            run(grey, folder, seeds=seeds)
    result = run(grey, folder, seeds=seeds, nll_samples=0, resume=True)
    assert result["epochs"] == 2
    assert "test_nll" not in result


@pytest.mark.usefixtures("no_figures")
def test_a_resumed_ensemble_equals_an_uninterrupted_one(grey: Path, tmp_path: Path) -> None:
    run(grey, tmp_path / "whole", seeds=2)
    run(grey, tmp_path / "resumed", seeds=2, epochs=1)
    run(grey, tmp_path / "resumed", seeds=2, resume=True)
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "whole")
    for seed in (0, 1):
        ours, theirs = (
            (tmp_path / name / "models" / f"seed_{seed}.safetensors").read_bytes()
            for name in ("resumed", "whole")
        )
        assert ours == theirs


def test_a_line_that_is_no_metric_is_refused_before_anything_changes(
    whole: Path, grey: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([lines[0], "\0\0\0\n", *lines[2:]]))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 2 is no record of an epoch"):
        run(grey, folder, **STREAMED, resume=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.usefixtures("no_figures")
def test_a_checkpoint_that_cannot_be_written_is_said_and_costs_nothing(
    grey: Path, tmp_path: Path
) -> None:
    """By a limit on files, which the system keeps to as it does to a full disk."""
    folder = tmp_path / "run"
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
from jvae.experiments import command_line
command_line.main()
"""
    flags = ["--latent-dim", "2", "--hidden", "900", "--batch-size", "6", "--nll-samples", "5"]
    words = ["train", "--data", str(grey), *flags, "--epochs", "2", "--checkpoint-every", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--out", str(folder)],
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == (
        f"error: cannot write {folder}/checkpoints: File too large\n"
        f"To go on once that is mended: the same command with --resume --out {folder}\n"
    )
    result = run(grey, folder, hidden=(900,), resume=True)
    assert [record["epoch"] for record in metrics(folder)] == [1, 2]
    assert result["steps"] == 2 * STEPS


def test_a_second_process_is_refused_and_changes_nothing(whole: Path, grey: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    with run_folder.lock(whole):
        for resume, message in ((True, "another process is at work"), (False, "add --resume")):
            with pytest.raises(RunFolderError, match=message):
                run(grey, whole, **(STREAMED | {"epochs": 9}), resume=resume)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
