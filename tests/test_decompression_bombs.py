"""Small files that would unpack to very large ones are refused before they do."""

import re
import resource
import tracemalloc
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_files import (
    LABELS,
    assert_holds,
    fill,
    npy,
    npy_header,
    parquet,
    png_of_header,
    refusal,
    zipped,
)

from jvae import data
from jvae.data import array_files


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
