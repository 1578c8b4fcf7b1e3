"""Your own data: arrays, `.npy`, `.npz`, tables of numbers, folders of images."""

import csv
import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jvae.data.dataset import DataError, Dataset, content_sha256, hold_out

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
ARRAY_SUFFIXES = (".npy", ".npz")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")

# A folder of images that takes more than this, decoded, is read as it is needed.
STREAM_ABOVE_BYTES = 2 << 30
# The test part is always in memory: of a folder that is not, it has no more images than this.
MAX_STREAMED_TEST = 10_000
# A file that unpacks to more than this, and to so many times its size, is taken for a bomb:
# deflate reaches 1,032 on zeros alone, real data 10.
BOMB_BYTES = 1 << 28
BOMB_RATIO = 100

# The names that others use for the parts of an .npz file: Keras's, and ours.
_NPZ_NAMES = {
    "train": ("train", "x_train"),
    "valid": ("valid", "x_valid", "x_val"),
    "test": ("test", "x_test"),
    "train_labels": ("train_labels", "y_train"),
    "valid_labels": ("valid_labels", "y_valid", "y_val"),
    "test_labels": ("test_labels", "y_test"),
}

_UNKNOWN_LICENCE = "your own data"


def from_array(
    train: np.ndarray,
    test: np.ndarray | None = None,
    *,
    name: str = "array",
    test_fraction: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """A `Dataset` of arrays.

    Args:
      train: [num, *data_shape]. uint8 stays, and means 8-bit pixels; so do booleans, and other
        integers in 0 … 255 with two axes an example or more. All else becomes float32.
      test: [num, *data_shape] alike; None to hold out a part of `train`.
      name: of the dataset.
      test_fraction: how much to hold out where there is no `test`.
      split_seed: of that split.

    Raises:
      DataError: no numbers, no examples, NaN or infinities, or a table's constant column, named
        by index and value.
    """
    parts = {"train": np.asarray(train)}
    if test is not None:
        parts["test"] = np.asarray(test)
    return _from_parts(parts, name, name, test_fraction, split_seed)


def load_path(
    path: str | os.PathLike[str],
    *,
    test_fraction: float = 0.1,
    split_seed: int = 0,
    stream_above: int = STREAM_ABOVE_BYTES,
) -> Dataset:
    """Load your own data.

    - `.npy`: an array [num, *data_shape], as `from_array` takes it.
    - `.npz`: one array, or `train` and perhaps `test`, `valid`, `train_labels`, … (Keras's names,
      `x_train` and its kin, too).
    - `.csv`, `.tsv`, `.parquet`: a table of numbers, a row an example.
    - A folder: its images, below it at any depth, in the order of their paths; where it has
      folders `train` and `test`, those are the parts.

    Args:
      path: the file or folder.
      test_fraction: how much to hold out where there is no test part.
      split_seed: of that split.
      stream_above: a folder of images that decodes to more bytes than this is not read into
        memory: `train` is then an `ImageFiles`.

    Returns:
      A `Dataset` named as the file or folder.

    Raises:
      DataError: what cannot be read or trained on, with file, row and value. Nothing is ever
        unpickled, and a file that unpacks beyond all measure is refused.
    """
    path = Path(path).expanduser()
    split = test_fraction, split_seed
    try:
        if path.is_dir():
            return _load_folder(path, *split, stream_above)
        if not path.exists():
            raise DataError(f"{path} does not exist")
        suffix = path.suffix.lower()
        if suffix == ".npy":
            return _from_parts({"train": _read_npy(path)}, path.stem, str(path), *split)
        if suffix == ".npz":
            return _from_parts(_read_npz(path), path.stem, str(path), *split)
        if suffix in TABLE_SUFFIXES:
            columns, table = _read_parquet(path) if suffix == ".parquet" else _read_text(path)
            parts = {"train": table}
            return _from_parts(parts, path.stem, str(path), *split, columns=columns)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    known = ", ".join((*ARRAY_SUFFIXES, *TABLE_SUFFIXES))
    raise DataError(f"{path}: expected a folder of images or a file of {known}, got {suffix!r}")


def _from_parts(
    parts: dict[str, np.ndarray],
    name: str,
    where: str,
    test_fraction: float,
    split_seed: int,
    columns: Sequence[str] = (),
) -> Dataset:
    """The dataset of arrays by the names of `Dataset`, held out where there is no test part."""
    several = len(parts) > 1
    examples: dict[str, Any] = {
        part: _examples(parts[part], f"{where}: {part}" if several else where, columns)
        for part in ("train", "valid", "test")
        if part in parts
    }
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
        train, test = hold_out(len(examples["train"]), test_fraction, split_seed)
        examples["test"] = examples["train"][test]
        examples["train"] = examples["train"][train]
        if "train_labels" in labels:
            labels["test_labels"] = labels["train_labels"][test]
            labels["train_labels"] = labels["train_labels"][train]
        source += f", {len(test)} examples held out (seed {split_seed})"
    if len(shape) == 1 and dtype == np.float32:
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


def _examples(array: np.ndarray, where: str, columns: Sequence[str]) -> np.ndarray:
    """uint8 or finite float32 [num, *data_shape]."""
    if array.dtype.kind not in "buif":
        raise DataError(f"{where}: values of type {array.dtype}, expected numbers")
    if array.ndim < 2 or array.size == 0:
        raise DataError(f"{where}: shape {array.shape}, expected (num, *data_shape)")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind in "iu" and array.ndim > 2 and array.min() >= 0 and array.max() <= 255:
        return array.astype(np.uint8)
    with np.errstate(over="ignore"):  # beyond float32: refused below, as an infinity
        converted = array.astype(np.float32)
    if not np.isfinite(converted).all():
        index = np.unravel_index(np.argmin(np.isfinite(converted)), array.shape)
        row, *rest = (int(i) for i in index)
        column = f" ({columns[rest[0]]!r})" if columns else ""
        raise DataError(
            f"{where}: row {row + 1}, column {', '.join(str(i + 1) for i in rest)}{column} is "
            f"{array[index]}: expected finite numbers"
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
        name = f" ({columns[int(index[0])]!r})" if columns else ""
        raise DataError(
            f"{where}: column {', '.join(str(int(i) + 1) for i in index)}{name} is "
            f"{train[(0, *index)]} in all {len(train)} training rows: its density is unbounded "
            "under a Gaussian; leave it out"
        )


def _read_npy(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _bad_array(path, error) from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: not an .npy file")
    return array


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        _refuse_bomb(path, sum(member.file_size for member in members))
        with np.load(path, allow_pickle=False) as arrays:
            found: dict[str, np.ndarray] = {name: arrays[name] for name in arrays.files}
    except (ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise _bad_array(path, error) from error
    parts = {}
    for part, names in _NPZ_NAMES.items():
        present = [name for name in names if name in found]
        if present:
            parts[part] = found.pop(present[0])
    if "train" not in parts and len(found) == 1 and not parts:
        return {"train": found.popitem()[1]}
    if "train" not in parts or found:
        raise DataError(
            f"{path} holds {', '.join(sorted([*parts, *found])) or 'nothing'}: expected one array, "
            f"or arrays named {', '.join(_NPZ_NAMES)}"
        )
    for part in ("valid", "test"):
        if f"{part}_labels" in parts and part not in parts:
            raise DataError(f"{path} holds {part}_labels without {part}")
    return parts


def _bad_array(path: Path, error: Exception) -> DataError:
    if any(word in str(error).lower() for word in ("pickle", "object")):
        return DataError(f"{path}: holds pickled Python objects, which are never loaded")
    return DataError(f"{path}: not a whole {path.suffix} file ({error})")


def _refuse_bomb(path: Path, unpacked: int) -> None:
    packed = path.stat().st_size
    if unpacked > BOMB_BYTES and unpacked > BOMB_RATIO * packed:
        raise DataError(
            f"{path}: {packed:,} bytes would unpack to {unpacked:,}: refused as a decompression "
            "bomb; save it uncompressed if it is none"
        )


def _read_text(path: Path) -> tuple[list[str], np.ndarray]:
    """The names of the columns, none without a header, and the numbers [rows, columns]."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            delimiter = max("\t;,", key=first.count)
            header = next(csv.reader([first], delimiter=delimiter), [])
            names = [] if all(map(_is_number, header)) else [name.strip() for name in header]
            if not names:
                file.seek(0)
            with warnings.catch_warnings(action="ignore"):  # no rows: refused by its shape
                table = np.loadtxt(file, delimiter=delimiter, comments=None, quotechar='"', ndmin=2)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text in UTF-8 ({error})") from error
    except ValueError as error:
        raise _bad_row(path, delimiter, names, error) from error
    if names and table.size and len(names) != table.shape[1]:
        raise DataError(f"{path}: {len(names)} names of columns for {table.shape[1]} columns")
    return names, table


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _bad_row(path: Path, delimiter: str, names: list[str], error: ValueError) -> DataError:
    """The refusal of the first row that is wrong, found by a second look."""
    width = len(names)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter)
        for number, row in enumerate(rows):
            if (names and number == 0) or not row:
                continue
            where = f"{path}, line {rows.line_num}"
            width = width or len(row)
            if len(row) != width:
                return DataError(f"{where}: {len(row)} columns, expected {width}")
            for i, text in enumerate(row):
                if not _is_number(text):
                    name = f" ({names[i]!r})" if names else ""
                    return DataError(f"{where}, column {i + 1}{name}: {text!r} is not a number")
    return DataError(f"{path}: {error}")


def _read_parquet(path: Path) -> tuple[list[str], np.ndarray]:
    import pyarrow
    import pyarrow.parquet
    import pyarrow.types as types

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_bomb(path, 8 * file.metadata.num_rows * file.metadata.num_columns)
            table = file.read()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a whole Parquet file ({error})") from error
    # pandas stores an index beside the columns.
    names = [name for name in table.column_names if not name.startswith("__index_level_")]
    columns = []
    for name in names:
        column = table.column(name)
        if not (types.is_floating(column.type) or types.is_integer(column.type)):
            raise DataError(f"{path}: column {name!r} holds {column.type}, expected numbers")
        if column.null_count:
            row = int(np.argmax(column.is_null().to_numpy())) + 1
            raise DataError(f"{path}: row {row}, column {name!r} is empty: expected a number")
        columns.append(column.to_numpy().astype(np.float64))
    if not columns:
        raise DataError(f"{path}: no columns")
    return names, np.stack(columns, axis=1)


class ImageFiles:
    """Images of one size in files, each decoded when it is asked for.

    Attributes:
      paths: of the files.
      shape: (num, height, width), with 3 channels (num, height, width, 3).
    """

    def __init__(self, paths: Sequence[Path], image_shape: tuple[int, ...]):
        self.paths = tuple(paths)
        self.shape = (len(self.paths), *image_shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8."""
        return np.dtype(np.uint8)

    @property
    def nbytes(self) -> int:
        """Of all images, decoded."""
        return int(np.prod(self.shape, dtype=object))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> np.ndarray:
        """One image, uint8 `shape[1:]`.

        Raises:
          DataError: the file cannot be decoded.
        """
        from PIL import Image

        path = self.paths[index]
        mode = "RGB" if len(self.shape) == 4 else "L"
        try:
            with Image.open(path) as image:
                array = np.asarray(image.convert(mode))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path}: not a whole image ({error})") from error
        if array.shape != self.shape[1:]:
            raise DataError(f"{path}: changed to an image of {array.shape} while it was used")
        return array


def _load_folder(folder: Path, test_fraction: float, split_seed: int, stream_above: int) -> Dataset:
    found = list(_image_paths(folder))
    if not found:
        raise DataError(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)})")
    shape = _common_shape(found)
    parts = {
        part: [path for path in found if path.is_relative_to(folder / part)]
        for part in ("train", "test")
    }
    source = str(folder)
    if parts["train"] and parts["test"]:
        if len(found) != len(parts["train"]) + len(parts["test"]):
            raise DataError(f"{folder}: images outside its folders train and test")
    else:
        streamed = int(np.prod((len(found), *shape), dtype=object)) > stream_above
        fraction = min(test_fraction, MAX_STREAMED_TEST / len(found)) if streamed else test_fraction
        train, test = hold_out(len(found), fraction, split_seed)
        parts = {"train": [found[i] for i in train], "test": [found[i] for i in test]}
        source += f", {len(test)} images held out (seed {split_seed})"
    files = {part: ImageFiles(paths, shape) for part, paths in parts.items()}
    return Dataset(
        name=folder.resolve().name,
        train=files["train"] if files["train"].nbytes > stream_above else _decode(files["train"]),
        test=_decode(files["test"]),
        source=source,
        sha256=_files_sha256(folder, found),
        licence=_UNKNOWN_LICENCE,
    )


def _image_paths(folder: Path) -> Iterator[Path]:
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(directory, name)


def _common_shape(paths: Sequence[Path]) -> tuple[int, ...]:
    """The shape of all images, from their headers alone.

    Raises:
      DataError: two sizes, grey and colour mixed, a mode that is neither, a bomb, or no image.
    """
    from PIL import Image

    first: tuple[int, ...] | None = None
    for path in tqdm(paths, "Looking at images", unit=" images", disable=None, delay=1):
        try:
            with (
                warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
                Image.open(path) as image,
            ):
                mode, (width, height) = image.mode, image.size
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: refused as a decompression bomb ({error})") from error
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path}: not an image ({error})") from error
        if mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr"):
            raise DataError(
                f"{path}: an image of mode {mode!r}, expected 8-bit grey or colour without "
                "transparency"
            )
        shape = (height, width) if mode in ("1", "L") else (height, width, 3)
        first = first or shape
        if shape != first:
            raise DataError(f"{path} is {_words(shape)}, {paths[0]} is {_words(first)}")
    if first is None:
        raise DataError("no images")
    return first


def _words(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}×{shape[1]} {'in colour' if len(shape) == 3 else 'grey'}"


def _decode(files: ImageFiles) -> np.ndarray:
    images = np.empty(files.shape, np.uint8)
    for i in tqdm(range(len(files)), "Reading images", unit=" images", disable=None, delay=1):
        images[i] = files[i]
    return images


def _files_sha256(folder: Path, paths: Sequence[Path]) -> str:
    """Of the names and bytes of files."""
    digest = hashlib.sha256()
    for path in tqdm(paths, "Hashing files", unit=" files", disable=None, delay=1):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\0".encode())
    return digest.hexdigest()
