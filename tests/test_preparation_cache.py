"""The cache of decoded arrays: it is what is read the second time, and refused when damaged."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_sources import Damage, assert_is, flip, folder_of, install, refusal, rewrite, tree

from jvae import data
from jvae.data import preparation


def test_the_second_time_only_the_cache_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = install(monkeypatch, "svhn_cropped", tmp_path / "downloads" / "manual")
    first = data.load("svhn_cropped", tmp_path)
    shutil.rmtree(tmp_path / "downloads")
    folder = folder_of("svhn_cropped", tmp_path)
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    before = tree(tmp_path)
    second = data.load("svhn_cropped", tmp_path)
    assert_is(second, made)
    assert (second.sha256, second.source) == (first.sha256, first.source)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("times", [1, 2])
def test_arrays_are_memory_mapped_and_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    install(monkeypatch, "mnist", tmp_path / "mnist")
    for _ in range(times):
        dataset = data.load("mnist", tmp_path)
    for array in (dataset.train, dataset.test, dataset.train_labels, dataset.test_labels):
        assert isinstance(array, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


# Damages.


def save(name: str, array: Any) -> Damage:
    return lambda cache: np.save(cache / name, array)


def settings(**changes: Any) -> Damage:
    return lambda cache: rewrite(cache / "cache.json", lambda found: found.update(changes))


def arrays(change: Callable[[dict[str, str]], object]) -> Damage:
    """Of the names and checksums of the arrays."""
    return lambda cache: rewrite(cache / "cache.json", lambda found: change(found["arrays"]))


def without(key: str) -> Damage:
    return lambda cache: rewrite(cache / "cache.json", lambda found: found.pop(key))


def cut(name: str, num_bytes: int) -> Damage:
    return lambda cache: os.truncate(cache / name, num_bytes)


OTHER = "other content"
# What is done to the folder, and the reason that the refusal gives.
CACHE_DAMAGES: dict[str, tuple[Damage, str]] = {
    "a byte of train": (lambda cache: flip(cache / "train.npy"), OTHER),
    "a byte of valid": (lambda cache: flip(cache / "valid.npy", 300), OTHER),
    "a byte of test": (lambda cache: flip(cache / "test.npy"), OTHER),
    "train deleted": (
        lambda cache: (cache / "train.npy").unlink(),
        "[Errno 2] No such file or directory: '{cache}/train.npy'",
    ),
    "train cut": (cut("train.npy", 1000), "mmap length is greater than file size"),
    "train empty": (cut("train.npy", 0), "No data left in file"),
    "train without its header": (save("train.npy", np.zeros(3, object)), "Array can't be memory-"),
    "header changed": (lambda cache: flip(cache / "train.npy", 10), ""),
    "other shape": (save("train.npy", np.zeros((11, 28, 27), np.uint8)), OTHER),
    "more images": (save("train.npy", np.zeros((12, 28, 28), np.uint8)), OTHER),
    "other numbers": (save("train.npy", np.zeros((11, 28, 28), np.float32)), OTHER),
    "other checksum": (settings(sha256="0" * 64), OTHER),
    "other checksum of train": (arrays(lambda found: found.update(train="0" * 64)), OTHER),
    "other checksum of valid": (arrays(lambda found: found.update(valid="0" * 64)), OTHER),
    "no arrays": (settings(arrays={}), OTHER),
    "no train": (arrays(lambda found: found.pop("train")), OTHER),
    "no valid": (arrays(lambda found: found.pop("valid")), OTHER),
    "no test": (arrays(lambda found: found.pop("test")), OTHER),
    "an array more": (
        arrays(lambda found: found.update(extra="0" * 64)),
        "[Errno 2] No such file or directory: '{cache}/extra.npy'",
    ),
    "names of arrays alone": (
        settings(arrays=["test", "train", "valid"]),
        "'list' object has no attribute 'keys'",
    ),
    "nothing about arrays": (without("arrays"), "'arrays'"),
    "no checksum": (without("sha256"), "'sha256'"),
    "no source": (without("source"), "'source'"),
    "no cache.json": (
        lambda cache: (cache / "cache.json").unlink(),
        "[Errno 2] No such file or directory: '{cache}/cache.json'",
    ),
    "broken JSON": (
        lambda cache: (cache / "cache.json").write_text("{"),
        "Expecting property name enclosed in double quotes",
    ),
    "a list": (
        lambda cache: (cache / "cache.json").write_text("[]"),
        "list indices must be integers or slices, not str",
    ),
    "no text": (
        lambda cache: (cache / "cache.json").write_bytes(b"\xff"),
        "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    ),
}


@pytest.mark.parametrize("case", CACHE_DAMAGES)
def test_a_damaged_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    damage, reason = CACHE_DAMAGES[case]
    made = install(monkeypatch, "binarized_mnist", tmp_path / "binarized_mnist")
    data.load("binarized_mnist", tmp_path)
    cache = folder_of("binarized_mnist", tmp_path) / "jvae"
    damage(cache)
    message = refusal(lambda: data.load("binarized_mnist", tmp_path))
    assert message.startswith(f"the cache {cache} is damaged ({reason.format(cache=cache)}")
    assert message.endswith("): delete that folder")
    shutil.rmtree(cache)
    assert_is(data.load("binarized_mnist", tmp_path), made)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda cache: flip(cache / "train_labels.npy"), OTHER, id="a byte"),
        pytest.param(save("test_labels.npy", np.zeros(3, np.uint8)), OTHER, id="fewer"),
        pytest.param(
            lambda cache: (cache / "test_labels.npy").unlink(),
            "[Errno 2] No such file or directory: '{cache}/test_labels.npy'",
            id="deleted",
        ),
        pytest.param(arrays(lambda found: found.pop("train_labels")), OTHER, id="train forgotten"),
        pytest.param(arrays(lambda found: found.pop("test_labels")), OTHER, id="test forgotten"),
    ],
)
def test_a_cache_with_damaged_labels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Damage, reason: str
) -> None:
    install(monkeypatch, "mnist", tmp_path / "mnist")
    data.load("mnist", tmp_path)
    cache = folder_of("mnist", tmp_path) / "jvae"
    damage(cache)
    assert refusal(lambda: data.load("mnist", tmp_path)) == (
        f"the cache {cache} is damaged ({reason.format(cache=cache)}): delete that folder"
    )


@pytest.mark.parametrize("name", ["mnist", "binarized_mnist"])
def test_the_cache_knows_the_checksum_of_every_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made = install(monkeypatch, name, tmp_path / name)
    dataset = data.load(name, tmp_path)
    found = json.loads((folder_of(name, tmp_path) / "jvae" / "cache.json").read_text())
    assert found == {
        "arrays": {array: data.content_sha256(made.arrays[array]) for array in made.arrays},
        "sha256": dataset.sha256,
        "source": dataset.source,
    }


@pytest.mark.parametrize("array", ["test", "test_labels"])
@pytest.mark.parametrize(("more", "refused"), [(0, True), (-1, False)])
def test_a_large_cache_is_not_read_at_every_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: str, more: int, refused: bool
) -> None:
    made = install(monkeypatch, "mnist", tmp_path / "mnist")
    digest = data.load("mnist", tmp_path).sha256
    cache = folder_of("mnist", tmp_path) / "jvae"
    flip(cache / f"{array}.npy")
    size = sum(found.nbytes for found in made.arrays.values())
    assert size == 17 * 784 + 17
    monkeypatch.setattr(preparation, "MAX_CHECKED_BYTES", size + more)
    if refused:
        assert refusal(lambda: data.load("mnist", tmp_path)) == (
            f"the cache {cache} is damaged (other content): delete that folder"
        )
    else:
        assert data.load("mnist", tmp_path).sha256 == digest


def test_the_shapes_of_a_large_cache_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "mnist", tmp_path / "mnist")
    data.load("mnist", tmp_path)
    cache = folder_of("mnist", tmp_path) / "jvae"
    np.save(cache / "test.npy", np.zeros((6, 28, 27), np.uint8))
    monkeypatch.setattr(preparation, "MAX_CHECKED_BYTES", 0)
    assert refusal(lambda: data.load("mnist", tmp_path)) == (
        f"the cache {cache} is damaged (other content): delete that folder"
    )
