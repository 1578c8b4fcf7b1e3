"""Arrays in `.npy` and `.npz` files come back, the parts by their names; nothing is unpickled."""

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tiny_files import (
    CHEAP,
    FRACTIONS,
    LABELS,
    LARGEST,
    PARTS,
    SEEDS,
    TABLE,
    assert_holds,
    assert_same,
    float32_tells_apart,
    has_constant_column,
    npz,
    refusal,
    zipped,
)

from jvae import data

# What was written is read back.


def as_read(array: np.ndarray) -> np.ndarray:
    if array.dtype == bool:
        return np.where(array, 255, 0).astype(np.uint8)
    if array.dtype == np.uint8 or (array.ndim > 2 and set(array.flat) <= set(range(256))):
        return np.where(array, 255, 0).astype(np.uint8) if array.max() <= 1 else array.astype("u1")
    if array.dtype.kind == "f" and array.ndim > 2:
        scaled = 255 * array.astype(np.float64)
        near = np.abs(scaled - np.round(scaled)) <= 1e-4
        if near.all() and scaled.min() >= 0 and np.round(scaled).max() <= 255:
            return np.round(scaled).astype(np.uint8)
    return array.astype(np.float32)


DTYPES = ["u1", "?", "<f4", ">f4", "<f8", "<f2", "i1", "<i2", ">i4", "<i8", "<u2", "<u8"]


@st.composite
def numbers(draw: st.DrawFn) -> np.ndarray:
    """An array of at least 4 examples, of 2 to 4 axes."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = (draw(st.integers(4, 9)), *draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    elements: st.SearchStrategy[Any]
    if dtype.kind == "f":
        bound = min(LARGEST, float(np.finfo(dtype).max))
        elements = st.floats(-bound, bound, width=8 * dtype.itemsize)  # type: ignore[arg-type]
    elif dtype.kind in "iu" and draw(st.booleans()):
        elements = st.integers(0, min(255, 2 ** (8 * dtype.itemsize - (dtype.kind == "i")) - 1))
    else:
        elements = npst.from_dtype(dtype)
    varied = len(shape) == 2 and dtype.kind in "iuf"
    array = draw(npst.arrays(dtype, shape, elements=elements, fill=st.nothing(), unique=varied))
    assume(array.dtype.kind not in "iuf" or float32_tells_apart(array))
    return np.asfortranarray(array) if draw(st.booleans()) else array


@CHEAP
@given(array=numbers(), fraction=FRACTIONS, seed=SEEDS, suffix=st.sampled_from([".npy", ".npz"]))
def test_arrays_come_back(array: np.ndarray, fraction: float, seed: int, suffix: str) -> None:
    expected = as_read(array)
    if array.ndim == 2 and expected.dtype == np.float32:
        assume(not has_constant_column(expected, fraction, seed))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"mine{suffix}")
        if suffix == ".npy":
            np.save(path, array)
        else:
            np.savez_compressed(path, anything=array)
        dataset = data.load_path(path, test_fraction=fraction, split_seed=seed)
        assert_holds(dataset, expected, fraction, seed)
        assert dataset.name == "mine"
        _, test = data.hold_out(len(array), fraction, seed)
        assert dataset.source == f"{path}, {len(test)} examples held out (seed {seed})"
        assert dataset.sha256 == data.content_sha256(dataset.train, dataset.test)
        same = data.from_array(array, test_fraction=fraction, split_seed=seed)
        assert_holds(same, expected, fraction, seed)
        assert same.sha256 == dataset.sha256


# The parts of an .npz file.

KERAS = {
    "x_train": "train",
    "y_train": "train_labels",
    "x_val": "valid",
    "y_val": "valid_labels",
    "x_test": "test",
    "y_test": "test_labels",
}


@pytest.mark.parametrize(
    "names",
    [
        {name: name for name in PARTS},
        KERAS,
        {name.replace("val", "valid"): part for name, part in KERAS.items()},
        {name: name for name in ("train", "test")},
        {name: name for name in ("train", "test", "test_labels")},
        {name: name for name in ("train", "valid", "test", "train_labels")},
        {"x_train": "train", "test": "test", "y_test": "test_labels"},
    ],
)
def test_parts_by_name(tmp_path: Path, names: dict[str, str]) -> None:
    path = tmp_path / "digits.npz"
    path.write_bytes(npz(**{name: PARTS[part] for name, part in names.items()}))
    dataset = data.load_path(path)
    for part, array in PARTS.items():
        if part in names.values():
            assert_same(getattr(dataset, part), array)
        else:
            assert getattr(dataset, part) is None
    assert dataset.name == "digits"
    assert dataset.source == str(path)
    arrays = [PARTS[part] for part in ("train", "valid", "test") if part in names.values()]
    assert dataset.sha256 == data.content_sha256(*arrays)


def test_labels_are_held_out_with_their_examples(tmp_path: Path) -> None:
    path = tmp_path / "z.npz"
    path.write_bytes(npz(x_train=TABLE, y_train=LABELS, x_val=TABLE[:3], y_val=LABELS[:3]))
    dataset = data.load_path(path, test_fraction=0.5, split_seed=4)
    train, test = data.hold_out(6, 0.5, 4)
    assert_holds(dataset, TABLE.astype(np.float32), 0.5, 4)
    np.testing.assert_array_equal(dataset.train_labels, train)
    np.testing.assert_array_equal(dataset.test_labels, test)
    assert dataset.valid is not None
    assert_same(dataset.valid, TABLE[:3].astype(np.float32))
    np.testing.assert_array_equal(dataset.valid_labels, [0, 1, 2])
    hashed = data.content_sha256(dataset.train, dataset.valid, dataset.test)
    assert dataset.sha256 == hashed


# Nothing is unpickled.


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


PICKLED: dict[str, Callable[[Path, Payload], object]] = {
    "an array of objects.npy": lambda path, payload: np.save(
        path, np.array([[payload]] * 3), allow_pickle=True
    ),
    "records with objects.npy": lambda path, payload: np.save(
        path, np.array([(1.0, payload)] * 3, "f8,O"), allow_pickle=True
    ),
    "a pickle.npy": lambda path, payload: path.write_bytes(pickle.dumps(payload)),
    "an old pickle.npy": lambda path, payload: path.write_bytes(pickle.dumps(payload, protocol=0)),
    "a pickle.npz": lambda path, payload: path.write_bytes(pickle.dumps(payload)),
    "objects.npz": lambda path, payload: np.savez(path, train=np.array([[payload]] * 3)),
    "objects beside.npz": lambda path, payload: np.savez(
        path, train=TABLE, other=np.array([payload], object)
    ),
    "labels that are objects.npz": lambda path, payload: np.savez(
        path, train=TABLE, train_labels=np.array([payload] * 6, object)
    ),
    "a pickle in.npz": lambda path, payload: path.write_bytes(
        zipped({"train.npy": pickle.dumps(payload)})
    ),
}


@pytest.mark.parametrize("name", PICKLED)
def test_nothing_is_unpickled(tmp_path: Path, name: str) -> None:
    trace = tmp_path / "unpickled"
    payload = Payload(trace)
    pickle.loads(pickle.dumps(payload)).close()  # noqa: S301
    assert trace.exists()
    trace.unlink()
    path = tmp_path / name
    PICKLED[name](path, payload)
    message = refusal(path)
    if "a pickle" not in name or name.endswith("npy"):
        assert message == (
            f"{path}: no .npy array, or one of pickled Python objects, which are never loaded"
        )
    assert not trace.exists()
