"""Folders of images, decoded at once or one by one."""

import hashlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jvae import cores
from jvae.data.dataset import DataError

# Pillow goes by the content, and would start Ghostscript for one of PostScript.
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


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
        return math.prod(self.shape)

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
            with Image.open(path, formats=_FORMATS) as image:
                array = np.asarray(image.convert(mode))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path}: not a whole image ({error})") from error
        if array.shape != self.shape[1:]:
            raise DataError(f"{path}: changed to an image of {array.shape} while it was used")
        return array

    def chosen(self, indices: Sequence[int] | np.ndarray) -> "ImageFiles":
        """The images at `indices`, in their order."""
        return ImageFiles([self.paths[i] for i in indices], self.shape[1:])

    def check(self) -> None:
        """Decode all images once, on every core, and keep none.

        Raises:
          DataError: a file cannot be decoded.
        """
        with ThreadPoolExecutor(cores.count()) as threads:
            read = threads.map(self._size, range(len(self)))
            for _ in tqdm(
                read, "Checking images", len(self), unit=" images", disable=None, delay=1
            ):
                pass

    def _size(self, index: int) -> int:
        return self[index].nbytes

    def decode(self) -> np.ndarray:
        """All images, uint8 `shape`.

        Raises:
          DataError: a file cannot be decoded.
        """
        images = np.empty(self.shape, np.uint8)
        for i in tqdm(range(len(self)), "Reading images", unit=" images", disable=None, delay=1):
            images[i] = self[i]
        return images


def image_paths(folder: Path) -> Iterator[Path]:
    """The image files below a folder, by their suffix, in the order of their paths.

    Links to folders are followed, each folder once. Hidden files are left out.

    Raises:
      OSError: a folder below cannot be read.
    """
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise error

    for directory, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(directory))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and os.path.realpath(os.path.join(directory, name)) not in seen
        )
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(directory, name)


def common_shape(paths: Sequence[Path]) -> tuple[int, ...]:
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
                Image.open(path, formats=_FORMATS) as image,
            ):
                mode, (width, height) = image.mode, image.size
                if image.has_transparency_data and "A" not in mode:
                    mode += "A"
                if _has_16_bits(image) and "16" not in mode:
                    mode += ";16"
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


def _has_16_bits(image: Any) -> bool:
    """Whether Pillow, which has no mode for it, would cut 16 bits a channel to 8."""
    for decoder, _, _, args in image.tile:
        raw_mode = args[0] if isinstance(args, tuple) else args
        if "16" in str(raw_mode) or (decoder == "ppm" and args[-1] > 255):
            return True
    return False


def files_sha256(parts: Mapping[str, ImageFiles], folder: Path) -> str:
    """SHA-256 of the parts' names, the files' names relative to `folder`, and their bytes."""
    digest = hashlib.sha256()
    for part, files in parts.items():
        for path in tqdm(files.paths, f"Hashing {part}", unit=" files", disable=None, delay=1):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            # A name is bytes, which need not be a text.
            digest.update(f"{part}\0".encode() + os.fsencode(path.relative_to(folder).as_posix()))
            digest.update(f"\0{content}\0".encode())
    return digest.hexdigest()
