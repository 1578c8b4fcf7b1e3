"""What a run tells its loggers: TensorBoard, Weights & Biases, or a function of your own."""

import contextlib
import dataclasses
import importlib
import json
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Shaped, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg

from jvae import distributed, leaves, training
from jvae.experiments import figures, run_folder
from jvae.experiments.config import Config, ConfigError
from jvae.experiments.job import Job


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """What a logger is given after an epoch.

    Of an ensemble, images and histograms are of the first model.

    Attributes:
      step: steps done.
      scalars: the numbers of the line in `metrics.jsonl`, those of seed s as `…_by_seed/s`.
      images: uint8 [height, width, 3], the figures of the model; none between checkpoints.
      histograms: the weights, by the name that they have in `model.safetensors`; none between
        checkpoints.
    """

    step: int
    scalars: Mapping[str, int | float]
    images: Mapping[str, UInt8[np.ndarray, "_ _ 3"]]
    histograms: Mapping[str, Shaped[np.ndarray, "..."]]


# Called after each epoch, in the first process of a run. What it raises ends the run.
Logger: TypeAlias = Callable[[Record], object]


def write(
    loggers: Sequence[Logger],
    job: Job,
    state: training.TrainState,
    line: Mapping[str, Any],
    *,
    in_full: bool,
) -> None:
    """Give each logger a record of the epoch; without one nothing is computed.

    Args:
      loggers: from `from_settings`, or anyone's.
      job: what is run.
      state: after the epoch.
      line: of `metrics.jsonl`.
      in_full: with images and histograms.
    """
    if not loggers:
        return
    images, histograms = {}, {}
    if in_full:
        params = distributed.to_host(training.members(state)[0].params)
        images = {name: _pixels(figure) for name, figure in figures.of_model(job, params).items()}
        weights = leaves.named(params.weights)
        histograms = {name: np.asarray(leaf) for name, leaf in weights.items()}
    scalars = dict(_scalars(line, job.config.all_seeds))
    record = Record(line["step"], scalars, images, histograms)
    for logger in loggers:
        logger(record)


def _scalars(line: Mapping[str, Any], seeds: Sequence[int]) -> Iterator[tuple[str, int | float]]:
    for name, value in line.items():
        if isinstance(value, list):
            yield from ((f"{name}/{s}", one) for s, one in zip(seeds, value, strict=True))
        elif value is not None and name != "step":
            yield name, value


def _pixels(figure: figures.Figure) -> UInt8[np.ndarray, "height width 3"]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def check_installed(config: Config) -> None:
    """Refuse settings whose logger is not installed.

    Raises:
      ImportError: names the extra to install.
    """
    for flag, module, wanted in (
        ("tensorboard", "tensorboardX", config.tensorboard),
        ("wandb", "wandb", config.wandb is not None),
    ):
        try:
            if wanted:
                importlib.import_module(module)
        except ModuleNotFoundError as missing:
            raise ImportError(
                f"--{flag}: no module {missing.name!r}: pip install 'jvae[{flag}]'"
            ) from missing


@contextlib.contextmanager
def from_settings(job: Job) -> Iterator[list[Logger]]:
    """The loggers that the flags of a run ask for.

    Raises:
      ConfigError: Weights & Biases refuses to start, for want of a key, say.
    """
    with contextlib.ExitStack() as stack:
        loggers = []
        if job.config.tensorboard:
            loggers.append(stack.enter_context(tensorboard(job.folder / "tensorboard")))
        if job.config.wandb is not None:
            loggers.append(stack.enter_context(wandb(job.config.wandb, job)))
        yield loggers


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[Logger]:
    """A logger that writes event files for TensorBoard, without TensorFlow.

    A record is on the disk before the next epoch, so that a run that is killed loses none. The
    first one begins a new file, which says that the run restarts at its step: what earlier files
    have from there on, TensorBoard drops.

    Args:
      folder: made with the first record.
    """
    # Not SummaryWriter: its flush leaves out what is still on the way to its thread.
    from tensorboardX import RecordWriter, summary
    from tensorboardX.proto import event_pb2

    file: Any = None
    with contextlib.ExitStack() as stack:

        def write(**content: Any) -> None:
            file.write(event_pb2.Event(wall_time=time.time(), **content).SerializeToString())

        def log(record: Record) -> None:
            nonlocal file
            if file is None:
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(contextlib.closing(RecordWriter(str(_new(folder)))))
                write(file_version="brain.Event:2")
                restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                write(step=record.step, session_log=restart)
            for name, value in record.scalars.items():
                write(step=record.step, summary=summary.scalar(name, value))
            for name, image in record.images.items():
                write(step=record.step, summary=summary.image(name, image, dataformats="HWC"))
            for name, values in record.histograms.items():
                write(step=record.step, summary=summary.histogram(name, values, bins=64))
            file.flush()

        yield log


def _new(folder: Path) -> Path:
    """A name for an event file; TensorBoard reads them in the order of their names."""
    seconds, rest = divmod(time.time_ns(), 10**9)
    return folder / f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{rest:09d}"


@contextlib.contextmanager
def wandb(project: str, job: Job) -> Iterator[Logger]:
    """A logger to Weights & Biases, where a run that is resumed goes on as the same run.

    There a step counts once: what a resumed run logs of it again is dropped, and is equal.

    Args:
      project: the name of the project.
      job: what is run; `wandb.json` in its folder keeps the run's name there.

    Raises:
      ConfigError: Weights & Biases refuses to start, for want of a key, say.
    """
    import wandb as module

    path = job.folder / "wandb.json"
    if not path.exists():
        run_folder.write_json(path, {"id": uuid.uuid4().hex})
    try:
        run = module.init(
            project=project,
            id=json.loads(path.read_text())["id"],
            resume="allow",
            name=job.folder.name,
            dir=job.folder.absolute(),
            config=job.settings(),
            allow_val_change=True,
        )
    except module.Error as error:
        raise ConfigError(f"--wandb {project}: {error}") from error

    def log(record: Record) -> None:
        images = {name: module.Image(image) for name, image in record.images.items()}
        histograms = {name: module.Histogram(v) for name, v in record.histograms.items()}
        run.log({**record.scalars, **images, **histograms}, step=record.step)

    # Not `with run`, which prints a traceback of what the command says in one line.
    try:
        yield log
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
