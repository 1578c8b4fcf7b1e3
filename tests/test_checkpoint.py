import asyncio
import gc
import json
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import jvae
from jvae import checkpoint, networks, training


def make_state(
    seed: int = 0, latent_dim: int = 3, optimizer: str = "adam", step: int = 0, data_dim: int = 4
) -> training.TrainState:
    model = jvae.VAE.mlp(data_shape=(data_dim,), latent_dim=latent_dim, hidden=())
    key = jax.random.key(seed)
    state = training.init(jvae.init(model, key), training.make_optimizer(optimizer, 0.1), key)
    return state._replace(step=state.step + step)


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    optimizer = training.make_optimizer("adam", 0.1)
    step = training.make_step(jvae.elbo, optimizer)
    state, _ = step(make_state(), jax.random.uniform(jax.random.key(1), (5, 4)))
    like = make_state(seed=1)._replace(key=state.key)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save_state(checkpoints, state)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        restored = checkpoint.restore_latest(checkpoints, like)
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
        restored = checkpoint.restore_latest(checkpoints, make_state(seed=0))
    first = make_state(seed=0)
    jax.tree.map(np.testing.assert_array_equal, restored.params, first.params)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = r"cannot write .*/file/checkpoints: "
    with (
        pytest.raises(checkpoint.UnwritableError, match=message),
        checkpoint.open_checkpoints(tmp_path / "file" / "checkpoints"),
    ):
        pytest.fail("opened")


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
            checkpoint.CheckpointError, match=r"0 is of another model or optimizer \(opt_state/"
        ):
            checkpoint.restore_latest(checkpoints, make_state(**other))  # type: ignore[arg-type]
    assert (tmp_path / "0").exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    """Of the same shapes: a run's key tells it from others."""
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save_state(checkpoints, make_state(seed=1, step=7))
        message = r"7 is of another run \(its key is \[0, 1\], expected \[0, 0\]\)"
        with pytest.raises(checkpoint.CheckpointError, match=message):
            checkpoint.restore_latest(checkpoints, make_state())
    assert (tmp_path / "7").exists()


# Weights alone.

MODELS = {
    "the paper's": jvae.VAE.mlp(data_shape=(4,), latent_dim=3, hidden=(5,)),
    "affine, scale fixed": jvae.VAE.mlp((2, 3), 1, (), likelihood=jvae.Gaussian(scale=0.5)),
    "modern": jvae.VAE.mlp((3,), 2, (4, 5), "relu", jvae.Gaussian(sigmoid_mean=True), "lecun"),
    **{name: jvae.VAE.mlp((3,), 2, (), likelihood=name) for name in networks.FAMILIES},
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
        self.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(checkpoint.CheckpointError, match=r"cannot write .*No space left"):
            checkpoint.save(file, params)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]
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
    "no end": (
        lambda path: safetensors.numpy.save_file({}, path, {"model": "[" * 10**5}),
        "not a whole file",
    ),
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


# States that cannot be used.


def cut(raw: bytes) -> bytes:
    return raw[:-10]


def flip(raw: bytes) -> bytes:
    """Change one byte in the middle."""
    k = len(raw) // 2
    return raw[:k] + bytes([raw[k] ^ 255]) + raw[k + 1 :]


def spoil(raw: bytes) -> bytes:
    return raw[:50] + b"\xff" * 3 + raw[53:]


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {checkpoint.CHECKSUMS}


def save_two(folder: Path, *seeds: int, data_dim: int = 4) -> None:
    """Steps 1 and 2, of states that differ."""
    with checkpoint.open_checkpoints(folder) as checkpoints:
        for step, seed in enumerate(seeds, 1):
            state = make_state(seed, step=step, data_dim=data_dim)
            params = jax.tree.map(lambda leaf, step=step: leaf + step, state.params)
            checkpoint.save_state(checkpoints, state._replace(params=params))


VALUES = "ocdbt.process_0/d/*"
# The file, the largest where there are several; what becomes of its bytes; what is said of it.
DAMAGED_FILES: dict[str, tuple[str, Callable[[bytes], bytes | None], str]] = {
    "no description": ("_METADATA", lambda raw: None, "its description is missing"),
    "half a description": ("_METADATA", cut, "Unterminated string"),
    "bytes for a description": ("_METADATA", flip, "can't decode byte"),
    "a list for a description": ("_METADATA", lambda raw: b"[1,2]", "'list' object"),
    "no index": ("manifest.ocdbt", lambda raw: None, "NOT_FOUND"),
    "half an index": ("manifest.ocdbt", cut, "DATA_LOSS"),
    "no tree": ("d/*", lambda raw: None, "NOT_FOUND"),
    "half a tree": ("d/*", cut, "OUT_OF_RANGE"),
    "another tree": ("d/*", flip, "DATA_LOSS"),
    "a spoilt tree": ("d/*", spoil, "Error opening"),
    "no values": (VALUES, lambda raw: None, "Error reading"),
    "a few values": (VALUES, lambda raw: raw[:60], "OUT_OF_RANGE"),
    "spoilt values": (VALUES, spoil, "Error reading"),
    "other values": (VALUES, flip, "its values have the checksum"),
    "no devices": ("_sharding", lambda raw: b"", "FAILED_PRECONDITION"),
    "nothing": ("", lambda raw: None, "Unable to retrieve"),
}


@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(name: str, tmp_path: Path) -> None:
    save_two(tmp_path, 0, 0, data_dim=100)
    pattern, damage, reason = DAMAGED_FILES[name]
    folder = tmp_path / "2" / "default"
    if pattern:
        file = max(folder.glob(pattern), key=lambda file: file.stat().st_size)
        raw = damage(file.read_bytes())
        file.unlink() if raw is None else file.write_bytes(raw)
    else:
        shutil.rmtree(folder)
    said: list[str] = []
    like = make_state(data_dim=100)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        state = checkpoint.restore_latest(checkpoints, like, on_damaged=said.append)
        assert int(state.step) == 1
        # Its place is free for the same step of the run that goes on.
        checkpoint.save_state(checkpoints, state._replace(step=state.step + 1))
        again = checkpoint.restore_latest(checkpoints, like, on_damaged=said.append)
    assert int(again.step) == 2
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)
    (line,) = said
    assert f"checkpoint 2 in {tmp_path} is damaged " in line
    assert reason in line
    assert line.endswith("): going on from 1")
    assert "\n" not in line
    assert kept(tmp_path) == {"1", "2", "2.unusable"}


@pytest.mark.parametrize(
    ("seed", "reason"),
    [(5, r"is of another run .its key is .*, expected"), (0, "is damaged or of another run")],
)
def test_a_foreign_checkpoint_gives_way_to_the_one_before(
    seed: int, reason: str, tmp_path: Path
) -> None:
    """Of another seed, or of the same one, whose key is the same."""
    ours, theirs, said = tmp_path / "ours", tmp_path / "theirs", list[str]()
    save_two(theirs, seed, seed)
    for _ in range(2):  # the second time a foreign one is there already
        save_two(ours, 0, 0)
        params = make_state(seed).params
        with checkpoint.open_checkpoints(tmp_path / "other") as checkpoints:
            checkpoint.save_state(checkpoints, make_state(seed, step=2)._replace(params=params))
        shutil.rmtree(ours / "2")
        shutil.copytree(tmp_path / "other" / "2", ours / "2")
        with checkpoint.open_checkpoints(ours) as checkpoints:
            with pytest.raises(checkpoint.LostError, match=reason):
                checkpoint.restore(checkpoints, 2, make_state())
            state = checkpoint.restore_latest(checkpoints, make_state(), on_damaged=said.append)
        assert int(state.step) == 1
    assert all("checkpoint 2" in line and "of another run" in line for line in said)
    assert len(said) == 2
    assert kept(ours) == {"1", "2.unusable"}


@pytest.mark.parametrize("content", [None, "", "[1]", '{"2"'], ids=str)
def test_checkpoints_without_checksums_are_read(content: str | None, tmp_path: Path) -> None:
    """As those of earlier versions; the next save begins the file anew."""
    save_two(tmp_path, 0, 0)
    file = tmp_path / checkpoint.CHECKSUMS
    file.unlink() if content is None else file.write_text(content)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        state = checkpoint.restore_latest(checkpoints, make_state(), on_damaged=pytest.fail)
        assert int(state.step) == 2
        checkpoint.save_state(checkpoints, state._replace(step=state.step + 1))
    assert json.loads(file.read_text()).keys() == {"3"}


def test_checksums_are_of_the_checkpoints_that_are_there(tmp_path: Path) -> None:
    file, saved = tmp_path / checkpoint.CHECKSUMS, dict[str, str]()
    for step in range(1, 5):
        with checkpoint.open_checkpoints(tmp_path) as checkpoints:
            state = make_state(step=step)
            # Arrays of NumPy are saved too, and have the same checksum.
            params = jax.device_get(state.params) if step == 3 else state.params
            checkpoint.save_state(checkpoints, state._replace(params=params))
            saved = json.loads(file.read_text())
            assert saved.keys() == {str(s) for s in (step - 2, step - 1, step) if s > 0}
    assert len(set(saved.values())) == 3  # the step is a part of the state


def test_a_last_save_that_fails_as_all_is_closed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise ValueError("[os_error_code='28']")

    with (
        pytest.raises(checkpoint.UnwritableError, match=r"cannot write .*: No space left"),
        checkpoint.open_checkpoints(tmp_path) as checkpoints,
    ):
        monkeypatch.setattr(checkpoints, "close", full)


def caused(cause: Exception, error: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (
            OSError(5, "Input/output error"),
            checkpoint.CheckpointError,
            r"checkpoint 2 in .* cannot be read \(\[Errno 5\] Input/output error\): try again",
        ),
        (
            ValueError("UNAVAILABLE: the store is away\nSource locations: 1"),
            checkpoint.CheckpointError,
            r"checkpoint 2 in .* cannot be read \(UNAVAILABLE: the store is away\): try again",
        ),
        (
            caused(
                ValueError("PERMISSION_DENIED: not now [tensorstore_spec='{}']"), Exception("…")
            ),
            checkpoint.CheckpointError,
            r"checkpoint 2 in .* cannot be read \(PERMISSION_DENIED: not now\): try again",
        ),
        (
            ValueError("INTERNAL: read [os_error_code='5']"),
            checkpoint.CheckpointError,
            r"checkpoint 2 in .* cannot be read \(INTERNAL: read .*\): try again",
        ),
        (jax.errors.JaxRuntimeError("process 1"), jax.errors.JaxRuntimeError, "process 1"),
        (ValueError("Gloo: process 1"), ValueError, "Gloo: process 1"),
        (TimeoutError("process 1"), TimeoutError, "process 1"),
        (MemoryError("2 GiB"), MemoryError, "2 GiB"),
        (caused(MemoryError("2 GiB"), ValueError("…")), ValueError, "…"),
        (caused(ValueError("Gloo"), ValueError("…")), ValueError, "…"),
        (
            RuntimeError("can't start new thread"),
            checkpoint.CheckpointError,
            r"checkpoint 2 in .* cannot be read \(can't start new thread\): try again",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_says_nothing_of_the_bytes_costs_no_checkpoint(
    error: Exception,
    expected: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def restore(*args: object, **kwargs: object) -> None:
        raise error

    save_two(tmp_path, 0, 0)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "restore", restore)
            with pytest.raises(expected, match=message):
                checkpoint.restore_latest(checkpoints, make_state())
        assert int(checkpoint.restore_latest(checkpoints, make_state()).step) == 2
    assert kept(tmp_path) == {"1", "2"}


@pytest.mark.parametrize(
    "error",
    [
        IsADirectoryError(21, "Is a directory"),
        NotADirectoryError(20, "Not a directory"),
        ValueError("NOT_FOUND: a file [os_error_code='2']"),
        caused(ValueError("Data corruption detected"), Exception("…")),
        NotImplementedError("sharding"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_says_that_the_bytes_are_wrong_is_damage(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def restore(*args: object, **kwargs: object) -> None:
        raise error

    save_two(tmp_path, 0, 0)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints, "restore", restore)
        with pytest.raises(checkpoint.CheckpointError, match="can be gone on from: 2 is damaged"):
            checkpoint.restore_latest(checkpoints, make_state())


def coroutine_of(file: str) -> object:
    return SimpleNamespace(cr_code=SimpleNamespace(co_filename=file))


def test_other_errors_that_nobody_can_catch_are_still_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    hush = checkpoint._hush_what_is_left_unfinished
    with monkeypatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_value))
        hush.cache_clear()
        with checkpoint.open_checkpoints(tmp_path):
            for object_, error in (
                (None, RuntimeError("Event loop is closed")),
                (None, RuntimeError("another")),
                (print, RuntimeError("Event loop is closed")),
                (coroutine_of(ocp.__file__), RuntimeError("of Orbax")),
                (coroutine_of(__file__), RuntimeError("of another coroutine")),
            ):
                what: Any = SimpleNamespace(object=object_, exc_value=error)
                sys.unraisablehook(what)
    hush.cache_clear()
    assert [str(error) for error in told] == [
        "another",
        "Event loop is closed",
        "of another coroutine",
    ]


def test_nothing_but_damage_is_refused_and_left(tmp_path: Path) -> None:
    save_two(tmp_path, 0, 0)
    for step in "12":
        file = tmp_path / step / "default" / "_METADATA"
        file.write_bytes(cut(file.read_bytes()))
    message = r"no checkpoint in .* can be gone on from: 2 is damaged \(.*delete that folder to"
    with (
        checkpoint.open_checkpoints(tmp_path) as checkpoints,
        pytest.raises(checkpoint.CheckpointError, match=message),
    ):
        checkpoint.restore_latest(checkpoints, make_state())
    assert kept(tmp_path) == {"1", "2"}


def test_errors_that_others_log_beside_orbax_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with checkpoint.open_checkpoints(tmp_path):
        try:
            raise ValueError
        except ValueError:
            absl.logging.exception("mine")
    assert [record.getMessage() for record in caplog.records if record.exc_info] == ["mine"]


async def fail() -> None:
    raise OSError("of a task")


async def never_end() -> None:
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("whose", ["orbax", "mine"])
@pytest.mark.parametrize(
    ("coroutine", "gathered"), [(fail, False), (fail, True), (never_end, False)]
)
def test_what_orbax_leaves_unfinished_is_not_told_and_all_else_is(
    coroutine: Any, gathered: bool, whose: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with checkpoint.open_checkpoints(tmp_path):
        pass
    file = str(Path(ocp.__file__).with_name("tasks.py")) if whose == "orbax" else __file__
    task = types.FunctionType(coroutine.__code__.replace(co_filename=file), globals())

    async def leave() -> None:
        future = asyncio.gather(task(), task()) if gathered else asyncio.ensure_future(task())
        await asyncio.wait([future], timeout=0.01)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    gc.collect()
    told = [record for record in caplog.records if record.name == "asyncio"]
    assert len(told) == (whose == "mine")
