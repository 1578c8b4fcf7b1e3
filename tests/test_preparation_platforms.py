"""Datasets are prepared and read without array_record, posix_fallocate or TensorFlow."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_sources import PARTS, assert_is, folder_of, install, stopping, tiny, tree

from jvae import data
from jvae.data import preparation
from jvae.data.catalogue import SOURCES

# Platforms without array_record.


@pytest.mark.parametrize("stop", [False, True])
def test_without_array_record_there_is_only_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: bool
) -> None:
    made = install(monkeypatch, "mnist", tmp_path / "mnist")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "array_record" else find(name)
    )
    before = tree(tmp_path)
    if stop:

        def interrupt() -> None:
            raise KeyboardInterrupt

        monkeypatch.setitem(SOURCES, "mnist", stopping(made, interrupt))
        with pytest.raises(KeyboardInterrupt):
            data.load("mnist", tmp_path)
        assert tree(tmp_path) == before
        monkeypatch.setitem(SOURCES, "mnist", made.source)
    assert_is(data.load("mnist", tmp_path), made)
    folder = folder_of("mnist", tmp_path)
    assert [path.name for path in folder.iterdir()] == ["jvae"]
    shutil.move(tmp_path / "mnist" / "train-images-idx3-ubyte.gz", tmp_path)
    assert_is(data.load("mnist", tmp_path), made)


def test_without_array_record_prepared_files_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "mnist", tmp_path / "mnist")
    data.load("mnist", tmp_path)
    folder = folder_of("mnist", tmp_path)
    shutil.rmtree(folder / "jvae")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "array_record" else find(name)
    )
    before = tree(tmp_path)
    assert preparation.read_prepared(SOURCES["mnist"], folder) is None
    assert tree(tmp_path) == before


WITHOUT_ARRAY_RECORD = """
import sys
from pathlib import Path

sys.modules["array_record"] = None
import jvae.data
from jvae.data.catalogue import SOURCES
from tiny_sources import tiny

SOURCES["mnist"] = tiny("mnist").source
for _ in range(2):
    dataset = jvae.data.load("mnist", Path(sys.argv[1]))
    print(dataset.source, dataset.sha256)
"""


def test_without_array_record_raw_files_are_read_beside_prepared_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "mnist", tmp_path / "mnist")
    digest = data.load("mnist", tmp_path).sha256
    shutil.rmtree(folder_of("mnist", tmp_path) / "jvae")
    before = tree(tmp_path)
    lines = run(WITHOUT_ARRAY_RECORD, tmp_path, sys.path)
    assert lines == [f"raw files in {tmp_path / 'mnist'} {digest}"] * 2
    after = tree(tmp_path)
    assert {path: after[path] for path in before} == before


def run(script: str, data_dir: Path, search: list[str]) -> list[str]:
    """The lines that a script prints, in an interpreter of its own."""
    result = subprocess.run(
        [sys.executable, "-c", script, str(data_dir)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


# Platforms without posix_fallocate.


def test_without_posix_fallocate_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = install(monkeypatch, "mnist", tmp_path / "mnist")
    monkeypatch.delattr(os, "posix_fallocate")
    for _ in range(2):
        assert_is(data.load("mnist", tmp_path), made)


# TensorFlow.

WITHOUT_TENSORFLOW = """
import shutil, sys
from pathlib import Path

import jvae.data
from jvae.data.catalogue import SOURCES
from tiny_sources import folder_of, tiny

data_dir = Path(sys.argv[1])
for name in ("mnist", "celeb_a"):
    SOURCES[name] = tiny(name).source
    for _ in range(3):
        print(jvae.data.load(name, data_dir).sha256)
    shutil.rmtree(folder_of(name, data_dir) / "jvae")
    print(jvae.data.load(name, data_dir).source)
print("tensorflow" in sys.modules)
import tensorflow
print("tensorflow" in sys.modules)
"""


def test_tensorflow_is_never_imported(tmp_path: Path) -> None:
    """Not even one that is there: an empty package, of which nothing can be had."""
    (tmp_path / "packages" / "tensorflow").mkdir(parents=True)
    (tmp_path / "packages" / "tensorflow" / "__init__.py").touch()
    expected = []
    for name in ("mnist", "celeb_a"):
        made, folder = tiny(name), folder_of(name, tmp_path)
        made.write(tmp_path / name)
        parts = [made.arrays[part] for part in PARTS if part in made.arrays]
        expected += [data.content_sha256(*parts)] * 3
        expected += [f"prepared by tensorflow-datasets in {folder}"]
    lines = run(WITHOUT_TENSORFLOW, tmp_path, [str(tmp_path / "packages"), *sys.path])
    assert lines == [*expected, "False", "True"]
