import hashlib
import os
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from tiny_files import GREY, TABLE, assert_holds, fill, npy
from tiny_sources import NAMES, folder_of, install, refusal, tree

from jvae import data
from jvae.data import own_files, raw_files
from jvae.data.catalogue import SOURCES

# The embedded digits.


def test_mnist_5k_is_what_its_readme_says() -> None:
    digits = data.load("mnist_5k")
    assert digits.data_shape == (28, 28)
    assert digits.train.shape == (4000, 28, 28)
    assert digits.test.shape == (1000, 28, 28)
    assert digits.train.dtype == digits.test.dtype == np.uint8
    assert digits.valid is None
    assert digits.train_labels is not None
    assert digits.test_labels is not None
    np.testing.assert_array_equal(np.bincount(digits.train_labels), np.full(10, 400))
    np.testing.assert_array_equal(np.bincount(digits.test_labels), np.full(10, 100))
    assert {digits.train.min(), digits.train.max()} == {0, 255}
    # Recorded results name this hash.
    expected = "559118565d6388a493d550349520045fb18f3ad9b2d996483ed42cf72146f515"
    assert digits.sha256 == expected == data.content_sha256(digits.train, digits.test)
    assert digits.source == "embedded in jvae"
    assert digits.name == "mnist_5k"
    assert (digits.licence, digits.citation) == (
        SOURCES["mnist"].licence,
        SOURCES["mnist"].citation,
    )


def test_no_test_image_is_trained_on() -> None:
    digits = data.load("mnist_5k")
    train, test = ({image.tobytes() for image in part} for part in (digits.train, digits.test))
    assert len(train) == 4000
    assert len(test) == 1000
    assert not train & test


def test_embedded_digits_that_changed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = resources.files("jvae") / "datasets" / "mnist_5k.npz"
    raw = bytearray(stored.read_bytes())
    raw[-100] ^= 1
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "mnist_5k.npz").write_bytes(raw)
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    digest = hashlib.sha256(raw).hexdigest()
    with pytest.raises(data.DataError, match=rf"mnist_5k.npz.*{digest}.*install jvae again"):
        data.load("mnist_5k")


# Names.


def test_the_names_are_those_of_the_documentation() -> None:
    assert data.NAMES == (
        "mnist_5k",
        "mnist",
        "fashion_mnist",
        "kmnist",
        "binarized_mnist",
        "omniglot",
        "frey_face",
        "cifar10",
        "svhn_cropped",
        "celeb_a",
    )


@pytest.mark.parametrize("name", ["minst", "", "MNIST", "omniglot_28x28"])
def test_unknown_names_are_refused(tmp_path: Path, name: str) -> None:
    assert refusal(lambda: data.load(name, tmp_path)) == (
        f"unknown dataset {name!r}: expected one of mnist_5k, mnist, fashion_mnist, kmnist, "
        "binarized_mnist, omniglot, frey_face, cifar10, svhn_cropped, celeb_a, or a path (with a "
        "separator: ./data)"
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_dataset_says_its_terms_and_what_to_cite(name: str) -> None:
    source = SOURCES[name]
    assert source.licence.strip()
    assert source.citation.startswith("@")
    assert source.citation.count("{") == source.citation.count("}") > 0
    assert source.homepage.startswith("http")
    assert all(len(file.url) > len("https://") for file in source.files)


@pytest.mark.parametrize(
    ("name", "is_path"),
    [
        ("mnist", False),
        ("mnist_5k", False),
        ("./mnist", True),
        ("mnist/", True),
        ("/mnist", True),
        ("a/b", True),
        ("mnist.npz", True),
        (Path("mnist"), True),
        # What is there has a path, unless it has a dataset's name.
        ("faces", True),
        ("..", True),
    ],
)
def test_what_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | Path, is_path: bool
) -> None:
    install(monkeypatch, "mnist", tmp_path / "mnist")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").mkdir()
    asked = []

    def load_path(path: str | os.PathLike[str]) -> data.Dataset:
        asked.append(path)
        return data.load("mnist_5k")

    monkeypatch.setattr(own_files, "load_path", load_path)
    dataset = data.load(name, tmp_path)
    assert asked == [name] * is_path
    assert is_path or dataset.name == name


# Paths.


def test_load_takes_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = TABLE.astype(np.float32)
    fill(tmp_path, {"mine.npy": npy(TABLE), "MINE.NPY": npy(TABLE), "sub/mine.csv": b""})
    fill(tmp_path / "mnist_5k", GREY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (
        "mine.npy",
        "./mine.npy",
        "MINE.NPY",
        str(tmp_path / "mine.npy"),
        Path("mine.npy"),
        tmp_path / "sub" / ".." / "mine.npy",
        "~/mine.npy",
        Path("~/mine.npy"),
    ):
        assert_holds(data.load(path), expected)
    for folder in ("./mnist_5k", "mnist_5k/", Path("mnist_5k"), Path("~/mnist_5k")):
        dataset = data.load(folder)
        assert_holds(dataset, np.stack(list(GREY.values())))
        assert dataset.name == "mnist_5k"
    assert len(data.load("mnist_5k").train) == 4000
    monkeypatch.chdir(tmp_path / "mnist_5k")
    assert data.load("./").name == data.load(Path()).name == "mnist_5k"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mnist.txt", "mnist.txt does not exist"),
        ("./mnist", "mnist does not exist"),
        (Path("mnist"), "mnist does not exist"),
    ],
)
def test_load_refuses_paths_as_load_path_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | Path, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError, match=f"^{message}$"):
        data.load(path)


# The folder of all datasets.


def test_the_folder_is_that_of_tensorflow_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = install(monkeypatch, "mnist", tmp_path / "all" / "mnist")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "all"))
    assert data.default_data_dir() == tmp_path / "all"
    np.testing.assert_array_equal(data.load("mnist").train, made.arrays["train"])
    assert folder_of("mnist", tmp_path / "all").is_dir()


@pytest.mark.parametrize("variable", [None, "~/tensorflow_datasets"])
def test_the_folder_is_below_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if variable is None:
        monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    else:
        monkeypatch.setenv("TFDS_DATA_DIR", variable)
    assert data.default_data_dir() == tmp_path / "tensorflow_datasets"


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_that_is_given_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[str | Path]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    made = install(monkeypatch, "mnist", tmp_path / "mine" / "mnist")
    train = data.load("mnist", kind("~/mine")).train
    np.testing.assert_array_equal(train, made.arrays["train"])
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_is_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "mnist", tmp_path / "mnist")
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refusal(lambda: data.load("mnist", tmp_path / "file"))


# Which files are read.


def test_the_cache_comes_before_the_prepared_files_and_those_before_the_raw_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = install(monkeypatch, "mnist", tmp_path / "mnist")
    data.load("mnist", tmp_path)
    folder, raw = folder_of("mnist", tmp_path), tmp_path / "mnist" / "train-images-idx3-ubyte.gz"

    def located(*args: object) -> dict[str, Path]:
        raise AssertionError("raw files were looked for")

    monkeypatch.setattr(raw_files, "locate", located)
    raw.write_bytes(b"damaged")
    shutil.rmtree(folder / "jvae")
    from_prepared = data.load("mnist", tmp_path)
    assert from_prepared.source == f"prepared by tensorflow-datasets in {folder}"
    (folder / "dataset_info.json").write_bytes(b"damaged")
    before = tree(tmp_path)
    np.testing.assert_array_equal(data.load("mnist", tmp_path).train, made.arrays["train"])
    assert tree(tmp_path) == before
    shutil.rmtree(folder)
    with pytest.raises(AssertionError, match="raw files were looked for"):
        data.load("mnist", tmp_path)


def test_datasets_of_the_same_folder_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of MNIST's kin have files of the same names."""
    names = ("mnist", "fashion_mnist", "kmnist")
    made = {name: install(monkeypatch, name, tmp_path / name) for name in names}
    for _ in range(2):
        for name in names:
            train = data.load(name, tmp_path).train
            np.testing.assert_array_equal(train, made[name].arrays["train"])
    assert len({made[name].arrays["train"].tobytes() for name in names}) == 3
