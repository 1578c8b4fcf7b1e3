"""The weights that are a run's result: the last, or with a validation part those of its best ELBO.

`metrics.jsonl` says which are the best; what is kept and what is chosen both follow from it.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from jvae import checkpoint, distributed
from jvae.checkpoint import Checkpoints
from jvae.experiments import results, run_folder
from jvae.experiments.job import Job
from jvae.training import TrainState, members


def open_checkpoints(
    job: Job, records: Sequence[Mapping[str, Any]]
) -> AbstractContextManager[Checkpoints]:
    """The checkpoints of a run, of which the latest two stay, and the best one of each seed.

    Args:
      job: what is run.
      records: the lines of `metrics.jsonl`, to which more are added as the run goes on.

    Raises:
      UnwritableError: as `jvae.checkpoint.open_checkpoints`.
    """
    return checkpoint.open_checkpoints(_folder(job), also_keep=lambda: _best_so_far(job, records))


def missing(job: Job, records: Sequence[Mapping[str, Any]], checkpoints: Checkpoints) -> list[int]:
    """The steps of the best checkpoints so far that are not there; damage is not looked for.

    Args:
      job: what is run.
      records: the lines of `metrics.jsonl`.
      checkpoints: from `open_checkpoints`.
    """
    return sorted(set(_best_so_far(job, records)) - set(checkpoints.all_steps()))


def _best_so_far(job: Job, records: Sequence[Mapping[str, Any]]) -> list[int]:
    return [_best(of_seed) for of_seed in _candidates(job, records) if of_seed]


def choose(job: Job, state: TrainState) -> list[TrainState]:
    """The state of each model whose weights are the run's result.

    With a validation part that is the one of the highest validation ELBO among the checkpoints
    of every `checkpoint_every` epochs and the last state; of equals the last. A checkpoint that
    was saved at a signal, or at an earlier end of the run, is none of them, so that a run that was
    gone on with chooses as one that never stopped.

    Args:
      job: what was run.
      state: after the last epoch, on one device.

    Raises:
      LostError: the best checkpoint is missing or damaged.
      CheckpointError: it cannot be read.
    """
    chosen = members(state)
    if job.valid is None:
        return chosen
    last = int(state.step)
    candidates = _candidates(job, run_folder.read_metrics(job.folder))
    for elbos, of_seed in zip(results.elbos(job, chosen, "validation"), candidates, strict=True):
        of_seed[last] = float(elbos.mean())
    best = [_best(of_seed) for of_seed in candidates]
    like = job.on_devices(state)
    with checkpoint.open_checkpoints(_folder(job)) as checkpoints:
        for step in sorted(set(best) - {last}):
            # Of an ensemble, the members of this step.
            restored = members(distributed.to_host(_restore(checkpoints, step, like)))
            chosen = [
                one if of_seed == step else kept
                for one, kept, of_seed in zip(restored, chosen, best, strict=True)
            ]
    return chosen


def _restore(checkpoints: Checkpoints, step: int, like: TrainState) -> TrainState:
    try:
        return checkpoint.restore(checkpoints, step, like)
    except checkpoint.LostError as error:
        raise checkpoint.LostError(
            f"{error}, and its validation ELBO is the best: put a copy in its place, or run anew"
        ) from error


def _folder(job: Job) -> Path:
    return job.folder / "checkpoints"


def _candidates(job: Job, records: Sequence[Mapping[str, Any]]) -> list[dict[int, float]]:
    """The validation ELBO of each checkpoint that may be the best, by its step, of each seed."""
    by_seed: list[dict[int, float]] = [{} for _ in job.config.all_seeds]
    if job.valid is None:
        return by_seed
    for record in records:
        if record["epoch"] % job.config.checkpoint_every == 0:
            elbos = record.get("validation_elbo_by_seed", [record["validation_elbo"]])
            for of_seed, elbo in zip(by_seed, elbos, strict=True):
                of_seed[record["step"]] = elbo
    return by_seed


def _best(elbos: Mapping[int, float]) -> int:
    """The step of the highest; of equals the last."""
    return max(elbos, key=lambda step: (elbos[step], step))
