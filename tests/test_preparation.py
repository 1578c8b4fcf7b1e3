import concurrent.futures
import dataclasses
import functools
import gzip
import importlib.util
import itertools
import json
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing
from tiny_sources import (
    NAMES,
    SPLITS,
    Tiny,
    flip,
    folder_of,
    idx,
    install,
    mat,
    refusal,
    sha256,
    stock,
    tiny,
    tree,
    with_files,
)

from jvae import data
from jvae.data import preparation
from jvae.data.catalogue import SOURCES, Split

PARTS = ("train", "valid", "test")
ARRAYS = (*PARTS, *(f"{part}_labels" for part in PARTS))
Damage = Callable[[Path], object]


def assert_is(dataset: data.Dataset, made: Tiny) -> None:
    """Every array is what was written into the raw files, in their order."""
    for name in ARRAYS:
        found = getattr(dataset, name)
        if name in made.arrays:
            np.testing.assert_array_equal(found, made.arrays[name], strict=True)
        else:
            assert found is None
    parts = [made.arrays[part] for part in PARTS if part in made.arrays]
    assert dataset.sha256 == data.content_sha256(*parts)


def order_in(made: Tiny, part: str, images: list[np.ndarray]) -> list[int]:
    """The place of each image among those of the raw files."""
    places = {record["image"].tobytes(): i for i, record in enumerate(made.stored[part])}
    return [places[image.tobytes()] for image in images]


def keys_of(made: Tiny, part: str) -> list[int] | list[str]:
    """File names of CelebA, numbered through all parts; of others numbers from 0."""
    nums = {name: len(records) for name, records in made.stored.items()}
    if made.source.name != "celeb_a":
        return list(range(nums[part]))
    start = {"train": 1, "valid": 1 + nums["train"], "test": 1 + nums["train"] + nums["valid"]}
    return [f"{start[part] + i:06d}.jpg" for i in range(nums[part])]


def test_every_dataset_by_name_is_here() -> None:
    assert tuple(SOURCES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_the_raw_files_hold_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made = install(monkeypatch, name, tmp_path / name)
    dataset = data.load(name, tmp_path)
    assert_is(dataset, made)
    assert dataset.name == name
    assert dataset.source == f"raw files in {tmp_path / name}"
    assert dataset.licence == SOURCES[name].licence
    assert dataset.citation == SOURCES[name].citation
    assert dataset.data_shape == SOURCES[name].data_shape


@pytest.mark.parametrize("name", NAMES)
def test_tensorflow_datasets_reads_what_was_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made = install(monkeypatch, name, tmp_path / name)
    data.load(name, tmp_path)
    found = stock(name, tmp_path)
    assert found.keys() == made.stored.keys()
    for part, records in found.items():
        order = order_in(made, part, [record["image"] for record in records])
        # By the hashes of the keys of its own builder: so are files that it prepared.
        hasher = hashing.Hasher(SPLITS[part])
        hashes = [hasher.hash_key(key) for key in keys_of(made, part)]
        assert order == sorted(range(len(records)), key=hashes.__getitem__)
        # That is a shuffle, so that the tests of the order below can fail.
        assert order != sorted(order)
        for record, i in zip(records, order, strict=True):
            np.testing.assert_equal(record, made.stored[part][i])


@pytest.mark.parametrize("name", NAMES)
def test_prepared_files_alone_are_loaded_in_the_order_of_the_raw_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made = install(monkeypatch, name, tmp_path / "downloads" / "manual")
    first, folder = data.load(name, tmp_path), folder_of(name, tmp_path)
    shutil.rmtree(tmp_path / "downloads")
    shutil.rmtree(folder / "jvae")
    again = data.load(name, tmp_path)
    assert_is(again, made)
    assert again.sha256 == first.sha256
    assert again.source == f"prepared by tensorflow-datasets in {folder}"
    assert_is(data.load(name, tmp_path), made)


def test_the_order_is_kept_across_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = install(monkeypatch, "mnist", tmp_path / "mnist")
    config = functools.partial(tfds.download.DownloadConfig, num_shards=3)
    monkeypatch.setattr(tfds.download, "DownloadConfig", config)
    data.load("mnist", tmp_path)
    folder = folder_of("mnist", tmp_path)
    assert len(list(folder.glob("mnist-train.array_record-*-of-00003"))) == 3
    shutil.rmtree(folder / "jvae")
    assert_is(data.load("mnist", tmp_path), made)


def test_files_that_were_not_shuffled_are_read_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = install(monkeypatch, "mnist", tmp_path / "mnist")
    data.load("mnist", tmp_path)
    folder = folder_of("mnist", tmp_path)
    shutil.rmtree(folder / "jvae")
    rewrite(folder / "dataset_info.json", lambda info: info.update(disableShuffling=True))
    train = data.load("mnist", tmp_path).train
    order = order_in(made, "train", list(train))
    assert order == order_in(
        made, "train", [record["image"] for record in stock("mnist", tmp_path)["train"]]
    )


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    """Change what a JSON file holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("omniglot", "frey_face")])
def test_features_and_version_are_those_of_tensorflow_datasets(tmp_path: Path, name: str) -> None:
    source = SOURCES[name]
    builder = tfds.builder(source.prepared_name, data_dir=tmp_path)
    features = tfds.features.FeaturesDict(source.features(tfds))
    assert features.to_json() == builder.info.features.to_json()
    assert source.version == str(builder.version)


@pytest.mark.parametrize("name", ["omniglot", "frey_face"])
def test_other_data_has_no_name_of_tensorflow_datasets(name: str) -> None:
    assert SOURCES[name].prepared_name not in tfds.list_builders(with_community_datasets=False)


def test_what_is_prepared_says_its_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mnist", tmp_path / "mnist")
    data.load("mnist", tmp_path)
    described = json.loads((folder_of("mnist", tmp_path) / "dataset_info.json").read_text())
    assert described["citation"] == SOURCES["mnist"].citation
    assert described["location"] == {"urls": [SOURCES["mnist"].homepage]}
    assert described["redistributionInfo"] == {"license": SOURCES["mnist"].licence}


# What a raw file may hold.


def written(tmp_path: Path, name: str, files: Mapping[str, bytes]) -> dict[str, Path]:
    """The paths of raw files: the tiny ones, but for those given."""
    paths = {}
    for file, content in {**tiny(name).files, **files}.items():
        paths[file] = tmp_path / file
        paths[file].write_bytes(content)
    return paths


BLACK = np.zeros((11, 28, 28), np.uint8)
SMALL = {
    "data": np.zeros((784, 3)),
    "target": np.zeros((50, 3)),
    "testdata": np.zeros((784, 2)),
    "testtarget": np.zeros((50, 2)),
}
LARGE = SMALL | {"target": np.zeros((50, 24_345), np.uint8)}


def corner(value: float, dtype: Any) -> np.ndarray:
    """Images of OMNIGLOT, all black but for a pixel."""
    images = np.zeros((784, 24_345), dtype)
    images[5, 7] = value
    return images


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        pytest.param(
            "mnist",
            "train-images-idx3-ubyte.gz",
            gzip.compress(idx(np.zeros((11, 28, 27), np.uint8))),
            ": images of (28, 27), expected (28, 28)",
            id="mnist, other images",
        ),
        pytest.param(
            "kmnist",
            "t10k-labels-idx1-ubyte.gz",
            gzip.compress(idx(np.zeros(5, np.uint8))),
            ": 5 labels for 6 images",
            id="kmnist, fewer labels",
        ),
        pytest.param(
            "binarized_mnist",
            "binarized_mnist_valid.amat",
            b"0 1 0\n",
            ", row 1: 5 characters, expected 784 digits with a blank between",
            id="binarized_mnist, other images",
        ),
        pytest.param(
            "omniglot",
            "chardata.mat",
            mat(SMALL),
            ": train images (784, 3) and alphabets (50, 3), expected (784, 24345) and (50, 24345)",
            id="omniglot, fewer images",
        ),
        pytest.param(
            "omniglot",
            "chardata.mat",
            mat(LARGE | {"data": corner(0, np.uint8)}),
            ": test images (784, 2) and alphabets (50, 2), expected (784, 8070) and (50, 8070)",
            id="omniglot, fewer test images",
        ),
        pytest.param(
            "omniglot",
            "chardata.mat",
            mat(LARGE | {"data": corner(2, np.uint8)}),
            ": train values 0 to 2, expected 0 to 1",
            id="omniglot, too large",
        ),
        pytest.param(
            "omniglot",
            "chardata.mat",
            mat(LARGE | {"data": corner(-1, np.int8)}),
            ": train values -1 to 0, expected 0 to 1",
            id="omniglot, negative",
        ),
        pytest.param(
            "omniglot",
            "chardata.mat",
            mat(LARGE | {"data": corner(np.nan, np.float32)}),
            ": train values nan to nan, expected 0 to 1",
            id="omniglot, no number",
        ),
        pytest.param(
            "frey_face",
            "frey_rawface.mat",
            mat({"ff": np.zeros((560, 5))}),
            ": 'ff' is float64 (560, 5), expected uint8 (560, 1965)",
            id="frey_face, no bytes",
        ),
        pytest.param(
            "frey_face",
            "frey_rawface.mat",
            mat({"ff": np.zeros((561, 5), np.uint8)}),
            ": 'ff' is uint8 (561, 5), expected uint8 (560, 1965)",
            id="frey_face, other images",
        ),
        pytest.param(
            "svhn_cropped",
            "test_32x32.mat",
            mat({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.ones((5, 1), np.uint8)}),
            ": 'X' is uint8 (32, 32, 3, 4), expected uint8 (32, 32, 3, 5)",
            id="svhn_cropped, more labels",
        ),
        pytest.param(
            "svhn_cropped",
            "train_32x32.mat",
            mat({"X": np.zeros((32, 32, 3, 4)), "y": np.ones((4, 1), np.uint8)}),
            ": 'X' is float64 (32, 32, 3, 4), expected uint8 (32, 32, 3, 4)",
            id="svhn_cropped, no bytes",
        ),
    ],
)
def test_raw_files_of_other_data_are_refused(
    tmp_path: Path, name: str, file: str, content: bytes, message: str
) -> None:
    paths = written(tmp_path, name, {file: content})
    assert refusal(lambda: SOURCES[name].splits(paths)) == f"{paths[file]}{message}"


@pytest.mark.parametrize(
    "file", ["list_attr_celeba.txt", "list_landmarks_align_celeba.txt", "identity_CelebA.txt"]
)
def test_a_table_without_an_image_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    made = tiny("celeb_a")
    lines = made.files[file].splitlines(keepends=True)
    files = made.files | {file: b"".join(line for line in lines if b"000012.jpg" not in line)}
    source = with_files(made.source, files)
    monkeypatch.setitem(SOURCES, "celeb_a", source)
    dataclasses.replace(made, files=files).write(tmp_path / "celeb_a")
    before = tree(tmp_path)
    message = refusal(lambda: data.load("celeb_a", tmp_path))
    assert message == "000012.jpg is missing in one of CelebA's tables"
    assert tree(tmp_path) == before


@pytest.mark.parametrize("more", [-1, 1])
def test_another_number_of_records_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    made = install(monkeypatch, "mnist", tmp_path / "mnist")

    def splits(files: Mapping[str, Path]) -> dict[str, Split]:
        whole = made.source.splits(files)
        return {**whole, "test": Split(whole["test"].num + more, whole["test"].records)}

    monkeypatch.setitem(SOURCES, "mnist", dataclasses.replace(made.source, splits=splits))
    before = tree(tmp_path)
    message = refusal(lambda: data.load("mnist", tmp_path))
    assert message == f"mnist: 6 test images, expected {6 + more}"
    assert tree(tmp_path) == before


def test_omniglots_sizes_are_the_literatures(tmp_path: Path) -> None:
    splits = SOURCES["omniglot"].splits(written(tmp_path, "omniglot", {}))
    assert {part: split.num for part, split in splits.items()} == {"train": 24_345, "test": 8_070}
    assert sum(1 for _ in splits["test"].records) == 8_070


def test_the_split_of_frey_face_never_changes(tmp_path: Path) -> None:
    frames = np.zeros((1965, 560), np.uint8)
    frames[:, :2] = np.arange(1965, dtype="<u2").view(np.uint8).reshape(-1, 2)
    splits = SOURCES["frey_face"].splits(
        written(tmp_path, "frey_face", {"frey_rawface.mat": mat({"ff": frames.T})})
    )
    which = {
        part: [int(r["image"][0, 0]) + 256 * int(r["image"][0, 1]) for r in split.records]
        for part, split in splits.items()
    }
    assert {part: len(rows) for part, rows in which.items()} == {
        "train": 1565,
        "valid": 200,
        "test": 200,
    }
    assert sorted(itertools.chain(*which.values())) == list(range(1965))
    digests = {part: sha256(np.array(rows, "<i8").tobytes()) for part, rows in which.items()}
    assert digests == {
        "train": "955c6a919f16eb1d30645638717dc09ef003be99053ac651588ac8ab8271857e",
        "valid": "567a6448e8420b7856bb4c5e79b6851cd04749d6c2b8827e10ecfb41fb037f76",
        "test": "90f57919863137ab7f16bd2c84a76a10706d581d805bfa848581c6f4cdbfdf83",
    }


def test_celeb_a_is_cut_from_the_centre() -> None:
    image = np.zeros((218, 178, 3), np.uint8)
    image[35:183, 15:163] = 255
    np.testing.assert_array_equal(
        SOURCES["celeb_a"].image(image), np.full((64, 64, 3), 255, np.uint8), strict=True
    )


def test_celeb_a_is_averaged() -> None:
    """A plane stays a plane: each value is that of the point in the middle of its pixel."""
    rows, columns = np.mgrid[:218, :178]
    image = np.stack([rows, columns, 255 - rows], axis=-1).astype(np.uint8)
    small = SOURCES["celeb_a"].image(image).astype(float)
    middle = (np.arange(64) + 0.5) * 148 / 64 - 0.5
    inner = slice(2, -2)
    for channel, expected in enumerate((35 + middle[:, None], 15 + middle, 220 - middle[:, None])):
        difference = small[..., channel] - expected
        assert np.abs(difference[inner, inner]).max() <= 0.51


# The cache.


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


# Files that were prepared.


def array_record(folder: Path) -> Path:
    return folder / "mnist-train.array_record-00000-of-00001"


def info(change: Callable[[Any], object]) -> Damage:
    return lambda folder: rewrite(folder / "dataset_info.json", change)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: flip(array_record(folder), 2000), id="a byte"),
        pytest.param(lambda folder: os.truncate(array_record(folder), 66_000), id="cut"),
        pytest.param(lambda folder: os.truncate(array_record(folder), 0), id="empty"),
        pytest.param(lambda folder: array_record(folder).unlink(), id="deleted"),
        pytest.param(
            lambda folder: array_record(folder).write_bytes(b"x" * 70_000), id="something else"
        ),
        pytest.param(lambda folder: (folder / "features.json").unlink(), id="no features"),
        pytest.param(
            lambda folder: os.truncate(folder / "features.json", 10), id="broken features"
        ),
        pytest.param(
            info(lambda found: found["splits"][0].update(shardLengths=["12"])), id="more images"
        ),
    ],
)
def test_damaged_prepared_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Damage
) -> None:
    install(monkeypatch, "mnist", tmp_path / "mnist")
    data.load("mnist", tmp_path)
    folder = folder_of("mnist", tmp_path)
    shutil.rmtree(folder / "jvae")
    damage(folder)
    before = tree(tmp_path)
    message = refusal(lambda: data.load("mnist", tmp_path))
    assert message.startswith(f"the prepared files in {folder} cannot be read (")
    assert message.endswith("): delete that folder")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        pytest.param(lambda found: found["splits"].pop(0), "test", id="no train"),
        pytest.param(lambda found: found["splits"].pop(1), "train", id="no test"),
        pytest.param(lambda found: found.pop("splits"), "none", id="no parts"),
        pytest.param(
            lambda found: found["splits"][0].update(name="extra"), "extra, test", id="other parts"
        ),
    ],
)
def test_prepared_files_without_a_part_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object], parts: str
) -> None:
    install(monkeypatch, "mnist", tmp_path / "mnist")
    data.load("mnist", tmp_path)
    folder = folder_of("mnist", tmp_path)
    shutil.rmtree(folder / "jvae")
    rewrite(folder / "dataset_info.json", change)
    before = tree(tmp_path)
    assert refusal(lambda: data.load("mnist", tmp_path)) == (
        f"the prepared files in {folder} cannot be read (their parts are {parts}): delete that "
        "folder"
    )
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["mnist", "celeb_a"])
def test_tensorflow_datasets_decodes_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It would do so with OpenCV where that is installed, to other pixels."""
    made = install(monkeypatch, name, tmp_path / name)
    data.load(name, tmp_path)
    folder = folder_of(name, tmp_path)
    shutil.rmtree(folder / "jvae")
    asked = []
    decode = tfds.features.Image.decode_example_np

    def decode_example_np(feature: Any, example: Any) -> Any:
        asked.append(example)
        return decode(feature, example)

    monkeypatch.setattr(tfds.features.Image, "decode_example_np", decode_example_np)
    dataset = data.load(name, tmp_path)
    assert dataset.source == f"prepared by tensorflow-datasets in {folder}"
    assert_is(dataset, made)
    assert asked == []
    stock(name, tmp_path)
    assert len(asked) == sum(map(len, made.stored.values()))


def test_prepared_files_of_other_images_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "cifar10", tmp_path / "cifar10")
    data.load("cifar10", tmp_path)
    folder = folder_of("cifar10", tmp_path)
    shutil.rmtree(folder / "jvae")
    grey = dataclasses.replace(SOURCES["cifar10"], data_shape=(28, 28))
    monkeypatch.setitem(SOURCES, "cifar10", grey)
    before = tree(tmp_path)
    message = refusal(lambda: data.load("cifar10", tmp_path))
    assert message == (
        f"the prepared files in {folder} cannot be read (cannot reshape array of size 3072 into "
        "shape (28,28)): delete that folder"
    )
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"[]", b'"text"'])
def test_a_damaged_description_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    install(monkeypatch, "mnist", tmp_path / "mnist")
    folder = folder_of("mnist", tmp_path)
    folder.mkdir()
    (folder / "dataset_info.json").write_bytes(content)
    before = tree(tmp_path)
    message = refusal(lambda: data.load("mnist", tmp_path))
    assert message.startswith(f"{folder / 'dataset_info.json'} cannot be read: ")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "description", [{"fileFormat": "tfrecord"}, {"fileFormat": "riegeli"}, {}, None]
)
def test_what_only_tensorflow_reads_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, description: dict[str, str] | None
) -> None:
    made = install(monkeypatch, "mnist", tmp_path / "mnist")
    folder = folder_of("mnist", tmp_path)
    folder.mkdir()
    (folder / "mnist-train.tfrecord-00000-of-00001").write_bytes(b"records")
    if description is not None:
        (folder / "dataset_info.json").write_text(json.dumps(description))
    before = tree(tmp_path)
    assert_is(data.load("mnist", tmp_path), made)
    after = tree(tmp_path)
    assert {path: after[path] for path in before} == before
    cache = folder.relative_to(tmp_path) / "jvae"
    files = ["cache.json", "test.npy", "test_labels.npy", "train.npy", "train_labels.npy"]
    assert after.keys() - before.keys() == {str(cache), *(str(cache / file) for file in files)}
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").unlink()
    assert_is(data.load("mnist", tmp_path), made)


@pytest.mark.parametrize("prepared", [False, True])
def test_other_content_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: bool
) -> None:
    made = install(monkeypatch, "mnist", tmp_path / "mnist")
    digest, folder = data.content_sha256(made.arrays["train"], made.arrays["test"]), "mnist"
    if prepared:
        data.load("mnist", tmp_path)
        folder = "mnist/3.0.1"
        shutil.rmtree(tmp_path / folder / "jvae")
    demanding = dataclasses.replace(made.source, content_sha256="0" * 64)
    monkeypatch.setitem(SOURCES, "mnist", demanding)
    before = tree(tmp_path)
    found = "prepared by tensorflow-datasets in" if prepared else "raw files in"
    assert refusal(lambda: data.load("mnist", tmp_path)) == (
        f"{found} {tmp_path / folder}: images of SHA-256 {digest}, mnist's is {'0' * 64}: these "
        "are other images"
    )
    assert tree(tmp_path) == before
    content = dataclasses.replace(made.source, content_sha256=digest)
    monkeypatch.setitem(SOURCES, "mnist", content)
    assert_is(data.load("mnist", tmp_path), made)


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


def stopping(made: Tiny, stop: Callable[[], object], at: int = 4) -> Any:
    """The source, which calls `stop` before its test record of that number."""

    def splits(files: Mapping[str, Path]) -> dict[str, Split]:
        whole = made.source.splits(files)

        def records() -> Iterator[Mapping[str, Any]]:
            for i, record in enumerate(whole["test"].records):
                if i == at:
                    stop()
                yield record

        return {**whole, "test": Split(whole["test"].num, records())}

    return dataclasses.replace(made.source, splits=splits)


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


def test_others_may_read_what_was_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mnist", tmp_path / "mnist")
    before = os.umask(0o022)
    try:
        data.load("mnist", tmp_path)
    finally:
        os.umask(before)
    folder = folder_of("mnist", tmp_path)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    assert set(modes.values()) == {0o755, 0o644}
    assert [modes[folder], modes[folder / "jvae"]] == [0o755, 0o755]


def test_nothing_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, "mnist", tmp_path / "mnist")
    data.load("mnist", tmp_path)
    shutil.rmtree(folder_of("mnist", tmp_path) / "jvae")
    data.load("mnist", tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    assert "%" not in err


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


def test_without_posix_fallocate_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = install(monkeypatch, "mnist", tmp_path / "mnist")
    monkeypatch.delattr(os, "posix_fallocate")
    for _ in range(2):
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
