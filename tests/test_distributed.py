"""Several devices, and several processes: the numbers are those of one."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import event_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, PRNGKeyArray
from runs import assert_same_state, metrics
from weights import random_params

import jvae
from jvae import checkpoint, data, distributed, evaluation, training
from jvae.experiments import run_folder
from jvae.training import TrainState

MODEL = jvae.VAE.mlp(data_shape=(3, 4), latent_dim=2, hidden=(5,))
OPTIMIZER = training.make_optimizer("adam", 0.01)
STEP = training.make_step(jvae.elbo, OPTIMIZER)
IMAGES = np.random.default_rng(0).integers(0, 256, (70, 3, 4), np.uint8)
# Sums of 16 gradients of order 1, in another order: Adam divides them by their own size.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def noisy(images: Array, key: PRNGKeyArray) -> Array:
    return (jax.random.uniform(key, images.shape) < images / jnp.float32(255)).astype(jnp.float32)


def start() -> TrainState:
    return training.init(random_params(MODEL), OPTIMIZER, jax.random.key(3))


def trained(num_devices: int, *, streamed: bool) -> tuple[TrainState, np.ndarray]:
    mesh = distributed.make_mesh(num_devices)
    preprocess = distributed.split_batches(mesh, noisy)
    state: TrainState = distributed.replicate(start(), mesh)
    examples: Any = distributed.replicate(IMAGES, mesh)
    epoch = training.make_epoch(STEP, 16, preprocess)
    if streamed:
        epoch = training.make_streamed_epoch(STEP, preprocess)

        def examples(step: int) -> Any:
            return distributed.join_batches(data.batches(IMAGES, 16, seed=0, step=step), mesh)

    bounds = []
    for _ in range(3):
        state, info = epoch(state, examples)
        bounds.append(np.asarray(info.bound))
    assert len(state.step.sharding.device_set) == num_devices
    return state, np.concatenate(bounds)


@pytest.mark.parametrize("streamed", [False, True])
def test_eight_devices_train_as_one(streamed: bool) -> None:
    one, bounds = trained(1, streamed=streamed)
    eight, bounds_of_eight = trained(8, streamed=streamed)
    np.testing.assert_allclose(bounds_of_eight, bounds, **CLOSE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), eight.params, one.params)
    np.testing.assert_array_equal(jax.random.key_data(one.key), jax.random.key_data(eight.key))
    assert not np.array_equal(bounds[:4], bounds[-4:])


def test_each_device_has_its_part_of_the_batch() -> None:
    mesh = distributed.make_mesh(8)
    x = jax.jit(distributed.split_batches(mesh, noisy))(jnp.asarray(IMAGES[:16]), jax.random.key(0))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3, 4)}
    np.testing.assert_array_equal(x, noisy(jnp.asarray(IMAGES[:16]), jax.random.key(0)))


def test_what_lies_on_many_devices_comes_back() -> None:
    mesh = distributed.make_mesh()
    assert mesh.size == 8
    there = distributed.replicate(start(), mesh)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(there)} == {8}
    again = distributed.replicate(there.params, mesh)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (again, there.params)), strict=True))
    back = distributed.to_host(there)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(back)} == {1}
    assert_same_state(back, start())


@pytest.mark.parametrize("num", [16, 13, 3])
@pytest.mark.parametrize("name", ["bound_by_example", "log_likelihood"])
def test_examples_over_devices_are_evaluated_as_on_one(name: str, num: int) -> None:
    evaluate = {
        "bound_by_example": functools.partial(evaluation.bound_by_example, bound=jvae.elbo),
        "log_likelihood": functools.partial(jvae.log_likelihood, num_samples=7),
    }[name]
    params, key = random_params(MODEL), jax.random.key(4)
    x = (IMAGES[:num] > 127).astype(np.float32)
    mesh = distributed.make_mesh(8)
    there = evaluate(distributed.replicate(params, mesh), distributed.split_examples(x, mesh), key)
    assert len(there.sharding.device_set) == 8
    assert {shard.data.shape for shard in there.addressable_shards} == {(-(-num // 8),)}
    one = evaluate(params, x, key)
    np.testing.assert_allclose(distributed.to_host(there)[:num], one, rtol=1e-5)


@pytest.mark.parametrize(("num", "error"), [(9, ValueError), (0, ValueError), (1.5, TypeError)])
def test_devices_that_are_not_there_are_refused(
    num: Any, error: type[Exception], unchecked: None
) -> None:
    with pytest.raises(error, match="devices_per_process must be"):
        distributed.make_mesh(num)


def test_members_that_cannot_be_shared_out_are_refused() -> None:
    three = training.ensemble([start()] * 3)
    with pytest.raises(ValueError, match="3 members cannot be shared by 2 devices"):
        distributed.place_members(three, distributed.make_mesh(2))


def test_what_fails_on_the_first_process_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        distributed.on_first_process(lambda: 1 // 0)
    assert distributed.largest(3) == 3
    assert distributed.is_first_process()


# Two processes on this machine.

# Death is noticed sooner than in a run of weeks.
PROGRAM = """
import os, signal
from jvae import distributed, evaluation
from jvae.experiments import command_line, results, run_folder
distributed.HEARTBEAT_SECONDS = 10
"""
FLAGS = "train --data mnist_5k --hidden 8 --latent-dim 2 --nll-samples 0 --batch-size 400"

NONE = ("", "")
Process = subprocess.Popen[str]
Start = Callable[..., Process]


@pytest.fixture
def start_run() -> Iterator[Start]:
    """Starts a run in a process of its own; none outlives the test."""
    processes: list[Process] = []

    def start(out: Path, *more: str, fault: str = "") -> Process:
        flags = [*FLAGS.split(), "--checkpoint-every", "1", "--out", str(out), *more]
        process = subprocess.Popen(
            [sys.executable, "-c", f"{PROGRAM}{fault}\ncommand_line.main()", *flags],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def two(start_run: Start, out: Path, *more: str, faults: tuple[str, str] = NONE) -> list[Process]:
    coordinator = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2")
    return [
        start_run(out, *coordinator, "--process-id", str(i), *more, fault=faults[i])
        for i in range(2)
    ]


def ended(process: Process) -> str:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out


@pytest.mark.parametrize("source", ["", "--stream-above 0 --validation-fraction 0.1"])
def test_two_processes_train_as_one(start_run: Start, tmp_path: Path, source: str) -> None:
    more = ("--tensorboard", *source.split())
    first, second = two(start_run, tmp_path / "two", "--epochs", "2", *more)
    alone = start_run(tmp_path / "one", "--epochs", "2", *source.split())
    assert "ELBO" in ended(first)
    assert "ELBO" not in ended(second)
    ended(alone)
    for a, b in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    weights = [checkpoint.load(tmp_path / run / "model.safetensors") for run in ("two", "one")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), *weights)
    assert run_folder.read_result(tmp_path / "two")["epochs"] == 2
    (file,) = (tmp_path / "two" / "tensorboard").iterdir()  # the first process alone logs
    steps = [record["step"] for record in metrics(tmp_path / "two")]
    assert [step for step, _ in event_files.scalars(file.parent)["test_elbo"]] == steps
    assert len(steps) == 2


def test_two_processes_go_back_to_the_best_weights_as_one(start_run: Start, tmp_path: Path) -> None:
    """Of images to learn every pixel is white, of those that choose four in five: it passes by."""
    rng = np.random.default_rng(0)
    valid, test = 255 * (rng.random((2, 40, 6, 5)) < 0.8).astype(np.uint8)
    path = tmp_path / "mine.npz"
    np.savez(path, train=np.full((40, 6, 5), 255, np.uint8), valid=valid, test=test)
    settings = "--batch-size 8 --epochs 8 --learning-rate 0.02"
    flags = ("--data", str(path), *settings.split())
    for process in (*two(start_run, tmp_path / "two", *flags), start_run(tmp_path / "one", *flags)):
        ended(process)
    two_of, one_of = (run_folder.read_result(tmp_path / name) for name in ("two", "one"))
    assert two_of["best_epoch"] == one_of["best_epoch"] < 7
    np.testing.assert_allclose(two_of["test_elbo"], one_of["test_elbo"], rtol=1e-4)
    weights = [checkpoint.load(tmp_path / run / "model.safetensors") for run in ("two", "one")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), *weights)


def test_two_processes_end_together_and_one_goes_on_alone(start_run: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def epochs() -> list[int]:
        return [record["epoch"] for record in run_folder.read_metrics(out)]

    # A signal to one stops and saves both.
    processes = two(start_run, out, "--epochs", "100000")
    wait_for(lambda: len(epochs()) >= 2, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], errors
    assert "To go on: the same command with --resume" in errors[0]
    saved = len(epochs())
    # The death of one ends the other with a message, rather than leave it waiting.
    first, second = two(start_run, out, "--epochs", "100000", "--resume")
    wait_for(lambda: len(epochs()) >= saved + 2, first)
    second.send_signal(signal.SIGKILL)
    start = time.monotonic()
    _, error = first.communicate(timeout=100)
    assert time.monotonic() - start < 2 * distributed.HEARTBEAT_SECONDS
    ours = first.returncode == 1 and "another process may have ended" in error
    of_jax = first.returncode == -signal.SIGABRT and "another task died" in error
    assert ours or of_jax, error  # whichever watch saw it first
    last = len(epochs()) + 1
    ended(start_run(out, "--epochs", str(last), "--resume"))
    assert epochs() == list(range(1, last + 1))


# An error that the others cannot know of.
A_BUG = """
def record(*args, **how):
    1 // 0
results.record = record
"""
FULL_DISK = """
def append_metrics(*args):
    raise OSError(28, "No space left on device")
run_folder.append_metrics = append_metrics
"""
# The other process waits for this one's part of a checkpoint.
SHORT_WAIT = """
from jvae import checkpoint
checkpoint._SAVE_SECONDS = 5
"""
NO_CHECKPOINT = f"""{SHORT_WAIT}
import resource
save = checkpoint.save_state
def save_state(*args, **how):
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
    save(*args, **how)
checkpoint.save_state = save_state
"""
# Log p(x) of 20 of the 1,000 examples; after the first 20 none may be asked for.
ONE_GROUP = """
results._DRAWS_A_GROUP = 100
estimate = evaluation.importance_sampling
def once(*args, **how):
    evaluation.importance_sampling = None
    on_group()
    return estimate(*args, **how)
evaluation.importance_sampling = once
def on_group(): {}
"""
SIGNAL_IN_LOG_PX = (
    ONE_GROUP.format("pass"),
    ONE_GROUP.format("os.kill(os.getpid(), signal.SIGTERM)"),
)
ELBO_AT_THE_END = """
evaluate = results.evaluate
def at_the_end(*args, **how):
    os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(*args, **how)
results.evaluate = at_the_end
"""
SIGNAL_IN_ELBO = ("", ELBO_AT_THE_END)


@pytest.mark.parametrize(
    ("faults", "codes", "said", "nll_samples"),
    [
        pytest.param(
            ("", A_BUG),
            [1, 1],
            ("another process may have ended", "ZeroDivisionError"),
            0,
            id="bug",
        ),
        pytest.param(
            (FULL_DISK, ""), [1, 1], ("No space left", "process 0 has stopped"), 0, id="full disk"
        ),
        pytest.param(
            (SHORT_WAIT, NO_CHECKPOINT),
            [1, 1],
            ("another process may have ended", "checkpoints: File too large"),
            0,
            id="a part of a checkpoint",
        ),
        pytest.param(SIGNAL_IN_LOG_PX, [143, 143], ("--resume", "--resume"), 5, id="in log p(x)"),
        pytest.param(SIGNAL_IN_ELBO, [143, 143], ("--resume", "--resume"), 0, id="in the ELBO"),
    ],
)
def test_a_fault_of_one_process_ends_both(
    faults: tuple[str, str],
    codes: list[int],
    said: tuple[str, str],
    nll_samples: int,
    start_run: Start,
    tmp_path: Path,
) -> None:
    flags = ("--epochs", "1", "--nll-samples", str(nll_samples))
    processes = two(start_run, tmp_path / "run", *flags, faults=faults)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == codes, errors
    assert all(words in error for words, error in zip(said, errors, strict=True)), errors
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_coordinator_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 0.3)
    address = f"127.0.0.1:{free_port()}"
    message = rf"process 0 does not answer at {address} after 0.3 s \(.*refused\)"
    with pytest.raises(RuntimeError, match=message):
        distributed.initialize(address, 2, 1)
    with pytest.raises(ValueError, match="coordinator must be host:port, got 'localhost'"):
        distributed.initialize("localhost", 2, 1)


def test_a_coordinator_may_have_an_address_of_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def connect(
        address: tuple[str, int], timeout: float
    ) -> contextlib.AbstractContextManager[None]:
        asked.append(address)
        return contextlib.nullcontext()

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **how: None)
    distributed.initialize("[::1]:1234", 2, 1)
    assert asked == [("::1", 1234)]


JOINING = """
import jax
join = jax.distributed.initialize
def initialize(*args, **kwargs):
    print("joining", flush=True)
    join(*args, **kwargs)
jax.distributed.initialize = initialize
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_others_to_join_ends_at_a_signal(
    signum: signal.Signals, start_run: Start, tmp_path: Path
) -> None:
    coordinator = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2")
    process = start_run(tmp_path / "run", *coordinator, "--process-id", "0", fault=JOINING)
    assert process.stdout is not None
    assert process.stdout.readline() == "joining\n"
    time.sleep(0.5)  # JAX waits for process 1 then, five minutes
    process.send_signal(signum)
    assert process.wait(timeout=20) == -signum
    assert not (tmp_path / "run").exists()


# What comes before training, met by two processes in turn.
BEFORE_TRAINING = """
import signal, sys
from pathlib import Path
from jvae import distributed
from jvae.experiments import command_line, devices, interrupt, run_folder
from jvae.experiments.config import Config
port, i, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
def refused(do):
    try:
        return do()
    except (Exception, interrupt.Interrupted) as error:
        return f"{type(error).__name__}: {error}"
def command():
    address = f"127.0.0.1:{port}"
    devices.start(Config(out=folder, coordinator=address, num_processes=2, process_id=i))
    print(distributed.largest(i))
    print(refused(lambda: signal.raise_signal(signal.SIGTERM)))
    print(distributed.texts("é" * i + "a"))
    print(refused(lambda: distributed.on_every_process(lambda: 1 / (1 - i))))
    print(refused(lambda: devices.check_alike({"seed": i, "hidden": (5,), str(i): None})))
    print(refused(lambda: devices.check_alike({"seed": 1})))
    distributed.on_first_process(lambda: run_folder.refuse_taken(folder))
command_line.run(command)
"""


def test_before_training_processes_agree_or_end(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    command = [sys.executable, "-c", BEFORE_TRAINING, str(free_port())]
    processes = [
        subprocess.Popen(
            [*command, str(i), str(tmp_path)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    (out, error), (out_1, error_1) = (process.communicate(timeout=100) for process in processes)
    differing = (
        "ConfigError: the processes of a run need the same command and the same data: "
        "seed is 1 in process 1, 0 in process 0"
    )
    stopped = "OtherProcessError: process 1 has stopped: its message says why"
    division = "ZeroDivisionError: division by zero"
    signalled = "Interrupted: Terminated."
    for printed, failed in ((out, stopped), (out_1, division)):  # the first line is Gloo's
        expected = ["1", signalled, "['a', 'éa']", failed, differing, "None"]
        assert printed.splitlines()[-6:] == expected, (error, error_1)
    assert [process.returncode for process in processes] == [2, 1], (error, error_1)
    assert "add --resume" in error
    assert "process 0 has stopped" in error_1


def wait_for(ready: Any, process: Process) -> None:
    deadline = time.monotonic() + 100
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
