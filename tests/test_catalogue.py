"""Every dataset by name: its features, its version, and what its raw files may hold."""

import dataclasses
import gzip
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tiny_sources import NAMES, idx, install, mat, refusal, sha256, tiny, tree, with_files

from jvae import data
from jvae.data.catalogue import SOURCES, Split


def test_every_dataset_by_name_is_here() -> None:
    assert tuple(SOURCES) == NAMES


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


# What a raw file may hold.


def written(tmp_path: Path, name: str, files: Mapping[str, bytes]) -> dict[str, Path]:
    """The paths of raw files: the tiny ones, but for those given."""
    paths = {}
    for file, content in {**tiny(name).files, **files}.items():
        paths[file] = tmp_path / file
        paths[file].write_bytes(content)
    return paths


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


# What the literature says, and what never changes.


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
