import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jvae.experiments import run_folder


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    run_folder.write_json(path, {"elbo": -1.0})
    with pytest.raises(TypeError):
        run_folder.write_json(path, {"elbo": object()})
    assert path.read_text() == '{\n  "elbo": -1.0\n}\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("blocker", ["file", "full folder"])
def test_create_refuses_what_is_there(tmp_path: Path, blocker: str) -> None:
    folder = tmp_path / "run"
    if blocker == "file":
        folder.write_text("")
    else:
        (folder / "figures").mkdir(parents=True)
    with pytest.raises(run_folder.RunFolderError, match="exists"):
        run_folder.create(folder, {})
    assert list(tmp_path.iterdir()) == [folder]


def test_create_leaves_nothing_when_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(run_folder.RunFolderError, match="cannot write"):
        run_folder.create(tmp_path / "file" / "run", {})
    with pytest.raises(TypeError):
        run_folder.create(tmp_path / "run", {"key": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_create_takes_an_empty_folder(tmp_path: Path) -> None:
    run_folder.create(tmp_path, {"seed": 0})
    assert run_folder.read_settings(tmp_path) == {"seed": 0}


def test_a_long_name_is_cut() -> None:
    """So that the folder's is one that a file system takes."""
    folder = run_folder.default_path("é" * 300)
    assert folder.parent == Path("runs")
    assert re.fullmatch(r"é{60}-\d{8}-\d{6}", folder.name)


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_settings_that_are_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(run_folder.RunFolderError, match=r"config\.json"):
        run_folder.read_settings(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"holds no finished run: no result\.json"),
        ("{", r"result\.json cannot be read"),
        ("[]", r"result\.json holds no settings or results of a run"),
        ('{"test_elbo": -1.0}', r"result\.json has no protocol"),
        ('{"protocol": "dynamic"}', r"result\.json has no protocol"),
    ],
)
def test_results_that_are_none(tmp_path: Path, content: str | None, message: str) -> None:
    run_folder.create(tmp_path, {"seed": 0})
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(run_folder.RunFolderError, match=message) as error:
        run_folder.read_result(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = {"test_elbo": -101.25, "seed": 0, "protocol": {"mean": [0.5, 1e-300]}}
    run_folder.write_json(tmp_path / "result.json", result)
    assert run_folder.read_result(tmp_path) == result


@pytest.mark.parametrize("change", ["create", "write_json", "rewind_metrics"])
def test_a_full_disk_leaves_no_draft(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, text: str) -> int:
        self.write_bytes(text[:5].encode())
        raise OSError(28, "No space left on device")

    changes: dict[str, Callable[[], object]] = {
        "create": lambda: run_folder.create(tmp_path, {"seed": 0}),
        "write_json": lambda: run_folder.write_json(tmp_path / "a.json", {"seed": 0}),
        "rewind_metrics": lambda: run_folder.rewind_metrics(tmp_path, 1),
    }
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises((OSError, run_folder.RunFolderError), match="No space left"):
        changes[change]()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["epoch 2", '{"epoch": 2}', "[2]", "\x00\x00", "\udcff", ""])
def test_a_line_of_metrics_that_is_none_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 10}', line, '{"step": 30}', ""]
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    before = path.read_bytes()
    message = rf"{re.escape(str(path))}, line 2 is no record of an epoch: delete it \("
    for read in (run_folder.read_metrics, lambda folder: run_folder.rewind_metrics(folder, 30)):
        with pytest.raises(run_folder.RunFolderError, match=message):
            read(tmp_path)
    assert path.read_bytes() == before


def test_numbers_that_are_none_are_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        run_folder.write_json(tmp_path / "result.json", {"elbo": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_epoch_is_known_up_to_where_it_was_left(tmp_path: Path) -> None:
    bounds = [-0.1, -1e-30, -123.456789]
    assert run_folder.read_unfinished(tmp_path, 9) == []
    # Steps 6, 7 and 8, of an epoch that begins with the sixth.
    run_folder.write_unfinished(tmp_path, 9, bounds)
    kept = {step: run_folder.read_unfinished(tmp_path, step) for step in range(12)}
    assert kept == {step: bounds[: step - 6] if 6 <= step <= 9 else [] for step in range(12)}
    run_folder.write_unfinished(tmp_path, 10, [*bounds, -1.0])
    assert run_folder.read_unfinished(tmp_path, 9) == bounds
    assert run_folder.read_unfinished(tmp_path, 10) == [*bounds, -1.0]
    assert [path.name for path in tmp_path.iterdir()] == [run_folder.UNFINISHED]


@pytest.mark.parametrize("content", ["{", "[]"])
def test_an_unfinished_epoch_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / run_folder.UNFINISHED).write_text(content)
    with pytest.raises(run_folder.RunFolderError, match=run_folder.UNFINISHED):
        run_folder.read_unfinished(tmp_path, 3)


def test_metrics_rewind_to_a_step_and_forget_a_cut_line(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        run_folder.append_metrics(tmp_path, {"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    assert [record["step"] for record in run_folder.read_metrics(tmp_path)] == [10, 20, 30]
    assert run_folder.rewind_metrics(tmp_path, 20) == [{"step": 10}, {"step": 20}]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 10}\n{"step": 20}\n'


def test_one_process_at_a_time_is_in_a_folder(tmp_path: Path) -> None:
    message = f"another process is at work in {re.escape(str(tmp_path))}: wait, or end it"
    with (
        run_folder.lock(tmp_path),
        pytest.raises(run_folder.RunFolderError, match=message),
        run_folder.lock(tmp_path),
    ):
        pytest.fail("let in")
    with run_folder.lock(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_a_folder_is_free_once_its_process_was_killed(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from jvae.experiments import run_folder
with run_folder.lock(Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    with run_folder.lock(tmp_path):
        pass


def test_bounds_of_unfinished_epochs_serve_every_checkpoint_that_is_kept(tmp_path: Path) -> None:
    """Killed before the state of a later epoch is saved, a run goes on in the one before."""
    for step, bounds in ((3, [0.0, 1.0, 2.0]), (12, [10.0, 11.0]), (13, [10.0, 11.0, 12.0])):
        run_folder.write_unfinished(tmp_path, step, bounds)
    kept = {step: run_folder.read_unfinished(tmp_path, step) for step in (0, 2, 3, 4, 10, 12, 13)}
    assert kept == {
        **{0: [], 2: [0, 1], 3: [0, 1, 2], 4: []},
        **{10: [], 12: [10, 11], 13: [10, 11, 12]},
    }
    for step in (21, 31):
        run_folder.write_unfinished(tmp_path, step, [float(step)])
    assert run_folder.read_unfinished(tmp_path, 3) == []
    assert run_folder.read_unfinished(tmp_path, 13) == [10, 11, 12]
