"""How a user's own arrays become a dataset: types, the support of a likelihood, parts, the hash."""

import re
from pathlib import Path

import numpy as np
import pytest
from tiny_files import (
    GREY,
    LARGEST,
    TABLE,
    assert_holds,
    assert_same,
    fill,
    npy,
    npz,
    parquet,
    picture,
    refusal,
)

from jvae import data
from jvae.data import own_files

# Types.

EIGHT_BIT = np.arange(256, dtype=np.uint8).reshape(256, 1, 1)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[0, 255], [7, 8], [9, 9], [9, 1]], np.uint8), None),
        (np.array([[0, 2], [1, 1], [0, 0], [1, 0]], np.uint8), None),
        (
            np.array([[0, 1], [1, 1], [0, 0], [1, 0]], np.uint8),
            np.array([[0, 255], [255, 255], [0, 0], [255, 0]], np.uint8),
        ),
        (
            np.array([[True, False], [False, False], [False, False], [True, True]]),
            np.array([[255, 0], [0, 0], [0, 0], [255, 255]], np.uint8),
        ),
        (
            np.array([[[True]], [[False]], [[False]], [[True]]]),
            np.array([[[255]], [[0]], [[0]], [[255]]], np.uint8),
        ),
        (
            np.array([[[0]], [[255]], [[1]], [[2]]], np.int64),
            np.array([[[0]], [[255]], [[1]], [[2]]], np.uint8),
        ),
        (
            np.array([[[0]], [[255]], [[1]], [[2]]], np.uint16),
            np.array([[[0]], [[255]], [[1]], [[2]]], np.uint8),
        ),
        (
            np.array([[[0]], [[256]], [[1]], [[2]]], np.int64),
            np.array([[[0]], [[256]], [[1]], [[2]]], np.float32),
        ),
        (
            np.array([[[0]], [[255]], [[-1]], [[2]]], np.int16),
            np.array([[[0]], [[255]], [[-1]], [[2]]], np.float32),
        ),
        (
            np.array([[0], [1], [2], [3]], np.int64),
            np.array([[0], [1], [2], [3]], np.float32),
        ),
        (np.array([[0.0], [1], [2], [3]], np.float32), None),
        (
            np.array([[[0.0]], [[1]], [[2]], [[255]]], np.float32),
            np.array([[[0]], [[1]], [[2]], [[255]]], np.uint8),
        ),
        (
            np.array([[[0.0]], [[1]], [[1]], [[0]]], np.float64),
            np.array([[[0]], [[255]], [[255]], [[0]]], np.uint8),
        ),
        (
            np.array([[[0]], [[1]], [[1]], [[0]]], np.int16),
            np.array([[[0]], [[255]], [[255]], [[0]]], np.uint8),
        ),
        (np.array([[[0.0]], [[256]], [[2]], [[255]]], np.float32), None),
        (np.array([[[0.0]], [[-1]], [[2]], [[255]]], np.float32), None),
        (np.array([[[0.5]], [[1]], [[2]], [[255]]], np.float32), None),
        # All of the 8-bit values divided by 255, in either precision, and almost.
        (EIGHT_BIT.astype(np.float32) / np.float32(255), EIGHT_BIT),
        (EIGHT_BIT / 255, EIGHT_BIT),
        ((EIGHT_BIT + 0.9e-4) / 255, EIGHT_BIT),
        ((EIGHT_BIT[1:] - 0.9e-4) / 255, EIGHT_BIT[1:]),
        ((EIGHT_BIT + 1.1e-4) / 255, ((EIGHT_BIT + 1.1e-4) / 255).astype(np.float32)),
        ((EIGHT_BIT - 1e-5) / 255, ((EIGHT_BIT - 1e-5) / 255).astype(np.float32)),
        ((EIGHT_BIT + 1.0) / 255, ((EIGHT_BIT + 1.0) / 255).astype(np.float32)),
        # With one axis an example, they are numbers of a table.
        (
            np.array([[0.0], [1], [128], [255]]) / 255,
            np.array([[0], [1 / 255], [128 / 255], [1]], "f4"),
        ),
        # Bytes that wrap around are none.
        (
            np.array([[[0]], [[-257]], [[-514]], [[-771]]], np.int16),
            np.array([[[0]], [[-257]], [[-514]], [[-771]]], np.float32),
        ),
        (
            np.array([[[0]], [[-1]], [[127]], [[2]]], np.int8),
            np.array([[[0]], [[-1]], [[127]], [[2]]], np.float32),
        ),
        (np.array([[[0.5]], [[1e38]], [[2]], [[3]]], np.float32), None),
        (
            np.array([[0.1], [1], [2], [3]], np.float64),
            np.array([[0.1], [1], [2], [3]], np.float32),
        ),
        (
            np.array([[0.1], [1], [2], [3]], ">f2"),
            np.array([[0.0999755859375], [1], [2], [3]], np.float32),
        ),
        (
            np.array([[LARGEST], [-LARGEST], [1e-50], [3]]),
            np.array([[LARGEST], [-LARGEST], [0], [3]], np.float32),
        ),
    ],
)
def test_types(array: np.ndarray, expected: np.ndarray | None) -> None:
    assert_holds(data.from_array(array), array if expected is None else expected)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (np.array([[0, 200], [7, 8]], np.uint8), np.array([[0, 1], [1, 0]], np.uint8)),
        (np.array([[0, 1], [1, 1]], np.uint8), np.array([[0, 2], [1, 0]], np.uint8)),
        (np.array([[[0.0]], [[2]]]), np.array([[[0.0]], [[1]]])),
    ],
)
def test_dark_pixels_of_one_part_are_on_the_scale_of_the_other(
    train: np.ndarray, test: np.ndarray
) -> None:
    dataset = data.from_array(train, test)
    assert_same(np.asarray(dataset.train), train.astype(np.uint8))
    assert_same(dataset.test, test.astype(np.uint8))


def test_images_of_one_value_pass() -> None:
    """Only the columns of tables of floats must vary."""
    assert_holds(data.from_array(np.full((4, 2, 2), 0.3)), np.full((4, 2, 2), 0.3, np.float32))
    assert_holds(data.from_array(np.zeros((4, 2), np.uint8)), np.zeros((4, 2), np.uint8))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (1e9 + np.arange(6.0)[:, None], "column 1 has values near 1000000000.0"),
        (2**40 + np.arange(6)[:, None], "column 1 has values near 1099511627776"),
        (
            np.column_stack([TABLE[:, 0], 1e9 + TABLE[:, 1]]),
            "column 2 has values near 1000000000.5",
        ),
        # A column of one value loses nothing.
        (
            np.column_stack([np.full(6, 0.1), 1e9 + np.arange(6.0)]).reshape(6, 2, 1),
            "column 2, 1 has values near 1000000000.0",
        ),
        (2**40 + np.arange(24).reshape(6, 2, 2), "column 1, 1 has values near 1099511627776"),
    ],
)
def test_values_that_float32_cannot_tell_apart_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(data.DataError) as error:
        data.from_array(array)
    assert str(error.value) == (
        f"array: {message} that differ by less than float32 keeps: subtract a constant"
    )
    less = array - array[0]
    assert_holds(data.from_array(less + 0.5), (less + 0.5).astype(np.float32))


# The support of a likelihood.

BITS = np.array([[0.0, 1, 0], [1, 1, 0], [0, 1, 0], [1, 1, 0]])


@pytest.mark.parametrize(
    ("array", "likelihood", "expected"),
    [
        # Bits and pixels are in the support of a Bernoulli, a constant column too.
        (BITS, "bernoulli", BITS.astype(np.float32)),
        (BITS, None, BITS.astype(np.float32)),
        (BITS.astype(bool), "bernoulli", (255 * BITS).astype(np.uint8)),
        (BITS.astype(int), "bernoulli", BITS.astype(np.float32)),
        (PIXELS := picture(4, 3), "bernoulli", PIXELS),
        (PIXELS, "gaussian", PIXELS),
        (PIXELS[:, None].astype(int), "bernoulli", PIXELS[:, None]),
        (BITS[:, None], "gaussian", (255 * BITS[:, None]).astype(np.uint8)),
        (BITS[:, None], "bernoulli", (255 * BITS[:, None]).astype(np.uint8)),
        (BITS.astype(np.uint8), "bernoulli", (255 * BITS).astype(np.uint8)),
        (TABLE, "gaussian", TABLE.astype(np.float32)),
    ],
)
def test_values_inside_the_support_pass(
    array: np.ndarray, likelihood: str | None, expected: np.ndarray
) -> None:
    assert_holds(data.from_array(array, likelihood=likelihood), expected)


ZERO_OR_ONE = "expected 0 or 1 under a bernoulli likelihood, or 8-bit pixels to be binarised"


@pytest.mark.parametrize(
    ("array", "likelihood", "message"),
    [
        (TABLE, "bernoulli", f"row 1, column 1 is -0.5: {ZERO_OR_ONE}"),
        (BITS / 2, "bernoulli", f"row 1, column 2 is 0.5: {ZERO_OR_ONE}"),
        (np.where(BITS > 0, np.nan, 0), "bernoulli", f"row 1, column 2 is nan: {ZERO_OR_ONE}"),
        (2 * BITS.astype(int), "bernoulli", f"row 1, column 2 is 2: {ZERO_OR_ONE}"),
        (BITS[:, None] / 4, "bernoulli", f"row 1, column 1, 2 is 0.25: {ZERO_OR_ONE}"),
        # Almost 0 is not 0.
        (BITS + 1e-12, "bernoulli", f"row 1, column 1 is 1e-12: {ZERO_OR_ONE}"),
        (BITS, "gaussian", "column 2 is 1.0 in all 2 training rows"),
    ],
)
def test_values_outside_the_support_are_refused(
    tmp_path: Path, array: np.ndarray, likelihood: str, message: str
) -> None:
    with pytest.raises(data.DataError, match=f"^array: {re.escape(message)}"):
        data.from_array(array, likelihood=likelihood)
    path = tmp_path / "a.npy"
    path.write_bytes(npy(array))
    assert refusal(path, likelihood=likelihood).startswith(f"{path}: {message}")


def test_grey_targets_are_no_data_of_a_bernoulli() -> None:
    data.check_support(BITS / 2)
    with pytest.raises(data.DataError, match=re.escape(f"is 0.5: {ZERO_OR_ONE}")):
        data.from_array(BITS / 2, likelihood="bernoulli")


def test_values_outside_the_support_are_named_in_tables(tmp_path: Path) -> None:
    path = fill(tmp_path, {"a.csv": b"rain,wind\n0,1\n1,0\n1,0.3\n1,1\n"}) / "a.csv"
    expected = f"{path}: row 3, column 2 ('wind') is 0.3: {ZERO_OR_ONE}"
    assert refusal(path, likelihood="bernoulli") == expected


# The parts.


def test_from_array_with_a_test_part() -> None:
    train, test = TABLE[:4], TABLE[4:]
    dataset = data.from_array(train, test, name="measurements")
    assert_same(np.asarray(dataset.train), train.astype(np.float32))
    assert_same(dataset.test, test.astype(np.float32))
    assert dataset.name == dataset.source == "measurements"
    assert dataset.licence == "your own data"
    assert dataset.sha256 == data.content_sha256(dataset.train, dataset.test)
    assert dataset.train_labels is dataset.test_labels is dataset.valid is None
    # A single test example was asked for and is given.
    assert len(data.from_array(train, test[:1]).test) == 1


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("stream_above", [0, 10**6])
def test_fractions_outside_0_to_1_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fraction: float, stream_above: int
) -> None:
    monkeypatch.setattr(own_files, "MAX_STREAMED_HELD_OUT", 2)
    with pytest.raises(ValueError, match=f"between 0 and 1, got {fraction}"):
        data.load_path(fill(tmp_path, GREY), test_fraction=fraction, stream_above=stream_above)


# The hash.


def test_the_hash_is_of_the_content_wherever_it_was_read(tmp_path: Path) -> None:
    table = TABLE.astype(np.float32)
    train, test = (table[part] for part in data.hold_out(6, 0.1, 0))
    text = "\n".join(",".join(map(str, row)) for row in TABLE.tolist())
    files = {
        "held out.npy": npy(TABLE),
        "float32.npy": npy(table),
        "big-endian.npy": npy(table.astype(">f4")),
        "column-major.npy": npy(np.asfortranarray(TABLE)),
        "held out.npz": npz(anything=TABLE),
        "both parts.npz": npz(train=train, test=test),
        "Keras.npz": npz(x_train=train, x_test=test, y_train=np.zeros(len(train), int)),
        "table.csv": text.encode(),
        "table.parquet": parquet(dict(zip("abc", TABLE.T, strict=True))),
    }
    fill(tmp_path, files)
    hashes = {data.load_path(tmp_path / name).sha256 for name in files}
    assert hashes == {data.content_sha256(train, test)}
    others = [
        npz(train=test, test=train),
        npz(train=train[::-1], test=test),
        npz(train=train, test=test, valid=test),
        npz(train=train, test=np.nextafter(test, np.float32(99))),
    ]
    for other in others:
        (tmp_path / "other.npz").write_bytes(other)
        hashes.add(data.load_path(tmp_path / "other.npz").sha256)
    assert len(hashes) == 1 + len(others)
