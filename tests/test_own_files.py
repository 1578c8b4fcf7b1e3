import csv
import gc
import io
import os
import pickle
import re
import resource
import struct
import tempfile
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from jvae import data
from jvae.data import array_files, own_files

CHEAP = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
GENERATOR = np.random.default_rng(0)
# Six rows of three numbers, no two alike.
TABLE = np.arange(18.0).reshape(6, 3) ** 2 - 0.5
LABELS = np.arange(6)
LARGEST = float(np.finfo(np.float32).max)


def with_value(value: float, *index: int) -> np.ndarray:
    """The table with another value there."""
    table = TABLE.copy()
    table[index] = value
    return table


def assert_same(array: np.ndarray, expected: np.ndarray) -> None:
    """To the last bit, and in type and shape."""
    assert array.dtype == expected.dtype
    assert array.shape == expected.shape
    assert array.tobytes() == expected.tobytes()


def assert_holds(
    dataset: data.Dataset, expected: np.ndarray, fraction: float = 0.1, seed: int = 0
) -> None:
    """The rows that `hold_out` names are the test part, all others the training part."""
    train, test = data.hold_out(len(expected), fraction, seed)
    assert_same(np.asarray(dataset.train), expected[train])
    assert_same(dataset.test, expected[test])
    whole = np.empty_like(expected)
    whole[train], whole[test] = dataset.train, dataset.test
    assert_same(whole, expected)


def all_of(examples: Any) -> np.ndarray:
    return np.stack([examples[i] for i in range(len(examples))])


def refusal(path: Path | str, **options: Any) -> str:
    """What `load_path` refuses the file with: one line that names it."""
    with pytest.raises(data.DataError) as error:
        data.load_path(path, **options)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 1000
    return message


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def zipped(members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def npy_header(shape: str, descr: str = "'<f8'", num_bytes: int = 64) -> bytes:
    """An .npy file whose header says so, with `num_bytes` of zeros."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header = header.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(num_bytes)


def parquet(columns: Mapping[str, Any] | pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def picture(*shape: int) -> np.ndarray:
    return GENERATOR.integers(0, 256, shape, np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_header(
    width: int, height: int, depth: int, colour: int, rows: bytes, before: bytes = b""
) -> bytes:
    """A PNG file put together by hand."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            before,
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


def tiff_of_16_bits(width: int, height: int) -> bytes:
    """A black TIFF file in colour, put together by hand."""
    size = 6 * width * height
    entries = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, 3, 8),  # bits a channel: at byte 8
        (259, 3, 1, 1),  # not compressed
        (262, 3, 1, 2),  # in colour
        (273, 4, 1, 14),  # the pixels: at byte 14
        (277, 3, 1, 3),
        (278, 3, 1, height),
        (279, 4, 1, size),
    ]
    return b"".join(
        [
            struct.pack("<2sHI3H", b"II", 42, 14 + size, 16, 16, 16),
            bytes(size),
            struct.pack("<H", len(entries)),
            *(struct.pack("<HHII", *entry) for entry in entries),
            bytes(4),
        ]
    )


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def fill(folder: Path, files: Mapping[str, bytes | np.ndarray]) -> Path:
    """The folder with these files; arrays are encoded after their suffix."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            Image.fromarray(content).save(path)
    return folder


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


def float32_tells_apart(array: np.ndarray) -> bool:
    """Whether each column is of one value, or varies by a part that float32 keeps well."""
    values = array.astype(np.float64)
    largest = np.abs(values).max(axis=0)
    varied = (np.ptp(values, axis=0) > largest / 100) & (largest > 1e-35)
    return bool((varied | (values == values[0]).all(axis=0)).all())


def has_constant_column(array: np.ndarray, fraction: float, seed: int) -> bool:
    train = array[data.hold_out(len(array), fraction, seed)[0]]
    return bool((train == train[0]).all(axis=0).any())


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


FRACTIONS = st.floats(0.01, 0.6)
SEEDS = st.integers(0, 2**32)


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


@st.composite
def tables(draw: st.DrawFn) -> np.ndarray:
    """float64 [rows, columns] within float32, no column constant in the rows that are left."""
    shape = draw(st.tuples(st.integers(4, 12), st.integers(1, 4)))
    elements = st.floats(-LARGEST, LARGEST)
    array = draw(npst.arrays(np.float64, shape, elements=elements, fill=st.nothing(), unique=True))
    assume(float32_tells_apart(array))
    assume(not has_constant_column(array.astype(np.float32), 0.1, 0))
    return array


@CHEAP
@given(
    table=tables(),
    suffix=st.sampled_from([".csv", ".tsv"]),
    delimiter=st.sampled_from(",;\t"),
    header=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    line_end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    last_line_ends=st.booleans(),
    choices=st.data(),
)
def test_text_tables_come_back(
    table: np.ndarray,
    suffix: str,
    delimiter: str,
    header: bool,
    encoding: str,
    line_end: str,
    quoting: Any,
    last_line_ends: bool,
    choices: st.DataObject,
) -> None:
    delimiter = "\t" if suffix == ".tsv" else delimiter
    rows: list[list[str]] = [[repr(float(value)) for value in row] for row in table]
    if header:
        name = st.text(f'xyé {delimiter}"', max_size=6)
        width = table.shape[1]
        rows.insert(0, choices.draw(st.lists(name, min_size=width, max_size=width)))
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=line_end).writerows(rows)
    written = text.getvalue() if last_line_ends else text.getvalue().removesuffix(line_end)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"table{suffix}")
        path.write_bytes(written.encode(encoding))
        assert_holds(data.load_path(path), table.astype(np.float32))


@CHEAP
@given(
    table=tables(),
    rows_a_group=st.integers(1, 5),
    compression=st.sampled_from(["none", "snappy", "zstd"]),
    choices=st.data(),
)
def test_parquet_tables_come_back(
    table: np.ndarray, rows_a_group: int, compression: str, choices: st.DataObject
) -> None:
    num, width = table.shape
    name = st.text(st.characters(codec="utf-8"), max_size=5)
    names = choices.draw(st.lists(name, min_size=width, max_size=width, unique=True))
    columns = dict(zip(names, table.T, strict=True))
    integers = choices.draw(st.booleans())
    expected = table
    if integers:
        counts = np.arange(num, dtype=choices.draw(st.sampled_from(["i1", "u2", "i4", "i8"])))
        columns["whole numbers"] = counts
        expected = np.column_stack([table, counts])
    # As pandas writes a table with an index.
    columns["__index_level_0__"] = np.arange(num)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "table.parquet")
        path.write_bytes(parquet(columns, row_group_size=rows_a_group, compression=compression))
        assert_holds(data.load_path(path), expected.astype(np.float32))


def test_columns_of_one_name_are_columns(tmp_path: Path) -> None:
    rows = "".join(f"{a},{b}\n" for a, b in TABLE[:, :2])
    columns = [pa.array(TABLE[:, i]) for i in (0, 1)]
    files = {
        "a.csv": f"x,x\n{rows}".encode(),
        "a.parquet": parquet(pa.Table.from_arrays(columns, names=["x", "x"])),
    }
    fill(tmp_path, files)
    for name in files:
        assert_holds(data.load_path(tmp_path / name), TABLE[:, :2].astype(np.float32))


FOLDER_NAMES = st.text("aB1_é", min_size=1, max_size=2)
FILE_NAMES = st.builds(
    "".join,
    st.tuples(
        st.text("aB1_é .", min_size=1, max_size=3).filter(lambda name: name[0] != "."),
        st.sampled_from([".png", ".PNG", ".bmp", ".tif", ".tiff"]),
    ),
)
PATHS = st.lists(
    st.tuples(st.lists(FOLDER_NAMES, max_size=2), FILE_NAMES).map(lambda p: (*p[0], p[1])),
    min_size=3,
    max_size=9,
    unique=True,
)


def walk_order(path: tuple[str, ...]) -> list[tuple[bool, str]]:
    """A folder's files come by name, then its folders by name."""
    return [*((True, folder) for folder in path[:-1]), (False, path[-1])]


@CHEAP
@given(paths=PATHS, colour=st.booleans(), fraction=FRACTIONS, seed=SEEDS, stream=st.booleans())
def test_images_come_back_in_the_order_of_their_paths(
    paths: list[tuple[str, ...]], colour: bool, fraction: float, seed: int, stream: bool
) -> None:
    images = {path: picture(2, 3, *[3] * colour) for path in paths}
    expected = np.stack([images[path] for path in sorted(paths, key=walk_order)])
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder, "mine"), {"/".join(path): image for path, image in images.items()})
        dataset = data.load_path(
            Path(folder, "mine"),
            test_fraction=fraction,
            split_seed=seed,
            stream_above=0 if stream else expected.nbytes,
        )
        assert isinstance(dataset.train, data.ImageFiles if stream else np.ndarray)
        if stream:
            in_memory = data.load_path(
                Path(folder, "mine"), test_fraction=fraction, split_seed=seed
            )
            assert_holds(in_memory, expected, fraction, seed)
            assert_same(all_of(dataset.train), np.asarray(in_memory.train))
            assert_same(dataset.test, in_memory.test)
        else:
            assert_holds(dataset, expected, fraction, seed)
        assert dataset.name == "mine"


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


def test_values_outside_the_support_are_named_in_tables(tmp_path: Path) -> None:
    path = fill(tmp_path, {"a.csv": b"rain,wind\n0,1\n1,0\n1,0.3\n1,1\n"}) / "a.csv"
    expected = f"{path}: row 3, column 2 ('wind') is 0.3: {ZERO_OR_ONE}"
    assert refusal(path, likelihood="bernoulli") == expected


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


# The parts of an .npz file.

PARTS = {
    "train": picture(5, 2, 3),
    "valid": picture(4, 2, 3),
    "test": picture(3, 2, 3),
    "train_labels": np.arange(5, dtype=np.int64),
    "valid_labels": np.arange(4, dtype=np.uint8),
    "test_labels": np.arange(3, dtype=np.int32),
}
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


# Folders of images.


def test_folders_train_and_test_are_the_parts(tmp_path: Path) -> None:
    images = [picture(4, 3) for _ in range(5)]
    names = ["train/b.png", "train/a/c.png", "train/d/e.png", "test/x.png", "test/deep/y.png"]
    dataset = data.load_path(fill(tmp_path / "cats", dict(zip(names, images, strict=True))))
    assert_same(dataset.train, np.stack(images[:3]))
    assert_same(dataset.test, np.stack(images[3:]))
    assert dataset.name == "cats"
    assert dataset.source == str(tmp_path / "cats")
    assert dataset.licence == "your own data"


@pytest.mark.parametrize(
    ("train", "valid", "test"),
    [
        ("train", "valid", "test"),
        ("training", "validation", "testing"),
        ("Train", "VAL", "Test"),
        ("TRAINING", "Valid", "tesTing"),
    ],
)
def test_folders_named_as_parts_in_any_case(
    tmp_path: Path, train: str, valid: str, test: str
) -> None:
    images = {
        part: {f"{folder}/{i}.png": picture(2, 2) for i in range(num)}
        for part, folder, num in (("train", train, 4), ("valid", valid, 3), ("test", test, 2))
    }
    expected = {part: np.stack(list(named.values())) for part, named in images.items()}
    for named in images.values():
        fill(tmp_path, named)
    for stream_above in (0, 10**6):
        dataset = data.load_path(tmp_path, stream_above=stream_above)
        assert_same(all_of(dataset.train), expected["train"])
        assert dataset.valid is not None
        assert_same(dataset.valid, expected["valid"])
        assert_same(dataset.test, expected["test"])
        assert dataset.source == str(tmp_path)
    for name in images["test"]:
        (tmp_path / name).unlink()
    # Without test, it is held out of train.
    dataset = data.load_path(tmp_path)
    assert_holds(dataset, expected["train"])
    assert dataset.valid is not None
    assert_same(dataset.valid, expected["valid"])
    assert dataset.source == f"{tmp_path}, 2 images held out (seed 0)"


def test_folders_of_two_names_for_a_part_are_one_part(tmp_path: Path) -> None:
    images = {name: picture(2, 2) for name in ("Train/a.png", "train/a.png", "training/a.png")}
    tests = {f"test/{i}.png": picture(2, 2) for i in range(2)}
    dataset = data.load_path(fill(tmp_path, images | tests))
    assert_same(dataset.train, np.stack(list(images.values())))


@pytest.mark.parametrize(
    ("names", "parts", "outside"),
    [
        (["train/a.png", "train/b.png", "test/a.png", "c.png"], "test, train", "c.png"),
        (["Train/a.png", "train/b.png", "trains/c.png"], "train", "trains/c.png"),
        (["a.png", "test/b.png", "test/c.png", "u/d.png"], "test", "a.png"),
        (
            ["train/a.png", "val/b.png", "test/c.png", "u/test/d.png"],
            "test, train, valid",
            "u/test/d.png",
        ),
        (["test/a.png", "test/b.png", "test/c.png"], "test", None),
        (["test/a.png", "validation/b.png", "test/c.png"], "test, valid", None),
    ],
)
def test_images_outside_the_parts_are_refused(
    tmp_path: Path, names: list[str], parts: str, outside: str | None
) -> None:
    fill(tmp_path, {name: picture(2, 2) for name in names})
    where = "none in train" if outside is None else f"outside ({tmp_path / outside})"
    assert refusal(tmp_path) == (
        f"{tmp_path} has images in {parts} and {where}: put all into folders train, test and "
        "perhaps valid, or none"
    )


def test_a_folder_train_alone_is_the_training_part(tmp_path: Path) -> None:
    images = {name: picture(2, 2) for name in ("train/a.png", "train/b.png", "train/u/c.png")}
    expected = np.stack(list(images.values()))
    assert_holds(data.load_path(fill(tmp_path, images)), expected)


def test_files_and_deeper_folders_named_as_parts_are_like_any_other(tmp_path: Path) -> None:
    images = {name: picture(2, 2) for name in ("test.png", "train.png", "u/test/a.png")}
    expected = np.stack(list(images.values()))
    assert_holds(data.load_path(fill(tmp_path, images)), expected)


def test_a_tiff_file_in_colour_by_lzw(tmp_path: Path) -> None:
    image = picture(6, 16, 3)
    fill(tmp_path, {f"{i}.tif": encoded(image, "TIFF", compression="tiff_lzw") for i in range(3)})
    assert_holds(data.load_path(tmp_path), np.stack([image] * 3))


def test_hidden_files_and_other_files_are_ignored(tmp_path: Path) -> None:
    images = {name: picture(2, 2) for name in ("a.png", "b/c.png", "d.e.JPG.png")}
    others = {
        ".hidden.png": b"",
        ".git/a.png": b"",
        "b/.thumbnails/a.png": b"",
        "labels.csv": b"",
        "Thumbs.db": b"",
        "png": b"",
        "a.png.txt": b"",
        "b/a.gif": b"",
    }
    dataset = data.load_path(fill(fill(tmp_path, images), others))
    assert_holds(dataset, np.stack([images[n] for n in ("a.png", "d.e.JPG.png", "b/c.png")]))
    for name in others:
        (tmp_path / name).unlink()
    assert data.load_path(tmp_path).sha256 == dataset.sha256


@pytest.mark.parametrize(
    ("kind", "suffix", "image", "expected"),
    [
        ("PNG", "png", Image.fromarray(np.eye(3) > 0), 255 * np.eye(3, dtype=np.uint8)),
        ("BMP", "bmp", Image.new("L", (3, 2), 7), np.full((2, 3), 7, np.uint8)),
        # What has a 16 in its file is not of 16 bits.
        ("BMP", "bmp", Image.new("L", (16, 2), 7), np.full((2, 16), 7, np.uint8)),
        ("BMP", "bmp", Image.new("L", (160, 2), 7), np.full((2, 160), 7, np.uint8)),
        (
            "BMP",
            "bmp",
            Image.new("RGB", (53, 2), (7, 8, 9)),
            np.full((2, 53, 3), [7, 8, 9], np.uint8),
        ),
        ("PPM", "pgm", Image.new("L", (3, 2), 7), np.full((2, 3), 7, np.uint8)),
        (
            "PPM",
            "ppm",
            Image.new("RGB", (3, 2), (7, 8, 9)),
            np.full((2, 3, 3), [7, 8, 9], np.uint8),
        ),
        (
            "TIFF",
            "tif",
            Image.new("RGB", (3, 2), (7, 8, 9)),
            np.full((2, 3, 3), [7, 8, 9], np.uint8),
        ),
        ("TIFF", "tiff", Image.new("L", (3, 2), 7), np.full((2, 3), 7, np.uint8)),
        ("JPEG", "jpg", Image.new("L", (16, 8), 128), np.full((8, 16), 128, np.uint8)),
        ("JPEG", "jpeg", Image.new("RGB", (8, 8), (128,) * 3), np.full((8, 8, 3), 128, np.uint8)),
        ("JPEG", "jpg", Image.new("CMYK", (8, 8)), np.full((8, 8, 3), 255, np.uint8)),
        ("WEBP", "webp", Image.new("RGB", (8, 8)), np.zeros((8, 8, 3), np.uint8)),
        # The colours of a palette are colours.
        (
            "PNG",
            "png",
            Image.new("RGB", (3, 2), (7, 8, 9)).quantize(2),
            np.full((2, 3, 3), [7, 8, 9], np.uint8),
        ),
    ],
)
def test_kinds_of_images(
    tmp_path: Path, kind: str, suffix: str, image: Image.Image, expected: np.ndarray
) -> None:
    fill(tmp_path, {f"{i}.{suffix}": encoded(image, kind) for i in range(3)})
    assert_holds(data.load_path(tmp_path), np.stack([expected] * 3))


# Refusals. In a table a name has the file or array and the message.

NUMBERS = "expected finite numbers"
NO_SHAPE = re.escape("expected (num, *data_shape)")
REFUSED_ARRAYS: dict[str, tuple[np.ndarray, str]] = {
    "NaN": (with_value(np.nan, 2, 1), f"row 3, column 2 is nan: {NUMBERS}"),
    "infinity": (
        with_value(-np.inf, 0, 2),
        f"row 1, column 3 is -inf: {NUMBERS}",
    ),
    "first of several": (
        np.where(TABLE < 80, TABLE, np.nan),
        f"row 4, column 1 is nan: {NUMBERS}",
    ),
    "NaN in images": (
        np.where(np.arange(24).reshape(4, 3, 2) == 9, np.nan, 0.5),
        f"row 2, column 2, 2 is nan: {NUMBERS}",
    ),
    "beyond float32": (
        with_value(1e39, 5, 0),
        rf"row 6, column 1 is 1e\+39: {NUMBERS}",
    ),
    "complex": (TABLE.astype(np.complex128), "values of type complex128, expected numbers"),
    "text": (np.array([["a"]] * 5), "values of type <U1, expected numbers"),
    "bytes": (np.array([[b"a"]] * 5), r"values of type \|S1, expected numbers"),
    "times": (np.zeros((5, 2), "M8[s]"), r"values of type datetime64\[s\], expected numbers"),
    "durations": (np.zeros((5, 2), "m8[s]"), r"values of type timedelta64\[s\], expected numbers"),
    "records": (np.zeros((5, 2), "f4,f4"), "values of type .*, expected numbers"),
    "no axis": (np.array(1.0), rf"shape \(\), {NO_SHAPE}"),
    "one axis": (np.arange(5.0), rf"shape \(5,\), {NO_SHAPE}"),
    "no rows": (np.zeros((0, 3)), rf"shape \(0, 3\), {NO_SHAPE}"),
    "no columns": (np.zeros((5, 0), np.uint8), rf"shape \(5, 0\), {NO_SHAPE}"),
    "constant column": (
        TABLE * [1, 0, 1] + [0, 2.5, 0],
        "column 2 is 2.5 in all 4 training rows: .*leave it out",
    ),
    "one training row": (TABLE[:3], "column 1 is -0.5 in all 1 training rows"),
}


@pytest.mark.parametrize("name", REFUSED_ARRAYS)
def test_arrays_are_refused(tmp_path: Path, name: str) -> None:
    array, message = REFUSED_ARRAYS[name]
    with pytest.raises(data.DataError, match=f"^array: {message}") as error:
        data.from_array(array)
    assert "\n" not in str(error.value)
    for suffix, raw in (("npy", npy(array)), ("npz", npz(train=array))):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(raw)
        assert re.match(message, refusal(path).removeprefix(f"{path}: "))


def test_objects_are_refused() -> None:
    objects = np.array([[object()]] * 5)
    with pytest.raises(data.DataError, match=r"^array: values of type object, expected numbers$"):
        data.from_array(objects)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            TABLE,
            TABLE[:, :2],
            r"test has examples of float32 \(2,\), train of float32 \(3,\)",
        ),
        (
            PARTS["train"],
            PARTS["test"] / 100,
            r"test has examples of float32 \(2, 3\), train of uint8 \(2, 3\)",
        ),
        # Of integers the values decide.
        (
            np.arange(4).reshape(4, 1, 1),
            np.arange(254, 257).reshape(3, 1, 1),
            r"test has examples of float32 \(1, 1\), train of uint8 \(1, 1\)",
        ),
        (TABLE, np.where(TABLE < 5, np.nan, TABLE), f"test: row 1, column 1 is nan: {NUMBERS}"),
        (TABLE * [1, 1, 0], TABLE, r"column 3 is 0.0 in all 6 training rows"),
        (TABLE, TABLE[:0], rf"test: shape \(0, 3\), {NO_SHAPE}"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    tmp_path: Path, train: np.ndarray, test: np.ndarray, message: str
) -> None:
    with pytest.raises(data.DataError, match=f"^mine: {message}"):
        data.from_array(train, test, name="mine")
    path = tmp_path / "a.npz"
    path.write_bytes(npz(train=train, test=test))
    assert re.match(message, refusal(path).removeprefix(f"{path}: "))


def test_check_varied() -> None:
    table = np.array([[1.0, 2.0, 3.0], [4.0, 2.0, 3.0]])
    with pytest.raises(
        data.DataError,
        match=re.escape("t.csv: column 2 ('b') is 2.0 in all 2 training rows"),
    ):
        data.check_varied(table, "t.csv", ["a", "b", "c"])
    images = np.array([[[1.0, 2.0], [5.0, 4.0]], [[2.0, 3.0], [5.0, 4.0]]])
    with pytest.raises(data.DataError, match=r"^x: column 2, 1 is 5\.0 in all 2 training rows"):
        data.check_varied(images, "x")
    data.check_varied(np.array([[1.0, 2.0], [1.0, 3.0], [2.0, 2.0]]), "x")


TRUNCATED = "not a whole .np[yz] file"
NAMES = "expected one array, or arrays named train, valid, test, train_labels, valid_labels, "
# file, bytes, message after "<path>: " or "<path> "
REFUSED_FILES: dict[str, tuple[str, bytes, str]] = {
    # Arrays.
    "two rows.npy": ("a.npy", npy(TABLE[:2]), "2 examples, at least 3 are needed"),
    "cut.npy": ("a.npy", npy(TABLE)[:-1], TRUNCATED),
    "cut in its header.npy": ("a.npy", npy(TABLE)[:50], TRUNCATED),
    "empty.npy": ("a.npy", b"", TRUNCATED),
    "a zip.npy": ("a.npy", npz(a=TABLE), "not an .npy file"),
    "a web page.npy": ("a.npy", b"<html>404</html>", ""),
    "claims terabytes.npy": ("a.npy", npy_header("(1000000000000, 2)"), TRUNCATED),
    "claims beyond 64 bits.npy": ("a.npy", npy_header(f"({10**30}, 2)"), TRUNCATED),
    "claims 2**66 numbers.npy": ("a.npy", npy_header(f"({2**32}, {2**32}, 4)"), TRUNCATED),
    "negative shape.npy": ("a.npy", npy_header("(-1, 2)"), TRUNCATED),
    "negative shapes.npy": ("a.npy", npy_header("(-2, -4)"), TRUNCATED),
    "true shape.npy": ("a.npy", npy_header("(True, 2)"), TRUNCATED),
    "unclosed header.npy": ("a.npy", b"\x93NUMPY\x01\x00\x08\x00" + b"((((((((", TRUNCATED),
    "unknown type.npy": ("a.npy", npy_header("(4, 2)", "'zz'"), TRUNCATED),
    # Archives.
    "cut.npz": ("a.npz", npz(train=TABLE)[:-1], TRUNCATED),
    "half.npz": ("a.npz", npz(train=TABLE)[:150], TRUNCATED),
    "empty.npz": ("a.npz", b"", TRUNCATED),
    "no zip.npz": ("a.npz", npy(TABLE), TRUNCATED),
    "text.npz": ("a.npz", b"hello", TRUNCATED),
    "an array cut in it.npz": ("a.npz", zipped({"train.npy": npy(TABLE)[:-8]}), TRUNCATED),
    "a byte flipped.npz": (
        "a.npz",
        (lambda raw: raw[:200] + bytes([raw[200] ^ 1]) + raw[201:])(npz(train=TABLE)),
        TRUNCATED,
    ),
    "no arrays.npz": ("a.npz", npz(), f"holds nothing: {NAMES}"),
    "unknown names.npz": ("a.npz", npz(x=TABLE, y=LABELS), f"holds x, y: {NAMES}"),
    "a name too many.npz": (
        "a.npz",
        npz(train=TABLE, test=TABLE, weights=TABLE),
        f"holds test, train, weights: {NAMES}",
    ),
    "two names for one.npz": (
        "a.npz",
        npz(train=TABLE, x_train=TABLE),
        f"holds train, x_train: {NAMES}",
    ),
    "test alone.npz": ("a.npz", npz(test=TABLE), f"holds test: {NAMES}"),
    "labels alone.npz": ("a.npz", npz(y_train=LABELS), f"holds train_labels: {NAMES}"),
    "labels without test.npz": (
        "a.npz",
        npz(train=TABLE, y_test=LABELS),
        "holds test_labels without test",
    ),
    "labels without valid.npz": (
        "a.npz",
        npz(train=TABLE, y_val=LABELS),
        "holds valid_labels without valid",
    ),
    "a label too few.npz": (
        "a.npz",
        npz(train=TABLE, train_labels=LABELS[:5]),
        r"train_labels are int64 \(5,\), expected integers \(6,\)",
    ),
    "labels of test.npz": (
        "a.npz",
        npz(train=TABLE, test=TABLE[:2], test_labels=LABELS),
        r"test_labels are int64 \(6,\), expected integers \(2,\)",
    ),
    "labels of valid.npz": (
        "a.npz",
        npz(train=TABLE, valid=TABLE[:2], y_val=LABELS),
        r"valid_labels are int64 \(6,\), expected integers \(2,\)",
    ),
    "labels in columns.npz": (
        "a.npz",
        npz(train=TABLE, train_labels=LABELS[:, None]),
        r"train_labels are int64 \(6, 1\), expected integers \(6,\)",
    ),
    "floats for labels.npz": (
        "a.npz",
        npz(train=TABLE, train_labels=LABELS / 2),
        r"train_labels are float64 \(6,\), expected integers \(6,\)",
    ),
    "names for labels.npz": (
        "a.npz",
        npz(train=TABLE, train_labels=np.array(["cat"] * 6)),
        r"train_labels are <U3 \(6,\), expected integers \(6,\)",
    ),
    "text in it.npz": ("a.npz", zipped({"notes.txt": b"hello"}), ""),
    "text for an array.npz": ("a.npz", zipped({"train.npy": b"hello"}), ""),
    "an empty array file.npz": ("a.npz", zipped({"train.npy": b""}), ""),
    "claims terabytes.npz": (
        "a.npz",
        zipped({"train.npy": npy_header("(1000000000000, 2)")}),
        TRUNCATED,
    ),
    "claims beyond 64 bits.npz": (
        "a.npz",
        zipped({"train.npy": npy_header(f"({10**30}, 2)")}),
        TRUNCATED,
    ),
    "deflate gone wrong.npz": (
        "a.npz",
        (lambda raw: raw[:45] + b"\xff" * 20 + raw[65:])(zipped({"train.npy": npy(TABLE)})),
        TRUNCATED,
    ),
    "encrypted.npz": (
        "a.npz",
        zipped({"train.npy": npy(TABLE)})
        .replace(b"PK\x03\x04\x14\x00\x00", b"PK\x03\x04\x14\x00\x01")
        .replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"),
        "",
    ),
    # Text.
    "empty.csv": ("a.csv", b"", ""),
    "blank.csv": ("a.csv", b"\n\n", ""),
    "a header alone.csv": ("a.csv", b"a,b\n", ""),
    "two rows.csv": ("a.csv", b"1,2\n3,4\n", "2 examples, at least 3 are needed"),
    "text in a cell.csv": (
        "a.csv",
        b"a,b\n1,2\n3,4\n5,six\n",
        r"line 4, column 2 \('b'\): 'six' is not a number",
    ),
    "text without a header.csv": (
        "a.csv",
        b"1,2\n3,4\nfive,6\n",
        "line 3, column 1: 'five' is not a number",
    ),
    "an empty cell.csv": (
        "a.csv",
        b"a,b,c\n1,2,3\n4,,6\n7,8,9\n",
        r"line 3, column 2 \('b'\): '' is not a number",
    ),
    "a missing value.tsv": (
        "a.tsv",
        b"1\t2\n3\tNA\n5\t6\n",
        "line 2, column 2: 'NA' is not a number",
    ),
    "blank lines count.csv": (
        "a.csv",
        b"a,b\n\n1,2\n\n3,x\n",
        r"line 5, column 2 \('b'\): 'x' is not a number",
    ),
    "an underscore.csv": ("a.csv", b"a,b\n1,2\n1_000,3\n4,5\n", ".*'1_000'"),
    "other digits.csv": ("a.csv", "a,b\n1,2\n٣,3\n4,5\n".encode(), ".*'٣'"),
    "hexadecimal.csv": (
        "a.csv",
        b"1,2\n0x10,3\n4,5\n",
        "line 2, column 1: '0x10' is not a number$",
    ),
    "two commas.csv": (
        "a.csv",
        b"a;b\n1,500,000;2\n3;4\n",
        r"line 2, column 1 \('a'\): '1,500,000' is not a number$",
    ),
    "a decimal comma alone.csv": (
        "a.csv",
        b"1;2\n3; -4,25 \n",
        "line 2, column 2: ' -4,25 ' is not a number: write a decimal point$",
    ),
    "numbers for names.csv": (
        "a.csv",
        b"0,1,2\n1,5,3\n4,5,6\n7,8,10\n",
        "line 1 is 0, 1, …, 2, as pandas numbers columns without names: name them, or write no "
        "header$",
    ),
    "numbers for names.tsv": ("a.tsv", b"0\t1\t2\t3\n1\t5\t3\t2\n", "line 1 is 0, 1, …, 3, as"),
    "an index alone.csv": ("a.csv", b'""\n0\n1\n2\n', rf"shape \(3, 0\), {NO_SHAPE}"),
    "decimal commas.csv": (
        "a.csv",
        b"a;b\n1,5;2\n3,5;4\n",
        r"line 2, column 1 \('a'\): '1,5' is not a number: write a decimal point$",
    ),
    "NaN.csv": (
        "a.csv",
        b"a,b\n1,2\n3,nan\n5,6\n7,8\n",
        rf"row 2, column 2 \('b'\) is nan: {NUMBERS}",
    ),
    "infinity.csv": ("a.csv", b"1,2\n3,4\n-inf,6\n7,8\n", f"row 3, column 1 is -inf: {NUMBERS}"),
    "beyond float64.csv": ("a.csv", b"1,2\n3,1e400\n5,6\n", f"row 2, column 2 is inf: {NUMBERS}"),
    "beyond float32.csv": (
        "a.csv",
        b"1,2\n3,-1e39\n5,6\n",
        rf"row 2, column 2 is -1e\+39: {NUMBERS}",
    ),
    "a row too short.csv": ("a.csv", b"1,2\n3\n5,6\n", "line 2: 1 columns, expected 2"),
    "a row too long.csv": ("a.csv", b"a,b\n1,2\n3,4,5\n", "line 3: 3 columns, expected 2"),
    "a name too many.csv": ("a.csv", b"a,b,c\n1,2\n3,4\n5,6\n", "3 names of columns for 2 columns"),
    "a name too few.csv": ("a.csv", b"a,b\n1,2,3\n4,5,6\n7,8,9\n", "2 names of columns for 3"),
    "Latin-1.csv": ("a.csv", "a,b\n1,é\n".encode("latin-1"), "not a text in UTF-8"),
    "Latin-1 far down.csv": (
        "a.csv",
        b"a,b\n" + b"1,2\n3,4\n" * 5000 + b"\xe9,1\n",
        "not a text in UTF-8",
    ),
    "UTF-16.csv": ("a.csv", "a,b\n1,2\n".encode("utf-16"), "not a text in UTF-8"),
    "a constant column.csv": (
        "a.csv",
        b"width,height\n1,2\n3,2\n5,2\n7,2\n9,2\n",
        r"column 2 \('height'\) is 2.0 in all 3 training rows: .*leave it out",
    ),
    "constant, with a quoted name.csv": (
        "a.csv",
        b'"width, cm","height, ""cm"""\n1,2\n3,2\n5,2\n7,2\n9,2\n',
        r"""column 2 \('height, "cm"'\) is 2.0 in all 3 training rows""",
    ),
    "constant, without names.csv": (
        "a.csv",
        b"1,2\n1,3\n1,4\n1,5\n",
        "column 1 is 1.0 in all 2 training rows",
    ),
    "a quote never closed.csv": ("a.csv", b'a,b\n1,2\n3,"4\n5,6\n', "line 4, column 2"),
    "a cell of 200,000 letters.csv": ("a.csv", b"1,2\n3," + b"x" * 200_000 + b"\n", ""),
    "a line of 200,000 letters.csv": ("a.csv", b"x" * 200_000, ""),
    "a byte of zero.csv": ("a.csv", b"1,2\n3,\0\n", "line 2, column 2: .* is not a number"),
    # A first row with a gap is no header.
    "an empty cell in the first row.csv": ("a.csv", b"1,,3\n4,5,6\n7,8,10\n9,5,2\n3,1,0\n", ""),
    "a missing value in the first row.csv": ("a.csv", b"1,NA\n3,4\n5,6\n7,8\n9,9\n", ""),
    # Parquet.
    "two rows.parquet": ("a.parquet", parquet({"a": [1.0, 2]}), "2 examples, at least 3"),
    "no rows.parquet": ("a.parquet", parquet({"a": np.zeros(0)}), ""),
    "no columns.parquet": ("a.parquet", parquet({}), "no columns"),
    "an index alone.parquet": ("a.parquet", parquet({"__index_level_0__": LABELS}), "no columns"),
    "text.parquet": (
        "a.parquet",
        parquet({"a": LABELS, "name": ["x"] * 6}),
        "column 'name' holds string, expected numbers",
    ),
    "booleans.parquet": (
        "a.parquet",
        parquet({"yes": [True, False, True]}),
        "column 'yes' holds bool, expected numbers",
    ),
    "times.parquet": (
        "a.parquet",
        parquet({"when": np.zeros(3, "M8[s]")}),
        r"column 'when' holds timestamp\[.*\], expected numbers",
    ),
    "lists.parquet": (
        "a.parquet",
        parquet({"l": [[1.0]] * 3}),
        "column 'l' holds list<.*>, expected numbers",
    ),
    "nothing but nulls.parquet": (
        "a.parquet",
        parquet({"n": pa.nulls(3)}),
        "column 'n' holds null, expected numbers",
    ),
    "a null.parquet": (
        "a.parquet",
        parquet({"a": [1.0, 2, 3, 4], "b": [1.0, 2, None, None]}),
        "row 3, column 'b' is empty: expected a number",
    ),
    "a null among integers.parquet": (
        "a.parquet",
        parquet({"a": [1, 2, 3, None]}, row_group_size=2),
        "row 4, column 'a' is empty: expected a number",
    ),
    "NaN.parquet": (
        "a.parquet",
        parquet({"a": [1.0, 2, 3], "b": [1.0, 2, np.nan]}),
        rf"row 3, column 2 \('b'\) is nan: {NUMBERS}",
    ),
    "a constant column.parquet": (
        "a.parquet",
        parquet({"a": TABLE[:, 0], "b": [1] * 6}),
        r"column 2 \('b'\) is 1.0 in all 4 training rows: .*leave it out",
    ),
    "cut.parquet": ("a.parquet", parquet({"a": LABELS})[:-1], "not a whole Parquet file"),
    "half.parquet": ("a.parquet", parquet({"a": LABELS})[:200], "not a whole Parquet file"),
    "empty.parquet": ("a.parquet", b"", "not a whole Parquet file"),
    "a table of text.parquet": ("a.parquet", b"a,b\n1,2\n", "not a whole Parquet file"),
    # Others.
    "a suffix too many.csv.gz": (
        "a.csv.gz",
        b"",
        "expected a folder of images or a file of .npy, .npz, .csv, .tsv, .parquet, got '.gz'",
    ),
    "one image.png": ("a.png", encoded(picture(2, 2)), "expected a folder of images.*got '.png'"),
    "no suffix": ("data", b"1,2\n", "expected a folder of images or a file of .*, got ''"),
}


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_files_are_refused(tmp_path: Path, name: str) -> None:
    file, raw, message = REFUSED_FILES[name]
    path = tmp_path / file
    path.write_bytes(raw)
    after = refusal(path).split(str(path), 1)[1]
    assert re.match(f"[:,]? ?{message}", after)


def test_no_file_is_left_open(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        for file, raw, _ in REFUSED_FILES.values():
            (tmp_path / file).write_bytes(raw)
            refusal(tmp_path / file)
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


@pytest.mark.parametrize("name", ["here.npy", "here", "a/b/c.csv", "a\0b.npy"])
def test_a_path_that_does_not_exist_is_refused(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path / name) == f"{tmp_path / name} does not exist"


def test_a_path_that_cannot_be_looked_at_is_refused() -> None:
    path = "a" * 300 + ".npy"
    assert refusal(path) == f"{path} cannot be read: File name too long"


def test_the_home_of_an_unknown_user_is_refused() -> None:
    refusal("~nobody-of-this-name/a.npy")


GREY = {f"{i}.png": picture(5, 4) for i in range(4)}
WHOLE = encoded(picture(50, 40))
JPEG = encoded(picture(50, 40), "JPEG")
PALETTE = Image.fromarray(picture(5, 4)).convert("P")
MODE = "an image of mode '{}', expected 8-bit grey or colour without transparency"
# The name of the file that is refused, beside four grey images of 5×4, and the message.
REFUSED_IMAGES: dict[str, tuple[str, bytes | np.ndarray, str]] = {
    "another size": ("z.png", picture(4, 5), " is 4×5 grey, {first} is 5×4 grey"),
    "colour": ("z.png", picture(5, 4, 3), " is 5×4 in colour, {first} is 5×4 grey"),
    "colours of a palette": ("z.png", encoded(PALETTE), " is 5×4 in colour, {first} is 5×4 grey"),
    "colour and transparency": ("z.png", picture(5, 4, 4), ": " + MODE.format("RGBA")),
    "grey and transparency": ("z.png", picture(5, 4, 2), ": " + MODE.format("LA")),
    "16 bits": ("z.png", picture(5, 4).astype(np.uint16), ": " + MODE.format("I;16")),
    "16 bits in TIFF": ("z.tif", picture(5, 4).astype(np.uint16), ": " + MODE.format("I;16")),
    "16 bits in PGM": ("z.pgm", b"P5 4 5 65535\n" + bytes(40), ": " + MODE.format("I;16")),
    "floats": ("z.tiff", picture(5, 4).astype(np.float32), ": " + MODE.format("F")),
    "text": ("deep/z.png", b"hello", ": not an image ("),
    "PostScript": ("z.png", encoded(picture(5, 4, 3), "EPS"), ": not an image ("),
    "GIF": ("z.png", encoded(picture(5, 4), "GIF"), ": not an image ("),
    "empty": ("z.JPG", b"", ": not an image ("),
    "a header cut": ("z.png", WHOLE[:20], ": not an image ("),
    "a bomb": (
        "z.png",
        png_of_header(100_000, 100_000, 8, 0, b""),
        ": refused as a decompression bomb (",
    ),
    "a small bomb": (
        "z.png",
        png_of_header(10_000, 10_000, 8, 0, b""),
        ": refused as a decompression bomb (",
    ),
    "a bomb of text": (
        "z.png",
        png_of_header(
            4, 5, 8, 0, bytes(25), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))
        ),
        ": not an image (",
    ),
}


@pytest.mark.parametrize("stream_above", [0, 10**6])
@pytest.mark.parametrize("name", REFUSED_IMAGES)
def test_images_are_refused(tmp_path: Path, name: str, stream_above: int) -> None:
    file, content, message = REFUSED_IMAGES[name]
    fill(tmp_path, {**GREY, file: content})
    expected = f"{tmp_path / file}{message.format(first=tmp_path / '0.png')}"
    assert refusal(tmp_path, stream_above=stream_above).startswith(expected)


# One kind of image in the whole folder.
REFUSED_KINDS = {
    "a palette with a transparent colour": encoded(PALETTE, transparency=3),
    "a palette with transparent colours": encoded(PALETTE, transparency=bytes([0, 128, 255])),
    "grey with a transparent value": encoded(picture(5, 4), transparency=3),
    "colour with a transparent value": encoded(picture(5, 4, 3), transparency=(1, 2, 3)),
    "16 bits in colour": png_of_header(4, 5, 16, 2, bytes(5 * 25)),
    "16 bits in colour, PPM": b"P6 4 5 65535\n" + bytes(120),
    "16 bits in colour, TIFF": tiff_of_16_bits(4, 5),
}


@pytest.mark.parametrize("name", REFUSED_KINDS)
def test_transparency_and_16_bits_are_refused(tmp_path: Path, name: str) -> None:
    suffix = {"PPM": "ppm", "TIFF": "tif"}.get(name.rpartition(", ")[2], "png")
    fill(tmp_path, {f"{i}.{suffix}": REFUSED_KINDS[name] for i in range(4)})
    mode = ".*;16" if "16 bits" in name else ".*A"
    expected = "expected 8-bit grey or colour without transparency"
    message = rf"{tmp_path / f'0.{suffix}'}: an image of mode '{mode}', {expected}"
    assert re.fullmatch(message, refusal(tmp_path))


CUT = {
    "PNG": ("z.png", WHOLE[:-100]),
    "PNG in its first row": ("z.png", WHOLE[:60]),
    "JPEG": ("z.jpg", JPEG[:-300]),
    "JPEG in its first rows": ("z.jpg", JPEG[: len(JPEG) // 2]),
    "BMP": ("z.bmp", encoded(picture(50, 40), "BMP")[:-100]),
    "PGM": ("z.pgm", encoded(picture(50, 40), "PPM")[:-100]),
}


@pytest.mark.parametrize("name", CUT)
def test_images_that_are_cut_are_refused(tmp_path: Path, name: str) -> None:
    file, content = CUT[name]
    fill(tmp_path, {f"{i}.png": picture(50, 40) for i in range(5)} | {file: content})
    message = re.escape(f"{tmp_path / file}: not a whole image (")
    # In whichever part it is, streamed or not.
    in_test = [5 in data.hold_out(6, 0.1, seed)[1] for seed in range(6)]
    for seed in (in_test.index(True), in_test.index(False)):
        for stream_above in (0, 10**6):
            assert re.match(message, refusal(tmp_path, split_seed=seed, stream_above=stream_above))


def test_folders_without_enough_images_are_refused(tmp_path: Path) -> None:
    suffixes = ".bmp, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp"
    fill(tmp_path, {"a.txt": b"", ".a.png": b""})
    assert refusal(tmp_path) == f"{tmp_path}: no images ({suffixes})"
    fill(tmp_path, {"a.png": picture(2, 2), "b.png": picture(2, 2)})
    assert "2 examples, at least 3 are needed" in refusal(tmp_path)


def test_a_folder_that_cannot_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, {f"{name}/{i}.png": picture(2, 2) for name in "ab" for i in range(3)})
    scandir = os.scandir

    def refusing(path: str) -> Any:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert "Permission denied" in refusal(tmp_path)


def test_names_that_are_no_unicode_are_names(tmp_path: Path) -> None:
    images = [picture(2, 2) for _ in range(3)]
    for name, image in zip([b"a.png", b"b.png", b"\xff.png"], images, strict=True):
        (tmp_path / os.fsdecode(name)).write_bytes(encoded(image))
    assert_holds(data.load_path(tmp_path), np.stack(images))


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("stream_above", [0, 10**6])
def test_fractions_outside_0_to_1_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fraction: float, stream_above: int
) -> None:
    monkeypatch.setattr(own_files, "MAX_STREAMED_TEST", 2)
    with pytest.raises(ValueError, match=f"between 0 and 1, got {fraction}"):
        data.load_path(fill(tmp_path, GREY), test_fraction=fraction, stream_above=stream_above)


# Delimiters are told by the rows, not by what stands within quotes.


@pytest.mark.parametrize(
    ("file", "header", "delimiter"),
    [
        ("a.csv", '"a,b,c";d', ";"),
        ("a.csv", '"a;b;c",d', ","),
        ("a.csv", '"a;b;c"\td', "\t"),
        ("a.tsv", '"a,b,c"\td', "\t"),
        ("a.tsv", "a,b,c\td", "\t"),
        ("a.csv", '"a\nb",c', ","),
        ("a.csv", '"a ""quoted"" name",c', ","),
    ],
)
def test_names_with_other_delimiters(
    tmp_path: Path, file: str, header: str, delimiter: str
) -> None:
    rows = "".join(f"{a}{delimiter}{b}\n" for a, b in TABLE[:, :2])
    (tmp_path / file).write_text(f"{header}\n{rows}")
    assert_holds(data.load_path(tmp_path / file), TABLE[:, :2].astype(np.float32))


@pytest.mark.parametrize(
    ("header", "delimiter", "names"),
    [
        ("a,b;c", ";", ["a,b", "c"]),
        ("a;b\tc,d", "\t", ["a;b", "c,d"]),
        ("a,b\tc", "\t", ["a,b", "c"]),
    ],
)
def test_a_tab_is_preferred_to_a_semicolon_and_that_to_a_comma(
    tmp_path: Path, header: str, delimiter: str, names: list[str]
) -> None:
    path = tmp_path / "a.csv"
    rows = [delimiter.join(map(str, row)) for row in TABLE[:, :2]]
    path.write_text("\n".join([header, *rows]))
    assert_holds(data.load_path(path), TABLE[:, :2].astype(np.float32))
    for i, name in enumerate(names):
        constant = TABLE[:, :2].copy()
        constant[:, i] = 7
        rows = [delimiter.join(map(str, row)) for row in constant]
        path.write_text("\n".join([header, *rows]))
        assert refusal(path).startswith(f"{path}: column {i + 1} ({name!r}) is 7.0 in all 4 ")


def test_an_index_without_a_name_is_dropped(tmp_path: Path) -> None:
    """As pandas writes a table."""
    expected = TABLE[:, :2].astype(np.float32)
    rows = "".join(f"{i},{a},{b}\n" for i, (a, b) in enumerate(TABLE[:, :2]))
    path = tmp_path / "a.csv"
    path.write_text(f",x,y\n{rows}")
    assert_holds(data.load_path(path), expected)
    # The columns that stay keep their names.
    path.write_text(",x,y\n" + "".join(f"{i},{a},7\n" for i, a in enumerate(TABLE[:, 0])))
    assert refusal(path).startswith(f"{path}: column 2 ('y') is 7.0 in all 4 training rows")
    # One with a name is a column, and so is one that does not count from 0.
    counted = np.column_stack([np.arange(6), TABLE[:, :2]]).astype(np.float32)
    path.write_text(f"i,x,y\n{rows}")
    assert_holds(data.load_path(path), counted)
    path.write_text(rows)
    assert_holds(data.load_path(path), counted)
    path.write_text(
        ",x,y\n" + "".join(f"{i + 1},{a},{b}\n" for i, (a, b) in enumerate(TABLE[:, :2]))
    )
    assert_holds(data.load_path(path), counted + np.array([1, 0, 0], np.float32))


def test_numbers_from_0_in_the_first_row_are_a_row_of_less_than_three(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("0,1\n5,7\n3,2\n9,4\n")
    assert_holds(data.load_path(path), np.array([[0, 1], [5, 7], [3, 2], [9, 4]], np.float32))
    path.write_text("0,1,3\n5,7,1\n3,2,2\n9,4,8\n")
    expected = np.array([[0, 1, 3], [5, 7, 1], [3, 2, 2], [9, 4, 8]], np.float32)
    assert_holds(data.load_path(path), expected)


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


# Bombs.


def cost_of_refusal(path: Path) -> tuple[str, int]:
    """The message, and the most bytes that Python and NumPy took at once."""
    tracemalloc.start()
    try:
        return refusal(path), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bomb_message(path: Path, unpacked: int) -> str:
    return (
        f"{path}: {path.stat().st_size:,} bytes would unpack to {unpacked:,}: refused as a "
        "decompression bomb; save it uncompressed if it is none"
    )


def test_an_npz_bomb_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "zeros.npz"
    size = 300 << 20
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("train.npy", "w") as member,
    ):
        header = npy_header(f"({size // 8}, 8)", "'|u1'", 0)
        member.write(header)
        for _ in range(size >> 20):
            member.write(bytes(1 << 20))
    message, peak = cost_of_refusal(path)
    assert message == bomb_message(path, size + len(header))
    assert peak < 1 << 20


def test_a_parquet_bomb_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "zeros.parquet"
    group = pa.table({"a": np.zeros(1 << 20), "b": np.zeros(1 << 20)})
    with pq.ParquetWriter(path, group.schema) as writer:
        for _ in range(20):
            writer.write_table(group)
    monkeypatch.setattr(pq.ParquetFile, "read", lambda self: pytest.fail("read"))
    assert refusal(path) == bomb_message(path, 8 * 40 << 20)


def test_a_parquet_bomb_of_text_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A string that is stored once and would be unpacked for every row."""
    path = tmp_path / "text.parquet"
    path.write_bytes(parquet({"a": LABELS, "text": ["x" * 100_000] * 6}))
    monkeypatch.setattr(pq.ParquetFile, "read", lambda self: pytest.fail("read"))
    assert refusal(path) == f"{path}: column 'text' holds string, expected numbers"


def test_an_image_bomb_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png_of_header(100_000, 100_000, 8, 0, bytes(1 << 20))
    fill(tmp_path, {f"{i}.png": bomb for i in range(3)})
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message, peak = cost_of_refusal(tmp_path)
    assert message.startswith(f"{tmp_path / '0.png'}: refused as a decompression bomb (")
    assert peak < 64 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


ZEROS = np.zeros((1000, 100), np.uint8)
ZEROS_NPZ = zipped({"train.npy": npy(ZEROS)})
CONSTANT = {name: np.full(10_000, 2.5) for name in "ab"}
CONSTANT_PARQUET = parquet(CONSTANT)


@pytest.mark.parametrize(
    ("file", "raw", "unpacked", "message_else"),
    [
        ("a.npz", ZEROS_NPZ, len(npy(ZEROS)), None),
        ("a.parquet", CONSTANT_PARQUET, 160_000, "column 1 .* is 2.5 in all 9000 training rows"),
    ],
    ids=["npz", "parquet"],
)
@pytest.mark.parametrize("bytes_over", [-1, 0], ids=["large", "small"])
@pytest.mark.parametrize("ratio_over", [False, True], ids=["dense", "sparse"])
def test_a_bomb_is_large_and_unpacks_to_many_times_its_size(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    raw: bytes,
    unpacked: int,
    message_else: str | None,
    bytes_over: int,
    ratio_over: bool,
) -> None:
    path = tmp_path / file
    path.write_bytes(raw)
    monkeypatch.setattr(array_files, "BOMB_BYTES", unpacked + bytes_over)
    ratio = Fraction(unpacked - ratio_over, len(raw))
    monkeypatch.setattr(array_files, "BOMB_RATIO", ratio)
    if bytes_over < 0 and ratio_over:
        assert refusal(path) == bomb_message(path, unpacked)
    elif message_else is None:
        assert_holds(data.load_path(path), ZEROS)
    else:
        assert re.search(message_else, refusal(path))


# Whatever bytes are there.

VALID_FILES: dict[str, bytes] = {
    "a.npy": npy(TABLE),
    "a.npz": zipped({"train.npy": npy(TABLE[:, :2]), "y_train.npy": npy(LABELS)}),
    "stored.npz": npz(train=TABLE),
    "a.csv": b'"a","b"\n1,2.5\n-3,4e1\n5,6\n7.25,8\n9,1\n',
    "a.tsv": b"1\t2.5\n-3\t4e1\n5\t6\n7.25\t8\n9\t1\n",
    "a.parquet": parquet({"a": TABLE[:, 0], "b": LABELS}, compression="none"),
    "small.parquet": parquet({"a": TABLE[:, 0]}, compression="zstd", write_statistics=False),
    "folder/z.png": encoded(picture(5, 4)),
    "folder/z.jpg": encoded(picture(5, 4), "JPEG", optimize=True),
    "folder/z.bmp": encoded(Image.fromarray(np.eye(5, 4) > 0), "BMP"),
    "folder/z.pgm": encoded(picture(5, 4), "PPM"),
}


@pytest.mark.parametrize("damage", ["cut", "flipped", "one bit flipped"])
@pytest.mark.parametrize("name", VALID_FILES)
def test_any_file_is_read_or_refused_in_a_line(tmp_path: Path, name: str, damage: str) -> None:
    """Cut anywhere, or with any byte changed."""
    whole = VALID_FILES[name]
    path = tmp_path / name
    target = path.parent if path.parent != tmp_path else path
    fill(tmp_path, {name: whole} | ({f"folder/{n}": GREY[n] for n in GREY} if "/" in name else {}))
    assert isinstance(data.load_path(target), data.Dataset)
    others: dict[int, object] = {}
    for i in range(len(whole)):
        flipped = whole[i] ^ (0xFF if damage == "flipped" else 1 << i % 8)
        path.write_bytes(
            whole[:i] + (b"" if damage == "cut" else bytes([flipped]) + whole[i + 1 :])
        )
        try:
            data.load_path(target)
            if damage == "cut" and path.suffix in (".npy", ".npz", ".parquet"):
                others[i] = "read"
        except data.DataError as error:
            if "\n" in str(error) or str(target) not in str(error):
                others[i] = error
        except Exception as error:
            others[i] = error
    assert not others


# Folders that do not fit into memory.


def test_a_large_folder_is_streamed(tmp_path: Path) -> None:
    files = {f"{i // 5}/{i % 5}.png": picture(3, 4, 3) for i in range(20)}
    fill(tmp_path, files)
    images = np.stack(list(files.values()))
    train, test = data.hold_out(20, 0.2, 7)
    whole = data.load_path(tmp_path, test_fraction=0.2, split_seed=7)
    assert isinstance(whole.train, np.ndarray)
    streamed = data.load_path(
        tmp_path, test_fraction=0.2, split_seed=7, stream_above=16 * 3 * 4 * 3 - 1
    )
    assert isinstance(streamed.train, data.ImageFiles)
    assert isinstance(streamed.train, data.Examples)
    assert streamed.train.shape == whole.train.shape == (16, 3, 4, 3)
    assert streamed.train.dtype == whole.train.dtype == np.uint8
    assert streamed.train.nbytes == whole.train.nbytes == 16 * 3 * 4 * 3
    assert len(streamed.train) == 16
    assert streamed.data_shape == (3, 4, 3)
    assert streamed.values == (images[test].min(), images[test].max())
    assert streamed.train.paths == tuple(tmp_path / list(files)[i] for i in train)
    for i, number in enumerate(train):
        assert_same(streamed.train[i], images[number])
        assert_same(streamed.train[np.int64(i)], images[number])
    assert_same(streamed.train[-1], images[train[-1]])
    with pytest.raises(IndexError):
        streamed.train[16]
    assert isinstance(streamed.test, np.ndarray)
    assert_same(streamed.test, images[test])
    assert_same(whole.test, images[test])
    for name in ("name", "source", "sha256", "licence"):
        assert getattr(streamed, name) == getattr(whole, name)


@pytest.mark.parametrize(("stream_above", "streamed"), [(17, True), (18, False)])
def test_the_training_part_is_streamed_above_the_limit(
    tmp_path: Path, stream_above: int, streamed: bool
) -> None:
    files = {f"train/{i}.png": picture(2, 3) for i in range(3)}
    files |= {f"test/{i}.png": picture(2, 3) for i in range(9)}
    dataset = data.load_path(fill(tmp_path, files), stream_above=stream_above)
    assert isinstance(dataset.train, data.ImageFiles if streamed else np.ndarray)
    assert_same(all_of(dataset.train), np.stack(list(files.values())[:3]))
    assert_same(dataset.test, np.stack(list(files.values())[3:]))


def test_the_test_part_of_a_streamed_folder_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_files, "MAX_STREAMED_TEST", 3)
    files = {f"{i:02}.png": picture(2, 3) for i in range(20)}
    fill(tmp_path, files)
    images = np.stack(list(files.values()))
    for fraction, num_test in ((0.1, 2), (0.15, 3), (0.5, 3)):
        dataset = data.load_path(tmp_path, test_fraction=fraction, stream_above=0)
        assert_same(dataset.test, images[data.hold_out(20, num_test / 20, 0)[1]])
        assert len(dataset.train) == 20 - num_test
    assert len(data.load_path(tmp_path, test_fraction=0.5).test) == 10


def test_files_that_change_while_they_are_used_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, GREY)
    train = data.load_path(tmp_path, stream_above=0).train
    file = train.paths[0]
    for image, message in ((picture(5, 5), r"\(5, 5\)"), (picture(4, 5, 3), r"\(4, 5\)")):
        file.write_bytes(encoded(image))
        with pytest.raises(data.DataError, match=f"^{file}: changed to an image of {message}"):
            train[0]
    file.unlink()
    with pytest.raises(data.DataError, match=f"^{file}: not a whole image .*No such file"):
        train[0]


# Hashes.


def test_the_hash_of_a_folder_is_of_names_and_bytes(tmp_path: Path) -> None:
    fill(tmp_path, {f"{i}.png": picture(4, 4) for i in range(4)})
    (tmp_path / "1.png").write_bytes(encoded(Image.new("L", (4, 4), 7)))

    def sha256() -> str:
        return data.load_path(tmp_path).sha256

    seen = [sha256()]
    os.utime(tmp_path / "1.png", (0, 0))
    (tmp_path / "1.png").chmod(0o600)
    (tmp_path / "notes.txt").write_text("")
    assert sha256() == seen[0]
    (tmp_path / "moved").mkdir()
    changes: list[Callable[[], object]] = [
        lambda: (tmp_path / "1.png").write_bytes(encoded(Image.new("L", (4, 4), 8))),
        lambda: (tmp_path / "1.png").rename(tmp_path / "11.png"),
        lambda: (tmp_path / "11.png").rename(tmp_path / "moved" / "11.png"),
        lambda: (tmp_path / "moved" / "11.png").rename(tmp_path / "moved" / "12.png"),
        lambda: (tmp_path / "moved").rename(tmp_path / "again"),
        # The same pixels in other bytes.
        lambda: (tmp_path / "again" / "12.png").write_bytes(
            encoded(Image.new("L", (4, 4), 8), compress_level=0)
        ),
        lambda: fill(tmp_path, {"again/13.png": picture(4, 4)}),
        lambda: (tmp_path / "0.png").unlink(),
    ]
    for change in changes:
        change()
        seen.append(sha256())
    assert len(set(seen)) == 1 + len(changes)


def test_the_hash_of_a_folder_is_of_its_parts(tmp_path: Path) -> None:
    fill(tmp_path, {f"{i}.png": picture(4, 4) for i in range(8)})
    splits = [(fraction, seed) for fraction in (0.1, 0.5) for seed in (0, 1)]

    def sha256(path: Path, stream_above: int) -> list[str]:
        return [
            data.load_path(
                path, test_fraction=fraction, split_seed=seed, stream_above=stream_above
            ).sha256
            for fraction, seed in splits
        ]

    hashes = sha256(tmp_path, 10**6)
    assert len(set(hashes)) == len(splits)
    assert sha256(tmp_path, 0) == hashes
    other = tmp_path.rename(tmp_path.with_name("other"))
    assert sha256(other, 10**6) == hashes
    # Nor is an image in one part the same in another.
    moves = [f"{part}/{i}.png" for i, part in enumerate(["train"] * 4 + ["test"] * 4)]
    images = {name: picture(4, 4) for name in moves}
    parts = [images, {name.replace("train", "valid", 1): i for name, i in images.items()}]
    parts[1]["train/9.png"] = picture(4, 4)
    first, second = (
        data.load_path(fill(other / str(i), named)).sha256 for i, named in enumerate(parts)
    )
    assert first != second


def test_swapped_contents_change_the_hash(tmp_path: Path) -> None:
    a, b, c = (picture(4, 4) for _ in range(3))
    first = data.load_path(fill(tmp_path / "1", {"a.png": a, "b.png": b, "c.png": c}))
    second = data.load_path(fill(tmp_path / "2", {"a.png": b, "b.png": a, "c.png": c}))
    assert first.sha256 != second.sha256


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


# `load` takes paths too.


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
