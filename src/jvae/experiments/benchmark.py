"""Speed as ratios from one interleaved run: jvae, its peers, and the floor under them all.

python -m jvae.experiments.benchmark --help

A machine drifts, so a time means nothing next to one taken a minute before. Every round runs all
contestants in a shuffled order, a ratio is of two times of the same round, and what is reported
is the median over rounds. A process keeps a speed of its own too: a ratio near a target takes
--processes 4. The machine has to be idle otherwise: threads that spin while they wait, as those of
PyTorch seem to, suffer from company many times more than others.
"""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import rich.console
import rich.progress
import rich.table
import tyro

from jvae import cores
from jvae.experiments import command_line, run_folder
from jvae.experiments.config import ConfigError
from jvae.experiments.contestants import CONTESTANTS, load_work

# Training bounds of contestants that do the same work are this close, in nats, after a few epochs.
BOUND_TOLERANCE = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Time an epoch of the paper's MNIST model against the floor and against peers, on CPU."""

    dataset: Literal["mnist_5k", "mnist"] = "mnist_5k"
    """mnist_5k: the 4,000 training digits that jvae ships, repeated. mnist: all 60,000, from the
    four raw files in DATA_DIR/mnist/."""
    data_dir: Path | None = None
    """Folder that holds a folder for each dataset."""
    contestants: tuple[str, ...] = tuple(CONTESTANTS)
    """Who takes part; a target is checked where both of its contestants do."""
    rounds: int = 7
    """Timings of each contestant a process."""
    steps: int = 600
    """Steps an epoch, of 100 images each."""
    short_steps: int = 60
    """Steps an epoch, at most, of the two that compare L = 10 with L = 1."""
    processes: int = 1
    """Fresh processes that repeat the whole run; their medians are summarised by the median."""
    startup_repeats: int = 3
    """Fresh processes that time the first training step."""
    seed: int = 0
    """Of the weights, the noise and the order of contestants; process i adds i."""
    out: Path | None = None
    """Folder to write benchmark.json in."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("rounds", "steps", "short_steps", "processes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("startup_repeats", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        unknown = [name for name in self.contestants if name not in CONTESTANTS]
        if unknown or not self.contestants:
            raise ConfigError(f"contestants must be among {list(CONTESTANTS)}, got {unknown}")
        if self.dataset == "mnist" and self.data_dir is None:
            raise ConfigError("--dataset mnist needs --data-dir, the folder that holds mnist/")


@dataclasses.dataclass(frozen=True)
class Process:
    """What one process measured.

    Attributes:
      seconds: of an epoch, by contestant, a number a round.
      bounds: the mean training bound over the last epoch in nats, by contestant that trains.
    """

    seconds: dict[str, list[float]]
    bounds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Result:
    """All that was measured.

    Attributes:
      processes: each on its own; nothing compares across them.
      steps: of an epoch, by contestant.
      first_step_seconds: from the start of a process to the end of its first training step.
      first_step_seconds_cached: the same where JAX finds all its programs compiled.
    """

    processes: list[Process]
    steps: dict[str, int]
    first_step_seconds: list[float]
    first_step_seconds_cached: list[float]

    def ratio(self, over: str, under: str) -> "Summary | None":
        """Time a step of one contestant over that of another, of the same rounds."""
        if over not in self.steps or under not in self.steps:
            return None
        scale = self.steps[under] / self.steps[over]
        return _summary(
            [scale * a / b for a, b in zip(p.seconds[over], p.seconds[under], strict=True)]
            for p in self.processes
        )

    def epoch_seconds(self, name: str) -> "Summary":
        """Seconds for the steps of a whole epoch, for those too that ran fewer."""
        scale = max(self.steps.values()) / self.steps[name]
        return _summary([scale * s for s in p.seconds[name]] for p in self.processes)

    def bound(self, name: str) -> float | None:
        """The training bound in nats, median over processes."""
        bounds = [p.bounds[name] for p in self.processes if name in p.bounds]
        return statistics.median(bounds) if bounds else None


class Summary(NamedTuple):
    """A median, and the range over processes' medians or, of one process, over its rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} – {self.high:.2f})"


class Target(NamedTuple):
    """A claim that the ratio of two contestants' times stays within limits."""

    claim: str
    over: str
    under: str
    at_least: float = 0.0
    at_most: float = float("inf")


class Verdict(NamedTuple):
    """A target and what was measured; None where it was not."""

    claim: str
    measured: Summary | None
    passed: bool | None


TARGETS = (
    Target("at least 76 % of the floor's speed", "floor", "jvae-grey", at_least=0.76),
    Target("dynamic binarisation at most 1.10 × grey", "jvae-dynamic", "jvae-grey", at_most=1.10),
    Target("at least 2.5 × PyTorch eager's speed", "torch-eager", "jvae-grey", at_least=2.5),
    Target("at least 4 × PyTorch DataLoader's", "torch-dataloader", "jvae-grey", at_least=4.0),
    Target("at least 1.1 × NumPyro's", "numpyro", "jvae-grey", at_least=1.1),
    Target("8 seeds at least 85 % of their floor", "floor-8-seeds", "jvae-8-seeds", at_least=0.85),
    Target("8 seeds at least 1.3 × one seed's speed", "jvae-grey", "jvae-8-seeds", at_least=1.3),
    Target(
        "log p(x) at least 80 % of its floor", "floor-likelihood", "jvae-likelihood", at_least=0.8
    ),
    Target(
        "log p(x) at least 2 × PyTorch eager's", "torch-likelihood", "jvae-likelihood", at_least=2.0
    ),
    Target("L = 10 less than 10 × L = 1", "jvae-L10", "jvae-L1", at_most=10.0),
)
FIRST_STEP_SECONDS, FIRST_STEP_SECONDS_CACHED = 5.0, 2.5


def run(config: Config) -> Result:
    """Measure as `config` says, print the tables and write `benchmark.json`.

    Raises:
      DataError: the dataset is missing or corrupt.
      ConfigError: none of the contestants is installed.
    """
    console = rich.console.Console(stderr=True)
    config = dataclasses.replace(config, contestants=tuple(_installed(config, console)))
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    first_step = [_first_step_seconds(None) for _ in range(config.startup_repeats)]
    with tempfile.TemporaryDirectory() as cache:
        # The first of these fills the cache.
        num = config.startup_repeats + 1 if config.startup_repeats else 0
        cached = [_first_step_seconds(cache) for _ in range(num)][1:]
    if config.processes == 1:
        processes = [measure(config, console)]
    else:
        processes = [_measure_in_child(config, i, console) for i in range(config.processes)]
    steps = {name: _steps(config, name) for name in config.contestants}
    result = Result(processes, steps, first_step, cached)
    verdicts = judge(result)
    rich.console.Console().print(
        _contestants_table(result),
        _targets_table(verdicts),
        f"load average at the start: {load:.2f} (an idle machine: below 0.5)",
    )
    if config.out is not None:
        record = {"load_average": load, **_record(config, result, verdicts)}
        run_folder.write_json(config.out / "benchmark.json", record)
    return result


def _installed(config: Config, console: rich.console.Console) -> Iterator[str]:
    needs = {name: CONTESTANTS[name].needs for name in dict.fromkeys(config.contestants)}
    missing = sorted({n for n in needs.values() if n and importlib.util.find_spec(n) is None})
    if missing:
        console.print(
            f"left out, for want of {' and '.join(missing)}: pip install 'jvae[benchmark]'",
            markup=False,
        )
    return (name for name, need in needs.items() if need not in missing)


def _steps(config: Config, name: str) -> int:
    """Steps an epoch, over all models."""
    members = CONTESTANTS[name].members
    steps = min(config.steps, config.short_steps) if CONTESTANTS[name].short else config.steps
    return max(1, steps // members) * members


def measure(config: Config, console: rich.console.Console) -> Process:
    """Time every contestant once a round, in this process."""
    work = load_work(config.dataset, config.data_dir, steps=config.steps, seed=config.seed)
    generator = np.random.default_rng(config.seed)
    runs, bounds = {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in config.contestants}
    # No thread draws the bar while a contestant runs: it moves only between timings.
    progress = rich.progress.Progress(console=console, auto_refresh=False)
    task = progress.add_task("", total=len(seconds) * (config.rounds + 1))

    def show(text: str, done: int = 0) -> None:
        progress.update(task, description=f"{text:<26}", advance=done, refresh=True)

    with progress, jax.default_device(jax.devices("cpu")[0]):
        for name in seconds:
            show(f"compiling {name}")
            steps = _steps(config, name) // CONTESTANTS[name].members
            runs[name] = CONTESTANTS[name].build(work.first(steps))
            runs[name]()
            show(name, 1)
        for _ in range(config.rounds):
            for name in generator.permutation(list(seconds)).tolist():
                show(name)
                start = time.perf_counter()
                bound = runs[name]()
                seconds[name].append(time.perf_counter() - start)
                if bound is not None:
                    bounds[name] = bound
                show(name, 1)
    return Process(seconds, bounds)


def _measure_in_child(config: Config, index: int, console: rich.console.Console) -> Process:
    console.print(f"process {index + 1} of {config.processes}")
    with tempfile.TemporaryDirectory() as folder:
        child = dataclasses.replace(
            config,
            processes=1,
            startup_repeats=0,
            seed=config.seed + index,
            out=Path(folder),
        )
        subprocess.run(
            [sys.executable, "-m", "jvae.experiments.benchmark", *_flags(child)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        record = json.loads((Path(folder) / "benchmark.json").read_text())
    return Process(**record["processes"][0])


def _flags(config: Config) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None:
            yield f"--{field.name.replace('_', '-')}"
            yield from map(str, value if isinstance(value, tuple) else (value,))


def _first_step_seconds(cache: str | None) -> float:
    """From the start of a fresh process to its word that the first step is done."""
    program = (
        "from jvae.experiments import contestants; "
        "contestants.first_step(); print('done', flush=True)"
    )
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": str(cache is not None).lower(),
        "JAX_COMPILATION_CACHE_DIR": cache or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        word = next(iter(process.stdout or ()), "")
        seconds = time.perf_counter() - start
    if word.strip() != "done":
        raise RuntimeError("the first training step failed in a fresh process: see its error above")
    return seconds


def judge(result: Result) -> list[Verdict]:
    """Hold the medians against the targets."""
    verdicts = []
    for target in TARGETS:
        measured = result.ratio(target.over, target.under)
        passed = measured and target.at_least <= measured.median <= target.at_most
        verdicts.append(Verdict(target.claim, measured, passed))
    for what, limit, seconds in (
        ("nothing compiled", FIRST_STEP_SECONDS, result.first_step_seconds),
        ("all compiled before", FIRST_STEP_SECONDS_CACHED, result.first_step_seconds_cached),
    ):
        first_step = _summary([seconds]) if seconds else None
        passed = first_step and first_step.median <= limit
        claim = f"first step within {limit:g} s of the start, {what}"
        verdicts.append(Verdict(claim, first_step, passed))
    return verdicts


def _summary(series: Iterable[Sequence[float]]) -> Summary:
    """Of a sequence a process."""
    processes = list(series)
    medians = [statistics.median(values) for values in processes]
    spread = medians if len(processes) > 1 else processes[0]
    return Summary(statistics.median(medians), min(spread), max(spread))


def _contestants_table(result: Result) -> rich.table.Table:
    table = rich.table.Table(
        *("contestant", "s/epoch", "time / jvae-grey", "of floor", "bound, nats"),
        caption="median (lowest – highest); of floor: the floor's time over the contestant's",
    )
    for name in result.steps:
        relative, share = result.ratio(name, "jvae-grey"), result.ratio("floor", name)
        table.add_row(
            name,
            f"{result.epoch_seconds(name).median:.3f}",
            "" if relative is None else str(relative),
            "" if share is None else f"{share.median:.0%}",
            _bound_cell(result, name),
        )
    return table


def _bound_cell(result: Result, name: str) -> str:
    bound, like = result.bound(name), CONTESTANTS[name].bound_like
    if bound is None or like is None:
        return ""
    expected = result.bound(like)
    if expected is None or abs(bound - expected) <= BOUND_TOLERANCE:
        return f"{bound:.1f}"
    return f"[bold red]{bound:.1f} differs[/]"


def _targets_table(verdicts: list[Verdict]) -> rich.table.Table:
    words = {True: "[green]pass[/]", False: "[bold red]fail[/]", None: "not measured"}
    table = rich.table.Table("target", "measured", "")
    for verdict in verdicts:
        measured = "" if verdict.measured is None else str(verdict.measured)
        table.add_row(verdict.claim, measured, words[verdict.passed])
    return table


def _record(config: Config, result: Result, verdicts: list[Verdict]) -> dict[str, Any]:
    provenance = run_folder.provenance()
    peers = {CONTESTANTS[name].needs for name in config.contestants} - {None}
    provenance["versions"] |= {peer: importlib.metadata.version(str(peer)) for peer in peers}
    return {
        "settings": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in dataclasses.asdict(config).items()
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        **provenance,
        **dataclasses.asdict(result),
        "targets": [
            {
                "claim": verdict.claim,
                "measured": verdict.measured and verdict.measured._asdict(),
                "passed": verdict.passed,
            }
            for verdict in verdicts
        ],
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())


def main() -> None:
    """The command line."""
    # An ensemble takes a device a core; everything else runs on the first, with all threads.
    jax.config.update("jax_num_cpu_devices", cores.count())
    command_line.run(lambda: run(tyro.cli(Config, prog="python -m jvae.experiments.benchmark")))


if __name__ == "__main__":
    main()
