"""A step in a folder: it comes back bit for bit, and what is none is refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy
from runs import assert_same_state
from weights import random_params

import jvae
from jvae import bundle, training
from jvae.checkpoint import CheckpointError, UnwritableError

MODEL = jvae.VAE.mlp((2, 3), latent_dim=2, hidden=())
SETTINGS = {"optimizer": "adam"}


def make_optimizer(settings: dict[str, Any]) -> optax.GradientTransformation:
    return training.skip_non_finite(training.make_optimizer(settings["optimizer"], 0.1))


def make_state(impl: str = "threefry2x32") -> training.TrainState:
    """After a step of numbers that no rounding leaves alone."""
    key = jax.random.key(7, impl=impl)
    state = training.init(random_params(MODEL), make_optimizer(SETTINGS), key)
    noisy = jax.tree.map(
        lambda leaf: leaf + np.asarray(np.pi, leaf.dtype) if leaf.dtype != bool else ~leaf,
        state.opt_state,
    )
    return state._replace(step=state.step + 57, opt_state=noisy)


def batch() -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
    x[0, 0] = [np.nan, np.inf, -0.0]
    return x


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_a_bundle_comes_back_bit_for_bit(impl: str, tmp_path: Path) -> None:
    state = make_state(impl)
    for _ in range(2):  # in place of an earlier one
        bundle.save(tmp_path / "failure", state, batch(), SETTINGS)
    loaded = bundle.load(tmp_path / "failure", make_optimizer)
    assert_same_state(loaded.state, state)
    assert loaded.state.key.dtype == state.key.dtype
    assert loaded.state.params.model == MODEL
    assert np.asarray(loaded.x).tobytes() == batch().tobytes()
    assert loaded.settings == SETTINGS
    assert [path.name for path in tmp_path.iterdir()] == ["failure"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "failure"
    bundle.save(path, make_state(), batch(), SETTINGS)
    return path


def described(**changes: Any) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        description = json.loads((path / "step.json").read_text()) | changes
        (path / "step.json").write_text(json.dumps(description))

    return apply


def flipped(name: str) -> Callable[[Path], None]:
    """One bit of the last byte: a number is another, and the file is whole."""

    def apply(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[-1] ^= 1
        (path / name).write_bytes(content)

    return apply


def pickled(path: Path) -> None:
    np.save(path / "batch.npy", np.array([print]), allow_pickle=True)
    described(sha256={})(path)


def without_a_moment(path: Path) -> None:
    arrays = safetensors.numpy.load_file(path / "optimizer.safetensors")
    del arrays[sorted(arrays)[0]]
    safetensors.numpy.save_file(arrays, path / "optimizer.safetensors")
    described(sha256={})(path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (shutil.rmtree, "is no bundle of a step: no step.json"),
    "a file gone": (lambda path: (path / "batch.npy").unlink(), "no batch.npy"),
    "text": (lambda path: (path / "step.json").write_text("step 5"), "is no whole bundle"),
    "a list": (lambda path: (path / "step.json").write_text("[1]"), "is no whole bundle"),
    "of others": (lambda path: (path / "step.json").write_text("{}"), "'format' is missing"),
    "another format": (described(format="jvae step, 9"), "its format is 'jvae step, 9'"),
    "weights": (flipped("weights.safetensors"), "weights.safetensors is damaged"),
    "optimizer": (flipped("optimizer.safetensors"), "optimizer.safetensors is damaged"),
    "batch": (flipped("batch.npy"), "batch.npy is damaged"),
    "a pickle": (pickled, "allow_pickle=False"),
    "another key": (described(key_impl="md5"), "md5"),
    "another optimizer": (described(settings={"optimizer": "sgd"}), "its optimizer has none"),
    "a leaf missing": (without_a_moment, "is missing, its optimizer has "),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_no_bundle_is_refused_in_a_line(name: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "failure"
    shutil.copytree(good, path)
    damage, message = DAMAGE[name]
    damage(path)
    with pytest.raises(CheckpointError) as error:
        bundle.load(path, make_optimizer)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match="is no bundle"):
        bundle.save(tmp_path, make_state(), batch(), SETTINGS)
    assert (tmp_path / "notes").read_text() == "mine"


def full(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


def moved_but_the_draft(path: Path, target: Path) -> None:
    if path.name == ".failure.tmp":
        full()
    os.replace(path, target)


@pytest.mark.parametrize(
    ("owner", "name", "failing"), [(np, "save", full), (Path, "replace", moved_but_the_draft)]
)
def test_what_cannot_be_written_leaves_the_earlier_one(
    owner: object,
    name: str,
    failing: Callable[..., None],
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "failure"
    shutil.copytree(good, path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(UnwritableError, match=r"cannot write .*No space left"):
            bundle.save(path, make_state(), batch() + 1, SETTINGS)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["failure"]
