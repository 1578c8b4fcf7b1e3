"""Readers of raw files, each with its refusals: IDX, MATLAB, text, CIFAR's archive, CelebA's.

Every reader takes a path and gives arrays; nothing of what a file claims is believed before the
file is long enough for it.
"""

import gzip
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jvae.data.dataset import DataError


def read_idx(path: Path, *, ndim: int) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes, the format of MNIST's raw files.

    The header is two zero bytes, the type 0x08, the number of axes, then each size as a
    big-endian 32-bit integer.

    Args:
      path: the file.
      ndim: how many axes it must have.

    Raises:
      DataError: no gzip, a wrong magic number, or more or fewer bytes than the header says.
    """
    try:
        with gzip.open(path) as file:
            header = file.read(4 + 4 * ndim)
            magic = bytes([0, 0, 8, ndim])
            if header[:4] != magic:
                raise DataError(
                    f"{path}: magic number {header[:4].hex()}, expected {magic.hex()} (IDX of "
                    f"unsigned bytes with {ndim} axes)"
                )
            if len(header) < 4 + 4 * ndim:
                raise DataError(f"{path}: the header ends after {len(header)} bytes")
            shape = tuple(
                int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4)
            )
            size = int(np.prod(shape, dtype=object))
            # One byte more than announced, and piece by piece: the header may claim terabytes.
            pieces, left = [], size + 1
            while left and (piece := file.read(min(left, 1 << 24))):
                pieces.append(piece)
                left -= len(piece)
            content = b"".join(pieces)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}): download it again") from error
    if len(content) != size:
        more = "more than " if len(content) > size else ""
        raise DataError(
            f"{path}: {more}{min(len(content), size)} bytes of data, the header says {size}"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_mat(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read arrays of numbers by name from a MATLAB file (up to version 7.2).

    Raises:
      DataError: no such file, a name that is missing, or one that holds no numbers.
    """
    import scipy.io  # 0.1 s, for three datasets only

    try:
        found: dict[str, Any] = scipy.io.loadmat(path, variable_names=names)
    except Exception as error:  # scipy raises what the bytes happen to trip over
        raise DataError(f"{path}: not a whole MATLAB file ({error}): download it again") from error
    for name in names:
        if name not in found:
            raise DataError(f"{path}: no variable {name!r}")
        if found[name].dtype.kind not in "uif":
            raise DataError(f"{path}: {name!r} holds {found[name].dtype}, expected numbers")
    return {name: found[name] for name in names}


def read_amat(path: Path, *, columns: int) -> np.ndarray:
    """Read rows of zeros and ones, the text format of Larochelle's binarized MNIST.

    Args:
      path: the file: a line a row, its digits separated by single blanks.
      columns: digits a row.

    Returns:
      uint8 [rows, columns] of 0 and 1.

    Raises:
      DataError: a row of another length or with another character, by its number from 1.
    """
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            digits = np.frombuffer(line.rstrip(), np.uint8)
            if digits.size != 2 * columns - 1:
                raise DataError(
                    f"{path}, row {number}: {digits.size} characters, expected {columns} digits "
                    "with a blank between"
                )
            values = digits[::2] - ord("0")
            wrong = np.flatnonzero((values > 1) | np.append(digits[1::2] != ord(" "), False))
            if wrong.size:
                found = bytes(digits[2 * wrong[0] : 2 * wrong[0] + 2]).decode("latin-1")
                raise DataError(
                    f"{path}, row {number}, column {wrong[0] + 1}: {found!r}, expected 0 or 1"
                )
            rows.append(values)
    if not rows:
        raise DataError(f"{path}: no rows")
    return np.stack(rows)


def read_cifar10(path: Path) -> dict[str, np.ndarray]:
    """Read the binary version of CIFAR-10, without unpacking the archive to the disk.

    Returns:
      train, test: uint8 [num, 32, 32, 3]; train_labels, test_labels: uint8 [num].

    Raises:
      DataError: no such archive, or a part of it is missing or cut.
    """
    batches = {
        "train": [f"data_batch_{i}.bin" for i in range(1, 6)],
        "test": ["test_batch.bin"],
    }
    record = 1 + 3 * 32 * 32  # the label, then three planes
    arrays = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for part, names in batches.items():
                rows = []
                for name in names:
                    member = archive.extractfile(f"cifar-10-batches-bin/{name}")
                    content = b"" if member is None else member.read(10_000 * record + 1)
                    if not content or len(content) % record or len(content) > 10_000 * record:
                        raise DataError(f"{path}: {name} has {len(content)} bytes")
                    rows.append(np.frombuffer(content, np.uint8).reshape(-1, record))
                stacked = np.concatenate(rows)
                arrays[f"{part}_labels"] = stacked[:, 0]
                planes = stacked[:, 1:].reshape(-1, 3, 32, 32)
                arrays[part] = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{path}: not a whole archive ({error}): download it again") from error
    return arrays


def read_celeb_a_table(path: Path, *, header: bool) -> tuple[list[str], dict[str, list[int]]]:
    """Read a table of CelebA: a line an image, its file name and then whole numbers.

    Args:
      path: the file.
      header: whether two lines come first, the number of images and the names of the columns.

    Returns:
      The names of the columns (none without a header) and the numbers of each file.

    Raises:
      DataError: a line that is none, by its number from 1.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text ({error}): download it again") from error
    names = lines[1].split() if header and len(lines) > 1 else []
    numbers = {}
    for number, line in enumerate(lines, start=1):
        if number <= 2 * header:
            continue
        file, *values = line.split() or [""]
        try:
            numbers[file] = [int(value) for value in values]
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        if not values or (header and len(values) != len(names)):
            raise DataError(
                f"{path}, line {number}: {len(values)} numbers, expected {len(names) or 'some'}"
            )
    if not numbers:
        raise DataError(f"{path}: no images")
    return names, numbers


def read_zip_members(path: Path, names: list[str], *, max_bytes: int) -> Iterator[bytes]:
    """The contents of members of a zip archive, one at a time, in the order of `names`.

    Raises:
      DataError: no such archive, a member that is missing, corrupt or above `max_bytes`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                if archive.getinfo(name).file_size > max_bytes:
                    raise DataError(f"{path}: {name} is larger than {max_bytes:,} bytes")
                yield archive.read(name)
    except DataError:
        raise
    except Exception as error:  # zipfile and zlib raise what the bytes trip over
        raise DataError(f"{path}: not a whole archive ({error}): download it again") from error
