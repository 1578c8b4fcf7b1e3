"""The record of a study: a JSONL file whose lines come as it goes, and stay when it is stopped."""

import contextlib
import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jvae.experiments import run_folder
from jvae.experiments.config import ConfigError
from jvae.experiments.interrupt import Interrupted, catch_interrupt
from jvae.experiments.run_folder import RunFolderError

Write = Callable[[Mapping[str, Any]], None]


class Record(NamedTuple):
    """A study as it was recorded.

    Attributes:
      header: the study's name, its settings, when and by what it was run.
      points: what it measured, in the order in which it came.
      end: with `wall_seconds`; None where the study was stopped before its end.
    """

    header: dict[str, Any]
    points: list[dict[str, Any]]
    end: dict[str, Any] | None


def settings_of(config: Any, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a study's `Config`, in JSON's types; `without` those that measure nothing."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(config).items()
        if name not in without
    }
    return run_folder.json_round_trip(settings)


def refuse_taken(path: Path) -> None:
    """Refuse to record where a record is.

    Raises:
      ConfigError: `path` exists.
    """
    if path.exists():
        raise ConfigError(f"{path} exists: choose another --out, or add --redraw to draw it")


@contextlib.contextmanager
def recording(
    path: Path, study: str, settings: Mapping[str, Any], *, start: float
) -> Iterator[Write]:
    """Open a new record, give what writes a point to it, and end it where nothing was raised.

    Every line is whole on the disk before the next is begun.

    Args:
      path: of the file, which must not exist; its folder is made.
      study: its name.
      settings: all that its numbers depend on, in JSON's types.
      start: `time.perf_counter()` when the study began.

    Raises:
      ConfigError: `path` exists.
      ValueError: a number to be written is not finite.
    """
    refuse_taken(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:

        def write(record: Mapping[str, Any]) -> None:
            file.write(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n")
            file.flush()

        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        header = {"kind": "study", "study": study, **settings, "date": now}
        write(header | run_folder.provenance())
        yield lambda point: write({"kind": "point", **point})
        write({"kind": "end", "wall_seconds": round(time.perf_counter() - start, 1)})


@contextlib.contextmanager
def keeping(path: Path) -> Iterator[None]:
    """Catch Ctrl-C and SIGTERM, and say what of the record in `path` was kept.

    Raises:
      Interrupted: one of them came.
    """
    try:
        with catch_interrupt():
            yield
    except Interrupted as error:
        # After the header; a line cut short does not count.
        points = path.read_bytes().count(b"\n") - 1 if path.exists() else 0
        text = "Interrupted before the first measurement."
        if points > 0:
            text = f"Interrupted: {points} measurements are in {path}; --redraw draws them."
        raise Interrupted(text, error.signum) from error


def read(path: Path) -> Record:
    """What a file holds; a last line cut short, as a kill leaves it, does not count.

    Raises:
      RunFolderError: it holds no study's record, or a line before the last is damaged.
    """
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True)
    except (OSError, UnicodeError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from error
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise RunFolderError(
                f"{path}, line {number}, is cut or damaged ({error}): mend or delete the line"
            ) from error
    kinds = [record.get("kind") if isinstance(record, dict) else None for record in found]
    points = len(kinds) - 1 - (kinds[-1:] == ["end"])
    if kinds != ["study", *["point"] * points, *["end"] * (len(kinds) - 1 - points)]:
        expected = "a line of kind study, then points, then perhaps an end"
        raise RunFolderError(f"{path} holds no records of a study: expected {expected}")
    end = found[-1] if kinds[-1] == "end" else None
    return Record(found[0], found[1 : 1 + points], end)
