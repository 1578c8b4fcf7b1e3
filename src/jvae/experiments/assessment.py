"""Evaluate a finished run: log p(x) with its errors, and what its latents are used for.

jvae evaluate --help
"""

import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rich.console
import rich.progress
import rich.table
import tyro

from jvae.experiments import (
    devices,
    evaluations,
    finished,
    parts,
    progress_bars,
    results,
    run_folder,
)
from jvae.experiments.config import ConfigError
from jvae.experiments.finished import FinishedRun
from jvae.experiments.interrupt import Interrupted, catch_interrupt

# The most test images of which I(x; z) is taken where nothing is said: its cost is their square.
_MUTUAL_INFORMATION = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Evaluate a finished run: log p(x) with its errors, and what its latents are used for.

    A table, and RUN/evaluation.json, to which every part is added when it is done; numbers of
    each example in RUN/evaluation/, figures in RUN/figures/. A part that is there with the same
    settings is kept: after Ctrl-C the same command goes on. With other settings it is computed and
    takes the old one's place. Parts that are not asked for stay. All go when the run's weights
    have changed.
    """

    run: tyro.conf.Positional[Path]
    """The folder of a finished run."""
    num_samples: int = 5000
    """Importance samples an example, of the whole test set and as much of the training set."""
    repeats: int = 1
    """Importance sampling of the test set so often, to see the estimator's own spread."""
    ais: int = 0
    """Test images for annealed importance sampling; 0 leaves it out."""
    bdmc: int = 0
    """Simulated examples for bidirectional Monte Carlo; 0 leaves it out."""
    num_temperatures: int = 1000
    """Of AIS and BDMC."""
    num_chains: int = 16
    """Of AIS and BDMC, an example."""
    schedule: Literal["sigmoid", "linear"] = "sigmoid"
    """Of the temperatures."""
    start: Literal["prior", "posterior"] = "prior"
    """Where chains begin: at p(z) or at q(z|x)."""
    app_d: int = 0
    """Test images for the paper's own estimator, App. D, for few latents; 0 leaves it out."""
    inference_gap: int = 0
    """Test images whose log p(x) - ELBO is split into what the family of q leaves, diagonal and of
    full covariance, and what the encoder; with the higher of AIS and importance sampling as
    log p(x), which are too low in expectation, and so the gap. 0 leaves it out."""
    mutual_information: int | None = None
    """Test images for I(x; z) and KL(q(z) ‖ p(z)); by default all, up to 1,000. The estimate of
    I(x; z) is at most the log of their number, and is too low near it."""
    seed: int = 0
    """Of all noise."""
    data: str | None = None
    """Where the data is, if it was moved since; its content must be the same."""
    data_dir: Path | None = None
    """Folder of all datasets, if it was moved since."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
          ConfigError: names the flag, what was expected and what was given.
        """
        for name in ("num_samples", "repeats", "num_temperatures", "num_chains"):
            _refuse_unless(getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("ais", "bdmc", "app_d", "inference_gap"):
            n = getattr(self, name)
            _refuse_unless(n == 0 or n >= 2, self, name, "0 or at least 2, to have an error")
        n = self.mutual_information
        _refuse_unless(n is None or n >= 2, self, "mutual_information", "at least 2")
        _refuse_unless(0 <= self.seed < 2**32, self, "seed", "between 0 and 2**32 - 1")

    @property
    def annealing(self) -> parts.Annealing:
        """Of AIS and BDMC."""
        return parts.Annealing(self.num_temperatures, self.num_chains, self.schedule, self.start)


def _refuse_unless(valid: bool, config: Config, name: str, expected: str) -> None:
    if not valid:
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{flag} must be {expected}, got {getattr(config, name)}")


def run(config: Config) -> dict[str, Any]:
    """Evaluate as `config` says.

    Returns:
      The content of `evaluation.json`.

    Raises:
      RunFolderError: no run is there, it is not finished, or another process is at work in it.
      ConfigError: more images than there are, or a part that this model cannot have.
      CheckpointError: its weights are missing or damaged.
      DataError: its data is missing, or has changed.
      Interrupted: SIGINT or SIGTERM came; the parts that were done are written.
      FloatingPointError: a number that is not finite; the parts before it are written.
    """
    settings = finished.read(config.run)
    num_test = int(settings.protocol["num_test"])
    for name in ("ais", "app_d", "inference_gap", "mutual_information"):
        most = f"at most the {num_test} test examples"
        _refuse_unless((getattr(config, name) or 0) <= num_test, config, name, most)
    possible = not config.app_d or settings.latent_dim < parts.APP_D_SAMPLES
    few = f"0 for a model of {parts.APP_D_SAMPLES} latents or more"
    _refuse_unless(possible, config, "app_d", few)
    console = devices.console()
    with run_folder.lock(config.run), catch_interrupt():
        try:
            found = finished.load(config.run, settings, name=config.data, data_dir=config.data_dir)
            content = _evaluate(config, found, console)
        except Interrupted as error:
            raise Interrupted(
                f"Interrupted: what was done is in {config.run / run_folder.EVALUATION}. To go on: "
                "the same command",
                error.signum,
            ) from None
    return content


def _evaluate(config: Config, found: FinishedRun, console: rich.console.Console) -> dict[str, Any]:
    content, dropped = evaluations.begin(found)
    if dropped:
        console.print("The run's weights have changed: earlier parts are dropped.")
    names = []
    with progress_bars.of_examples(console) as progress:
        for part in _parts(config, found, content):
            names.append(part.name)
            kept = evaluations.is_done(found, content, part)
            if not kept:
                _compute(found, content, part, progress)
            of_part = content["parts"][part.name]
            how = "kept" if kept else f"{of_part['seconds']:.1f} s"
            console.print(f"{part.name}: {how}")
            for warning in of_part["warnings"]:
                results.show_warning(console, f"{part.name}: {warning}")
            if part.draw is not None:
                path = found.folder / of_part["figure"]
                path.parent.mkdir(exist_ok=True)
                figure = part.draw(evaluations.arrays(found, content, part.name))
                figure.savefig(path, dpi=150)
    console.print(_table(content, names))
    unit, over = content["protocol"]["units"], content["stderr_over"]
    console.print(f"In {unit}, ± standard error over {over}.", soft_wrap=True)
    console.print(f"All of it is in {found.folder / run_folder.EVALUATION}", soft_wrap=True)
    return content


def _parts(config: Config, found: FinishedRun, content: dict[str, Any]) -> Iterator[parts.Part]:
    """Those asked for; the later ones are made from the earlier ones' numbers."""
    arrays = functools.partial(evaluations.arrays, found, content)
    seed, K = config.seed, config.num_samples
    num_test = len(found.inputs.test)
    yield parts.importance_sampling(found, seed, num_samples=K, repeats=config.repeats)
    num_in_mixture = config.mutual_information or min(num_test, _MUTUAL_INFORMATION)
    yield parts.latents(found, seed, num=num_in_mixture)
    log_px = arrays("importance_sampling")["log_px"]
    yield parts.train_gap(found, seed, log_px, num_samples=K, repeats=config.repeats)
    sampled_settings = content["parts"]["importance_sampling"]["settings"]
    if num := config.ais:
        yield parts.ais(found, seed, num=num, annealing=config.annealing)
        yield parts.ais_paired(
            arrays("ais")["log_px"],
            log_px.mean(axis=1)[:, parts.chosen(num_test, num)],
            {"ais": content["parts"]["ais"]["settings"], "importance_sampling": sampled_settings},
        )
    if config.bdmc:
        yield parts.bdmc(found, seed, num=config.bdmc, annealing=config.annealing)
    if config.app_d:
        yield parts.app_d(found, seed, num=config.app_d)
    if num := config.inference_gap:
        few = parts.chosen(num_test, num)
        # The worst of an example's repeats counts.
        ess = arrays("importance_sampling")["ess"].min(axis=1)[:, few]
        best = parts.Source(
            "importance_sampling", sampled_settings, log_px.mean(axis=1)[:, few], ess
        )
        annealed = content["parts"].get("ais")
        if annealed is not None and annealed["settings"]["num_examples"] >= num:
            of_ais = arrays("ais")
            # Both are too low in expectation: the higher is the nearer.
            if of_ais["log_px"][:, :num].mean() > best.log_px.mean():
                numbers = (of_ais[name][:, :num] for name in ("log_px", "ess"))
                best = parts.Source("ais", annealed["settings"], *numbers)
        yield parts.inference_gap(found, seed, best, num=num)


def _compute(
    found: FinishedRun, content: dict[str, Any], part: parts.Part, progress: rich.progress.Progress
) -> None:
    bar = progress.add_task(part.name, total=part.amount * len(found.seeds))
    start = time.perf_counter()
    by_model: list[parts.Arrays] = []
    warned: list[str] = []
    for member, seed in enumerate(found.seeds):
        with results.warnings_into(warned, seed=seed if len(found.seeds) > 1 else None):
            by_model.append(part.compute(member, lambda num: progress.advance(bar, num)))
    evaluations.write(
        found,
        content,
        part,
        {name: np.stack([of_one[name] for of_one in by_model]) for name in by_model[0]},
        warned=warned,
        seconds=round(time.perf_counter() - start, 3),
    )


def _table(content: dict[str, Any], names: list[str]) -> rich.table.Table:
    """The numbers of the parts asked for; lists are in the file alone."""
    table = rich.table.Table("part", "quantity", "value")
    for name in names:
        shown = evaluations.shown(content["parts"][name]["results"])
        for quantity, value in shown.items():
            table.add_row(name, quantity, value)
    return table
