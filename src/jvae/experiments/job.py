"""A training run, whatever its data: progress, checkpoints, results and figures."""

import dataclasses
import math
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import rich.console
import rich.progress
import rich.table
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.figure import Figure

import jvae
from jvae import checkpoint, data, plotting, training
from jvae.evaluation import bound_by_example
from jvae.experiments import failure, objective, run_folder
from jvae.experiments.config import Config
from jvae.experiments.interrupt import Interrupted, catch_interrupt

# Settings that a resumed run may change: the numbers of the epochs done do not depend on them.
FREE_ON_RESUME = {
    "epochs",
    "out",
    "resume",
    "data",
    "data_dir",
    "checkpoint_every",
    "nll_samples",
    "max_skipped",
}


class Keys(NamedTuple):
    """The run's keys, each of one use; all come from the seed."""

    init: PRNGKeyArray
    train: PRNGKeyArray
    elbo: PRNGKeyArray
    nll: PRNGKeyArray
    figures: PRNGKeyArray


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What is to be run.

    Attributes:
      config: the settings.
      model: the model.
      train: [num_train, *data_shape], what `preprocess` takes: an array, which goes to the
        device, or other examples, which are streamed.
      test: float [num_test, *data_shape].
      preprocess: from a batch of `train` and a key to x, or None.
      protocol: what makes two results comparable, for `config.json` and `result.json`.
      folder: the run's folder.
      remarks: what else these two files are to say.
      log_volume: where x is data divided by scales, the sum of their logs: -log p(data) is
        -log p(x) plus it. None where x is the data.
      shown: from x to images in [0, 1]; None where x is no image.
    """

    config: Config
    model: jvae.VAE
    train: Any
    test: Float[Array, "num_test ..."]
    preprocess: training.Preprocess | None
    protocol: dict[str, Any]
    folder: Path
    remarks: dict[str, Any] = dataclasses.field(default_factory=dict)
    log_volume: float | None = None
    shown: Callable[[Array], Array] | None = None

    @property
    def keys(self) -> Keys:
        """The run's keys."""
        return Keys(*jax.random.split(jax.random.key(self.config.seed), len(Keys._fields)))

    @property
    def steps_per_epoch(self) -> int:
        """Batches in a pass over the training set."""
        return training.steps_per_epoch(len(self.train), self.config.batch_size)

    @property
    def learning_rate(self) -> optax.ScalarOrSchedule:
        """The learning rate, or a function from the step to it."""
        return objective.make_learning_rate(self.config, len(self.train))

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer that the settings describe."""
        return objective.make_optimizer(self.config, len(self.train))

    def settings(self) -> dict[str, Any]:
        """The content of `config.json`."""
        config = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self.config).items()
        }
        return config | {"protocol": self.protocol} | self.remarks | run_folder.provenance()


def run(job: Job, *, console: rich.console.Console) -> dict[str, Any]:
    """Train, evaluate and draw, into the run's folder.

    Args:
      job: what is to be run.
      console: where progress and results are shown.

    Returns:
      The content of `result.json`.

    Raises:
      ConfigError: fewer training examples than one batch.
      RunFolderError: the run's folder cannot be made or continued.
      CheckpointError: the checkpoint to go on from does not fit.
      Interrupted: SIGINT or SIGTERM came; training ended after the epoch in hand, or the batch
        where data is streamed, and was saved.
      NonFiniteError: the bound or the weights became infinite or NaN; the last good state is
        saved, `failure.json` says where it happened, and `failure/` holds that step for
        `jvae.experiments.replay`.
      FloatingPointError: the test ELBO did, with both finite; what stays is the last checkpoint.
    """
    job.config.check_examples(len(job.train))
    if job.config.resume:
        run_folder.read_settings(job.folder)  # which says so when there is none
    else:
        run_folder.create(job.folder, job.settings())
    with run_folder.lock(job.folder), catch_interrupt() as interrupt:
        if job.config.resume:
            _check_same_run(job)
        try:
            interrupt.deferred = True
            state = _train(job, console, stop=lambda: interrupt.signum is not None)
            interrupt.deferred = False
            if interrupt.signum is not None:
                epoch, rest = divmod(int(state.step), job.steps_per_epoch)
                done = f"step {state.step}" if rest else f"epoch {epoch}"
                raise Interrupted(f"saved after {done}", interrupt.signum)
            with console.status("Evaluating and drawing …"):
                checkpoint.save(job.folder / "model.safetensors", state.params)
                result = _evaluate(job, state)
                run_folder.write_json(job.folder / "result.json", result)
                _draw(job, state)
        except Interrupted as error:
            raise Interrupted(
                f"Interrupted ({error}). To go on: the same command with --resume --out "
                f"{shlex.quote(str(job.folder))}",
                error.signum,
            ) from None
    (job.folder / "failure.json").unlink(missing_ok=True)
    shutil.rmtree(job.folder / "failure", ignore_errors=True)
    if int(state.step) % job.steps_per_epoch == 0:
        (job.folder / run_folder.UNFINISHED).unlink(missing_ok=True)
    _report(console, job, result)
    return result


def _check_same_run(job: Job) -> None:
    saved = run_folder.read_settings(job.folder)
    ours = run_folder.json_round_trip(job.settings())
    free = set(FREE_ON_RESUME)
    if job.config.schedule == "cosine":
        free.remove("epochs")  # the schedule's length: every epoch depends on it
    if (job.folder / "failure.json").exists():
        free.add("learning_rate")  # the same one would fail again
    fixed = {field.name for field in dataclasses.fields(job.config)} - free
    changed = [
        f"{name} was {saved.get(name)}, is {ours[name]}"
        for name in [*sorted(fixed), "protocol"]
        if saved.get(name) != ours[name]
    ]
    if changed:
        raise run_folder.RunFolderError(
            f"{job.folder} is a run of other settings: {'; '.join(changed)}"
        )
    # What it was made with stays on record beside what goes on with it.
    saved.setdefault("resumed_with", []).append(ours)
    run_folder.write_json(job.folder / "config.json", saved)


def _train(
    job: Job, console: rich.console.Console, *, stop: Callable[[], bool]
) -> training.TrainState:
    """The state after the last epoch, or where `stop()` was first true.

    That is asked at the end of an epoch, and where data is streamed after each batch.
    """
    config = job.config
    step = training.make_step(objective.make_bound(config), job.optimizer)
    streamed = not isinstance(job.train, jax.Array)
    epoch = (
        training.make_streamed_epoch(step, job.preprocess)
        if streamed
        else training.make_epoch(step, config.batch_size, job.preprocess)
    )
    state = training.init(jvae.init(job.model, job.keys.init), job.optimizer, job.keys.train)
    with (
        checkpoint.open_checkpoints(job.folder / "checkpoints") as checkpoints,
        _progress(console) as progress,
    ):
        if config.resume:
            # Killed before its first checkpoint, a run starts over: the result is the same.
            if checkpoints.latest_step() is not None:
                state = checkpoint.restore_latest(checkpoints, state, on_damaged=console.print)
            run_folder.rewind_metrics(job.folder, int(state.step))
        done = int(state.step) // job.steps_per_epoch
        earlier = run_folder.read_unfinished(job.folder, int(state.step))
        bar = progress.add_task("", total=config.epochs, completed=done, status="compiling …")
        start = time.perf_counter()

        def batches(step: int) -> Iterator[np.ndarray]:
            read = data.batches(job.train, config.batch_size, seed=config.seed, step=step)
            for i, batch in enumerate(read, start=step):
                progress.update(bar, completed=i / job.steps_per_epoch)
                yield batch
                if stop():
                    return

        def on_epoch(state: training.TrainState, info: training.StepInfo) -> bool:
            nonlocal start, earlier
            seconds = time.perf_counter() - start
            taken = slice(None) if info.skipped is None else ~info.skipped
            bounds = [*earlier, *info.bound[taken].tolist()]
            if int(state.step) % job.steps_per_epoch:  # stopped in the midst of an epoch
                run_folder.write_unfinished(job.folder, int(state.step), bounds)
                checkpoint.save_state(checkpoints, state)
                return True
            speed = len(info.bound) * config.batch_size / seconds
            record, earlier = _record(job, state, bounds, images_per_second=round(speed)), []
            run_folder.append_metrics(job.folder, record)
            done = record["epoch"]
            ending = stop()
            if ending or done % config.checkpoint_every == 0 or done == config.epochs:
                checkpoint.save_state(checkpoints, state)
            status = (
                f"test ELBO {record['test_elbo']:.2f}  {record['images_per_second']:,} images/s"
            )
            progress.update(bar, completed=done, status=status)
            if not console.is_terminal and done % max(1, config.epochs // 20) == 0:
                console.print(f"epoch {done}/{config.epochs}  {status}")
            start = time.perf_counter()
            return ending

        try:
            return training.fit(
                state,
                epoch,
                batches if streamed else job.train,
                num_epochs=config.epochs - done,
                on_epoch=on_epoch,
                max_skipped=config.max_skipped,
            )
        except training.NonFiniteError as error:
            good, rate = error.last_good_state, job.learning_rate
            checkpoint.save_state(checkpoints, good)
            where = {
                "step": error.step,
                "bound": str(error.bound),
                "learning_rate": float(rate(error.step) if callable(rate) else rate),
                "last_good_step": int(good.step),
            }
            run_folder.write_json(job.folder / "failure.json", where)
            error.add_note(
                f"The learning rate was {where['learning_rate']:g}. To go on from that state: "
                f"another --learning-rate with --resume --out {shlex.quote(str(job.folder))}"
            )
            again = batches(int(good.step)) if streamed else _batches(job, good)
            folder, num = job.folder / "failure", len(job.train)
            error.add_note(failure.write(folder, error, config, num, again, job.preprocess))
            raise


def _batches(job: Job, state: training.TrainState) -> Iterator[Array]:
    """Those of the epoch in memory that starts at `state`."""
    key = training.step_keys(state).shuffle
    order = training.shuffled_batches(key, len(job.train), job.config.batch_size)
    return (job.train[batch] for batch in order)


def _skipped(state: training.TrainState) -> dict[str, int]:
    """How many steps were skipped so far, where the settings let them be."""
    if not training.skips_non_finite(state):
        return {}
    return {"skipped_steps": int(state.opt_state.total_notfinite)}


def _progress(console: rich.console.Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("epoch"),
        rich.progress.MofNCompleteColumn(),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[status]}"),
        rich.progress.TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _record(
    job: Job, state: training.TrainState, bounds: Sequence[float], *, images_per_second: int
) -> dict[str, Any]:
    """A line of `metrics.jsonl`."""
    step = int(state.step)
    test_elbo, stderr = _test_elbo(job, state)
    if not math.isfinite(test_elbo):
        raise FloatingPointError(f"the test ELBO is {test_elbo} after step {step}")
    return {
        "step": step,
        "epoch": step // job.steps_per_epoch,
        "examples": step * job.config.batch_size,
        # Of the steps taken; there may be none where they can be skipped.
        job.config.train_metric: float(np.mean(bounds, dtype=np.float64)) if bounds else None,
        "test_elbo": test_elbo,
        "test_elbo_stderr": stderr,
        "images_per_second": images_per_second,
        **_skipped(state),
    }


def _test_elbo(job: Job, state: training.TrainState) -> tuple[float, float]:
    """Mean over the test set and its standard error, with one sample of z an example."""
    key = jax.random.fold_in(job.keys.elbo, state.step)
    return _mean_and_stderr(bound_by_example(state.params, job.test, key, bound=jvae.elbo))


def _mean_and_stderr(values: Float[Array, "num"]) -> tuple[float, float]:
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array)))


def _evaluate(job: Job, state: training.TrainState) -> dict[str, Any]:
    """The content of `result.json`."""
    elbo, elbo_stderr = _test_elbo(job, state)
    result: dict[str, Any] = {"test_elbo": elbo, "test_elbo_stderr": elbo_stderr}
    if num_samples := job.config.nll_samples:
        log_px = jvae.log_likelihood(state.params, job.test, job.keys.nll, num_samples=num_samples)
        nll, nll_stderr = _mean_and_stderr(-log_px)
        result |= {
            "test_nll": nll,
            "test_nll_stderr": nll_stderr,
            "test_nll_estimator": f"importance sampling from q(z|x), K = {num_samples}",
        }
        if job.log_volume is not None:
            result["test_nll_of_the_data_as_given"] = nll + job.log_volume
        if job.config.binarisation == "dequantised":
            # E[-log p(x)] + D log 256 bounds -log P(image); Theis et al. (2016), Section 3.1.
            bits_of_x = nll / math.prod(job.model.data_shape) / math.log(2)
            result["test_bits_per_dimension_at_most"] = bits_of_x + 8
    records = run_folder.read_metrics(job.folder)
    return result | {
        "stderr_over": "test examples",
        "weights": "after the last epoch",
        "epochs": int(state.step) // job.steps_per_epoch,
        "steps": int(state.step),
        **_skipped(state),
        "seed": job.config.seed,
        "num_seeds": 1,
        "images_per_second": float(np.median([r["images_per_second"] for r in records])),
        "protocol": job.protocol,
        **job.remarks,
        **run_folder.provenance(),
    }


def _draw(job: Job, state: training.TrainState) -> None:
    figures = _marginals(job, state) if job.shown is None else _images(job, state, job.shown)
    figures["curves"] = plotting.learning_curves(
        run_folder.read_metrics(job.folder),
        curves={
            job.config.train_metric: f"train {job.config.bound}, mean over the epoch",
            "test_elbo": "test elbo, after the epoch",
        },
        unit=job.protocol["units"],
    )
    for name, figure in figures.items():
        figure.savefig(job.folder / "figures" / f"{name}.png", dpi=150)


def _images(
    job: Job, state: training.TrainState, shown: Callable[[Array], Array]
) -> dict[str, Figure]:
    sample_key, reconstruct_key = jax.random.split(job.keys.figures)
    shape = job.model.data_shape
    means = jvae.sample(state.params, sample_key, 100)
    x = job.test[:50]
    cmap = "gray_r" if job.config.likelihood == "bernoulli" else "gray"  # ink, or light
    figures = {
        "samples": plotting.image_grid(
            shown(means).reshape(10, 10, *shape),
            title="Means of p(x|z), z from the prior",
            cmap=cmap,
        ),
        "reconstructions": plotting.reconstructions(
            shown(x), shown(jvae.reconstruct(state.params, x, reconstruct_key)), cmap=cmap
        ),
    }
    if job.config.latent_dim == 2:
        z = plotting.latent_grid(20).reshape(400, 2)
        means = jvae.likelihood(state.params, z).mean
        figures["manifold"] = plotting.image_grid(
            shown(means).reshape(20, 20, *shape),
            title="Means of p(x|z), z at equal steps of prior probability",
            cmap=cmap,
        )
    return figures


def _marginals(job: Job, state: training.TrainState) -> dict[str, Figure]:
    z_key, x_key = jax.random.split(job.keys.figures)
    prior = jvae.prior(state.params)
    z = jax.vmap(prior.sample)(jax.random.split(z_key, len(job.test)))
    drawn = jvae.likelihood(state.params, z).sample(x_key)
    return {"marginals": plotting.marginals(job.test, drawn)}


def _report(console: rich.console.Console, job: Job, result: dict[str, Any]) -> None:
    table = rich.table.Table("test set", job.protocol["units"], "± s.e.")
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
    console.print(table)
    console.print(f"Figures, metrics and checkpoints are in {job.folder}", soft_wrap=True)
