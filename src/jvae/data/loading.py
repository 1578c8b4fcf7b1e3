"""`load`: a dataset by name or path."""

import hashlib
import io
import os
from importlib import resources
from pathlib import Path

import numpy as np

from jvae.data import own_files, preparation, raw_files
from jvae.data.catalogue import MNIST, SOURCES, Source
from jvae.data.dataset import DataError, Dataset, content_sha256

_MNIST_5K_SHA256 = "5a67ad96a5e81ba105516ad6f98d16d0da396dea8a0593301e34ab26bd62061f"

NAMES = ("mnist_5k", *SOURCES)


def default_data_dir() -> Path:
    """Where tensorflow-datasets keeps its data: `$TFDS_DATA_DIR`, or ~/tensorflow_datasets."""
    return Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def load(name: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a dataset by name, or your own by its path.

    A named dataset is looked for in this order: prepared files of tensorflow-datasets, in
    `<data_dir>/<name>/<version>/`; its authors' raw files, in `<data_dir>/downloads/manual/` or
    `<data_dir>/<name>/`; a download, checked against its checksum. Raw files are prepared for
    tensorflow-datasets, and what is decoded is kept beside them as memory-mapped arrays: the
    second time it takes a moment. TensorFlow is never needed.

    Args:
      name: "mnist_5k", embedded in the package (4,000 training and 1,000 test digits of MNIST's
        training set); "mnist", "fashion_mnist", "kmnist", "binarized_mnist", "omniglot",
        "frey_face", "cifar10", "svhn_cropped", "celeb_a"; or a path as `load_path` takes it:
        `is_path` says which.
      data_dir: the folder of all datasets; by default `$TFDS_DATA_DIR` or ~/tensorflow_datasets.

    Returns:
      A `Dataset`; its images are uint8 [num, *data_shape].

    Raises:
      DataError: an unknown name, or a file that is missing (the message names it, where to put
        it and its checksum), corrupt or another one's.
    """
    if is_path(name):
        return own_files.load_path(name)
    if name == "mnist_5k":
        return _load_mnist_5k()
    if name not in SOURCES:
        raise DataError(
            f"unknown dataset {name!r}: expected one of {', '.join(NAMES)}, or a path (with a "
            "separator: ./data)"
        )
    folder = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    return _load_source(SOURCES[name], folder)


def is_path(name: str | os.PathLike[str]) -> bool:
    """Whether `load` takes `name` for a path and not for the name of a dataset.

    A `Path` is one, and so is text with a separator or a suffix. Text with neither is one where a
    file or folder is there, but for the names of datasets, which mean these whatever is there.
    """
    if isinstance(name, os.PathLike):
        return True
    looks_like_one = os.sep in name or "/" in name or bool(Path(name).suffix)
    return looks_like_one or (name not in NAMES and os.path.exists(name))


def _load_source(source: Source, data_dir: Path) -> Dataset:
    folder = preparation.folder_of(source, data_dir)
    try:
        return (
            preparation.read_cache(source, folder)
            or preparation.read_prepared(source, folder)
            or preparation.prepare(source, raw_files.locate(source, data_dir), folder)
        )
    except OSError as error:
        raise DataError(f"dataset {source.name!r} in {data_dir}: {error}") from error


def _load_mnist_5k() -> Dataset:
    file = resources.files("jvae") / "datasets" / "mnist_5k.npz"
    raw = file.read_bytes()
    if (digest := hashlib.sha256(raw).hexdigest()) != _MNIST_5K_SHA256:
        raise DataError(
            f"the embedded {file} has SHA-256 {digest}, expected {_MNIST_5K_SHA256}: "
            "install jvae again"
        )
    with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
        parts = dict(arrays)
    return Dataset(
        name="mnist_5k",
        **parts,
        source="embedded in jvae",
        sha256=content_sha256(parts["train"], parts["test"]),
        licence=MNIST.licence,
        citation=MNIST.citation,
    )
