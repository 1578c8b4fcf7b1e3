"""Which images of a folder are read, in which order, into which part, and the folder's hash."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_files import (
    CHEAP,
    FRACTIONS,
    SEEDS,
    all_of,
    assert_holds,
    assert_same,
    encoded,
    fill,
    picture,
    refusal,
)

from jvae import data

# The order.

FOLDER_NAMES = st.text("aB1_é", min_size=1, max_size=2)
FILE_NAMES = st.builds(
    "".join,
    st.tuples(
        st.text("aB1_é .", min_size=1, max_size=3).filter(lambda name: name[0] != "."),
        st.sampled_from([".png", ".PNG", ".bmp", ".tif", ".tiff"]),
    ),
)
PATHS = st.lists(
    st.tuples(st.lists(FOLDER_NAMES, max_size=2), FILE_NAMES).map(lambda p: (*p[0], p[1])),
    min_size=3,
    max_size=9,
    unique=True,
)


def walk_order(path: tuple[str, ...]) -> list[tuple[bool, str]]:
    """A folder's files come by name, then its folders by name."""
    return [*((True, folder) for folder in path[:-1]), (False, path[-1])]


@CHEAP
@given(paths=PATHS, colour=st.booleans(), fraction=FRACTIONS, seed=SEEDS, stream=st.booleans())
def test_images_come_back_in_the_order_of_their_paths(
    paths: list[tuple[str, ...]], colour: bool, fraction: float, seed: int, stream: bool
) -> None:
    images = {path: picture(2, 3, *[3] * colour) for path in paths}
    expected = np.stack([images[path] for path in sorted(paths, key=walk_order)])
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder, "mine"), {"/".join(path): image for path, image in images.items()})
        dataset = data.load_path(
            Path(folder, "mine"),
            test_fraction=fraction,
            split_seed=seed,
            stream_above=0 if stream else expected.nbytes,
        )
        assert isinstance(dataset.train, data.ImageFiles if stream else np.ndarray)
        if stream:
            in_memory = data.load_path(
                Path(folder, "mine"), test_fraction=fraction, split_seed=seed
            )
            assert_holds(in_memory, expected, fraction, seed)
            assert_same(all_of(dataset.train), np.asarray(in_memory.train))
            assert_same(dataset.test, in_memory.test)
        else:
            assert_holds(dataset, expected, fraction, seed)
        assert dataset.name == "mine"


# The parts.


def test_folders_train_and_test_are_the_parts(tmp_path: Path) -> None:
    images = [picture(4, 3) for _ in range(5)]
    names = ["train/b.png", "train/a/c.png", "train/d/e.png", "test/x.png", "test/deep/y.png"]
    dataset = data.load_path(fill(tmp_path / "cats", dict(zip(names, images, strict=True))))
    assert_same(dataset.train, np.stack(images[:3]))
    assert_same(dataset.test, np.stack(images[3:]))
    assert dataset.name == "cats"
    assert dataset.source == str(tmp_path / "cats")
    assert dataset.licence == "your own data"


@pytest.mark.parametrize(
    ("train", "valid", "test"),
    [
        ("train", "valid", "test"),
        ("training", "validation", "testing"),
        ("Train", "VAL", "Test"),
        ("TRAINING", "Valid", "tesTing"),
    ],
)
def test_folders_named_as_parts_in_any_case(
    tmp_path: Path, train: str, valid: str, test: str
) -> None:
    images = {
        part: {f"{folder}/{i}.png": picture(2, 2) for i in range(num)}
        for part, folder, num in (("train", train, 4), ("valid", valid, 3), ("test", test, 2))
    }
    expected = {part: np.stack(list(named.values())) for part, named in images.items()}
    for named in images.values():
        fill(tmp_path, named)
    for stream_above in (0, 10**6):
        dataset = data.load_path(tmp_path, stream_above=stream_above)
        assert_same(all_of(dataset.train), expected["train"])
        assert dataset.valid is not None
        assert_same(dataset.valid, expected["valid"])
        assert_same(dataset.test, expected["test"])
        assert dataset.source == str(tmp_path)
    for name in images["test"]:
        (tmp_path / name).unlink()
    # Without test, it is held out of train.
    dataset = data.load_path(tmp_path)
    assert_holds(dataset, expected["train"])
    assert dataset.valid is not None
    assert_same(dataset.valid, expected["valid"])
    assert dataset.source == f"{tmp_path}, 2 images held out (seed 0)"


def test_folders_of_two_names_for_a_part_are_one_part(tmp_path: Path) -> None:
    images = {name: picture(2, 2) for name in ("Train/a.png", "train/a.png", "training/a.png")}
    tests = {f"test/{i}.png": picture(2, 2) for i in range(2)}
    dataset = data.load_path(fill(tmp_path, images | tests))
    assert_same(dataset.train, np.stack(list(images.values())))


@pytest.mark.parametrize(
    ("names", "parts", "outside"),
    [
        (["train/a.png", "train/b.png", "test/a.png", "c.png"], "test, train", "c.png"),
        (["Train/a.png", "train/b.png", "trains/c.png"], "train", "trains/c.png"),
        (["a.png", "test/b.png", "test/c.png", "u/d.png"], "test", "a.png"),
        (
            ["train/a.png", "val/b.png", "test/c.png", "u/test/d.png"],
            "test, train, valid",
            "u/test/d.png",
        ),
        (["test/a.png", "test/b.png", "test/c.png"], "test", None),
        (["test/a.png", "validation/b.png", "test/c.png"], "test, valid", None),
    ],
)
def test_images_outside_the_parts_are_refused(
    tmp_path: Path, names: list[str], parts: str, outside: str | None
) -> None:
    fill(tmp_path, {name: picture(2, 2) for name in names})
    where = "none in train" if outside is None else f"outside ({tmp_path / outside})"
    assert refusal(tmp_path) == (
        f"{tmp_path} has images in {parts} and {where}: put all into folders train, test and "
        "perhaps valid, or none"
    )


def test_a_folder_train_alone_is_the_training_part(tmp_path: Path) -> None:
    images = {name: picture(2, 2) for name in ("train/a.png", "train/b.png", "train/u/c.png")}
    expected = np.stack(list(images.values()))
    assert_holds(data.load_path(fill(tmp_path, images)), expected)


def test_files_and_deeper_folders_named_as_parts_are_like_any_other(tmp_path: Path) -> None:
    images = {name: picture(2, 2) for name in ("test.png", "train.png", "u/test/a.png")}
    expected = np.stack(list(images.values()))
    assert_holds(data.load_path(fill(tmp_path, images)), expected)


# Which files are images.


def test_hidden_files_and_other_files_are_ignored(tmp_path: Path) -> None:
    images = {name: picture(2, 2) for name in ("a.png", "b/c.png", "d.e.JPG.png")}
    others = {
        ".hidden.png": b"",
        ".git/a.png": b"",
        "b/.thumbnails/a.png": b"",
        "labels.csv": b"",
        "Thumbs.db": b"",
        "png": b"",
        "a.png.txt": b"",
        "b/a.gif": b"",
    }
    dataset = data.load_path(fill(fill(tmp_path, images), others))
    assert_holds(dataset, np.stack([images[n] for n in ("a.png", "d.e.JPG.png", "b/c.png")]))
    for name in others:
        (tmp_path / name).unlink()
    assert data.load_path(tmp_path).sha256 == dataset.sha256


def test_names_that_are_no_unicode_are_names(tmp_path: Path) -> None:
    images = [picture(2, 2) for _ in range(3)]
    for name, image in zip([b"a.png", b"b.png", b"\xff.png"], images, strict=True):
        (tmp_path / os.fsdecode(name)).write_bytes(encoded(image))
    assert_holds(data.load_path(tmp_path), np.stack(images))


def test_folders_without_enough_images_are_refused(tmp_path: Path) -> None:
    suffixes = ".bmp, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp"
    fill(tmp_path, {"a.txt": b"", ".a.png": b""})
    assert refusal(tmp_path) == f"{tmp_path}: no images ({suffixes})"
    fill(tmp_path, {"a.png": picture(2, 2), "b.png": picture(2, 2)})
    assert "2 examples, at least 3 are needed" in refusal(tmp_path)


def test_a_folder_that_cannot_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, {f"{name}/{i}.png": picture(2, 2) for name in "ab" for i in range(3)})
    scandir = os.scandir

    def refusing(path: str) -> Any:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert "Permission denied" in refusal(tmp_path)


# Hashes.


def test_the_hash_of_a_folder_is_of_names_and_bytes(tmp_path: Path) -> None:
    fill(tmp_path, {f"{i}.png": picture(4, 4) for i in range(4)})
    (tmp_path / "1.png").write_bytes(encoded(Image.new("L", (4, 4), 7)))

    def sha256() -> str:
        return data.load_path(tmp_path).sha256

    seen = [sha256()]
    os.utime(tmp_path / "1.png", (0, 0))
    (tmp_path / "1.png").chmod(0o600)
    (tmp_path / "notes.txt").write_text("")
    assert sha256() == seen[0]
    (tmp_path / "moved").mkdir()
    changes: list[Callable[[], object]] = [
        lambda: (tmp_path / "1.png").write_bytes(encoded(Image.new("L", (4, 4), 8))),
        lambda: (tmp_path / "1.png").rename(tmp_path / "11.png"),
        lambda: (tmp_path / "11.png").rename(tmp_path / "moved" / "11.png"),
        lambda: (tmp_path / "moved" / "11.png").rename(tmp_path / "moved" / "12.png"),
        lambda: (tmp_path / "moved").rename(tmp_path / "again"),
        # The same pixels in other bytes.
        lambda: (tmp_path / "again" / "12.png").write_bytes(
            encoded(Image.new("L", (4, 4), 8), compress_level=0)
        ),
        lambda: fill(tmp_path, {"again/13.png": picture(4, 4)}),
        lambda: (tmp_path / "0.png").unlink(),
    ]
    for change in changes:
        change()
        seen.append(sha256())
    assert len(set(seen)) == 1 + len(changes)


def test_the_hash_of_a_folder_is_of_its_parts(tmp_path: Path) -> None:
    fill(tmp_path, {f"{i}.png": picture(4, 4) for i in range(8)})
    splits = [(fraction, seed) for fraction in (0.1, 0.5) for seed in (0, 1)]

    def sha256(path: Path, stream_above: int) -> list[str]:
        return [
            data.load_path(
                path, test_fraction=fraction, split_seed=seed, stream_above=stream_above
            ).sha256
            for fraction, seed in splits
        ]

    hashes = sha256(tmp_path, 10**6)
    assert len(set(hashes)) == len(splits)
    assert sha256(tmp_path, 0) == hashes
    other = tmp_path.rename(tmp_path.with_name("other"))
    assert sha256(other, 10**6) == hashes
    # Nor is an image in one part the same in another.
    moves = [f"{part}/{i}.png" for i, part in enumerate(["train"] * 4 + ["test"] * 4)]
    images = {name: picture(4, 4) for name in moves}
    parts = [images, {name.replace("train", "valid", 1): i for name, i in images.items()}]
    parts[1]["train/9.png"] = picture(4, 4)
    first, second = (
        data.load_path(fill(other / str(i), named)).sha256 for i, named in enumerate(parts)
    )
    assert first != second


def test_swapped_contents_change_the_hash(tmp_path: Path) -> None:
    a, b, c = (picture(4, 4) for _ in range(3))
    first = data.load_path(fill(tmp_path / "1", {"a.png": a, "b.png": b, "c.png": c}))
    second = data.load_path(fill(tmp_path / "2", {"a.png": b, "b.png": a, "c.png": c}))
    assert first.sha256 != second.sha256
