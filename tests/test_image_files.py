"""Images in files: the kinds that are read, those that are refused, and those that are streamed."""

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_files import (
    GREY,
    all_of,
    assert_holds,
    assert_same,
    chunk,
    encoded,
    fill,
    picture,
    png_of_header,
    refusal,
)

from jvae import data
from jvae.data import own_files


@pytest.mark.parametrize(
    ("kind", "suffix", "image", "expected"),
    [
        ("PNG", "png", Image.fromarray(np.eye(3) > 0), 255 * np.eye(3, dtype=np.uint8)),
        ("BMP", "bmp", Image.new("L", (3, 2), 7), np.full((2, 3), 7, np.uint8)),
        # What has a 16 in its file is not of 16 bits.
        ("BMP", "bmp", Image.new("L", (16, 2), 7), np.full((2, 16), 7, np.uint8)),
        ("BMP", "bmp", Image.new("L", (160, 2), 7), np.full((2, 160), 7, np.uint8)),
        (
            "BMP",
            "bmp",
            Image.new("RGB", (53, 2), (7, 8, 9)),
            np.full((2, 53, 3), [7, 8, 9], np.uint8),
        ),
        ("PPM", "pgm", Image.new("L", (3, 2), 7), np.full((2, 3), 7, np.uint8)),
        (
            "PPM",
            "ppm",
            Image.new("RGB", (3, 2), (7, 8, 9)),
            np.full((2, 3, 3), [7, 8, 9], np.uint8),
        ),
        (
            "TIFF",
            "tif",
            Image.new("RGB", (3, 2), (7, 8, 9)),
            np.full((2, 3, 3), [7, 8, 9], np.uint8),
        ),
        ("TIFF", "tiff", Image.new("L", (3, 2), 7), np.full((2, 3), 7, np.uint8)),
        ("JPEG", "jpg", Image.new("L", (16, 8), 128), np.full((8, 16), 128, np.uint8)),
        ("JPEG", "jpeg", Image.new("RGB", (8, 8), (128,) * 3), np.full((8, 8, 3), 128, np.uint8)),
        ("JPEG", "jpg", Image.new("CMYK", (8, 8)), np.full((8, 8, 3), 255, np.uint8)),
        ("WEBP", "webp", Image.new("RGB", (8, 8)), np.zeros((8, 8, 3), np.uint8)),
        # The colours of a palette are colours.
        (
            "PNG",
            "png",
            Image.new("RGB", (3, 2), (7, 8, 9)).quantize(2),
            np.full((2, 3, 3), [7, 8, 9], np.uint8),
        ),
    ],
)
def test_kinds_of_images(
    tmp_path: Path, kind: str, suffix: str, image: Image.Image, expected: np.ndarray
) -> None:
    fill(tmp_path, {f"{i}.{suffix}": encoded(image, kind) for i in range(3)})
    assert_holds(data.load_path(tmp_path), np.stack([expected] * 3))


def test_a_tiff_file_in_colour_by_lzw(tmp_path: Path) -> None:
    image = picture(6, 16, 3)
    fill(tmp_path, {f"{i}.tif": encoded(image, "TIFF", compression="tiff_lzw") for i in range(3)})
    assert_holds(data.load_path(tmp_path), np.stack([image] * 3))


# What is refused. In a table a name has the file and the message.


def tiff_of_16_bits(width: int, height: int) -> bytes:
    """A black TIFF file in colour, put together by hand."""
    size = 6 * width * height
    entries = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, 3, 8),  # bits a channel: at byte 8
        (259, 3, 1, 1),  # not compressed
        (262, 3, 1, 2),  # in colour
        (273, 4, 1, 14),  # the pixels: at byte 14
        (277, 3, 1, 3),
        (278, 3, 1, height),
        (279, 4, 1, size),
    ]
    return b"".join(
        [
            struct.pack("<2sHI3H", b"II", 42, 14 + size, 16, 16, 16),
            bytes(size),
            struct.pack("<H", len(entries)),
            *(struct.pack("<HHII", *entry) for entry in entries),
            bytes(4),
        ]
    )


WHOLE = encoded(picture(50, 40))
JPEG = encoded(picture(50, 40), "JPEG")
PALETTE = Image.fromarray(picture(5, 4)).convert("P")
MODE = "an image of mode '{}', expected 8-bit grey or colour without transparency"
# The name of the file that is refused, beside four grey images of 5×4, and the message.
REFUSED_IMAGES: dict[str, tuple[str, bytes | np.ndarray, str]] = {
    "another size": ("z.png", picture(4, 5), " is 4×5 grey, {first} is 5×4 grey"),
    "colour": ("z.png", picture(5, 4, 3), " is 5×4 in colour, {first} is 5×4 grey"),
    "colours of a palette": ("z.png", encoded(PALETTE), " is 5×4 in colour, {first} is 5×4 grey"),
    "colour and transparency": ("z.png", picture(5, 4, 4), ": " + MODE.format("RGBA")),
    "grey and transparency": ("z.png", picture(5, 4, 2), ": " + MODE.format("LA")),
    "16 bits": ("z.png", picture(5, 4).astype(np.uint16), ": " + MODE.format("I;16")),
    "16 bits in TIFF": ("z.tif", picture(5, 4).astype(np.uint16), ": " + MODE.format("I;16")),
    "16 bits in PGM": ("z.pgm", b"P5 4 5 65535\n" + bytes(40), ": " + MODE.format("I;16")),
    "floats": ("z.tiff", picture(5, 4).astype(np.float32), ": " + MODE.format("F")),
    "text": ("deep/z.png", b"hello", ": not an image ("),
    "PostScript": ("z.png", encoded(picture(5, 4, 3), "EPS"), ": not an image ("),
    "GIF": ("z.png", encoded(picture(5, 4), "GIF"), ": not an image ("),
    "empty": ("z.JPG", b"", ": not an image ("),
    "a header cut": ("z.png", WHOLE[:20], ": not an image ("),
    "a bomb": (
        "z.png",
        png_of_header(100_000, 100_000, 8, 0, b""),
        ": refused as a decompression bomb (",
    ),
    "a small bomb": (
        "z.png",
        png_of_header(10_000, 10_000, 8, 0, b""),
        ": refused as a decompression bomb (",
    ),
    "a bomb of text": (
        "z.png",
        png_of_header(
            4, 5, 8, 0, bytes(25), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))
        ),
        ": not an image (",
    ),
}


@pytest.mark.parametrize("stream_above", [0, 10**6])
@pytest.mark.parametrize("name", REFUSED_IMAGES)
def test_images_are_refused(tmp_path: Path, name: str, stream_above: int) -> None:
    file, content, message = REFUSED_IMAGES[name]
    fill(tmp_path, {**GREY, file: content})
    expected = f"{tmp_path / file}{message.format(first=tmp_path / '0.png')}"
    assert refusal(tmp_path, stream_above=stream_above).startswith(expected)


# One kind of image in the whole folder.
REFUSED_KINDS = {
    "a palette with a transparent colour": encoded(PALETTE, transparency=3),
    "a palette with transparent colours": encoded(PALETTE, transparency=bytes([0, 128, 255])),
    "grey with a transparent value": encoded(picture(5, 4), transparency=3),
    "colour with a transparent value": encoded(picture(5, 4, 3), transparency=(1, 2, 3)),
    "16 bits in colour": png_of_header(4, 5, 16, 2, bytes(5 * 25)),
    "16 bits in colour, PPM": b"P6 4 5 65535\n" + bytes(120),
    "16 bits in colour, TIFF": tiff_of_16_bits(4, 5),
}


@pytest.mark.parametrize("name", REFUSED_KINDS)
def test_transparency_and_16_bits_are_refused(tmp_path: Path, name: str) -> None:
    suffix = {"PPM": "ppm", "TIFF": "tif"}.get(name.rpartition(", ")[2], "png")
    fill(tmp_path, {f"{i}.{suffix}": REFUSED_KINDS[name] for i in range(4)})
    mode = ".*;16" if "16 bits" in name else ".*A"
    expected = "expected 8-bit grey or colour without transparency"
    message = rf"{tmp_path / f'0.{suffix}'}: an image of mode '{mode}', {expected}"
    assert re.fullmatch(message, refusal(tmp_path))


CUT = {
    "PNG": ("z.png", WHOLE[:-100]),
    "PNG in its first row": ("z.png", WHOLE[:60]),
    "JPEG": ("z.jpg", JPEG[:-300]),
    "JPEG in its first rows": ("z.jpg", JPEG[: len(JPEG) // 2]),
    "BMP": ("z.bmp", encoded(picture(50, 40), "BMP")[:-100]),
    "PGM": ("z.pgm", encoded(picture(50, 40), "PPM")[:-100]),
}


@pytest.mark.parametrize("name", CUT)
def test_images_that_are_cut_are_refused(tmp_path: Path, name: str) -> None:
    file, content = CUT[name]
    fill(tmp_path, {f"{i}.png": picture(50, 40) for i in range(5)} | {file: content})
    message = re.escape(f"{tmp_path / file}: not a whole image (")
    # In whichever part it is, streamed or not.
    in_test = [5 in data.hold_out(6, 0.1, seed)[1] for seed in range(6)]
    for seed in (in_test.index(True), in_test.index(False)):
        for stream_above in (0, 10**6):
            assert re.match(message, refusal(tmp_path, split_seed=seed, stream_above=stream_above))


# Folders that do not fit into memory.


def test_a_large_folder_is_streamed(tmp_path: Path) -> None:
    files = {f"{i // 5}/{i % 5}.png": picture(3, 4, 3) for i in range(20)}
    fill(tmp_path, files)
    images = np.stack(list(files.values()))
    train, test = data.hold_out(20, 0.2, 7)
    whole = data.load_path(tmp_path, test_fraction=0.2, split_seed=7)
    assert isinstance(whole.train, np.ndarray)
    streamed = data.load_path(
        tmp_path, test_fraction=0.2, split_seed=7, stream_above=16 * 3 * 4 * 3 - 1
    )
    assert isinstance(streamed.train, data.ImageFiles)
    assert isinstance(streamed.train, data.Examples)
    assert streamed.train.shape == whole.train.shape == (16, 3, 4, 3)
    assert streamed.train.dtype == whole.train.dtype == np.uint8
    assert streamed.train.nbytes == whole.train.nbytes == 16 * 3 * 4 * 3
    assert len(streamed.train) == 16
    assert streamed.data_shape == (3, 4, 3)
    assert streamed.values == (images[test].min(), images[test].max())
    assert streamed.train.paths == tuple(tmp_path / list(files)[i] for i in train)
    for i, number in enumerate(train):
        assert_same(streamed.train[i], images[number])
        assert_same(streamed.train[np.int64(i)], images[number])
    assert_same(streamed.train[-1], images[train[-1]])
    with pytest.raises(IndexError):
        streamed.train[16]
    assert isinstance(streamed.test, np.ndarray)
    assert_same(streamed.test, images[test])
    assert_same(whole.test, images[test])
    for name in ("name", "source", "sha256", "licence"):
        assert getattr(streamed, name) == getattr(whole, name)


@pytest.mark.parametrize(("stream_above", "streamed"), [(17, True), (18, False)])
def test_the_training_part_is_streamed_above_the_limit(
    tmp_path: Path, stream_above: int, streamed: bool
) -> None:
    files = {f"train/{i}.png": picture(2, 3) for i in range(3)}
    files |= {f"test/{i}.png": picture(2, 3) for i in range(9)}
    dataset = data.load_path(fill(tmp_path, files), stream_above=stream_above)
    assert isinstance(dataset.train, data.ImageFiles if streamed else np.ndarray)
    assert_same(all_of(dataset.train), np.stack(list(files.values())[:3]))
    assert_same(dataset.test, np.stack(list(files.values())[3:]))


def test_the_test_part_of_a_streamed_folder_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_files, "MAX_STREAMED_HELD_OUT", 3)
    files = {f"{i:02}.png": picture(2, 3) for i in range(20)}
    fill(tmp_path, files)
    images = np.stack(list(files.values()))
    for fraction, num_test in ((0.1, 2), (0.15, 3), (0.5, 3)):
        dataset = data.load_path(tmp_path, test_fraction=fraction, stream_above=0)
        assert_same(dataset.test, images[data.hold_out(20, num_test / 20, 0)[1]])
        assert len(dataset.train) == 20 - num_test
    assert len(data.load_path(tmp_path, test_fraction=0.5).test) == 10


def test_files_that_change_while_they_are_used_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, GREY)
    train = data.load_path(tmp_path, stream_above=0).train
    file = train.paths[0]
    for image, message in ((picture(5, 5), r"\(5, 5\)"), (picture(4, 5, 3), r"\(4, 5\)")):
        file.write_bytes(encoded(image))
        with pytest.raises(data.DataError, match=f"^{file}: changed to an image of {message}"):
            train[0]
    file.unlink()
    with pytest.raises(data.DataError, match=f"^{file}: not a whole image .*No such file"):
        train[0]
