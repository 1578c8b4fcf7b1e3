import gzip
import io
import re
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from tiny_sources import amat, idx, mat, refusal, tar_gz, zipped

from jvae.data import raw_formats, read_idx

AGAIN = r"\): download it again"
WEB_PAGE = b"<!DOCTYPE html>\n<html><body>404: not found</body></html>\n"


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file, of which a refusal must say the whole path."""
    return tmp_path / "a folder" / "raw file"


def refused(path: Path, content: bytes, read: Callable[[], object]) -> str:
    """What the refusal says after the path of the file."""
    path.parent.mkdir()
    path.write_bytes(content)
    message = refusal(read)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


# IDX.

IMAGES = random_bytes(5, 28, 28)
IDX_IMAGES = idx(IMAGES)
GZIPPED = gzip.compress(IDX_IMAGES)


@pytest.mark.parametrize(
    "shape", [(3,), (0,), (5, 28, 28), (0, 28, 28), (1, 1, 1), (2, 3, 4, 5), (257, 1)]
)
def test_idx_is_read_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = random_bytes(*shape)
    (tmp_path / "file").write_bytes(gzip.compress(idx(array)))
    found = read_idx(tmp_path / "file", ndim=len(shape))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, array, strict=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            gzip.compress(idx(IMAGES[:, 0, 0])),
            ": magic number 00000801, expected 00000803 (IDX of unsigned bytes with 3 axes)",
            id="labels for images",
        ),
        pytest.param(
            gzip.compress(b"\0\0\x0d\3" + IDX_IMAGES[4:]),
            ": magic number 00000d03, expected 00000803 (IDX of unsigned bytes with 3 axes)",
            id="floats",
        ),
        pytest.param(
            gzip.compress(b""),
            ": magic number , expected 00000803 (IDX of unsigned bytes with 3 axes)",
            id="empty",
        ),
        pytest.param(
            gzip.compress(IDX_IMAGES[:3]),
            ": magic number 000008, expected 00000803 (IDX of unsigned bytes with 3 axes)",
            id="magic number cut",
        ),
        pytest.param(
            gzip.compress(IDX_IMAGES[:4]), ": the header ends after 4 bytes", id="no sizes"
        ),
        pytest.param(
            gzip.compress(IDX_IMAGES[:15]), ": the header ends after 15 bytes", id="header cut"
        ),
        pytest.param(
            gzip.compress(IDX_IMAGES[:16]),
            ": 0 bytes of data, the header says 3920",
            id="header only",
        ),
        pytest.param(
            gzip.compress(IDX_IMAGES[:-1]),
            ": 3919 bytes of data, the header says 3920",
            id="data cut",
        ),
        pytest.param(
            gzip.compress(IDX_IMAGES + b"\0"),
            ": more than 3920 bytes of data, the header says 3920",
            id="data too long",
        ),
        pytest.param(
            gzip.compress(b"\0\0\x08\3" + b"\xff" * 12 + b"abc"),
            f": 3 bytes of data, the header says {(2**32 - 1) ** 3}",
            id="sizes beyond an index",
        ),
        pytest.param(
            gzip.compress(b"\0\0\x08\3" + b"\0\x10\0\0" * 3 + b"abc"),
            f": 3 bytes of data, the header says {2**60}",
            id="sizes beyond the memory",
        ),
    ],
)
def test_idx_that_is_not_what_its_header_says(path: Path, content: bytes, message: str) -> None:
    assert refused(path, content, lambda: read_idx(path, ndim=3)) == message


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="no bytes"),
        pytest.param(IDX_IMAGES, id="not gzipped"),
        pytest.param(WEB_PAGE, id="a web page"),
        pytest.param(GZIPPED[:5], id="cut in gzip's header"),
        pytest.param(GZIPPED[:-20], id="cut in the data"),
        pytest.param(GZIPPED[:-1], id="cut in gzip's checksum"),
        pytest.param(GZIPPED[:200] + bytes([GZIPPED[200] ^ 255]) + GZIPPED[201:], id="data"),
        pytest.param(GZIPPED[:10] + b"\xff" + GZIPPED[11:], id="no deflate"),
        pytest.param(GZIPPED[:-8] + bytes([GZIPPED[-8] ^ 1]) + GZIPPED[-7:], id="checksum"),
        pytest.param(GZIPPED + b"more", id="something behind it"),
    ],
)
def test_gzip_that_is_not_whole(path: Path, content: bytes) -> None:
    message = refused(path, content, lambda: read_idx(path, ndim=3))
    # Nothing is no gzip with nothing in it: Python reads it as that.
    expected = r": not a whole gzip file \(.+" + AGAIN if content else ": magic number , expected"
    assert re.match(expected, message)


def test_no_more_is_unpacked_than_the_header_says(path: Path) -> None:
    bomb = gzip.compress(idx(np.zeros(5, np.uint8)) + bytes(30_000_000))
    tracemalloc.start()
    try:
        message = refused(path, bomb, lambda: read_idx(path, ndim=1))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert message == ": more than 5 bytes of data, the header says 5"
    assert peak < 3_000_000


# MATLAB.


@pytest.mark.parametrize("version", ["4", "5"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_mat_is_read_back(tmp_path: Path, version: str, dtype: Any) -> None:
    first, second = random_bytes(6, 7).astype(dtype), random_bytes(3, 1).astype(dtype)
    scipy.io.savemat(
        tmp_path / "file", {"first": first, "second": second, "text": "no number"}, format=version
    )
    found = raw_formats.read_mat(tmp_path / "file", ("second", "first"))
    assert list(found) == ["second", "first"]
    np.testing.assert_array_equal(found["first"], first)
    np.testing.assert_array_equal(found["second"], second)
    assert version == "4" or found["first"].dtype == dtype


FACES = mat({"ff": random_bytes(60, 70)})
PLAIN = io.BytesIO()
scipy.io.savemat(PLAIN, {"ff": random_bytes(60, 70)})


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="no bytes"),
        pytest.param(WEB_PAGE, id="a web page"),
        pytest.param(3 * WEB_PAGE, id="a long web page"),
        pytest.param(FACES[:100], id="cut in the header"),
        pytest.param(FACES[:130], id="cut in the first tag"),
        pytest.param(FACES[:-20], id="cut in the data"),
        pytest.param(PLAIN.getvalue()[:1000], id="cut in data not compressed"),
        pytest.param(FACES[:1000] + bytes([FACES[1000] ^ 255]) + FACES[1001:], id="data"),
        pytest.param(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(400), id="version 7.3"),
    ],
)
def test_mat_that_is_not_whole(path: Path, content: bytes) -> None:
    message = refused(path, content, lambda: raw_formats.read_mat(path, ("ff",)))
    assert re.fullmatch(r": not a whole MATLAB file \(.+" + AGAIN, message)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        pytest.param({"gg": np.zeros(3)}, ": no variable 'ff'", id="another name"),
        pytest.param({"ff": "faces"}, ": 'ff' holds <U5, expected numbers", id="text"),
        pytest.param(
            {"ff": np.array([[1, "a"]], object)}, ": 'ff' holds object, expected numbers", id="cell"
        ),
        pytest.param(
            {"ff": {"a": 1.0}}, ": 'ff' holds [('a', 'O')], expected numbers", id="structure"
        ),
        pytest.param(
            {"ff": np.ones(2, complex)}, ": 'ff' holds complex128, expected numbers", id="complex"
        ),
    ],
)
def test_mat_without_the_numbers(path: Path, variables: Mapping[str, Any], message: str) -> None:
    content = mat({"other": np.ones(2), **variables})
    names = ("other", "ff")
    assert refused(path, content, lambda: raw_formats.read_mat(path, names)) == message


# Text of zeros and ones.

DIGITS = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], np.uint8)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"0 1 1 0\n1 1 1 1\n0 0 0 0\n", id="as published"),
        pytest.param(b"0 1 1 0\r\n1 1 1 1\r\n0 0 0 0\r\n", id="CRLF"),
        pytest.param(b"0 1 1 0\n1 1 1 1\n0 0 0 0", id="no last line end"),
        pytest.param(b"0 1 1 0 \n1 1 1 1 \n0 0 0 0 \n", id="blanks behind"),
    ],
)
def test_amat_is_read_back(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    found = raw_formats.read_amat(tmp_path / "file", columns=4)
    np.testing.assert_array_equal(found, DIGITS, strict=True)


def test_amat_of_one_column_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(amat(DIGITS[:, 1:2]))
    found = raw_formats.read_amat(tmp_path / "file", columns=1)
    np.testing.assert_array_equal(found, DIGITS[:, 1:2], strict=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", ": no rows", id="empty"),
        pytest.param(
            b"0 1 1 0\n1 2 1 1\n", ", row 2, column 2: '2 ', expected 0 or 1", id="another digit"
        ),
        pytest.param(
            b"0 1 1 x\n1 1 1 1\n", ", row 1, column 4: 'x', expected 0 or 1", id="a letter"
        ),
        pytest.param(
            b"/ 1 1 0\n", ", row 1, column 1: '/ ', expected 0 or 1", id="the character before 0"
        ),
        pytest.param(
            b"0 1 1 0\n0 1,1 0\n", ", row 2, column 2: '1,', expected 0 or 1", id="a comma"
        ),
        pytest.param(b"0 1\t1 0\n", ", row 1, column 2: '1\\t', expected 0 or 1", id="a tabulator"),
        pytest.param(
            b"0 1 \xff 0\n", ", row 1, column 3: '\xff ', expected 0 or 1", id="no character"
        ),
    ],
)
def test_amat_with_another_row(path: Path, content: bytes, message: str) -> None:
    assert refused(path, content, lambda: raw_formats.read_amat(path, columns=4)) == message


@pytest.mark.parametrize(
    ("content", "row", "num"),
    [
        pytest.param(b"0 1 1 0\n1 1 1\n0 0 0 0\n", 2, 5, id="a short row"),
        pytest.param(b"0 1 1 0\n1 1 1 1\n0 0 0 0 1\n", 3, 9, id="a long row"),
        pytest.param(b"0 1 1 0\n\n0 0 0 0\n", 2, 0, id="an empty row"),
        pytest.param(b"0 1 1 0\n1 1", 2, 3, id="the last row cut short"),
        pytest.param(b"0 1 1 0\n0 1 10 0\n", 2, 8, id="two digits"),
        pytest.param(b"0 1 1 0\n0 1  0 0\n", 2, 8, id="two blanks"),
        pytest.param(b"0 1 1 0\n 0 1 0 0\n", 2, 8, id="a blank before"),
    ],
)
def test_amat_with_a_row_of_another_length(path: Path, content: bytes, row: int, num: int) -> None:
    message = refused(path, content, lambda: raw_formats.read_amat(path, columns=4))
    assert message == f", row {row}: {num} characters, expected 4 digits with a blank between"


# CIFAR-10.

BATCHES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
RECORD = 3073


def cifar_members() -> dict[str, bytes]:
    """Two records a batch; the label of record i of all is i."""
    records = random_bytes(12, RECORD)
    records[:, 0] = np.arange(12)
    return {
        f"cifar-10-batches-bin/{name}": rows.tobytes()
        for name, rows in zip(BATCHES, np.split(records, 6), strict=True)
    }


def test_cifar10_is_read_back(tmp_path: Path) -> None:
    records = random_bytes(12, RECORD)
    (tmp_path / "file").write_bytes(tar_gz({"readme.html": WEB_PAGE, **cifar_members()}))
    found = raw_formats.read_cifar10(tmp_path / "file")
    assert {name: array.shape for name, array in found.items()} == {
        "train": (10, 32, 32, 3),
        "train_labels": (10,),
        "test": (2, 32, 32, 3),
        "test_labels": (2,),
    }
    np.testing.assert_array_equal(found["train_labels"], np.arange(10, dtype=np.uint8), strict=True)
    np.testing.assert_array_equal(found["test_labels"], np.array([10, 11], np.uint8), strict=True)
    images = np.concatenate([found["train"], found["test"]])
    # Red, green and blue planes, row by row, behind the label.
    for i, row, column, channel in ((0, 0, 0, 0), (3, 0, 5, 1), (9, 31, 31, 2), (11, 7, 0, 2)):
        expected = records[i, 1 + 1024 * channel + 32 * row + column]
        assert images[i, row, column, channel] == expected


def folder_instead(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for member, content in cifar_members().items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            if member.endswith(name):
                info.size, info.type = 0, tarfile.DIRTYPE
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def with_member(name: str, content: bytes) -> bytes:
    return tar_gz(cifar_members() | {f"cifar-10-batches-bin/{name}": content})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            with_member("data_batch_2.bin", bytes(2 * RECORD - 1)),
            r": data_batch_2\.bin has 6145 bytes",
            id="a member cut",
        ),
        pytest.param(
            with_member("test_batch.bin", bytes(RECORD + 1)),
            r": test_batch\.bin has 3074 bytes",
            id="a member too long",
        ),
        pytest.param(
            with_member("data_batch_5.bin", b""),
            r": data_batch_5\.bin has 0 bytes",
            id="a member empty",
        ),
        pytest.param(
            with_member("data_batch_1.bin", bytes(10_001 * RECORD)),
            r": data_batch_1\.bin has 30730001 bytes",
            id="more than ten thousand records",
        ),
        pytest.param(
            folder_instead("data_batch_3.bin"),
            r": data_batch_3\.bin has 0 bytes",
            id="a folder for a member",
        ),
        pytest.param(
            tar_gz({k: v for k, v in cifar_members().items() if "batch_4" not in k}),
            r": not a whole archive \(.*cifar-10-batches-bin/data_batch_4\.bin.*not found.*"
            + AGAIN,
            id="a member missing",
        ),
        pytest.param(
            tar_gz({"cifar-10-batches-py/data_batch_1": bytes(100)}),
            r": not a whole archive \(.*data_batch_1\.bin.*not found.*" + AGAIN,
            id="the Python version",
        ),
        pytest.param(b"", r": not a whole archive \(.+" + AGAIN, id="no bytes"),
        pytest.param(WEB_PAGE, r": not a whole archive \(.+" + AGAIN, id="a web page"),
        pytest.param(gzip.compress(WEB_PAGE), r": not a whole archive \(.+" + AGAIN, id="no tar"),
        pytest.param(
            tar_gz(cifar_members())[:1000], r": not a whole archive \(.+" + AGAIN, id="cut early"
        ),
        pytest.param(
            tar_gz(cifar_members())[:-3000], r": not a whole archive \(.+" + AGAIN, id="cut late"
        ),
        pytest.param(
            gzip.compress(gzip.decompress(tar_gz(cifar_members()))[:-11_000]),
            r": not a whole archive \(.+" + AGAIN,
            id="cut before gzip",
        ),
    ],
)
def test_cifar10_that_is_not_whole(path: Path, content: bytes, message: str) -> None:
    assert re.fullmatch(message, refused(path, content, lambda: raw_formats.read_cifar10(path)))


# CelebA's tables.


@pytest.mark.parametrize(
    "content",
    [
        b"2\nBald Young \n000001.jpg -1  1\n000002.jpg  1 -1\n",
        b"2\r\nBald Young\r\n000001.jpg -1 1\r\n000002.jpg 1 -1\r\n",
        b"2\nBald Young\n000001.jpg -1 1\n000002.jpg 1 -1",
    ],
)
def test_a_table_with_header_is_read_back(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert raw_formats.read_celeb_a_table(tmp_path / "file", header=True) == (
        ["Bald", "Young"],
        {"000001.jpg": [-1, 1], "000002.jpg": [1, -1]},
    )


def test_a_table_without_header_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"000001.jpg 0\n000003.jpg 2\n000002.jpg 10177\n")
    assert raw_formats.read_celeb_a_table(tmp_path / "file", header=False) == (
        [],
        {"000001.jpg": [0], "000003.jpg": [2], "000002.jpg": [10_177]},
    )


@pytest.mark.parametrize(
    ("content", "header", "message"),
    [
        pytest.param(b"", True, ": no images", id="empty"),
        pytest.param(b"", False, ": no images", id="empty, no header"),
        pytest.param(b"2\nA B\n", True, ": no images", id="header only"),
        pytest.param(
            b"2\nA B\na.jpg 1 1\nb.jpg 1\n",
            True,
            ", line 4: 1 numbers, expected 2",
            id="a column less",
        ),
        pytest.param(
            b"2\nA B\na.jpg 1 1 1\nb.jpg 1 1\n",
            True,
            ", line 3: 3 numbers, expected 2",
            id="a column more",
        ),
        pytest.param(
            b"2\nA B\na.jpg 1 1\n\nb.jpg 1 1\n",
            True,
            ", line 4: 0 numbers, expected 2",
            id="an empty line",
        ),
        pytest.param(
            b"2\nA B\na.jpg 1 1\nb.jpg 1 x\n",
            True,
            ", line 4: invalid literal for int() with base 10: 'x'",
            id="no number",
        ),
        pytest.param(
            b"a.jpg 1\nb.jpg 1.5\n",
            False,
            ", line 2: invalid literal for int() with base 10: '1.5'",
            id="no whole number",
        ),
        pytest.param(
            WEB_PAGE,
            False,
            ", line 1: invalid literal for int() with base 10: 'html>'",
            id="a web page",
        ),
    ],
)
def test_a_table_with_another_line(path: Path, content: bytes, header: bool, message: str) -> None:
    found = refused(path, content, lambda: raw_formats.read_celeb_a_table(path, header=header))
    assert found == message


@pytest.mark.parametrize("content", [b"a.jpg 1\nb.jpg\n", b"a.jpg 1\n\nb.jpg 2\n"])
def test_a_table_without_header_with_an_empty_line(path: Path, content: bytes) -> None:
    message = refused(path, content, lambda: raw_formats.read_celeb_a_table(path, header=False))
    assert message == ", line 2: 0 numbers, expected some"


@pytest.mark.parametrize("header", [False, True])
def test_a_table_that_is_no_text(path: Path, header: bool) -> None:
    content = gzip.compress(b"2\nA\na.jpg 1\nb.jpg 1\n")
    message = refused(path, content, lambda: raw_formats.read_celeb_a_table(path, header=header))
    assert re.fullmatch(r": not a text \(.*can't decode byte 0x8b.*" + AGAIN, message)


# Zip.

MEMBERS = {"a/1.jpg": b"first" * 20, "a/2.jpg": random_bytes(300).tobytes(), "a/3.jpg": b""}
ZIP = zipped(MEMBERS)


def read_members(path: Path, *names: str, max_bytes: int = 300) -> list[bytes]:
    return list(raw_formats.read_zip_members(path, list(names), max_bytes=max_bytes))


def test_members_come_in_the_order_of_the_names(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(ZIP)
    assert read_members(tmp_path / "file", *MEMBERS) == list(MEMBERS.values())
    assert read_members(tmp_path / "file", "a/2.jpg", "a/1.jpg", "a/2.jpg") == [
        MEMBERS[name] for name in ("a/2.jpg", "a/1.jpg", "a/2.jpg")
    ]
    assert read_members(tmp_path / "file") == []


def test_members_before_a_missing_one_are_read(path: Path) -> None:
    """One at a time: an archive of 1.4 GB is not in memory."""
    path.parent.mkdir()
    path.write_bytes(ZIP)
    members = raw_formats.read_zip_members(path, ["a/1.jpg", "a/4.jpg"], max_bytes=100)
    assert next(members) == MEMBERS["a/1.jpg"]
    message = refusal(lambda: next(members))
    assert re.fullmatch(
        re.escape(str(path)) + r": not a whole archive \(.*a/4\.jpg.*" + AGAIN, message
    )


def test_a_member_that_is_too_large(path: Path) -> None:
    message = refused(path, ZIP, lambda: read_members(path, "a/2.jpg", max_bytes=299))
    assert message == ": a/2.jpg is larger than 299 bytes"


def patched(signature: bytes, offset: int, value: bytes) -> bytes:
    """The archive with other bytes in the last header of that signature."""
    content = bytearray(zipped({name: MEMBERS[name] for name in ("a/1.jpg", "a/2.jpg")}))
    start = content.rindex(signature) + offset
    content[start : start + len(value)] = value
    return bytes(content)


LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"
# A member that is said to be longer than the archive.
_STORED = io.BytesIO()
with zipfile.ZipFile(_STORED, "w") as _archive:
    _archive.writestr("a/1.jpg", b"0123456789")
_START = _STORED.getvalue().rindex(CENTRAL) + 20
SHORT = _STORED.getvalue()[:_START] + b"\x2c\1\0\0" * 2 + _STORED.getvalue()[_START + 8 :]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="no bytes"),
        pytest.param(WEB_PAGE, id="a web page"),
        pytest.param(ZIP[:-1], id="cut at the end"),
        pytest.param(ZIP[:200], id="cut in a member"),
        pytest.param(ZIP[: len(ZIP) // 2], id="cut in the middle"),
        pytest.param(zipped({"a/1.jpg": b""}), id="a member missing"),
        pytest.param(patched(LOCAL, 0, b"XXXX"), id="a member's header"),
        pytest.param(patched(LOCAL, 100, b"XXXX"), id="a member's data"),
        pytest.param(patched(CENTRAL, 16, b"XXXX"), id="a member's checksum"),
        pytest.param(SHORT, id="a member's size"),
        pytest.param(patched(CENTRAL, 8, b"\x01"), id="encrypted"),
        pytest.param(patched(CENTRAL, 10, b"\x63"), id="an unknown compression"),
    ],
)
def test_a_zip_that_is_not_whole(path: Path, content: bytes) -> None:
    message = refused(path, content, lambda: read_members(path, "a/1.jpg", "a/2.jpg"))
    assert re.fullmatch(r": not a whole archive \(.*" + AGAIN, message)
