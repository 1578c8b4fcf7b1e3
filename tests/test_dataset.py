import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jvae import data, networks
from jvae.data import dataset as dataset_module


def dataset(train: Any, test: np.ndarray, **more: Any) -> data.Dataset:
    return data.Dataset(
        name="mine", train=train, test=test, source="memory", sha256="0", licence="none", **more
    )


BYTES = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
LAST_BIT = np.array([[0, 0], [0, 0], [0, 1]], np.uint8)
FLOATS = np.linspace(-1.5, 3, 8).astype(np.float32)


def test_a_dataset_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset(BYTES, BYTES[:1]).name = "yours"  # type: ignore[misc]


def test_what_is_not_given_is_none() -> None:
    found = dataset(BYTES, BYTES[:1])
    assert found.valid is found.train_labels is found.valid_labels is found.test_labels is None
    assert found.citation == ""


def test_datasets_are_compared_by_identity() -> None:
    """Arrays have no truth value: equality of fields would raise."""
    one, other = dataset(BYTES, BYTES), dataset(BYTES, BYTES)
    assert one == one
    assert one != other


@pytest.mark.parametrize(
    ("train", "test", "shape", "values", "binary", "line"),
    [
        pytest.param(
            BYTES,
            BYTES[:2],
            (3, 2),
            (0, 23),
            False,
            "mine: uint8 [3, 2], 4 training, 2 test examples, values 0 to 23",
            id="bytes",
        ),
        pytest.param(
            np.array([[0], [255]], np.uint8),
            np.array([[255]], np.uint8),
            (1,),
            (0, 255),
            True,
            "mine: uint8 [1], 2 training, 1 test examples, values 0 to 255",
            id="black and white",
        ),
        pytest.param(
            np.array([[0], [255]], np.uint8),
            np.array([[254]], np.uint8),
            (1,),
            (0, 255),
            False,
            "mine: uint8 [1], 2 training, 1 test examples, values 0 to 255",
            id="grey in the test part",
        ),
        pytest.param(
            np.array([[0], [1]], np.uint8),
            np.array([[0]], np.uint8),
            (1,),
            (0, 1),
            False,
            "mine: uint8 [1], 2 training, 1 test examples, values 0 to 1",
            id="bytes 0 and 1 are dark greys",
        ),
        pytest.param(
            np.array([[0], [1]], np.float32),
            np.array([[1]], np.float32),
            (1,),
            (0, 1),
            True,
            "mine: float32 [1], 2 training, 1 test examples, values 0 to 1",
            id="zeros and ones",
        ),
        pytest.param(
            np.array([[0], [0.5]], np.float32),
            np.array([[1]], np.float32),
            (1,),
            (0, 1),
            False,
            "mine: float32 [1], 2 training, 1 test examples, values 0 to 1",
            id="grey in the training part",
        ),
        pytest.param(
            FLOATS[:6].reshape(3, 2),
            FLOATS[6:].reshape(1, 2),
            (2,),
            (-1.5, 3),
            False,
            "mine: float32 [2], 3 training, 1 test examples, values -1.5 to 3",
            id="the largest in the test part",
        ),
        pytest.param(
            np.zeros((60_000, 1), np.uint8),
            np.zeros((10_000, 1), np.uint8),
            (1,),
            (0, 0),
            True,
            "mine: uint8 [1], 60,000 training, 10,000 test examples, values 0 to 0",
            id="many",
        ),
    ],
)
def test_a_dataset_is_described(
    train: np.ndarray,
    test: np.ndarray,
    shape: tuple[int, ...],
    values: tuple[float, float],
    binary: bool,
    line: str,
) -> None:
    found = dataset(train, test)
    assert found.data_shape == shape
    assert found.values == values
    assert found.is_binary == binary
    assert found.describe() == line


def test_a_validation_part_is_described() -> None:
    found = dataset(np.zeros((2_000, 1)), np.ones((3, 1)), valid=np.zeros((1_000, 1)))
    assert found.describe() == (
        "mine: float64 [1], 2,000 training, 1,000 validation and 3 test examples, values 0 to 1"
    )


class OneAtATime:
    """Examples that are read when they are asked for."""

    def __init__(self, array: np.ndarray) -> None:
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: Any) -> Any:
        return self._array[index]


def on_disk(path: Path, array: np.ndarray) -> np.ndarray:
    """`array` memory-mapped."""
    np.save(path, array)
    mapped: np.ndarray = np.load(path, mmap_mode="r")
    return mapped


@pytest.mark.parametrize("kind", ["memory-mapped", "one at a time"])
def test_the_values_are_those_of_the_test_part_where_train_is_on_the_disk(
    tmp_path: Path, kind: str
) -> None:
    train = on_disk(tmp_path / "x.npy", BYTES) if kind == "memory-mapped" else OneAtATime(BYTES)
    found = dataset(train, BYTES[1:3])
    assert found.values == (6, 17)
    assert found.describe() == ("mine: uint8 [3, 2], 4 training, 2 test examples, values 6 to 17")


def test_a_test_part_on_the_disk_is_read_for_the_values(tmp_path: Path) -> None:
    assert dataset(BYTES[:1], on_disk(tmp_path / "x.npy", BYTES)).values == (0, 23)


# Test examples that are trained on.


@pytest.mark.parametrize(
    ("train", "test", "repeated"),
    [
        pytest.param(BYTES[:2], BYTES[2:], 0, id="none"),
        pytest.param(BYTES, BYTES[2:], 2, id="all"),
        pytest.param(BYTES[:3], BYTES[[3, 1, 1]], 2, id="one twice in the test part"),
        pytest.param(BYTES[[0, 0, 0]], BYTES[:2], 1, id="one thrice in the training part"),
        pytest.param(BYTES[:3], BYTES[:3] ^ LAST_BIT, 0, id="a bit"),
        pytest.param(BYTES, BYTES.reshape(4, 2, 3).transpose(0, 2, 1)[1:], 0, id="transposed"),
        pytest.param(np.asfortranarray(BYTES), BYTES[:, ::-1][:, ::-1], 4, id="another order"),
        pytest.param(FLOATS[:5, None], FLOATS[4:, None], 1, id="numbers"),
    ],
)
def test_test_examples_that_are_trained_on_are_counted(
    train: np.ndarray, test: np.ndarray, repeated: int
) -> None:
    assert dataset(train, test).count_repeated() == repeated


def test_training_examples_not_in_memory_are_not_compared() -> None:
    assert dataset(OneAtATime(BYTES), BYTES).count_repeated() is None


@pytest.mark.parametrize(("more", "repeated"), [(-1, None), (0, 1)])
def test_many_training_examples_are_not_compared(
    monkeypatch: pytest.MonkeyPatch, more: int, repeated: int | None
) -> None:
    monkeypatch.setattr(dataset_module, "MAX_COMPARED_BYTES", BYTES.nbytes + more)
    assert dataset(BYTES, BYTES[:1]).count_repeated() == repeated


def test_what_is_too_small_to_be_split_is_named() -> None:
    with pytest.raises(data.DataError) as error:
        data.hold_out(2, 0.5, 0, "my.npy")
    assert str(error.value) == "my.npy: 2 examples, at least 3 are needed to hold out a part"


# The fingerprint.


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


# Support.


@pytest.mark.parametrize(
    ("value", "likelihood", "expected"),
    [
        (-0.001, "bernoulli", r"in \[0, 1\]"),
        (1.001, "bernoulli", r"in \[0, 1\]"),
        (255.0, "bernoulli", r"in \[0, 1\]"),
        (np.nan, "bernoulli", r"in \[0, 1\]"),
        (np.inf, "bernoulli", r"in \[0, 1\]"),
        (np.inf, "gaussian", "finite"),
        (-np.inf, "gaussian", "finite"),
        (np.nan, "gaussian", "finite"),
    ],
)
@pytest.mark.parametrize("where", ["x", "my.npy"])
def test_values_outside_the_support_are_named_by_index(
    value: float, likelihood: str, expected: str, where: str
) -> None:
    x = np.full((3, 2, 2), 0.5)
    x[1, 0, 1] = x[2, 1, 1] = value
    message = (
        rf"^{re.escape(where)}\[1, 0, 1\] is {re.escape(str(value))}: the {likelihood} likelihood "
        f"needs values {expected}$"
    )
    more = {} if where == "x" else {"where": where}
    with pytest.raises(data.DataError, match=message):
        data.check_support(x, likelihood, **more)


def test_values_inside_the_support_pass() -> None:
    data.check_support(np.array([[0.0, 0.5, 1.0]]))
    data.check_support(np.array([[-1e30, 300.0]]), "gaussian")


def test_an_unknown_likelihood_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown likelihood 'poisson'.*'bernoulli'") as error:
        data.check_support(np.zeros(1), "poisson")
    assert not isinstance(error.value, data.DataError)


def test_a_likelihood_is_known_by_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks.FAMILIES, "poisson", networks.Gaussian())
    data.check_support(np.array([[3.0]]), "poisson")
    assert data.from_array(np.arange(8.0)[:, None], likelihood="poisson").train.dtype == np.float32
