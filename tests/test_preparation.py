"""What is prepared is what the raw files hold, in their order, and tensorflow-datasets reads it."""

import dataclasses
import functools
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing
from tiny_sources import (
    NAMES,
    SPLITS,
    Damage,
    Tiny,
    assert_is,
    flip,
    folder_of,
    install,
    refusal,
    rewrite,
    stock,
    tree,
)

from jvae import data
from jvae.data.catalogue import SOURCES


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


def test_what_is_prepared_says_its_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mnist", tmp_path / "mnist")
    data.load("mnist", tmp_path)
    described = json.loads((folder_of("mnist", tmp_path) / "dataset_info.json").read_text())
    assert described["citation"] == SOURCES["mnist"].citation
    assert described["location"] == {"urls": [SOURCES["mnist"].homepage]}
    assert described["redistributionInfo"] == {"license": SOURCES["mnist"].licence}


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
