import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import jvae
from jvae import checkpoint, training


def make_state(
    seed: int = 0, latent_dim: int = 3, optimizer: str = "adam", step: int = 0
) -> training.TrainState:
    model = jvae.VAE.mlp(data_shape=(4,), latent_dim=latent_dim, hidden=())
    key = jax.random.key(seed)
    state = training.init(jvae.init(model, key), training.make_optimizer(optimizer, 0.1), key)
    return state._replace(step=state.step + step)


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    optimizer = training.make_optimizer("adam", 0.1)
    step = training.make_step(jvae.elbo, optimizer)
    state, _ = step(make_state(), jax.random.uniform(jax.random.key(1), (5, 4)))
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save_state(checkpoints, state)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        restored = checkpoint.restore_latest(checkpoints, make_state(seed=1))
    # Trees of different structure cannot be mapped over together.
    a, b = (s._replace(key=jax.random.key_data(s.key)) for s in (restored, state))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_latest_two_stay(tmp_path: Path) -> None:
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoint.save_state(checkpoints, make_state(step=step))
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        assert sorted(checkpoints.all_steps()) == [3, 4]
        assert int(checkpoint.restore_latest(checkpoints, make_state()).step) == 4


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save_state(checkpoints, make_state(seed=0))
        checkpoint.save_state(checkpoints, make_state(seed=1))
        restored = checkpoint.restore_latest(checkpoints, make_state(seed=2))
    first = make_state(seed=0)
    jax.tree.map(np.testing.assert_array_equal, restored.params, first.params)


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    with (
        checkpoint.open_checkpoints(tmp_path / "none") as checkpoints,
        pytest.raises(checkpoint.CheckpointError, match="no checkpoint in"),
    ):
        checkpoint.restore_latest(checkpoints, make_state())


@pytest.mark.parametrize("other", [{"latent_dim": 4}, {"optimizer": "sgd"}], ids=str)
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, other: dict[str, int]) -> None:
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save_state(checkpoints, make_state())
        with pytest.raises(
            checkpoint.CheckpointError, match="is of another model or optimizer: opt_state/"
        ):
            checkpoint.restore_latest(checkpoints, make_state(**other))  # type: ignore[arg-type]


# Weights alone.

MODELS = {
    "the paper's": jvae.VAE.mlp(data_shape=(4,), latent_dim=3, hidden=(5,)),
    "affine, scale fixed": jvae.VAE.mlp((2, 3), 1, (), likelihood=jvae.Gaussian(scale=0.5)),
    "modern": jvae.VAE.mlp((3,), 2, (4, 5), "relu", jvae.Gaussian(sigmoid_mean=True), "lecun"),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A good file of weights."""
    params = jvae.init(MODELS["the paper's"], jax.random.key(0))
    checkpoint.save(tmp_path / "weights.safetensors", params)
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_back_with_their_model(tmp_path: Path, name: str) -> None:
    params = jvae.init(MODELS[name], jax.random.key(3))
    checkpoint.save(tmp_path / "a", params)
    loaded = checkpoint.load(str(tmp_path / "a"))
    assert loaded.model == params.model
    assert hash(loaded.model) == hash(params.model)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_equal_weights_make_equal_files(tmp_path: Path) -> None:
    params = jvae.init(MODELS["the paper's"], jax.random.key(0))
    for i in range(10):
        checkpoint.save(tmp_path / str(i), params)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_weights_are_read_in_a_new_process_without_training(file: Path) -> None:
    code = f"""
import sys, jax, jvae.checkpoint
params = jvae.checkpoint.load({str(file)!r})
print(jvae.sample(params, jax.random.key(1), 2).tolist())
assert not any(name.startswith("jvae.experiments") for name in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    params = jvae.init(MODELS["the paper's"], jax.random.key(0))
    np.testing.assert_allclose(
        json.loads(found.stdout), jvae.sample(params, jax.random.key(1), 2), rtol=1e-6
    )


def test_a_saved_file_is_replaced_whole(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()
    params = jvae.init(MODELS["modern"], jax.random.key(0))

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(checkpoint.CheckpointError, match=r"cannot write .*No space left"):
            checkpoint.save(file, params)
    assert file.read_bytes() == before
    checkpoint.save(file, params)
    assert checkpoint.load(file).model == MODELS["modern"]


def square(x: jax.Array) -> jax.Array:
    return x * x


def test_a_model_that_a_file_cannot_describe_is_refused(tmp_path: Path) -> None:
    params = jvae.init(jvae.VAE.mlp((4,), activation=square), jax.random.key(0))
    message = r"model\.encoder\.activation is <function square.*names and VAE, MLP"
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.save(tmp_path / "a", params)
    assert list(tmp_path.iterdir()) == []


def rewritten(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    """Change the weights of a file and leave the description of its model."""

    def apply(path: Path) -> None:
        with safetensors.safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata()
        arrays = safetensors.numpy.load_file(path)
        change(arrays)
        safetensors.numpy.save_file(arrays, path, metadata)

    return apply


def described(model: object) -> Callable[[Path], None]:
    """Change the description and leave the weights."""

    def apply(path: Path) -> None:
        arrays = safetensors.numpy.load_file(path)
        safetensors.numpy.save_file(arrays, path, {"model": json.dumps(model)})

    return apply


BIAS = "encoder/params/output/bias"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (Path.unlink, "does not exist"),
    "empty": (lambda path: path.write_bytes(b""), "not a whole file"),
    "text": (lambda path: path.write_text("weights"), "not a whole file"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not a whole file"),
    "of others": (
        lambda path: safetensors.numpy.save_file({"a": np.zeros(1)}, path),
        "no weights of jvae, 'model' is missing",
    ),
    "an unknown part": (described({"part": "os.system"}), "'os.system' is missing"),
    "a list": (described([1, 2]), "not a whole file"),
    "fields missing": (described({"part": "VAE"}), "not a whole file"),
    "a weight missing": (
        rewritten(lambda arrays: arrays.pop(BIAS)),
        rf"{BIAS} is missing, its model has float32 \(6,\)",
    ),
    "a weight more": (
        rewritten(lambda arrays: arrays.update(more=np.zeros(2, np.float32))),
        r"more is float32 \(2,\), its model has none",
    ),
    "another shape": (
        rewritten(lambda arrays: arrays.update({BIAS: np.zeros(7, np.float32)})),
        rf"{BIAS} is float32 \(7,\), its model has float32 \(6,\)",
    ),
    "another dtype": (
        rewritten(lambda arrays: arrays.update({BIAS: np.zeros(6)})),
        rf"{BIAS} is float64 \(6,\), its model has float32 \(6,\)",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_weights_are_refused(file: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(file)
    with pytest.raises(checkpoint.CheckpointError, match=message) as error:
        checkpoint.load(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


# Damaged states.


def damage_description(checkpoint_: Path) -> None:
    """Orbax reads it before all else, and leaves no task behind when that fails."""
    description = checkpoint_ / "default" / "_METADATA"
    description.write_bytes(description.read_bytes()[:-10])


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoint.save_state(checkpoints, make_state(seed=step, step=step))
    damage_description(tmp_path / "2")
    said: list[str] = []
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        state = checkpoint.restore_latest(checkpoints, make_state(), on_damaged=said.append)
        jax.tree.map(np.testing.assert_array_equal, state.params, make_state(seed=1).params)
        assert int(state.step) == 1
        # Its place is free for the same step of the run that goes on.
        checkpoint.save_state(checkpoints, make_state(seed=3, step=2))
        again = checkpoint.restore_latest(checkpoints, make_state())
        jax.tree.map(np.testing.assert_array_equal, again.params, make_state(seed=3).params)
    (line,) = said
    assert f"checkpoint 2 in {tmp_path} is damaged (" in line
    assert line.endswith("): going on from 1")
    assert "\n" not in line


def test_weights_that_are_damaged_give_way_too(tmp_path: Path) -> None:
    """In a process of its own: Orbax complains of such a failure long after it."""
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoint.save_state(checkpoints, make_state(step=step))
    (values,) = (tmp_path / "2" / "default" / "d").iterdir()
    raw = bytearray(values.read_bytes())
    raw[len(raw) // 2] ^= 255
    values.write_bytes(raw)
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_checkpoint import checkpoint, make_state
with checkpoint.open_checkpoints(Path({str(tmp_path)!r})) as checkpoints:
    state = checkpoint.restore_latest(checkpoints, make_state(), on_damaged=print)
    print(state.step)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line, restored = found.stdout.splitlines()
    assert "checkpoint 2" in line
    assert "DATA_LOSS" in line
    assert restored == "1"


def test_nothing_but_damage_is_refused_and_left(tmp_path: Path) -> None:
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save_state(checkpoints, make_state(step=1))
    damage_description(tmp_path / "1")
    with (
        checkpoint.open_checkpoints(tmp_path) as checkpoints,
        pytest.raises(checkpoint.CheckpointError, match=r"every checkpoint in .* is damaged: 1"),
    ):
        checkpoint.restore_latest(checkpoints, make_state())
    assert (tmp_path / "1").exists()
