"""The folder of a run: settings, a line of metrics an epoch, results; each written whole."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jvae import cores
from jvae.drafts import draft_of, written_whole

UNFINISHED = "unfinished_epochs.json"
# One more than there are checkpoints to go on from.
_UNFINISHED_KEPT = 3
EVALUATION = "evaluation.json"
FAILURE = "failure.json"


class RunFolderError(RuntimeError):
    """A run folder that cannot be made or continued; the message says what to do."""


def default_path(name: str) -> Path:
    """`runs/<name>-<date>-<time>`, new at every second."""
    return Path("runs") / f"{name[:60]}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def refuse_taken(folder: Path) -> None:
    """Refuse a folder that holds something, were it not what `create` leaves when it is killed.

    Raises:
      RunFolderError: `folder` exists and is no empty folder.
    """
    draft = draft_of(folder / "config.json")
    if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - {draft}):
        raise RunFolderError(
            f"{folder} exists: add --resume to go on with it, or choose another --out"
        )


def create(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder with its `config.json`; when that fails, nothing of it stays.

    Raises:
      RunFolderError: it is taken, or cannot be written.
    """
    refuse_taken(folder)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", settings)
    except BaseException as error:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunFolderError(f"cannot write {folder}: {error.strerror}") from error
        raise


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder; the system lets go of it when this one ends.

    Raises:
      RunFolderError: another process is at work in it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise RunFolderError(f"another process is at work in {folder}: wait, or end it") from error
    try:
        yield
    finally:
        os.close(descriptor)


def read_settings(folder: Path) -> dict[str, Any]:
    """The `config.json` of a run.

    Raises:
      RunFolderError: there is none, or it is no JSON object.
    """
    return _read_json(folder, "config.json", f"{folder} holds no run: it has no config.json")


def read_result(folder: Path) -> dict[str, Any]:
    """The `result.json` of a finished run.

    Raises:
      RunFolderError: there is none, or it is no JSON object.
    """
    result = _read_json(folder, "result.json", f"{folder} holds no finished run: no result.json")
    if not isinstance(result.get("protocol"), dict):
        raise RunFolderError(f"{folder / 'result.json'} has no protocol")
    return result


def read_failure(folder: Path) -> dict[str, Any] | None:
    """The `failure.json` of a run that met numbers that are not finite, else None.

    Raises:
      RunFolderError: it is no JSON object.
    """
    return _read_json(folder, FAILURE, missing="") if (folder / FAILURE).exists() else None


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """The `evaluation.json` of a run that was evaluated, else None.

    Raises:
      RunFolderError: it is something else.
    """
    if not (folder / EVALUATION).exists():
        return None
    evaluation = _read_json(folder, EVALUATION, missing="")
    if not {"parts", "seeds", "weights_sha256"} <= evaluation.keys():
        raise RunFolderError(f"{folder / EVALUATION} holds no evaluation: delete it")
    return evaluation


def _read_json(folder: Path, name: str, missing: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_text())
    except FileNotFoundError as error:
        raise RunFolderError(missing) from error
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder / name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{folder / name} holds no settings or results of a run")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` so that a reader finds the old file or the new one, never a part."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with written_whole(path) as draft:
        draft.write_text(text)


def append_metrics(folder: Path, record: Mapping[str, Any]) -> None:
    """Add a line to `metrics.jsonl`, on the disk before the checkpoint that it is told of."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line cut short by a crash does not count.

    Raises:
      RunFolderError: another line is no record of an epoch.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [_record(path, i, line) for i, line in enumerate(lines, 1) if line.endswith(b"\n")]


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(line)
        int(record["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise RunFolderError(
            f"{path}, line {number} is no record of an epoch: delete it ({error})"
        ) from error
    return record


def rewind_metrics(folder: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines after `step`, which a resumed run will write again; return the rest."""
    kept = [record for record in read_metrics(folder) if record["step"] <= step]
    with written_whole(folder / "metrics.jsonl") as draft:
        draft.write_text("".join(json.dumps(record) + "\n" for record in kept))
    return kept


def write_unfinished(folder: Path, step: int, bounds: list[float]) -> None:
    """Keep the bounds of an epoch's steps up to `step`, for the line of a run that goes on.

    Those of the epochs stopped in before stay too: a run that is killed now may go on from there.
    """
    start = step - len(bounds)
    others = [kept for kept in _unfinished(folder) if kept["step"] - len(kept["bounds"]) != start]
    latest = [*others, {"step": step, "bounds": bounds}][-_UNFINISHED_KEPT:]
    write_json(folder / UNFINISHED, {"epochs": latest})


def read_unfinished(folder: Path, step: int) -> list[float]:
    """The bounds of the steps before `step` in its epoch, as far as they are kept.

    A run that is killed before the state beside them is saved goes on from an earlier step.
    """
    for kept in _unfinished(folder):
        bounds: list[float] = kept["bounds"]
        start = kept["step"] - len(bounds)
        if start <= step <= kept["step"]:
            return bounds[: step - start]
    return []


def _unfinished(folder: Path) -> list[dict[str, Any]]:
    if not (folder / UNFINISHED).exists():
        return []
    epochs: list[dict[str, Any]] = _read_json(folder, UNFINISHED, missing="")["epochs"]
    return epochs


def provenance() -> dict[str, Any]:
    """What ran: command, commit, versions and devices."""
    packages = ("jvae", "jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "cores": cores.count(),
    }


def _commit() -> str | None:
    """The commit that the package's source is at; None where it is no git checkout."""
    package = Path(__file__).parents[1]
    git = ["git", "-C", str(package)]
    try:
        # The package may lie in an environment inside somebody else's repository.
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", "__init__.py"], check=True, capture_output=True
        )
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "."], text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}, with changes" if changed else commit


def json_round_trip(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` as `read_settings` gives it back: tuples are lists."""
    result: dict[str, Any] = json.loads(json.dumps(value))
    return result
