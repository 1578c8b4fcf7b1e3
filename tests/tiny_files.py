"""A user's own data in tiny files of every kind, and what `load_path` makes of them."""

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

from jvae import data

CHEAP = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FRACTIONS = st.floats(0.01, 0.6)
SEEDS = st.integers(0, 2**32)
GENERATOR = np.random.default_rng(0)
# Six rows of three numbers, no two alike.
TABLE = np.arange(18.0).reshape(6, 3) ** 2 - 0.5
LABELS = np.arange(6)
LARGEST = float(np.finfo(np.float32).max)


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


def float32_tells_apart(array: np.ndarray) -> bool:
    """Whether each column is of one value, or varies by a part that float32 keeps well."""
    values = array.astype(np.float64)
    largest = np.abs(values).max(axis=0)
    varied = (np.ptp(values, axis=0) > largest / 100) & (largest > 1e-35)
    return bool((varied | (values == values[0]).all(axis=0)).all())


def has_constant_column(array: np.ndarray, fraction: float, seed: int) -> bool:
    train = array[data.hold_out(len(array), fraction, seed)[0]]
    return bool((train == train[0]).all(axis=0).any())


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


PARTS = {
    "train": picture(5, 2, 3),
    "valid": picture(4, 2, 3),
    "test": picture(3, 2, 3),
    "train_labels": np.arange(5, dtype=np.int64),
    "valid_labels": np.arange(4, dtype=np.uint8),
    "test_labels": np.arange(3, dtype=np.int32),
}
GREY = {f"{i}.png": picture(5, 4) for i in range(4)}
