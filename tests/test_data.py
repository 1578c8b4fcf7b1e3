import dataclasses
import gzip
import hashlib
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from jvae import data

FILES = {
    "train": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}


def idx(array: np.ndarray) -> bytes:
    """The IDX format of unsigned bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "train": generator.integers(0, 256, (5, 28, 28), np.uint8),
        "train_labels": np.arange(5, dtype=np.uint8),
        "test": generator.integers(0, 256, (3, 28, 28), np.uint8),
        "test_labels": np.arange(3, dtype=np.uint8),
    }


@pytest.fixture
def data_dir(
    tmp_path: Path, arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A tiny MNIST in raw files."""
    digest = data.content_sha256(arrays["train"], arrays["test"])
    monkeypatch.setattr(data, "_MNIST_SHA256", digest)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part, file in FILES.items():
        (folder / file).write_bytes(gzip.compress(idx(arrays[part])))
    return tmp_path


# The embedded digits.


def test_mnist_5k_is_what_its_readme_says() -> None:
    digits = data.load("mnist_5k")
    assert digits.data_shape == (28, 28)
    assert digits.train.shape == (4000, 28, 28)
    assert digits.test.shape == (1000, 28, 28)
    assert digits.train.dtype == digits.test.dtype == np.uint8
    assert digits.train_labels is not None
    assert digits.test_labels is not None
    np.testing.assert_array_equal(np.bincount(digits.train_labels), np.full(10, 400))
    np.testing.assert_array_equal(np.bincount(digits.test_labels), np.full(10, 100))
    assert {digits.train.min(), digits.train.max()} == {0, 255}
    # Recorded results name this hash.
    expected = "559118565d6388a493d550349520045fb18f3ad9b2d996483ed42cf72146f515"
    assert digits.sha256 == expected == data.content_sha256(digits.train, digits.test)
    assert "embedded" in digits.source


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


# Raw files.


def test_raw_files_are_read(data_dir: Path, arrays: dict[str, np.ndarray]) -> None:
    mnist = data.load("mnist", data_dir)
    for part, array in arrays.items():
        np.testing.assert_array_equal(getattr(mnist, part), array)
    assert mnist.name == "mnist"
    assert str(data_dir / "mnist") in mnist.source
    assert mnist.sha256 == data.content_sha256(arrays["train"], arrays["test"])
    np.testing.assert_array_equal(data.load("mnist", str(data_dir)).train, arrays["train"])


def test_the_content_hash_is_of_shapes_dtypes_and_bytes() -> None:
    a = np.arange(12, dtype=np.uint8).reshape(3, 4)
    others = [
        (a.reshape(4, 3),),
        (a.view(np.int8),),
        (a[::-1],),
        (a, a),
        (a[:1], a[1:]),
        (a[:2], a[2:]),
    ]
    hashes = {data.content_sha256(*arrays) for arrays in [(a,), *others]}
    assert len(hashes) == 7
    assert data.content_sha256(np.asfortranarray(a)) == data.content_sha256(a.copy())
    expected = hashlib.sha256(b"|u1(3, 4)" + a.tobytes()).hexdigest()
    assert data.content_sha256(a) == expected


LABELS = np.arange(5, dtype=np.uint8)
IMAGES = np.zeros((5, 28, 28), np.uint8)
# file, its new bytes from its old, the message
Corruption = tuple[str, Callable[[bytes], bytes], str]
CORRUPTIONS: dict[str, Corruption] = {
    "labels for images": (
        FILES["train"],
        lambda raw: gzip.compress(idx(LABELS)),
        "magic number 00000801, expected 00000803",
    ),
    "floats": (
        FILES["test"],
        lambda raw: gzip.compress(bytes([0, 0, 0x0D, 3]) + idx(IMAGES)[4:]),
        "magic number 00000d03, expected 00000803",
    ),
    "empty": (FILES["test"], lambda raw: gzip.compress(b""), "magic number , expected 00000803"),
    "header cut": (
        FILES["train"],
        lambda raw: gzip.compress(idx(IMAGES)[:10]),
        "header ends after 10 bytes",
    ),
    "data cut": (
        FILES["train"],
        lambda raw: gzip.compress(idx(IMAGES)[:-1]),
        "3919 bytes of data, the header says 3920",
    ),
    "data too long": (
        FILES["train_labels"],
        lambda raw: gzip.compress(idx(LABELS) + b"\0"),
        "more than 5 bytes of data, the header says 5",
    ),
    "gzip cut": (FILES["train"], lambda raw: raw[:-20], "not a whole gzip file.*download it again"),
    "gzip flipped": (
        FILES["train"],
        lambda raw: raw[:200] + bytes([raw[200] ^ 255]) + raw[201:],
        "not a whole gzip file.*download it again",
    ),
    "a web page": (
        FILES["train"],
        lambda raw: b"<html>404</html>",
        "not a whole gzip file.*download it again",
    ),
    "fewer labels": (
        FILES["test_labels"],
        lambda raw: gzip.compress(idx(LABELS[:2])),
        "3 test images but 2 labels",
    ),
    "other images": (
        FILES["test"],
        lambda raw: gzip.compress(idx(np.zeros((3, 28, 27), np.uint8))),
        r"images of \(28, 27\), expected \(28, 28\)",
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupt_files_are_refused(data_dir: Path, name: str) -> None:
    file, corrupt, message = CORRUPTIONS[name]
    path = data_dir / "mnist" / file
    path.write_bytes(corrupt(path.read_bytes()))
    with pytest.raises(data.DataError, match=message) as error:
        data.load("mnist", data_dir)
    assert str(path if "labels" not in message else path.parent) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_are_named(data_dir: Path) -> None:
    (data_dir / "mnist" / FILES["test"]).unlink()
    with pytest.raises(data.DataError, match=rf"needs {FILES['test']} in {data_dir / 'mnist'}"):
        data.load("mnist", data_dir)
    with pytest.raises(data.DataError, match=f"{FILES['train']}.*{FILES['test_labels']}"):
        data.load("mnist", data_dir / "elsewhere")
    with pytest.raises(data.DataError, match=r"give data_dir .*--data-dir"):
        data.load("mnist")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(data.DataError, match=r"unknown dataset 'minst'.*'mnist', 'mnist_5k'"):
        data.load("minst")


# Support.


@pytest.mark.parametrize(
    ("value", "likelihood", "expected"),
    [
        (-0.001, "bernoulli", r"in \[0, 1\]"),
        (1.001, "bernoulli", r"in \[0, 1\]"),
        (255.0, "bernoulli", r"in \[0, 1\]"),
        (np.nan, "bernoulli", r"in \[0, 1\]"),
        (np.inf, "gaussian", "finite"),
        (np.nan, "gaussian", "finite"),
    ],
)
def test_values_outside_the_support_are_named_by_index(
    value: float, likelihood: str, expected: str
) -> None:
    x = np.full((3, 2, 2), 0.5)
    x[1, 0, 1] = x[2, 1, 1] = value
    message = rf"x\[1, 0, 1\] is {re.escape(str(value))}: .*{likelihood}.*{expected}"
    with pytest.raises(data.DataError, match=message):
        data.check_support(x, likelihood)


def test_values_inside_the_support_pass() -> None:
    data.check_support(np.array([[0.0, 0.5, 1.0]]))
    data.check_support(np.array([[-1e30, 300.0]]), "gaussian")
    with pytest.raises(ValueError, match=r"unknown likelihood 'poisson'.*'bernoulli'"):
        data.check_support(np.zeros(1), "poisson")


def test_a_dataset_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.load("mnist_5k").name = "mnist"  # type: ignore[misc]


def test_other_images_under_mnists_file_names_are_refused(
    data_dir: Path, arrays: dict[str, np.ndarray]
) -> None:
    other = idx(255 - arrays["train"])
    (data_dir / "mnist" / FILES["train"]).write_bytes(gzip.compress(other))
    with pytest.raises(data.DataError, match="these are other images"):
        data.load("mnist", data_dir)
