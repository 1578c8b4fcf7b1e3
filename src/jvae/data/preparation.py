"""Datasets prepared by tensorflow-datasets, without TensorFlow, and their decoded cache.

Prepared: `<data_dir>/<name>/<version>/`, which `tensorflow_datasets.data_source` reads. Reading
takes 0.1 ms an image and more, so the arrays are kept beside it, in `jvae/`, memory-mapped. A
folder appears whole, by one rename, or not at all.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

from jvae.data.catalogue import SPLITS, Source, Split
from jvae.data.dataset import DataError, Dataset, content_sha256

CACHE = "jvae"
# A cache is checked against its hashes at every start up to this size.
MAX_CHECKED_BYTES = 1 << 30

_DAY = 24 * 3600
_Arrays = dict[str, np.ndarray]


def folder_of(source: Source, data_dir: Path) -> Path:
    """Where tensorflow-datasets keeps the prepared dataset."""
    return data_dir / source.prepared_name / source.version


def read_cache(source: Source, folder: Path) -> Dataset | None:
    """The decoded arrays beside the prepared dataset, memory-mapped; None when there are none.

    Raises:
      DataError: the cache is damaged.
    """
    cache = folder / CACHE
    if not cache.is_dir():
        return None
    try:
        settings = json.loads((cache / "cache.json").read_text())
        hashes, sha256, found = settings["arrays"], settings["sha256"], settings["source"]
        arrays: _Arrays = {
            name: np.load(cache / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in hashes
        }
        damaged = not {"train", "test"} <= hashes.keys()
        damaged |= source.has_labels and not {"train_labels", "test_labels"} <= hashes.keys()
        damaged |= any(arrays[part].shape[1:] != source.data_shape for part in _parts(arrays))
        if sum(array.nbytes for array in arrays.values()) <= MAX_CHECKED_BYTES:
            damaged |= any(content_sha256(arrays[name]) != hashes[name] for name in hashes)
            damaged |= _sha256(arrays) != sha256
    except Exception as error:  # NumPy raises what the bytes trip over
        raise DataError(f"the cache {cache} is damaged ({error}): delete that folder") from error
    if damaged:
        raise DataError(f"the cache {cache} is damaged (other content): delete that folder")
    return _dataset(source, arrays, sha256=sha256, found=found)


def read_prepared(source: Source, folder: Path) -> Dataset | None:
    """Decode a prepared dataset and cache it; None when none is there in a readable format.

    Raises:
      DataError: the prepared files are damaged or hold other data.
    """
    try:
        info = json.loads((folder / "dataset_info.json").read_text())
        if info.get("fileFormat") != "array_record" or not _has_array_record():
            return None  # tfrecord, say, which only TensorFlow reads
        shuffled = not info.get("disableShuffling")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{folder / 'dataset_info.json'} cannot be read: {error}") from error
    with _temporary_folder(folder) as cache:
        try:
            splits = _prepared_splits(source, folder, shuffled=shuffled)
            arrays = _allocate(source, splits, cache)
            _fill_all(source, splits, arrays, f"Reading {source.name}")
        except OSError:
            raise
        except Exception as error:  # array_record and Pillow raise what the bytes trip over
            raise DataError(
                f"the prepared files in {folder} cannot be read ({error}): delete that folder"
            ) from error
        found = f"prepared by tensorflow-datasets in {folder}"
        dataset = _described(source, arrays, found, cache)
        if cache is not None:
            _publish(cache, folder / CACHE)
    return dataset


def prepare(source: Source, files: Mapping[str, Path], folder: Path) -> Dataset:
    """Prepare raw files as tensorflow-datasets' own builder would, and cache them decoded.

    Two processes may do it at once: the first to be done is kept. Where nothing can be written,
    the arrays are only decoded, into memory.

    Args:
      source: the dataset.
      files: its raw files by name, their checksums held.
      folder: as `folder_of` says.

    Raises:
      DataError: a raw file is corrupt.
    """
    splits = source.splits(files)
    found = f"raw files in {', '.join(sorted({str(path.parent) for path in files.values()}))}"
    # What is there already is in a format that we cannot read: it stays, and gets our cache.
    # Where array_record has no build, as on some platforms, there is no more than the cache.
    only_cache = folder.exists() or not _has_array_record()
    with _temporary_folder(folder if only_cache else folder.parent) as cache:
        arrays = _allocate(source, splits, cache)
        if cache is None or only_cache:
            _fill_all(source, splits, arrays, f"Decoding {source.name}")
            dataset = _described(source, arrays, found, cache)
            if cache is not None:
                _publish(cache, folder / CACHE)
        else:
            prepared = _build(source, splits, arrays, data_dir=cache.parent)
            dataset = _described(source, arrays, found, cache)
            cache.rename(prepared / CACHE)
            _publish(prepared, folder)
    return dataset


def _has_array_record() -> bool:
    return importlib.util.find_spec("array_record") is not None


def _build(source: Source, splits: Mapping[str, Split], arrays: _Arrays, *, data_dir: Path) -> Path:
    """Write the array_record files, filling `arrays` on the way."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    with registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            """What tensorflow-datasets asks for: features, parts, records."""

            name = source.prepared_name
            VERSION = tfds.core.Version(source.version)

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(source.features(tfds)),
                    homepage=source.homepage,
                    citation=source.citation,
                    license=source.licence,
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                del dl_manager
                return {SPLITS[part]: self._generate_examples(part) for part in splits}

            def _generate_examples(self, part: str) -> Iterator[tuple[Any, dict[str, Any]]]:
                keys = source.keys(part, {name: split.num for name, split in splits.items()})
                records = _fill(source, splits, part, arrays)
                for key, record in zip(keys, records, strict=True):
                    yield key, {**record, "image": _encoded(record["image"])}

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder = Builder(data_dir=data_dir, file_format="array_record")
    # It shows a bar on stderr; what it prints on stdout names a folder that is soon renamed.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    return Path(builder.data_dir)


def _encoded(image: Any) -> Any:
    """An image as `tfds.features.Image` takes it without TensorFlow."""
    if isinstance(image, bytes):
        return io.BytesIO(image)
    from PIL import Image

    return Image.fromarray(image)


def _decoded(image: Any) -> np.ndarray:
    if isinstance(image, bytes):
        from PIL import Image

        try:
            return np.asarray(Image.open(io.BytesIO(image)))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"an image is damaged ({error})") from error
    array: np.ndarray = image
    return array


def _prepared_splits(source: Source, folder: Path, *, shuffled: bool) -> dict[str, Split]:
    """The records of a prepared dataset in the order of its raw files."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import hashing

    # Encoded: tensorflow-datasets would decode with OpenCV where it is, to other pixels.
    encoded = {"image": tfds.decode.SkipDecoding()}
    stored = tfds.builder_from_directory(folder).as_data_source(decoders=encoded)
    counts = {part: len(stored[name]) for part, name in SPLITS.items() if name in stored}
    if not {"train", "test"} <= counts.keys():
        raise DataError(f"their parts are {', '.join(stored) or 'none'}")

    def records(part: str) -> Iterator[dict[str, Any]]:
        rows = stored[SPLITS[part]]
        order = np.arange(len(rows))
        if shuffled:
            hasher = hashing.Hasher(SPLITS[part])
            hashes = [hasher.hash_key(key) for key in source.keys(part, counts)]
            # Row j is the example with the j-th smallest hash.
            order[sorted(range(len(hashes)), key=hashes.__getitem__)] = np.arange(len(rows))
        for j in order:
            yield rows[int(j)]

    return {part: Split(num, records(part)) for part, num in counts.items()}


def _fill(
    source: Source, splits: Mapping[str, Split], part: str, arrays: _Arrays
) -> Iterator[Mapping[str, Any]]:
    """The records of a part, each after its image and label went into `arrays`."""
    split, count = splits[part], 0
    for count, record in enumerate(split.records, start=1):
        if count > split.num:
            break
        image = source.image(_decoded(record["image"]))
        arrays[part][count - 1] = image.reshape(source.data_shape)
        if source.has_labels:
            arrays[f"{part}_labels"][count - 1] = record["label"]
        yield record
    if count != split.num:
        raise DataError(f"{source.name}: {count} {part} images, expected {split.num}")


def _fill_all(
    source: Source, splits: Mapping[str, Split], arrays: _Arrays, description: str
) -> None:
    for part, split in splits.items():
        records = _fill(source, splits, part, arrays)
        # On a terminal only.
        for _ in tqdm(records, f"{description}, {part}", split.num, unit=" images", disable=None):
            pass


def _allocate(source: Source, splits: Mapping[str, Split], folder: Path | None) -> _Arrays:
    """Arrays to fill, in memory or in files of `folder`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part, split in splits.items():
        shapes[part] = (split.num, *source.data_shape)
        if source.has_labels:
            shapes[f"{part}_labels"] = (split.num,)
    if folder is None:
        return {name: np.empty(shape, np.uint8) for name, shape in shapes.items()}
    arrays: _Arrays = {}
    for name, shape in shapes.items():
        file = folder / f"{name}.npy"
        arrays[name] = open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
        if hasattr(os, "posix_fallocate"):
            # Taken now: a full disk would end the process when the memory is written back.
            with file.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return arrays


def _described(source: Source, arrays: _Arrays, found: str, cache: Path | None) -> Dataset:
    """The dataset in `arrays`, whose hash goes into `cache`."""
    sha256 = _sha256(arrays)
    if source.content_sha256 not in (None, sha256):
        raise DataError(
            f"{found}: images of SHA-256 {sha256}, {source.name}'s is {source.content_sha256}: "
            "these are other images"
        )
    if cache is not None:
        for array in arrays.values():
            array.flush()  # type: ignore[attr-defined]  # memory-mapped
        hashes = {name: content_sha256(array) for name, array in arrays.items()}
        settings = {"arrays": hashes, "sha256": sha256, "source": found}
        (cache / "cache.json").write_text(json.dumps(settings, indent=2) + "\n")
    return _dataset(source, arrays, sha256=sha256, found=found)


def _dataset(source: Source, arrays: _Arrays, *, sha256: str, found: str) -> Dataset:
    for array in arrays.values():
        array.setflags(write=False)
    return Dataset(
        name=source.name,
        train=arrays["train"],
        test=arrays["test"],
        valid=arrays.get("valid"),
        train_labels=arrays.get("train_labels"),
        valid_labels=arrays.get("valid_labels"),
        test_labels=arrays.get("test_labels"),
        source=found,
        sha256=sha256,
        licence=source.licence,
        citation=source.citation,
    )


def _sha256(arrays: _Arrays) -> str:
    return content_sha256(*(arrays[part] for part in _parts(arrays)))


def _parts(arrays: Mapping[str, Any]) -> list[str]:
    return [part for part in SPLITS if part in arrays]


@contextlib.contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path | None]:
    """An empty folder inside one that is gone at the end; None where nothing can be written."""
    new = not parent.exists()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(".jvae-*"):  # of a process that was killed
            with contextlib.suppress(FileNotFoundError):  # swept by another
                if time.time() - left.stat().st_mtime > _DAY:
                    shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=".jvae-", dir=parent))
    except OSError:
        temporary = None
    if temporary is None:
        yield None
        return
    try:
        folder = temporary / CACHE  # unlike `temporary`, readable for all that umask allows
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):  # it holds something now
                parent.rmdir()


def _publish(made: Path, folder: Path) -> None:
    """Rename `made` to `folder`, unless another process was faster: theirs holds the same."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
