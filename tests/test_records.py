"""Records of studies come line by line, stay when a study is stopped, and say when they are cut."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest

from jvae.experiments import records
from jvae.experiments.config import ConfigError
from jvae.experiments.run_folder import RunFolderError

POINTS = [{"samples": 100, "bound": -1.5}, {"samples": 200, "bound": -1.25}]


def write(path: Path, points: list[dict[str, Any]] = POINTS) -> None:
    with records.recording(path, "a study", {"seeds": [0, 1]}, start=time.perf_counter()) as point:
        for values in points:
            point(values)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    write(path)
    record = records.read(path)
    assert record.header["study"] == "a study"
    assert record.header["seeds"] == [0, 1]
    assert record.header.keys() >= {"date", "command", "commit", "versions", "devices"}
    assert record.points == [{"kind": "point", **values} for values in POINTS]
    assert record.end is not None
    assert 0 <= record.end["wall_seconds"] < 60


def test_points_are_on_the_disk_as_they_come_and_stay_when_the_study_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    def stopped() -> None:
        with records.recording(path, "a study", {}, start=time.perf_counter()) as point:
            point(POINTS[0])
            assert len(records.read(path).points) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    record = records.read(path)
    assert len(record.points) == 1
    assert record.end is None


def test_a_record_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"a\.jsonl exists: choose another --out"):
        write(path)
    assert path.read_bytes() == before


def test_a_number_that_is_not_finite_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path / "a.jsonl", [{"bound": float("nan")}])


def test_a_last_line_cut_short_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path)
    whole = path.read_bytes()
    for cut in range(len(whole) - 1, whole.index(b"\n"), -1):
        path.write_bytes(whole[:cut])
        record = records.read(path)
        assert record.end is None
        assert record.points == records.read(path).points[: len(record.points)]
    assert record.points == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no records of a study"),
        (['{"kind": "study"'], "holds no records of a study"),
        (["[1]\n"], "holds no records of a study"),
        (['{"step": 1}\n'], "holds no records of a study"),
        (['{"kind": "point"}\n'], "holds no records of a study"),
        (['{"kind": "study"}\n', '{"kind": "end"}\n', '{"kind": "point"}\n'], "holds no records"),
        (['{"kind": "study"}\n', '{"kind": "study"}\n'], "holds no records of a study"),
        (['{"kind": "study"}\n', '{"ki\n', '{"kind": "end"}\n'], "line 2, is cut or damaged"),
        (['{"kind": "study"}\n', '{"ki{"kind": "end"}\n'], "line 2, is cut or damaged"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "a.jsonl").write_text("".join(lines))
    with pytest.raises(RunFolderError, match=message):
        records.read(tmp_path / "a.jsonl")


def test_a_record_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be read"):
        records.read(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(RunFolderError, match="cannot be read"):
        records.read(tmp_path / "a.jsonl")


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path | None = Path("runs/a")
    seeds: tuple[int, ...] = (0, 1)
    redraw: bool = False


def test_settings_are_what_json_gives_back() -> None:
    settings = records.settings_of(Config(), without=("redraw",))
    assert settings == {"out": "runs/a", "seeds": [0, 1]}
    assert json.loads(json.dumps(settings)) == settings
    assert records.settings_of(Config(out=None))["out"] is None
