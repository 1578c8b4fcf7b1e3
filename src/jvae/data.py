"""Datasets as uint8 arrays: where they are found, and refusals of bad data."""

import dataclasses
import gzip
import hashlib
import io
import os
import zlib
from importlib import resources
from pathlib import Path

import numpy as np

_MNIST_5K_SHA256 = "5a67ad96a5e81ba105516ad6f98d16d0da396dea8a0593301e34ab26bd62061f"

# Of the images' content, as `content_sha256` takes it: Fashion-MNIST has the same file names.
_MNIST_SHA256 = "af0453f450034686886fcc93115c429dc0e14fbe74b042870e08b758f49fc19f"
_MNIST_FILES = {
    "train": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}


class DataError(ValueError):
    """Data that is missing, corrupt or outside its support; the message says what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images and where they come from.

    Attributes:
      name: as `load` takes it.
      train: uint8 [num, *data_shape].
      test: uint8 [num, *data_shape].
      train_labels: uint8 [num], or None.
      test_labels: uint8 [num], or None.
      source: where the bytes were found.
      sha256: of the content: shapes and pixels of `train`, then of `test`.
      licence: the terms the data is under.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    train_labels: np.ndarray | None
    test_labels: np.ndarray | None
    source: str
    sha256: str
    licence: str

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.train.shape[1:]


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a dataset by name.

    Args:
      name: "mnist_5k", embedded in the package (4,000 training and 1,000 test digits of MNIST's
        training set), or "mnist", the four raw files in `<data_dir>/mnist/`.
      data_dir: the folder that holds a folder for each dataset; "mnist" needs it.

    Raises:
      DataError: an unknown name, a missing file (the message names it and its place), or a
        corrupt one.
    """
    if name not in _LOADERS:
        raise DataError(f"unknown dataset {name!r}: expected one of {sorted(_LOADERS)}")
    return _LOADERS[name](None if data_dir is None else Path(data_dir))


def _load_mnist_5k(data_dir: Path | None) -> Dataset:
    del data_dir  # embedded
    file = resources.files("jvae") / "datasets" / "mnist_5k.npz"
    raw = file.read_bytes()
    if (digest := hashlib.sha256(raw).hexdigest()) != _MNIST_5K_SHA256:
        raise DataError(
            f"the embedded {file} has SHA-256 {digest}, expected {_MNIST_5K_SHA256}: "
            "install jvae again"
        )
    with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
        return _dataset("mnist_5k", dict(arrays), source="embedded in jvae")


def _load_mnist(data_dir: Path | None) -> Dataset:
    if data_dir is None:
        raise DataError(
            "dataset 'mnist' is read from raw files: give data_dir (--data-dir DIR) and put "
            f"{', '.join(_MNIST_FILES.values())} in DIR/mnist/"
        )
    folder = data_dir / "mnist"
    missing = [file for file in _MNIST_FILES.values() if not (folder / file).is_file()]
    if missing:
        raise DataError(f"dataset 'mnist' needs {', '.join(missing)} in {folder}")
    arrays = {
        part: read_idx(folder / file, ndim=1 if part.endswith("labels") else 3)
        for part, file in _MNIST_FILES.items()
    }
    for part in ("train", "test"):
        images, labels = arrays[part], arrays[f"{part}_labels"]
        if images.shape[1:] != (28, 28):
            raise DataError(
                f"{folder / _MNIST_FILES[part]}: images of {images.shape[1:]}, expected (28, 28)"
            )
        if len(images) != len(labels):
            raise DataError(f"{folder}: {len(images)} {part} images but {len(labels)} labels")
    digest = content_sha256(arrays["train"], arrays["test"])
    if digest != _MNIST_SHA256:
        raise DataError(
            f"{folder} holds images of SHA-256 {digest}, MNIST's is {_MNIST_SHA256}: these are "
            "other images (Fashion-MNIST and its kin use the same file names)"
        )
    return _dataset("mnist", arrays, source=str(folder))


_LOADERS = {"mnist_5k": _load_mnist_5k, "mnist": _load_mnist}


def _dataset(name: str, arrays: dict[str, np.ndarray], source: str) -> Dataset:
    return Dataset(
        name=name,
        train=arrays["train"],
        test=arrays["test"],
        train_labels=arrays["train_labels"],
        test_labels=arrays["test_labels"],
        source=source,
        sha256=content_sha256(arrays["train"], arrays["test"]),
        licence="CC BY-SA 3.0 (LeCun, Cortes and Burges)",
    )


def content_sha256(*arrays: np.ndarray) -> str:
    """SHA-256 of the shapes, dtypes and bytes of `arrays`, wherever they were read from."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


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
            content = file.read(size + 1)  # one byte more, never a bomb's worth
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}): download it again") from error
    if len(content) != size:
        more = "more than " if len(content) > size else ""
        raise DataError(
            f"{path}: {more}{min(len(content), size)} bytes of data, the header says {size}"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def check_support(x: np.ndarray, likelihood: str = "bernoulli") -> None:
    """Refuse values that have no density: outside [0, 1] for Bernoulli, not finite for any.

    Args:
      x: float [num, *data_shape].
      likelihood: "bernoulli" or "gaussian".

    Raises:
      DataError: names the index and the value of the first offender.
      ValueError: an unknown likelihood.
    """
    if likelihood not in ("bernoulli", "gaussian"):
        raise ValueError(f"unknown likelihood {likelihood!r}: expected 'bernoulli' or 'gaussian'")
    x = np.asarray(x)
    inside = np.isfinite(x)
    expected = "finite"
    if likelihood == "bernoulli":
        inside &= (x >= 0) & (x <= 1)
        expected = "in [0, 1]"
    if not inside.all():
        index = tuple(int(i) for i in np.unravel_index(np.argmin(inside), x.shape))
        raise DataError(
            f"x{list(index)} is {x[index]}: the {likelihood} likelihood needs values {expected}"
        )
