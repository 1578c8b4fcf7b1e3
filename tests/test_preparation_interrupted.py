"""What is prepared is there whole or not at all: no room, Ctrl-C, a kill, two at once."""

import concurrent.futures
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_sources import assert_is, folder_of, install, refusal, stock, stopping, tiny, tree

from jvae import data
from jvae.data.catalogue import SOURCES

# Where nothing can be written.


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(30, "read-only")])
def test_a_folder_that_cannot_be_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: bool, error: OSError
) -> None:
    made = install(monkeypatch, "mnist", tmp_path / "mnist")
    if prepared:
        data.load("mnist", tmp_path)
        shutil.rmtree(folder_of("mnist", tmp_path) / "jvae")

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise error

    before = tree(tmp_path)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    dataset = data.load("mnist", tmp_path)
    assert_is(dataset, made)
    assert type(dataset.train) is np.ndarray
    assert not dataset.train.flags.writeable
    assert tree(tmp_path) == before


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mnist", tmp_path / "mnist")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = tree(tmp_path)
    message = refusal(lambda: data.load("mnist", tmp_path))
    assert message == f"dataset 'mnist' in {tmp_path}: [Errno 28] No space left on device"
    assert tree(tmp_path) == before


# Whole or not at all.


@pytest.mark.parametrize("by_others", [False, True])
@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (data.DataError("a row is corrupt"), data.DataError, "^a row is corrupt$"),
        (
            OSError(5, "I/O error"),
            data.DataError,
            r"^dataset 'mnist' in .*: \[Errno 5\] I/O error$",
        ),
        (RuntimeError("of no kind"), RuntimeError, "^of no kind$"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "^stop$"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_is_interrupted_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    by_others: bool,
    error: BaseException,
    raised: type[BaseException],
    message: str,
) -> None:
    made = install(monkeypatch, "mnist", tmp_path / "mnist")
    if by_others:
        folder_of("mnist", tmp_path).mkdir()

    def stop() -> None:
        raise error

    monkeypatch.setitem(SOURCES, "mnist", stopping(made, stop))
    before = tree(tmp_path)
    with pytest.raises(raised, match=message):
        data.load("mnist", tmp_path)
    assert tree(tmp_path) == before
    monkeypatch.setitem(SOURCES, "mnist", made.source)
    assert_is(data.load("mnist", tmp_path), made)


@pytest.mark.parametrize("prepared", [False, True])
def test_what_was_left_by_a_killed_process_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: bool
) -> None:
    """After a day; what is fresh may be another process's."""
    made = install(monkeypatch, "mnist", tmp_path / "mnist")
    folder = folder_of("mnist", tmp_path)
    if prepared:
        data.load("mnist", tmp_path)
        shutil.rmtree(folder / "jvae")
    parent = folder if prepared else folder.parent
    day = 24 * 3600
    for name, age in (
        (".jvae-killed", day + 60),
        (".jvae-other", day - 60),
        (".jvae-now", 0),
        ("jvae-old", 9 * day),
        (".other", 9 * day),
    ):
        (parent / name / "jvae").mkdir(parents=True)
        (parent / name / "jvae" / "train.npy").write_bytes(b"half")
        then = time.time() - age
        os.utime(parent / name, (then, then))
    before = tree(parent)
    dataset = data.load("mnist", tmp_path)
    assert_is(dataset, made)
    assert isinstance(dataset.train, np.memmap)
    after = tree(parent)
    killed = {path for path in before if path.startswith(".jvae-killed")}
    assert len(killed) == 3
    assert before.keys() - after.keys() == killed
    assert {path for path in after.keys() - before.keys() if path.startswith(".")} == set()


@pytest.mark.parametrize("by_others", [False, True])
def test_who_is_done_first_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_others: bool
) -> None:
    """Another process prepares the same while this one is in the middle of it."""
    made = install(monkeypatch, "mnist", tmp_path / "mnist")
    folder = folder_of("mnist", tmp_path)
    if by_others:
        folder.mkdir()
    theirs: list[int] = []

    def other() -> None:
        monkeypatch.setitem(SOURCES, "mnist", made.source)
        thread = threading.Thread(target=data.load, args=("mnist", tmp_path))
        thread.start()
        thread.join()
        theirs.extend(path.stat().st_ino for path in (folder, folder / "jvae"))

    monkeypatch.setitem(SOURCES, "mnist", stopping(made, other))
    assert_is(data.load("mnist", tmp_path), made)
    assert theirs == [path.stat().st_ino for path in (folder, folder / "jvae")]
    assert not list(tmp_path.rglob(".jvae-*"))
    assert_is(data.load("mnist", tmp_path), made)


def _meet(barrier: Any) -> None:
    made = tiny("mnist")
    SOURCES["mnist"] = stopping(made, lambda: barrier.wait(timeout=60))


def _load_mnist(data_dir: Path) -> tuple[str, list[int]]:
    dataset = data.load("mnist", data_dir)
    assert dataset.train_labels is not None
    return data.content_sha256(dataset.train, dataset.test), dataset.train_labels.tolist()


def test_two_processes_prepare_at_once(tmp_path: Path) -> None:
    """Neither goes on before the other is in the middle of it too."""
    made = tiny("mnist")
    made.write(tmp_path / "mnist")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        2, mp_context=context, initializer=_meet, initargs=(context.Barrier(2),)
    ) as pool:
        found = list(pool.map(_load_mnist, [tmp_path] * 2))
    digest = data.content_sha256(made.arrays["train"], made.arrays["test"])
    assert found == [(digest, made.arrays["train_labels"].tolist())] * 2
    assert not list(tmp_path.rglob(".jvae-*"))
    folder = folder_of("mnist", tmp_path)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, *made.files}
    assert {path.name for path in folder.iterdir()} == {
        "LICENSE",
        "dataset_info.json",
        "features.json",
        "jvae",
        "mnist-test.array_record-00000-of-00001",
        "mnist-train.array_record-00000-of-00001",
    }
    labels = sorted(record["label"] for record in stock("mnist", tmp_path)["train"])
    assert labels == sorted(made.arrays["train_labels"].tolist())
