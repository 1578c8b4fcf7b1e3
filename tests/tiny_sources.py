"""Every dataset by name in tiny raw files, and what `load` and tensorflow-datasets make of them."""

import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

from jvae.data import DataError, Dataset, content_sha256, raw_files
from jvae.data.catalogue import SOURCES, RawFile, Source, Split

Arrays = dict[str, np.ndarray]
# What a test does to a folder.
Damage = Callable[[Path], object]

# Nobody listens there: no test of a dataset that is not found reaches the network.
NOWHERE = "http://127.0.0.1:9/"

# What tensorflow-datasets calls the parts.
SPLITS = {"train": "train", "valid": "validation", "test": "test"}

# The parts, and all that a dataset may hold of them.
PARTS = ("train", "valid", "test")
ARRAYS = (*PARTS, *(f"{part}_labels" for part in PARTS))

# The parts of a tiny dataset with validation part, and of one without.
THREE = {"train": 11, "valid": 7, "test": 6}
TWO = {"train": 11, "test": 6}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A dataset of a few examples.

    Attributes:
      source: that of `SOURCES` with the checksums of `files`, and no demand on the content.
      files: the raw files by name.
      arrays: what `load` gives: train, test, perhaps valid and the labels of each.
      stored: from a part to the features of its records, as tensorflow-datasets is to give them.
    """

    source: Source
    files: dict[str, bytes]
    arrays: Arrays
    stored: dict[str, list[dict[str, Any]]]

    def write(self, folder: Path) -> None:
        """Put the raw files into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def idx(array: np.ndarray) -> bytes:
    """The IDX format of unsigned bytes, before gzip."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def gzipped(content: bytes) -> bytes:
    """A gzip file."""
    return gzip.compress(content, mtime=0)


def mat(arrays: Mapping[str, Any]) -> bytes:
    """A MATLAB file."""
    file = io.BytesIO()
    scipy.io.savemat(file, dict(arrays), do_compression=True)
    # Its first line says when it was made: the checksum is to be that of yesterday.
    file.getbuffer()[:116] = b"MATLAB 5.0 MAT-file".ljust(116)
    return file.getvalue()


def amat(rows: np.ndarray) -> bytes:
    """Digits separated by blanks, a line a row."""
    return b"".join(b" ".join(b"%d" % digit for digit in row) + b"\n" for row in rows)


def tar_gz(members: Mapping[str, bytes]) -> bytes:
    """A gzipped tar archive."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return gzipped(file.getvalue())


def zipped(members: Mapping[str, bytes]) -> bytes:
    """A zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def with_files(source: Source, files: Mapping[str, bytes], url: str = NOWHERE) -> Source:
    """`source` with the checksums of `files`, published below `url`.

    Of a file without a checksum there is still none.
    """
    raw = tuple(
        RawFile(file.name, url + file.name, file.sha256 and (sha256(files[file.name]),))
        for file in source.files
    )
    return dataclasses.replace(source, files=raw, content_sha256=None)


def sha256(content: bytes) -> str:
    """The checksum of a file."""
    return hashlib.sha256(content).hexdigest()


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder: from a path to its content, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def flip(path: Path, position: int = -1) -> None:
    """Change a byte of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def refusal(call: Callable[[], object], error: type[DataError] = DataError) -> str:
    """The message of the error that `call` must raise: one line."""
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert message
    assert "\n" not in message
    return message


def assert_is(dataset: Dataset, made: Tiny) -> None:
    """Every array is what was written into the raw files, in their order."""
    for name in ARRAYS:
        found = getattr(dataset, name)
        if name in made.arrays:
            np.testing.assert_array_equal(found, made.arrays[name], strict=True)
        else:
            assert found is None
    parts = [made.arrays[part] for part in PARTS if part in made.arrays]
    assert dataset.sha256 == content_sha256(*parts)


def stopping(made: Tiny, stop: Callable[[], object], at: int = 4) -> Any:
    """The source, which calls `stop` before its test record of that number."""

    def splits(files: Mapping[str, Path]) -> dict[str, Split]:
        whole = made.source.splits(files)

        def records() -> Iterator[Mapping[str, Any]]:
            for i, record in enumerate(whole["test"].records):
                if i == at:
                    stop()
                yield record

        return {**whole, "test": Split(whole["test"].num, records())}

    return dataclasses.replace(made.source, splits=splits)


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    """Change what a JSON file holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))


def _images(generator: np.random.Generator, num: int, *shape: int) -> np.ndarray:
    return generator.integers(0, 256, (num, *shape), np.uint8)


def _labels(num: int) -> np.ndarray:
    return (np.arange(num, dtype=np.uint8) * 3 + 1) % 10


def _grey(image: np.ndarray) -> np.ndarray:
    return image[..., None]


def _idx(name: str) -> Tiny:
    generator = _generator(name)
    files: dict[str, bytes] = {}
    arrays: Arrays = {}
    stored = {}
    for (part, num), prefix in zip(TWO.items(), ("train", "t10k"), strict=True):
        images, labels = _images(generator, num, 28, 28), _labels(num)
        files[f"{prefix}-images-idx3-ubyte.gz"] = gzipped(idx(images))
        files[f"{prefix}-labels-idx1-ubyte.gz"] = gzipped(idx(labels))
        arrays |= {part: images, f"{part}_labels": labels}
        stored[part] = [
            {"image": _grey(image), "label": label}
            for image, label in zip(images, labels, strict=True)
        ]
    return Tiny(with_files(SOURCES[name], files), files, arrays, stored)


def _binarized_mnist(name: str) -> Tiny:
    generator = _generator(name)
    files: dict[str, bytes] = {}
    arrays: Arrays = {}
    stored = {}
    for part, num in THREE.items():
        digits = generator.integers(0, 2, (num, 784), np.uint8)
        files[f"binarized_mnist_{part}.amat"] = amat(digits)
        images = digits.reshape(num, 28, 28)
        arrays[part] = np.where(images == 1, np.uint8(255), np.uint8(0))
        stored[part] = [{"image": _grey(image)} for image in images]
    return Tiny(with_files(SOURCES[name], files), files, arrays, stored)


def _omniglot(name: str) -> Tiny:
    """The sizes are fixed: only the first few images are anything, and only they are prepared."""
    generator = _generator(name)
    content: dict[str, np.ndarray] = {}
    arrays: Arrays = {}
    stored = {}
    for (part, num), size, data, target in (
        (("train", TWO["train"]), 24_345, "data", "target"),
        (("test", TWO["test"]), 8_070, "testdata", "testtarget"),
    ):
        images, labels = _images(generator, num, 28, 28), _labels(num) + 40
        grey, alphabets = np.zeros((784, size), np.float32), np.zeros((50, size), np.uint8)
        # A column an image, whose own columns come first.
        grey[:, :num] = np.stack([image.flatten("F") for image in images], axis=1) / np.float32(255)
        alphabets[labels, np.arange(num)] = 1
        content |= {data: grey, target: alphabets}
        arrays |= {part: images, f"{part}_labels": labels}
        stored[part] = [
            {"image": _grey(image), "label": label}
            for image, label in zip(images, labels, strict=True)
        ]
    files = {"chardata.mat": mat(content)}
    whole = SOURCES[name].splits

    def splits(paths: Mapping[str, Path]) -> dict[str, Split]:
        return {
            part: Split(TWO[part], itertools.islice(split.records, TWO[part]))
            for part, split in whole(paths).items()
        }

    source = dataclasses.replace(with_files(SOURCES[name], files), splits=splits)
    return Tiny(source, files, arrays, stored)


def _frey_face(name: str) -> Tiny:
    frames = _images(_generator(name), 60, 28, 20)
    files = {"frey_rawface.mat": mat({"ff": frames.reshape(60, 560).T})}
    # Written down, not computed: the split is to stay what it is.
    which = {"valid": [4, 12, 21, 36, 41, 44], "test": [2, 3, 11, 13, 20, 59]}
    rest = set(range(60)).difference(*which.values())
    which = {"train": sorted(rest), **which}
    arrays = {part: frames[rows] for part, rows in which.items()}
    stored = {
        part: [{"image": _grey(image)} for image in images] for part, images in arrays.items()
    }
    return Tiny(with_files(SOURCES[name], files), files, arrays, stored)


def _cifar10(name: str) -> Tiny:
    generator = _generator(name)
    members = {}
    arrays: Arrays = {}
    stored = {}
    train = [f"data_batch_{i}.bin" for i in range(1, 6)]
    for part, num, batches in (("train", 10, train), ("test", 6, ["test_batch.bin"])):
        images, labels = _images(generator, num, 32, 32, 3), _labels(num)
        planes = images.transpose(0, 3, 1, 2).reshape(num, 3072)
        rows = np.concatenate([labels[:, None], planes], axis=1)
        for batch, content in zip(batches, np.split(rows, len(batches)), strict=True):
            members[f"cifar-10-batches-bin/{batch}"] = content.tobytes()
        arrays |= {part: images, f"{part}_labels": labels}
        stored[part] = [
            {"image": image, "label": label, "id": f"{part}_{i:05d}".encode()}
            for i, (image, label) in enumerate(zip(images, labels, strict=True))
        ]
    files = {"cifar-10-binary.tar.gz": tar_gz(members)}
    return Tiny(with_files(SOURCES[name], files), files, arrays, stored)


def _svhn_cropped(name: str) -> Tiny:
    generator = _generator(name)
    files: dict[str, bytes] = {}
    arrays: Arrays = {}
    stored = {}
    for part, num in TWO.items():
        images, labels = _images(generator, num, 32, 32, 3), _labels(num)
        y = np.where(labels == 0, np.uint8(10), labels)[:, None]
        files[f"{part}_32x32.mat"] = mat({"X": images.transpose(1, 2, 3, 0), "y": y})
        arrays |= {part: images, f"{part}_labels": labels}
        stored[part] = [
            {"image": image, "label": label, "id": f"{part}_{i:06d}".encode()}
            for i, (image, label) in enumerate(zip(images, labels, strict=True))
        ]
    return Tiny(with_files(SOURCES[name], files), files, arrays, stored)


# A few of CelebA's forty attributes would do for `load`; tensorflow-datasets wants them all.
_ATTRIBUTES = """
5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair
Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair
Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face
Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair
Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young
"""
_LANDMARKS = """
lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x
rightmouth_y
"""


def _celeb_a(name: str) -> Tiny:
    generator, attributes, landmarks = _generator(name), _ATTRIBUTES.split(), _LANDMARKS.split()
    num = sum(THREE.values())
    names = [f"{i:06d}.jpg" for i in range(1, num + 1)]
    signs = generator.choice([-1, 1], (num, len(attributes)))
    points = generator.integers(0, 178, (num, len(landmarks)))
    identities = generator.integers(1, 10_178, num)
    which = np.repeat(np.arange(3), list(THREE.values()))
    jpegs, decoded, small = [], [], []
    for _ in names:
        blocks = Image.fromarray(_images(generator, 1, 14, 11, 3)[0])
        file = io.BytesIO()
        blocks.resize((178, 218)).save(file, "JPEG")
        jpegs.append(file.getvalue())
        image = Image.open(file)
        decoded.append(np.asarray(image))
        centre = image.crop((15, 35, 15 + 148, 35 + 148))
        small.append(np.asarray(centre.resize((64, 64), Image.Resampling.BILINEAR)))

    def table(columns: list[str], rows: np.ndarray) -> bytes:
        lines = [
            f"{file}  {'  '.join(map(str, row))}" for file, row in zip(names, rows, strict=True)
        ]
        return "\n".join([str(num), " ".join(columns), *lines, ""]).encode()

    def pairs(values: np.ndarray) -> bytes:
        return "".join(f"{file} {v}\n" for file, v in zip(names, values, strict=True)).encode()

    files = {
        "img_align_celeba.zip": zipped(
            {f"img_align_celeba/{file}": jpeg for file, jpeg in zip(names, jpegs, strict=True)}
        ),
        "list_eval_partition.txt": pairs(which),
        "list_attr_celeba.txt": table(attributes, signs),
        "list_landmarks_align_celeba.txt": table(landmarks, points),
        "identity_CelebA.txt": pairs(identities),
    }
    arrays: Arrays = {}
    stored = {}
    for number, part in enumerate(THREE):
        rows = np.flatnonzero(which == number)
        arrays[part] = np.stack([small[row] for row in rows])
        stored[part] = [
            {
                "image": decoded[row],
                "attributes": dict(zip(attributes, signs[row] > 0, strict=True)),
                "landmarks": dict(zip(landmarks, points[row], strict=True)),
                "identity": {"Identity_No": identities[row]},
            }
            for row in rows
        ]
    return Tiny(with_files(SOURCES[name], files), files, arrays, stored)


_MAKERS: dict[str, Callable[[str], Tiny]] = {
    "mnist": _idx,
    "fashion_mnist": _idx,
    "kmnist": _idx,
    "binarized_mnist": _binarized_mnist,
    "omniglot": _omniglot,
    "frey_face": _frey_face,
    "cifar10": _cifar10,
    "svhn_cropped": _svhn_cropped,
    "celeb_a": _celeb_a,
}
NAMES = tuple(_MAKERS)


@functools.cache
def tiny(name: str) -> Tiny:
    """The tiny dataset of that name: always the same."""
    return _MAKERS[name](name)


def install(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path) -> Tiny:
    """Put the tiny dataset in the place of the true one, its raw files into `folder`."""
    made = tiny(name)
    made.write(folder)
    enter(monkeypatch, made.source)
    return made


def enter(monkeypatch: pytest.MonkeyPatch, source: Source) -> None:
    """Put `source` into the catalogue, and the checksums of its files among those it knows."""
    monkeypatch.setitem(SOURCES, source.name, source)
    digests = {digest for file in source.files for digest in file.sha256}
    monkeypatch.setattr(raw_files, "_EVERY_SHA256", raw_files._EVERY_SHA256 | digests)


def folder_of(name: str, data_dir: Path) -> Path:
    """Where tensorflow-datasets keeps what was prepared."""
    source = SOURCES[name]
    return data_dir / source.prepared_name / source.version


def stock(name: str, data_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """From a part to its records as tensorflow-datasets itself reads them, in its order."""
    import tensorflow_datasets as tfds

    source = SOURCES[name]
    records = {}
    for part in tiny(name).stored:
        rows = tfds.data_source(
            source.prepared_name, split=SPLITS[part], data_dir=data_dir, download=False
        )
        records[part] = [rows[i] for i in range(len(rows))]
    return records
