"""Batches read from the disk: their order, their shares, and the memory they take."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from standard_errors import SIGMAS

from jvae import data

NUM, BATCH = 23, 4
STEPS = 5  # three examples are left over in each epoch
NUMBERED = np.arange(NUM)[:, None]  # an example is its own index


def epoch(examples: data.Examples = NUMBERED, batch_size: int = BATCH, **how: Any) -> np.ndarray:
    """[steps, batch, *data_shape]: the batches to the end of the epoch."""
    return np.stack(list(data.batches(examples, batch_size, **{"seed": 0, **how})))


class Counted:
    """Examples that note which of them were asked for."""

    def __init__(self, num: int) -> None:
        self.shape = (num, 1)
        self.dtype = np.dtype(np.int64)
        self.nbytes = 8 * num
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        self.read.append(int(index))
        return np.array([index])


# The order.


def test_every_epoch_visits_an_example_at_most_once() -> None:
    epochs = [epoch(step=i * STEPS) for i in range(30)]
    for batches in epochs:
        assert batches.shape == (STEPS, BATCH, 1)
        assert len(np.unique(batches)) == STEPS * BATCH
        assert set(batches.ravel()) <= set(range(NUM))
    assert len({batches.tobytes() for batches in epochs}) == 30
    # Those left out are others each time: visits are binomial(30, 20 / 23).
    visits = np.bincount(np.ravel(epochs), minlength=NUM)
    assert (np.abs(visits - 30 * 20 / 23) < SIGMAS * np.sqrt(30 * 20 / 23 * 3 / 23)).all()
    # Nor is any place an example's own: a place sees binomial(30, 1 / 23) of each.
    places = np.stack([batches.ravel() for batches in epochs])
    shares = (places[:, :, None] == np.arange(NUM)).mean(axis=0)
    assert (shares < 1 / 23 + SIGMAS * np.sqrt(1 / 23 * 22 / 23 / 30)).all()


def test_the_seed_decides_the_order() -> None:
    np.testing.assert_array_equal(epoch(seed=3), epoch(seed=3))
    orders = {epoch(seed=seed).tobytes() for seed in range(20)}
    assert len({*orders, NUMBERED[:20].tobytes()}) == 21


@pytest.mark.parametrize("step", range(3 * STEPS))
def test_a_resume_from_any_step_gives_exactly_the_batches_that_remain(step: int) -> None:
    whole = epoch(step=step - step % STEPS)
    np.testing.assert_array_equal(epoch(step=step), whole[step % STEPS :])


def test_a_resume_reads_nothing_of_what_came_before() -> None:
    examples = Counted(NUM)
    last = epoch(examples, step=2 * STEPS - 1)
    assert sorted(examples.read) == sorted(last.ravel())
    np.testing.assert_array_equal(last, epoch(step=STEPS)[-1:])


def test_a_batch_of_all_examples_is_a_permutation() -> None:
    batches = epoch(batch_size=NUM)
    assert batches.shape == (1, NUM, 1)
    np.testing.assert_array_equal(np.sort(batches.ravel()), np.arange(NUM))


# Several processes.


@pytest.mark.parametrize("count", [2, 4])
def test_the_shares_of_the_processes_are_the_batch(count: int) -> None:
    alone = epoch(batch_size=8, step=3)
    shares = [
        epoch(batch_size=8, step=3, process_index=index, process_count=count)
        for index in range(count)
    ]
    assert alone.shape[1] == 8
    assert {share.shape for share in shares} == {(len(alone), 8 // count, 1)}
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), alone)


# What is read.


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (NUM, 6, 5, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: Path, images: np.ndarray) -> Path:
    """The images as PNG files, all for training."""
    for part, chosen in (("train", images), ("test", images[:2])):
        (tmp_path / "images" / part).mkdir(parents=True)
        for i, image in enumerate(chosen):
            Image.fromarray(image).save(tmp_path / "images" / part / f"{i:02}.png")
    return tmp_path / "images"


def test_arrays_memory_maps_and_files_give_the_same_batches(
    tmp_path: Path, images: np.ndarray, folder: Path
) -> None:
    expected = images[epoch().squeeze(axis=2)]
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    files = data.load_path(folder, stream_above=0).train
    assert isinstance(mapped, np.memmap)
    assert isinstance(files, data.ImageFiles)
    for examples in (images, mapped, files):
        batches = epoch(examples)
        assert batches.dtype == np.uint8
        np.testing.assert_array_equal(batches, expected)


def test_a_file_that_broke_since_it_was_looked_at_is_named(folder: Path) -> None:
    files = data.load_path(folder, stream_above=0).train
    broken = folder / "train" / "07.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(data.DataError, match=rf"{broken}: not a whole image"):
        epoch(files, batch_size=NUM)


# Refusals.


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"batch_size": NUM + 1}, ValueError, "at most the 23 examples given, got 24"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 4.0}, TypeError, "batch_size must be a static int, got float"),
        (
            {"batch_size": 9, "process_index": 1, "process_count": 2},
            ValueError,
            "batch_size 9 cannot be shared by 2 processes",
        ),
        (
            {"batch_size": BATCH, "process_index": 2, "process_count": 2},
            ValueError,
            "no step 0 of process 2 among 2",
        ),
        (
            {"batch_size": BATCH, "process_index": -1, "process_count": 2},
            ValueError,
            "no step 0 of process -1 among 2",
        ),
        (
            {"batch_size": BATCH, "process_index": 0, "process_count": 0},
            ValueError,
            "no step 0 of process 0 among 0",
        ),
        ({"batch_size": BATCH, "step": -1}, ValueError, "no step -1 of process 0 among 1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_batches_that_cannot_be_are_refused(
    how: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        data.batches(NUMBERED, **how, seed=0)


def test_without_grain_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"Grain: pip install 'jvae\[data\]'"):
        data.batches(NUMBERED, BATCH, seed=0)


# Memory. 315 MB of pixels have to pass through the 96 MB that are left to the process.

NUM_LARGE, LARGE_BATCH, ROOM = 400, 4, 96 << 20

IN_LITTLE_MEMORY = f"""
import functools, resource, sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jvae
from jvae import data, training


def used():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))


def thumbnail(images, key):
    return images[:, ::128, ::128].astype(jnp.float32) / 255


folder = sys.argv[1]
train = data.load_path(folder, stream_above=0).train
assert train.shape == ({NUM_LARGE}, 512, 512, 3) and train.nbytes > 2 * {ROOM}
model = jvae.VAE.mlp((4, 4, 3), latent_dim=2, hidden=(8,), likelihood="gaussian")
optimizer = optax.sgd(1e-4)
state = training.init(jvae.init(model, jax.random.key(0)), optimizer, jax.random.key(1))
epoch = training.make_streamed_epoch(training.make_step(jvae.elbo, optimizer), thumbnail)
batches = functools.partial(data.batches, train, {LARGE_BATCH}, seed=0)
state, _ = epoch(state, lambda step: batches(step={NUM_LARGE // LARGE_BATCH - 6}))  # compile
state = state._replace(step=jnp.zeros_like(state.step))

resource.setrlimit(resource.RLIMIT_DATA, (used() + {ROOM}, resource.RLIM_INFINITY))
state, info = epoch(state, lambda step: batches(step=step))
print(state.step, int(np.isfinite(info.bound).sum()))
try:
    data.load_path(folder, stream_above=1 << 40)
except MemoryError:
    print("too large for memory")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
def test_an_epoch_over_more_than_memory(tmp_path: Path) -> None:
    for part, num in (("train", NUM_LARGE), ("test", 2)):
        (tmp_path / part).mkdir()
        for i in range(num):
            Image.new("RGB", (512, 512), (i % 256, i // 2, 0)).save(tmp_path / part / f"{i}.png")
    done = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["100 100", "too large for memory"]
