"""Arrays in files: `.npy` and `.npz`, never unpickled."""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jvae.data.dataset import DataError

SUFFIXES = (".npy", ".npz")
# A file that unpacks to more than this, and to so many times its size, is taken for a bomb:
# deflate reaches 1,032 on zeros alone, real data 10.
BOMB_BYTES = 1 << 28
BOMB_RATIO = 100

# The names that others use for the parts of an .npz file: Keras's, and ours.
_NAMES = {
    "train": ("train", "x_train"),
    "valid": ("valid", "x_valid", "x_val"),
    "test": ("test", "x_test"),
    "train_labels": ("train_labels", "y_train"),
    "valid_labels": ("valid_labels", "y_valid", "y_val"),
    "test_labels": ("test_labels", "y_test"),
}


def read_npy(path: Path) -> np.ndarray:
    """Read an `.npy` file, memory-mapped.

    Raises:
      DataError: no such file, a damaged one, or one of Python objects.
    """
    return _loaded(path, path, mmap_mode="r")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an `.npz` file by the names that `Dataset` has for them.

    A single array of any name is "train".

    Raises:
      DataError: a damaged file, a decompression bomb, Python objects, or names of no part.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            refuse_bomb(path, sum(member.file_size for member in members))
            found = {}
            for member in members:
                with archive.open(member) as file:
                    found[member.filename.removesuffix(".npy")] = _loaded(path, file)
    except (DataError, OSError):
        raise
    except Exception as error:  # zipfile and zlib raise what the bytes trip over
        raise DataError(f"{path}: not a whole .npz file ({error})") from error
    parts = {}
    for part, names in _NAMES.items():
        for name in names:
            if name in found and part not in parts:
                parts[part] = found.pop(name)
    if not parts and len(found) == 1:
        return {"train": found.popitem()[1]}
    if "train" not in parts or found:
        raise DataError(
            f"{path} holds {', '.join(sorted([*parts, *found])) or 'nothing'}: expected one array, "
            f"or arrays named {', '.join(_NAMES)}"
        )
    for part in ("valid", "test"):
        if f"{part}_labels" in parts and part not in parts:
            raise DataError(f"{path} holds {part}_labels without {part}")
    return parts


def _loaded(path: Path, file: Any, **options: Any) -> np.ndarray:
    try:
        with warnings.catch_warnings(action="ignore"):  # of sizes that overflow: refused anyhow
            array: Any = np.load(file, allow_pickle=False, **options)
    except OSError:
        raise
    except Exception as error:  # a hostile header raises nearly anything
        if any(word in str(error).lower() for word in ("pickle", "object")):
            reason = "no .npy array, or one of pickled Python objects, which are never loaded"
        else:
            reason = f"not a whole {path.suffix} file ({error})"
        raise DataError(f"{path}: {reason}") from error
    if not isinstance(array, np.ndarray):  # an archive by the name of an array
        array.close()
        raise DataError(f"{path}: not an .npy file")
    return array


def refuse_bomb(path: Path, unpacked: int) -> None:
    """Refuse a file that unpacks to `unpacked` bytes, when that is beyond all measure.

    Raises:
      DataError: names both sizes.
    """
    packed = path.stat().st_size
    if unpacked > BOMB_BYTES and unpacked > BOMB_RATIO * packed:
        raise DataError(
            f"{path}: {packed:,} bytes would unpack to {unpacked:,}: refused as a decompression "
            "bomb; save it uncompressed if it is none"
        )
