import dataclasses
import hashlib
import re
from typing import Any

import numpy as np
import pytest

from jvae import data


def dataset(train: Any, test: np.ndarray, **more: Any) -> data.Dataset:
    return data.Dataset(
        name="mine", train=train, test=test, source="memory", sha256="0", licence="none", **more
    )


BYTES = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
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
            (0, 255),
            False,
            "mine: uint8 [3, 2], 4 training, 2 test examples, values 0 to 255",
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
            (0, 255),
            False,
            "mine: uint8 [1], 2 training, 1 test examples, values 0 to 255",
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
            (0, 255),
            True,
            "mine: uint8 [1], 60,000 training, 10,000 test examples, values 0 to 255",
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
