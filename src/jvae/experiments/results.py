"""The numbers of a run: a line of metrics an epoch, and its results with their errors."""

import math
import shlex
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import rich.console
import rich.markup
import rich.table
from jaxtyping import Array, Float, PRNGKeyArray

import jvae
from jvae import distributed, evaluation
from jvae.evaluation import LogLikelihood, bound_by_example
from jvae.experiments import run_folder
from jvae.experiments.job import Job
from jvae.training import TrainState, members, num_skipped, skips_non_finite

# Folded into a key beside steps, of which none is so large.
_VALIDATION = 2**32 - 1
# Estimates of log p(x) on fewer effective samples mean little.
MIN_ESS = 5.0
# About so many draws of z are made before progress shows and a signal is heard: of the paper's
# model a second's work on two cores.
_DRAWS_A_GROUP = 250_000
_PERCENTILES = (0, 1, 5, 10)


def record(
    job: Job, state: TrainState, bounds: npt.ArrayLike, *, images_per_second: int
) -> dict[str, Any]:
    """A line of `metrics.jsonl`.

    Args:
      job: what is run.
      state: after the epoch.
      bounds: of the epoch's steps, [steps] or of an ensemble [steps, members], nats; None for a
        step that was skipped.
      images_per_second: over all members.

    Raises:
      FloatingPointError: an ELBO of the test part, or of the validation part, is not finite.
    """
    step = int(state.step)
    states = members(state._replace(opt_state=()))
    held_out: dict[str, Any] = {}
    for part in job.held_out:
        values = elbos(job, states, part)
        if not np.isfinite(values).all():
            raise FloatingPointError(f"the {part} ELBO is {np.mean(values)} after step {step}")
        held_out |= summary(f"{part}_elbo", values)
    return {
        "step": step,
        "epoch": step // job.steps_per_epoch,
        "examples": step * job.config.batch_size,
        **_train_metric(job, bounds),
        **held_out,
        "images_per_second": images_per_second,
        **_skipped(state),
    }


def _train_metric(job: Job, bounds: npt.ArrayLike) -> dict[str, Any]:
    """The mean over the steps taken; there may be none where they can be skipped."""
    by_step = np.asarray(bounds, np.float64)
    by_seed = [column[~np.isnan(column)] for column in by_step.reshape(len(by_step), -1).T]
    name = job.config.train_metric
    if not all(len(taken) for taken in by_seed):
        return {name: None}
    if len(by_seed) == 1:
        return {name: float(by_seed[0].mean())}
    return summary(name, by_seed)


def _skipped(state: TrainState) -> dict[str, int]:
    """How many steps were skipped so far, where the settings let them be."""
    if not skips_non_finite(state):
        return {}
    return {"skipped_steps": int(np.sum(num_skipped(state)))}


def elbos(job: Job, states: Sequence[TrainState], part: str) -> list[Float[np.ndarray, "num"]]:
    """The ELBO of each example of a part, with one sample of z, under each model.

    Args:
      job: what is run.
      states: of the models, each at a step of its own; its draws of z are those of its step.
      part: "test" or "validation".

    Returns:
      float64 [num] nats of each model.
    """

    def of_one(state: TrainState, key: PRNGKeyArray) -> Float[np.ndarray, "num"]:
        if part == "validation":
            key = jax.random.fold_in(key, _VALIDATION)
        key = jax.random.fold_in(key, int(state.step))
        x = job.held_out_on_devices[part]
        values = bound_by_example(_on_devices(job, state), x, key, bound=jvae.elbo)
        return _cut(job, part, values)

    return [of_one(state, keys.elbo) for state, keys in zip(states, job.keys, strict=True)]


def _on_devices(job: Job, state: TrainState) -> jvae.Params:
    """The weights of a model, on all of the run's devices."""
    params = state.params
    return params if job.mesh is None else distributed.replicate(params, job.mesh)


def _cut(job: Job, part: str, values: Float[Array, "padded"]) -> Float[np.ndarray, "num"]:
    """Without what fills up the devices, on the host."""
    return np.asarray(distributed.to_host(values), np.float64)[: len(job.held_out[part])]


def summary(name: str, values: Sequence[npt.ArrayLike]) -> dict[str, Any]:
    """Mean and standard error: over examples under one model, over models where there are more."""
    if len(values) == 1:
        return _mean_and_stderr(name, values[0])
    by_seed = [float(np.asarray(of_one).mean()) for of_one in values]
    return _mean_and_stderr(name, by_seed) | {f"{name}_by_seed": by_seed}


def _mean_and_stderr(name: str, values: npt.ArrayLike) -> dict[str, Any]:
    array = np.asarray(values)
    stderr = array.std(ddof=1) / math.sqrt(len(array))
    return {name: float(array.mean()), f"{name}_stderr": float(stderr)}


def sampling_error(name: str, stderr: npt.ArrayLike) -> dict[str, float]:
    """`<name>_sampling_error`: the standard error that z's draws alone give a mean of log p(x).

    √(Σ s²) / n over all n estimates, whose errors s are independent. None where one weight an
    estimate tells of no error.

    Args:
      name: of the mean.
      stderr: of the estimates, of any shape.
    """
    s = np.asarray(stderr)
    if np.isinf(s).all():
        return {}
    return {f"{name}_sampling_error": float(np.sqrt(np.square(s).sum()) / s.size)}


def effective_samples(prefix: str, sizes: npt.ArrayLike) -> dict[str, Any]:
    """Median and low percentiles of effective sample sizes, and the share of those too small."""
    ess = np.asarray(sizes)
    lowest = np.percentile(ess, _PERCENTILES)
    return {
        f"{prefix}ess_median": float(np.median(ess)),
        f"{prefix}ess_share_below_{MIN_ESS:g}": float(np.mean(ess < MIN_ESS)),
        f"{prefix}ess_percentiles": dict(zip(map(str, _PERCENTILES), lowest.tolist(), strict=True)),
    }


@contextmanager
def warnings_into(said: list[str], *, seed: int | None) -> Iterator[None]:
    """Add to `said` what is warned of inside, each text once.

    Args:
      said: the warnings so far.
      seed: of the model at work, which warnings are to name; None for a single model.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    of_seed = "" if seed is None else f"seed {seed}: "
    said += dict.fromkeys(f"{of_seed}{warning.message}" for warning in caught)


def show_warning(console: rich.console.Console, text: str) -> None:
    """Print a warning that is kept with a result."""
    console.print(f"[bold yellow]WARNING: {rich.markup.escape(text)}[/]", soft_wrap=True)


def num_log_px(job: Job) -> int:
    """How many estimates of log p(x) are among the results of a run."""
    return len(job.config.all_seeds) * len(job.test) if job.config.nll_samples else 0


def _log_likelihoods(
    job: Job, states: Sequence[TrainState], advance: Callable[[int], object]
) -> tuple[list[LogLikelihood], list[str]]:
    """Of the test examples under each model, in float64; and what is to be warned of."""
    found: list[LogLikelihood] = []
    said: list[str] = []
    for seed, state, keys in zip(job.config.all_seeds, states, job.keys, strict=True):
        found.append(_log_likelihood(job, state, keys.nll, advance))
        with warnings_into(said, seed=seed if job.config.seeds > 1 else None):
            evaluation.warn_if_unreliable(found[-1], min_ess=MIN_ESS)
    return found, said


def _log_likelihood(
    job: Job, state: TrainState, key: PRNGKeyArray, advance: Callable[[int], object]
) -> LogLikelihood:
    """Of the test examples, a group after another, each with the key that it has among all."""
    num, num_samples = len(job.test), job.config.nll_samples
    num_devices = 1 if job.mesh is None else job.mesh.size
    num_groups = math.ceil(num / max(1, _DRAWS_A_GROUP // num_samples))
    size = math.ceil(num / num_groups / num_devices) * num_devices  # each device has as many
    params, keys = _on_devices(job, state), jax.random.split(key, num)
    groups = []
    for start in range(0, num, size):
        # All groups are of one size, so that one program does; the first examples fill up the last.
        indices = np.arange(start, start + size) % num
        x, x_keys = job.test[indices], keys[indices]
        if job.mesh is not None:
            x = distributed.split_examples(x, job.mesh)
            x_keys = distributed.replicate(x_keys, job.mesh)
        group = evaluation.importance_sampling(params, x, x_keys, num_samples=num_samples)
        groups.append(jax.tree.map(np.asarray, distributed.to_host(group)))
        advance(min(size, num - start))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:num].astype(np.float64), *groups)


def _refuse_infinite(job: Job, log_px: Sequence[LogLikelihood]) -> None:
    estimates = np.stack([of_one.estimate for of_one in log_px])
    bad = np.argwhere(~np.isfinite(estimates))
    if not len(bad):
        return
    member, example = bad[0]
    of_seed = f" of seed {job.config.all_seeds[member]}" if len(log_px) > 1 else ""
    raise FloatingPointError(
        f"log p(x) is not finite for {len(bad)} of {estimates.size} test examples: of example "
        f"{example}{of_seed} it is {estimates[member, example]}. To leave it out: the same command "
        f"with --nll-samples 0 --resume --out {shlex.quote(str(job.folder))}"
    )


def evaluate(
    job: Job,
    state: TrainState,
    chosen: Sequence[TrainState],
    *,
    advance: Callable[[int], object],
) -> dict[str, Any]:
    """The content of `result.json`.

    Args:
      job: what was run.
      state: after the last epoch.
      chosen: the state of each model whose weights are the result, from `best.choose`.
      advance: told how many examples' log p(x) was estimated, of `num_log_px(job)` in all.

    Raises:
      FloatingPointError: an estimate of log p(x) is not finite.
    """
    result: dict[str, Any] = {}
    for part in job.held_out:
        result |= summary(f"{part}_elbo", elbos(job, chosen, part))
    if num_samples := job.config.nll_samples:
        log_px, said = _log_likelihoods(job, chosen, advance)
        _refuse_infinite(job, log_px)
        result |= summary("test_nll", [-of_one.estimate for of_one in log_px])
        result |= sampling_error("test_nll", [of_one.stderr for of_one in log_px])
        result |= effective_samples("test_nll_", [of_one.ess for of_one in log_px])
        result["warnings"] = said
        nll = result["test_nll"]
        result["test_nll_estimator"] = f"importance sampling from q(z|x), K = {num_samples}"
        if job.log_volume is not None:
            result["test_nll_of_the_data_as_given"] = nll + job.log_volume
        if job.config.binarisation == "dequantised":
            # E[-log p(x)] + D log 256 bounds -log P(image); Theis et al. (2016), Section 3.1.
            bits_of_x = nll / math.prod(job.model.data_shape) / math.log(2)
            result["test_bits_per_dimension_at_most"] = bits_of_x + 8
    return result | {
        "stderr_over": _stderr_over(job),
        **_weights(job, chosen),
        "epochs": int(state.step) // job.steps_per_epoch,
        "steps": int(state.step),
        **_skipped(state),
        "seed": job.config.seed,
        "num_seeds": job.config.seeds,
        **_speed(job),
        "protocol": job.protocol,
        **job.remarks,
        **run_folder.provenance(),
    }


def _speed(job: Job) -> dict[str, int]:
    """Of two epochs the second's, since a process compiles in its first."""
    speeds = [record["images_per_second"] for record in run_folder.read_metrics(job.folder)]
    return {"images_per_second": statistics.median_high(speeds)} if speeds else {}


def _stderr_over(job: Job) -> str:
    if job.config.seeds == 1:
        return "test examples"
    return "seeds, of one order of examples" if job.streamed else "seeds"


def _weights(job: Job, chosen: Sequence[TrainState]) -> dict[str, Any]:
    """Of which epoch they are, or part of one where there was no whole one to choose."""
    if job.valid is None:
        return {"weights": "after the last epoch"}
    steps = [int(state.step) for state in chosen]
    whole = [divmod(step, job.steps_per_epoch) for step in steps]
    found = [epoch + rest / job.steps_per_epoch if rest else epoch for epoch, rest in whole]
    if len(found) == 1:
        return {
            "weights": f"of the best validation ELBO, at epoch {found[0]:.4g}",
            "best_epoch": found[0],
            "best_step": steps[0],
        }
    epochs = ", ".join(f"{epoch:.4g}" for epoch in found)
    return {
        "weights": f"of each seed's best validation ELBO, at epochs {epochs}",
        "best_epoch_by_seed": found,
        "best_step_by_seed": steps,
    }


def report(console: rich.console.Console, job: Job, result: dict[str, Any]) -> None:
    """Show the results as a table."""
    over = "" if job.config.seeds == 1 else f" over {job.config.seeds} seeds"
    table = rich.table.Table("test set", job.protocol["units"], f"± s.e.{over}")
    table.add_row("ELBO", f"{result['test_elbo']:.2f}", f"{result['test_elbo_stderr']:.2f}")
    if "test_nll" in result:
        table.add_row(
            f"-log p(x), {job.config.nll_samples} importance samples",
            f"{result['test_nll']:.2f}",
            f"{result['test_nll_stderr']:.2f}",
        )
    if "test_nll_of_the_data_as_given" in result:
        table.add_row(
            "-log p of the data in its own units",
            f"{result['test_nll_of_the_data_as_given']:.2f}",
            f"{result['test_nll_stderr']:.2f}",
        )
    if "test_bits_per_dimension_at_most" in result:
        bits = f"{result['test_bits_per_dimension_at_most']:.3f}"
        table.add_row("of the 8-bit images, bits per dimension, at most", bits, "")
    if "validation_elbo" in result:
        table.add_section()
        table.add_row(
            "for comparison: ELBO of the validation part",
            f"{result['validation_elbo']:.2f}",
            f"{result['validation_elbo_stderr']:.2f}",
        )
    console.print(table)
    if job.valid is not None:
        console.print(f"The weights are {result['weights']}.", soft_wrap=True)
    if "test_nll" in result:
        console.print(_trust(job, result), soft_wrap=True)
        for warning in result["warnings"]:
            show_warning(console, warning)
    console.print(f"Figures, metrics and checkpoints are in {job.folder}", soft_wrap=True)


def _trust(job: Job, result: dict[str, Any]) -> str:
    """How far to trust -log p(x): its effective samples, and its error by sampling."""
    few = result[f"test_nll_ess_share_below_{MIN_ESS:g}"]
    text = (
        f"Effective samples of {job.config.nll_samples:,}: median "
        f"{result['test_nll_ess_median']:.3g}, below {MIN_ESS:g} for {few:.0%} of the test set"
    )
    if "test_nll_sampling_error" in result:
        text += f"; by its own account sampling adds ± {result['test_nll_sampling_error']:.2g}"
    return f"{text}."
