"""A run that is killed at any moment and resumed is the run that nobody touched, bit for bit."""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import event_files
import numpy as np
import pytest
from runs import assert_same_state, last_state, metrics

from jvae.experiments import run_folder, train

PROGRAM = "from jvae.experiments import command_line; command_line.main()"
FLAGS = "train --data mnist_5k --hidden 8 --latent-dim 3 --nll-samples 0 --checkpoint-every 1"
MODEL = train.Config(data="mnist_5k", hidden=(8,), latent_dim=3)
# A start takes about this long, and what is written after training a good part of a second.
START_UP, RESULTS = 4.0, 0.6
# A save takes ten times as long, and to look more often takes a core from the run.
LOOK_EVERY = 0.003
# A save is under way while this is there.
SAVING = "checkpoints/*.orbax-checkpoint-tmp*"
# Where two runs may differ.
TIMINGS = ("images_per_second", "command")


@pytest.fixture
def chance() -> random.Random:
    """Other moments each time; JVAE_KILL_SEED brings back those of a test that failed."""
    seed = int(os.environ.get("JVAE_KILL_SEED", random.SystemRandom().randrange(10**6)))
    print(f"JVAE_KILL_SEED={seed}")  # noqa: T201
    return random.Random(seed)  # noqa: S311


@dataclasses.dataclass
class Run:
    """A run by one process after another.

    Attributes:
      out: its folder.
      flags: of the command.
      process: at work now.
      lines: of metrics when that one started.
      started: when.
    """

    out: Path
    flags: list[str]
    process: subprocess.Popen[str] = dataclasses.field(init=False)
    lines: int = 0
    started: float = 0.0

    def start(self) -> None:
        """As a user does: anew, as long as there is no run to go on with."""
        resume = ["--resume"] if (self.out / "config.json").exists() else []
        self.lines, self.started = self.count_lines(), time.time()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *self.flags, "--out", str(self.out), *resume],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, signum: signal.Signals | None = None) -> str:
        """What the process says at its end, which is that of the signal."""
        if signum is not None:
            self.process.send_signal(signum)
        _, error = self.process.communicate(timeout=120)
        codes = {None: 0, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGKILL: -signal.SIGKILL}
        assert self.process.returncode == codes[signum], error
        return error

    def wait_for(self, ready: Callable[[], object]) -> None:
        """Until the process has come so far."""
        deadline = time.monotonic() + 100
        while not ready():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(LOOK_EVERY)

    def count_lines(self) -> int:
        """The epochs on record."""
        path = self.out / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for_epoch(self) -> None:
        """Until this process has one on record, and no longer rewinds those of others."""
        self.wait_for(lambda: self.count_lines() > self.lines)

    def wait_for_file(self, *patterns: str) -> None:
        """Until this process has written one."""
        self.wait_for(
            lambda: any(
                modified(path) > self.started for glob in patterns for path in self.out.glob(glob)
            )
        )

    def epoch_seconds(self) -> float:
        """How long the last epoch took, of 4,000 images."""
        return 4000 / run_folder.read_metrics(self.out)[-1]["images_per_second"]


def modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # a draft, replaced meanwhile
        return 0.0


Start: TypeAlias = Callable[..., Run]


@pytest.fixture
def start_run(tmp_path: Path) -> Iterator[Start]:
    """Starts a run; no process of it outlives the test."""
    runs: list[Run] = []

    def start(name: str, flags: str) -> Run:
        runs.append(Run(tmp_path / name, [*FLAGS.split(), *flags.split()]))
        runs[-1].start()
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.communicate()


def in_start_up(run: Run, chance: random.Random) -> None:
    deadline = time.monotonic() + chance.uniform(0, START_UP)
    # A quick machine is past it sooner, and must not use up the epochs that others wait for.
    run.wait_for(lambda: run.count_lines() > run.lines or time.monotonic() > deadline)


def in_training(run: Run, chance: random.Random) -> None:
    run.wait_for_epoch()
    time.sleep(chance.uniform(0, 1) * run.epoch_seconds())


def in_a_save(run: Run, chance: random.Random) -> None:
    run.wait_for_epoch()
    run.wait_for(lambda: any(run.out.glob(SAVING)))


def in_the_results(run: Run, chance: random.Random) -> None:
    run.wait_for_file("*model.safetensors*", "*result.json*", "figures/*")
    time.sleep(chance.uniform(0, RESULTS))


def assert_same_run(killed: Path, whole: Path) -> None:
    """Weights, state, metrics, results and files, all but timings."""
    weights = "model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
    assert_same_state(*(last_state(folder, (28, 28), MODEL) for folder in (killed, whole)))
    assert metrics(killed) == metrics(whole)
    results = [run_folder.read_result(folder) for folder in (killed, whole)]
    ours, theirs = ({k: v for k, v in r.items() if k not in TIMINGS} for r in results)
    assert ours == theirs
    names = [{path.name for path in folder.iterdir()} for folder in (killed, whole)]
    assert names[0] == names[1]
    for figure in (whole / "figures").iterdir():
        if figure.stem != "curves":
            assert (killed / "figures" / figure.name).read_bytes() == figure.read_bytes()


def test_ten_kills_change_nothing(start_run: Start, chance: random.Random, tmp_path: Path) -> None:
    # Of images to learn every pixel is white, of those that choose four in five: it passes by.
    rng = np.random.default_rng(0)
    valid, test = 255 * (rng.random((2, 500, 28, 28)) < 0.8).astype(np.uint8)
    path = tmp_path / "mine.npz"
    np.savez(path, train=np.full((4000, 28, 28), 255, np.uint8), valid=valid, test=test)
    flags = f"--data {path} --batch-size 400 --epochs 24 --learning-rate 0.003"
    whole = start_run("whole", flags)
    whole.end()
    # None of the two that stay anyway.
    assert run_folder.read_result(whole.out)["best_epoch"] < 23
    moments = [in_start_up, *[in_training] * 3, *[in_a_save] * 3]
    chance.shuffle(moments)
    half_saved = 0
    run = start_run("killed", flags)
    for moment in (in_start_up, *moments, in_the_results, in_the_results):
        moment(run, chance)
        run.end(signal.SIGKILL)
        half_saved += any(run.out.glob(SAVING))
        run.start()
    run.end()
    assert half_saved
    assert_same_run(run.out, whole.out)


def test_kills_and_signals_change_nothing_in_a_stream(
    start_run: Start, chance: random.Random, tmp_path: Path
) -> None:
    """There a run stops in the midst of an epoch, too."""
    steps = 400
    flags = "--stream-above 0 --batch-size 10 --epochs 14 --tensorboard"
    whole = start_run("whole", flags)
    whole.end()
    run = start_run("killed", flags)

    def wait_for_the_midst_of_an_epoch() -> None:
        run.wait_for_epoch()
        # Its checkpoint takes its place while the next epoch is under way.
        step = run_folder.read_metrics(run.out)[-1]["step"]
        run.wait_for((run.out / "checkpoints" / str(step)).exists)
        time.sleep(chance.uniform(0, 0.3) * run.epoch_seconds())

    def is_cut_short() -> bool:
        """Whether it writes of an unfinished epoch; it may also have been at the end of one."""
        while run.process.poll() is None:
            if any(modified(path) > run.started for path in run.out.glob(run_folder.UNFINISHED)):
                return True
            time.sleep(LOOK_EVERY)
        return False

    wait_for_the_midst_of_an_epoch()
    run.end(signal.SIGKILL)
    run.start()
    wait_for_the_midst_of_an_epoch()
    while (said := re.search(r"saved after step (\d+)", run.end(signal.SIGTERM))) is None:
        run.start()
        wait_for_the_midst_of_an_epoch()
    step = int(said[1])
    assert step % steps
    assert last_state(run.out, (28, 28), MODEL).step == step
    assert len(run_folder.read_unfinished(run.out, step)) == step % steps
    # As a system does that has no patience: the second signal comes in the midst of the save.
    cut_short = False
    while not cut_short:
        run.start()
        wait_for_the_midst_of_an_epoch()
        run.process.send_signal(signal.SIGTERM)
        cut_short = is_cut_short()
        run.process.kill()
        _, error = run.process.communicate(timeout=120)
        # A quick machine may have ended its save, and the run.
        assert run.process.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM), error
    run.start()
    in_a_save(run, chance)
    run.end(signal.SIGKILL)
    run.start()
    run.end()
    assert_same_run(run.out, whole.out)
    # TensorBoard shows every line once.
    lines = run_folder.read_metrics(run.out)
    for name, series in event_files.scalars(run.out / "tensorboard").items():
        assert series == [(line["step"], float(np.float32(line[name]))) for line in lines]


def test_a_folder_that_was_being_made_is_made_or_taken_for_free(tmp_path: Path) -> None:
    """Killed before each of the changes to the disk that making it takes."""
    code = f"""
import os, signal, sys
from pathlib import Path
from jvae.experiments import run_folder

changes = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")

def killed_before(moment, folder):
    def watch(event, args):
        nonlocal moment
        if event in changes or (event == "open" and args[1] == "w"):
            if moment == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            moment -= 1
    sys.addaudithook(watch)
    run_folder.create(folder, {{"seed": 1}})
    os._exit(0)

for moment in range(100):
    folder = Path({str(tmp_path)!r}, str(moment))
    child = os.fork() or killed_before(moment, folder)
    if os.waitpid(child, 0)[1] == 0:
        break
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    *killed, whole = sorted(tmp_path.iterdir(), key=lambda folder: int(folder.name))
    # Before the draft is opened and before it takes its place; before the first, nothing was made.
    assert [folder.name for folder in killed] == ["1", "2"]
    assert [path.name for path in whole.iterdir()] == ["config.json"]
    for folder in killed:
        run_folder.create(folder, {"seed": 2})
        assert run_folder.read_settings(folder) == {"seed": 2}
        assert [path.name for path in folder.iterdir()] == ["config.json"]
