"""Your own data: arrays, `.npy`, `.npz`, tables of numbers, folders of images."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Shaped

from jvae.data import array_files, image_files, table_files
from jvae.data.dataset import DataError, Dataset, check_likelihood, content_sha256, hold_out
from jvae.data.image_files import ImageFiles

# A folder of images that takes more than this, decoded, is read as it is needed.
STREAM_ABOVE_BYTES = 1 << 30
# What is held out is always in memory: of a folder that is not, no more images than this.
MAX_STREAMED_HELD_OUT = 10_000
# The names of folders that are parts, in small letters.
_FOLDERS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "test": "test",
    "testing": "test",
}
_UNKNOWN_LICENCE = "your own data"


class _Wish(NamedTuple):
    """What the caller asked for; see `load_path`."""

    test_fraction: float
    split_seed: int
    likelihood: str | None


def from_array(
    train: Shaped[np.ndarray | Array, "..."],
    test: Shaped[np.ndarray | Array, "..."] | None = None,
    *,
    name: str = "array",
    test_fraction: float = 0.1,
    split_seed: int = 0,
    likelihood: str | None = None,
) -> Dataset:
    """A `Dataset` of arrays.

    Args:
      train: [num, *data_shape]. uint8 means 8-bit pixels, and so do, with two axes an example or
        more, other whole numbers from 0 to 255 and these divided by 255. Pixels of nothing but 0
        and 1, and booleans, become 0 and 255. All else becomes float32.
      test: [num, *data_shape] alike; None to hold out a part of `train`.
      name: of the dataset.
      test_fraction: how much to hold out where there is no `test`.
      split_seed: of that split.
      likelihood: the values have to be data of it: "bernoulli", 0 and 1 or 8-bit pixels to be
        binarised, but not other numbers between, which `check_support` passes as grey targets;
        "gaussian", or None for any, finite numbers, and in a table no constant column.

    Raises:
      DataError: no numbers, no examples, or values outside the support, named by row and value.
    """
    parts = {"train": np.asarray(train)}
    if test is not None:
        parts["test"] = np.asarray(test)
    check_likelihood(likelihood or "gaussian")
    return _from_parts(parts, name, name, _Wish(test_fraction, split_seed, likelihood))


def load_path(
    path: str | os.PathLike[str],
    *,
    test_fraction: float = 0.1,
    split_seed: int = 0,
    likelihood: str | None = None,
    stream_above: int = STREAM_ABOVE_BYTES,
) -> Dataset:
    """Load your own data.

    - `.npy`: an array [num, *data_shape], as `from_array` takes it.
    - `.npz`: one array, or `train` and perhaps `test`, `valid`, `train_labels`, … (Keras's names,
      `x_train` and its kin, too).
    - `.csv`, `.tsv`, `.parquet`: a table of numbers, a row an example.
    - A folder: its images, below it at any depth, in the order of their paths; where it has
      folders `train` and perhaps `test` and `valid`, those are the parts.

    Args:
      path: the file or folder.
      test_fraction: how much to hold out where there is no test part.
      split_seed: of that split.
      likelihood: as `from_array` takes it.
      stream_above: a folder of images that decodes to more bytes than this is not read into
        memory: `train` is then an `ImageFiles`.

    Returns:
      A `Dataset` named as the file or folder.

    Raises:
      DataError: what cannot be read or trained on, with file, row and value. Nothing is ever
        unpickled, and a file that unpacks beyond all measure is refused.
    """
    path = Path(path)
    wish = _Wish(test_fraction, split_seed, likelihood)
    check_likelihood(likelihood or "gaussian")
    try:
        path = path.expanduser()
        if path.is_dir():
            return _load_folder(path, wish, stream_above)
        if not path.exists():
            raise DataError(f"{path} does not exist")
        suffix = path.suffix.lower()
        columns: list[str] = []
        if suffix == ".npy":
            parts = {"train": array_files.read_npy(path)}
        elif suffix == ".npz":
            parts = array_files.read_npz(path)
        elif suffix in table_files.SUFFIXES:
            columns, table = table_files.read_table(path)
            parts = {"train": table}
        else:
            known = ", ".join((*array_files.SUFFIXES, *table_files.SUFFIXES))
            raise DataError(
                f"{path}: expected a folder of images or a file of {known}, got {suffix!r}"
            )
        return _from_parts(parts, path.stem, str(path), wish, columns)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except RuntimeError as error:  # of expanduser
        raise DataError(f"{path}: {error}") from error


def _from_parts(
    parts: dict[str, np.ndarray],
    name: str,
    where: str,
    wish: _Wish,
    columns: Sequence[str] = (),
) -> Dataset:
    """The dataset of arrays by the names of `Dataset`, held out where there is no test part."""
    several = len(parts) > 1
    examples: dict[str, Any] = {
        part: _examples(parts[part], f"{where}: {part}" if several else where, wish, columns)
        for part in ("train", "valid", "test")
        if part in parts
    }
    if all(part.dtype == np.uint8 and part.max() <= 1 for part in examples.values()):
        # Pixels of 0 and 1 are black and white, not two shades of black.
        examples = {part: array * np.uint8(255) for part, array in examples.items()}
    shape, dtype = examples["train"].shape[1:], examples["train"].dtype
    for part, array in examples.items():
        if array.shape[1:] != shape or array.dtype != dtype:
            raise DataError(
                f"{where}: {part} has examples of {array.dtype} {array.shape[1:]}, train of "
                f"{dtype} {shape}"
            )
    labels: dict[str, Any] = {part: array for part, array in parts.items() if part not in examples}
    for part, array in labels.items():
        num = len(examples[part.removesuffix("_labels")])
        if array.dtype.kind not in "iu" or array.shape != (num,):
            raise DataError(
                f"{where}: {part} are {array.dtype} {array.shape}, expected integers ({num},)"
            )
    source = where
    if "test" not in examples:
        train, test = hold_out(len(examples["train"]), wish.test_fraction, wish.split_seed, where)
        examples["test"] = examples["train"][test]
        examples["train"] = examples["train"][train]
        if "train_labels" in labels:
            labels["test_labels"] = labels["train_labels"][test]
            labels["train_labels"] = labels["train_labels"][train]
        source += f", {len(test)} examples held out (seed {wish.split_seed})"
    is_table = len(shape) == 1 and dtype == np.float32
    binary = wish.likelihood is None and bool(_is_binary(examples["train"]).all())
    if is_table and wish.likelihood != "bernoulli" and not binary:
        check_varied(examples["train"], where, columns)
    return Dataset(
        name=name,
        **examples,
        **labels,
        source=source,
        sha256=content_sha256(
            *(examples[part] for part in ("train", "valid", "test") if part in examples)
        ),
        licence=_UNKNOWN_LICENCE,
    )


def _is_8_bit(array: np.ndarray) -> bool:
    """Whether all are whole numbers from 0 to 255."""
    if not (array.min() >= 0 and array.max() <= 255):  # false with a NaN
        return False
    return array.dtype.kind in "iu" or bool((array == np.round(array)).all())


def _is_binary(array: np.ndarray) -> np.ndarray:
    return (array == 0) | (array == 1)


def _examples(array: np.ndarray, where: str, wish: _Wish, columns: Sequence[str]) -> np.ndarray:
    """uint8 or float32 [num, *data_shape] inside the likelihood's support."""
    if array.dtype.kind not in "buif":
        raise DataError(f"{where}: values of type {array.dtype}, expected numbers")
    if array.ndim < 2 or array.size == 0:
        raise DataError(f"{where}: shape {array.shape}, expected (num, *data_shape)")
    if array.dtype in (np.uint8, np.bool_) or (array.ndim > 2 and _is_8_bit(array)):
        return np.ascontiguousarray(array, np.uint8)
    in_unit = array.dtype.kind == "f" and array.min() >= 0 and array.max() < 1 + 1e-6
    if array.ndim > 2 and in_unit and not _is_binary(array).all():
        pixels = np.round(255 * array)
        if (abs(255 * array - pixels) <= 1e-4).all():
            return pixels.astype(np.uint8)
    with np.errstate(over="ignore"):  # beyond float32: refused below, as an infinity
        converted = array.astype(np.float32)
    inside, expected = np.isfinite(converted), "finite numbers"
    if wish.likelihood == "bernoulli":
        inside = _is_binary(array)
        expected = "0 or 1 under a bernoulli likelihood, or 8-bit pixels to be binarised"
    if not inside.all():
        row, *column = index = np.unravel_index(np.argmin(inside), array.shape)
        raise DataError(
            f"{where}: row {row + 1}, {_column(column, columns)} is {array[index]}: expected "
            f"{expected}"
        )
    lost = abs(converted - array).max(axis=0) > 1e-3 * array.std(axis=0, dtype=np.float64)
    lost &= (array != array[:1]).any(axis=0)
    if lost.any():
        index = np.unravel_index(np.argmax(lost), lost.shape)
        raise DataError(
            f"{where}: {_column(index, columns)} has values near {array[(0, *index)]} that differ "
            "by less than float32 keeps: subtract a constant"
        )
    return converted


def check_varied(train: np.ndarray, where: str, columns: Sequence[str] = ()) -> None:
    """Refuse a constant column: under a Gaussian with a learned variance it has no finite density.

    Args:
      train: float [num, *data_shape].
      where: what the message calls the data.
      columns: names of the columns, where they have names.

    Raises:
      DataError: names the first such column and its value.
    """
    constant = (train == train[:1]).all(axis=0)
    if constant.any():
        index = np.unravel_index(np.argmax(constant), constant.shape)
        raise DataError(
            f"{where}: {_column(index, columns)} is {train[(0, *index)]} in all {len(train)} "
            "training rows: its density is unbounded under a Gaussian; leave it out, or give 8-bit "
            "pixels, which are dequantised"
        )


def _column(index: Sequence[Any], columns: Sequence[str]) -> str:
    """The words for a column, counted from 1, with its name where it has one."""
    name = f" ({columns[int(index[0])]!r})" if columns else ""
    return f"column {', '.join(str(int(i) + 1) for i in index)}{name}"


def _load_folder(folder: Path, wish: _Wish, stream_above: int) -> Dataset:
    found = list(image_files.image_paths(folder))
    if not found:
        raise DataError(f"{folder}: no images ({', '.join(image_files.SUFFIXES)})")
    shape = image_files.common_shape(found)
    parts = _parts_of(folder, found)
    source = str(folder)
    if "test" not in parts:
        rest, fraction = parts["train"], wish.test_fraction
        if math.prod((len(rest), *shape)) > stream_above and 0 < fraction < 1:
            fraction = min(fraction, MAX_STREAMED_HELD_OUT / len(rest))
        train, test = hold_out(len(rest), fraction, wish.split_seed, str(folder))
        parts |= {"train": [rest[i] for i in train], "test": [rest[i] for i in test]}
        source += f", {len(test)} images held out (seed {wish.split_seed})"
    files = {part: ImageFiles(paths, shape) for part, paths in parts.items()}
    decoded: dict[str, Any] = {part: files[part].decode() for part in files if part != "train"}
    if files["train"].nbytes > stream_above:
        files["train"].check()
        decoded["train"] = files["train"]
    else:
        decoded["train"] = files["train"].decode()
    return Dataset(
        name=folder.resolve().name,
        **decoded,
        source=source,
        sha256=image_files.files_sha256(files, folder),
        licence=_UNKNOWN_LICENCE,
    )


def _parts_of(folder: Path, paths: Sequence[Path]) -> dict[str, list[Path]]:
    """The images of the folders that are named as parts; all are "train" where none is."""
    parts: dict[str, list[Path]] = {}
    outside = []
    for path in paths:
        first, *rest = path.relative_to(folder).parts
        part = _FOLDERS.get(first.lower()) if rest else None
        if part is None:
            outside.append(path)
        else:
            parts.setdefault(part, []).append(path)
    if not parts:
        return {"train": outside}
    if outside or "train" not in parts:
        raise DataError(
            f"{folder} has images in {', '.join(sorted(parts))} and "
            + (f"outside ({outside[0]})" if outside else "none in train")
            + ": put all into folders train, test and perhaps valid, or none"
        )
    return parts
