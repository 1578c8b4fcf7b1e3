"""A training run, whatever its data: progress, checkpoints, results and figures."""

import contextlib
import dataclasses
import errno
import functools
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
import rich.console
from jax.sharding import Mesh

from jvae import checkpoint, data, distributed, training
from jvae.experiments import (
    best,
    devices,
    epochs,
    failure,
    figures,
    logbook,
    objective,
    progress_bars,
    results,
    run_folder,
)
from jvae.experiments.interrupt import Interrupt, Interrupted, catch_interrupt
from jvae.experiments.job import Job
from jvae.experiments.logbook import Logger

# Settings that a resumed run may change: the numbers of the epochs done do not depend on them.
FREE_ON_RESUME = {
    *("epochs", "out", "resume", "data", "data_dir"),
    *("checkpoint_every", "nll_samples", "max_skipped"),
    *("devices", "distributed", "coordinator", "num_processes", "process_id"),
    *("tensorboard", "wandb"),
}
# What the system calls a disk that is full, a quota, a limit on files, a disk that only reads.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def run(
    job: Job, *, console: rich.console.Console, loggers: Sequence[Logger] = ()
) -> dict[str, Any]:
    """Train, evaluate and draw, into the run's folder.

    Of several processes all train and evaluate, and the first alone writes.

    Args:
      job: what is to be run.
      console: where progress and results are shown.
      loggers: told of each epoch, beside those that the settings ask for.

    Returns:
      The content of `result.json`.

    Raises:
      ConfigError: fewer training examples than one batch, or devices that cannot share it.
      RunFolderError: the run's folder cannot be made or continued.
      CheckpointError: the checkpoint to go on from does not fit, the best one is lost, or one
        cannot be written.
      Interrupted: SIGINT or SIGTERM came; training ended after the compiled call in hand, of at
        most `epochs.STEPS_A_CALL` steps, or the batch where data is streamed, and was saved.
      NonFiniteError: the bound or the weights became infinite or NaN; the last good state is
        saved, `failure.json` says where it happened, and `failure/` holds that step for
        `jvae.experiments.replay`.
      FloatingPointError: the test or the validation ELBO did, with both finite; the state before
        that epoch is saved, and `failure.json` says where it happened. Or, at the end, log p(x) of
        a test example.
      ImportError: a logger that the settings ask for is not installed.
    """
    job.config.check_examples(len(job.train))
    mesh = distributed.on_every_process(lambda: job.mesh)
    devices.check_alike(job.protocol)
    with contextlib.ExitStack() as stack:
        all_loggers = list(loggers)
        distributed.on_first_process(lambda: all_loggers.extend(_open(job, stack)))
        interrupt = stack.enter_context(catch_interrupt())
        stack.enter_context(_ended_with_the_others(job))
        try:
            interrupt.deferred = True
            # A signal to one process ends all, after the same step.
            state = _train(
                job,
                mesh,
                console,
                all_loggers,
                stop=lambda: distributed.largest(interrupt.signum or 0) > 0,
            )
            # One of several that left the evaluation would be waited for.
            interrupt.deferred = jax.process_count() > 1
            epoch, rest = divmod(int(state.step), job.steps_per_epoch)
            done = f"step {state.step}" if rest else f"epoch {epoch}"
            _end_at_signal(interrupt, f"saved after {done}")
            chosen, result = _evaluate(job, state, console, interrupt)
            with console.status("Drawing …"):
                distributed.on_first_process(lambda: _write_results(job, state, chosen, result))
        except Interrupted as error:
            raise Interrupted(
                f"Interrupted ({error}). To go on: the same command with --resume --out "
                f"{shlex.quote(str(job.folder))}",
                error.signum,
            ) from None
        except (OSError, checkpoint.UnwritableError, checkpoint.LostError) as error:
            note = (
                "To go on once that is mended: the same command with --resume --out "
                f"{shlex.quote(str(job.folder))}"
            )
            # Of a write that fails, Python does not say where.
            if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
                told = checkpoint.UnwritableError(f"cannot write {job.folder}: {error.strerror}")
                told.add_note(note)
                raise told from error
            error.add_note(note)
            raise
    results.report(console, job, result)
    return result


def _end_at_signal(interrupt: Interrupt, done: str) -> None:
    """Raise `Interrupted` where a signal came to any process; every one has to ask."""
    if signum := distributed.largest(interrupt.signum or 0):
        raise Interrupted(done, signum)


def _evaluate(
    job: Job, state: training.TrainState, console: rich.console.Console, interrupt: Interrupt
) -> tuple[list[training.TrainState], dict[str, Any]]:
    """The states whose weights are the result, and the content of `result.json`."""
    with progress_bars.of_examples(console) as progress:
        # Until the first log p(x) is done, the bar says only that there is work in hand.
        bar = progress.add_task("evaluating", total=results.num_log_px(job) or None, start=False)

        def advance(num: int) -> None:
            progress.start_task(bar)
            progress.advance(bar, num)
            _end_at_signal(interrupt, "trained, and its results not written")

        chosen = best.choose(job, state)
        result = results.evaluate(job, state, chosen, advance=advance)
        advance(0)
        return chosen, result


def _open(job: Job, stack: contextlib.ExitStack) -> list[Logger]:
    """Make the run's folder or check that it can be gone on with, lock it, open its loggers."""
    logbook.check_installed(job.config)
    if job.config.resume:
        run_folder.read_settings(job.folder)  # which says so when there is none
    else:
        run_folder.create(job.folder, job.settings())
    stack.enter_context(run_folder.lock(job.folder))
    if job.config.resume:
        _check_same_run(job)
    return stack.enter_context(logbook.from_settings(job))


def _write_results(
    job: Job,
    state: training.TrainState,
    chosen: Sequence[training.TrainState],
    result: dict[str, Any],
) -> None:
    models = [one.params for one in chosen]
    if len(models) == 1:
        checkpoint.save(job.folder / "model.safetensors", models[0])
    else:
        (job.folder / "models").mkdir(exist_ok=True)
        for seed, params in zip(job.config.all_seeds, models, strict=True):
            checkpoint.save(job.folder / "models" / f"seed_{seed}.safetensors", params)
    run_folder.write_json(job.folder / "result.json", result)
    figures.draw(job, models[0])
    (job.folder / run_folder.FAILURE).unlink(missing_ok=True)
    shutil.rmtree(job.folder / "failure", ignore_errors=True)
    if int(state.step) % job.steps_per_epoch == 0:
        (job.folder / run_folder.UNFINISHED).unlink(missing_ok=True)


def _check_same_run(job: Job) -> None:
    saved = run_folder.read_settings(job.folder)
    ours = run_folder.json_round_trip(job.settings())
    free = set(FREE_ON_RESUME)
    if job.config.schedule == "cosine":
        free.remove("epochs")  # the schedule's length: every epoch depends on it
    if job.valid is not None:
        free.remove("checkpoint_every")  # of these checkpoints one is chosen
    fields = dataclasses.fields(job.config)
    # A setting that is newer than the run had its default.
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    before = run_folder.json_round_trip(defaults) | saved
    failure = run_folder.read_failure(job.folder)
    if failure and failure.get("learning_rate_setting") == before["learning_rate"]:
        free.add("learning_rate")  # the same one would fail again
    fixed = {field.name for field in fields} - free
    protocols = [settings.get("protocol", {}) for settings in (before, ours)]
    names = sorted({**protocols[0], **protocols[1]})
    both = [(name, before.get(name), ours[name]) for name in sorted(fixed)]
    both += [(name, *(of.get(name) for of in protocols)) for name in names]
    if protocols[0].get("dataset_sha256") == protocols[1].get("dataset_sha256"):
        both = [one for one in both if one[0] != "dataset"]  # the same data by another name
    # Some settings are part of the protocol too.
    changed = dict.fromkeys(
        f"{name} was {_short(saw)}, is {_short(now)}" for name, saw, now in both if saw != now
    )
    if changed:
        raise run_folder.RunFolderError(
            f"{job.folder} is a run of other settings: {'; '.join(changed)}"
        )
    run_folder.read_metrics(job.folder)  # which refuses what is none


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:78]} …"


def _write_resumed(job: Job, step: int) -> None:
    """What the run was made with stays on record beside what goes on with it from `step`.

    A learning rate may be another after a failure; the one in force is that of `config.json`.
    """
    saved = run_folder.read_settings(job.folder)
    ours = run_folder.json_round_trip(job.settings())
    rate = ours["learning_rate"]
    first = {"from_step": 0, "learning_rate": saved.get("learning_rate", rate)}
    rates = [r for r in saved.get("learning_rates", [first]) if r["from_step"] < step]
    if not rates or rates[-1]["learning_rate"] != rate:
        rates.append({"from_step": step, "learning_rate": rate})
    saved |= {"learning_rate": rate, "learning_rates": rates}
    saved.setdefault("resumed_with", []).append(ours)
    run_folder.write_json(job.folder / "config.json", saved)


def _train(
    job: Job,
    mesh: Mesh | None,
    console: rich.console.Console,
    loggers: Sequence[Logger],
    *,
    stop: Callable[[], bool],
) -> training.TrainState:
    """The state after the last epoch, or where `stop()` was first true, on one device.

    That is asked between compiled calls, and where data is streamed after each batch.
    """
    config = job.config
    step = training.make_step(objective.make_bound(config), job.optimizer)
    preprocess, state, examples = job.preprocess, job.on_devices(job.init()), job.train
    if mesh is not None:
        if config.seeds == 1:
            preprocess = distributed.split_batches(mesh, preprocess)
        if not job.streamed:
            examples = distributed.replicate(examples, mesh)
    records: list[dict[str, Any]] = []
    with (
        best.open_checkpoints(job, records) as checkpoints,
        progress_bars.of_epochs(console) as progress,
    ):
        if config.resume:
            # Killed before its first checkpoint, a run starts over: the result is the same.
            if checkpoints.latest_step() is not None:
                say = functools.partial(
                    console.print, soft_wrap=True, markup=False, highlight=False
                )
                state = checkpoint.restore_latest(checkpoints, state, on_damaged=say)
            resumed_at = int(state.step)

            def rewind() -> None:
                _write_resumed(job, resumed_at)
                run_folder.rewind_metrics(job.folder, resumed_at)

            distributed.on_first_process(rewind)
            records += run_folder.read_metrics(job.folder)
            for step_of_best in best.missing(job, records, checkpoints):
                results.show_warning(
                    console,
                    f"checkpoint {step_of_best}, of the best validation ELBO so far, is missing: "
                    "put a copy in its place, or without a better epoch there will be no result",
                )
        done = int(state.step) // job.steps_per_epoch
        if lost := sorted(set(range(1, done + 1)) - {record["epoch"] for record in records}):
            results.show_warning(
                console,
                f"{job.folder / 'metrics.jsonl'} has lost the lines of epochs "
                f"{', '.join(map(str, lost))}: they cannot be made again",
            )
        earlier = run_folder.read_unfinished(job.folder, int(state.step))
        bar = progress.add_task("", total=config.epochs, completed=done, status="compiling …")
        start, good = time.perf_counter(), state

        def show(step: int) -> None:
            progress.update(bar, completed=step / job.steps_per_epoch)

        def batches(step: int) -> Iterator[Any]:
            read: Iterator[Any] = data.batches(
                job.train, config.batch_size, seed=config.seed, step=step
            )
            if mesh is not None and config.seeds == 1:
                read = distributed.join_batches(read, mesh)
            for i, batch in enumerate(read, start=step):
                show(i)
                yield batch
                if stop():
                    return

        if job.streamed:
            epoch = training.make_streamed_epoch(step, preprocess)
        else:
            whole = training.make_epoch(step, config.batch_size, preprocess)
            epoch = epochs.stoppable(whole, config.batch_size, stop=stop, on_step=show)

        def on_epoch(state: training.TrainState, info: training.StepInfo) -> bool:
            nonlocal start, earlier, good
            seconds = time.perf_counter() - start
            of_steps = np.asarray(info.bound, object)
            if info.skipped is not None:
                of_steps[np.asarray(info.skipped)] = None
            bounds = [*earlier, *of_steps.tolist()]
            if int(state.step) % job.steps_per_epoch:  # stopped in the midst of an epoch
                distributed.on_first_process(
                    lambda: run_folder.write_unfinished(job.folder, int(state.step), bounds)
                )
                checkpoint.save_state(checkpoints, state)
                return True
            speed = round(info.bound.size * config.batch_size / seconds)
            record = results.record(job, state, bounds, images_per_second=speed)
            records.append(record)
            earlier = []
            done = record["epoch"]
            ending = stop()
            saving = ending or done % config.checkpoint_every == 0 or done == config.epochs

            def write() -> None:
                run_folder.append_metrics(job.folder, record)
                logbook.write(loggers, job, state, record, in_full=saving)

            distributed.on_first_process(write)
            ending = ending or stop()  # a signal may have come in the meantime
            if saving or ending:
                checkpoint.save_state(checkpoints, state)
            status = (
                f"test ELBO {record['test_elbo']:.2f}  {record['images_per_second']:,} images/s"
            )
            progress.update(bar, completed=done, status=status)
            if not console.is_terminal and done % max(1, config.epochs // 20) == 0:
                console.print(f"epoch {done}/{config.epochs}  {status}")
            start, good = time.perf_counter(), state
            return ending

        try:
            with _ended_with_the_others(job):
                state = training.fit(
                    state,
                    epoch,
                    batches if job.streamed else examples,
                    num_epochs=config.epochs - done,
                    on_epoch=on_epoch,
                    max_skipped=config.max_skipped,
                )
            return state if mesh is None else distributed.to_host(state)
        except FloatingPointError as error:  # of a step, or of an ELBO after the epoch
            checkpoint.save_state(checkpoints, good)
            distributed.on_first_process(functools.partial(_write_failure, job, error, good))
            raise


def _write_failure(job: Job, error: FloatingPointError, good: training.TrainState) -> None:
    """Keep where it happened; tell the user in notes of the error."""
    config, rate = job.config, job.learning_rate
    if isinstance(error, training.NonFiniteError):
        step = error.step
        what = {"bound": str(error.bound), "seed": config.all_seeds[error.member]}
    else:  # an ELBO after the last step of the epoch
        step = (int(good.step) // job.steps_per_epoch + 1) * job.steps_per_epoch - 1
        what = {}
    where: dict[str, Any] = {
        "step": step,
        "learning_rate": float(rate(step) if callable(rate) else rate),
        "learning_rate_setting": config.learning_rate,
        "last_good_step": int(good.step),
        **what,
    }
    run_folder.write_json(job.folder / run_folder.FAILURE, where)
    seed = f"Of seed {what['seed']}. " if what and config.seeds > 1 else ""
    error.add_note(
        f"{seed}The learning rate was {where['learning_rate']:g}. To go on from the state of step "
        f"{good.step}: another --learning-rate with --resume --out "
        f"{shlex.quote(str(job.folder))}"
    )
    if isinstance(error, training.NonFiniteError):
        _write_bundle(job, error, distributed.to_host(training.members(good)[error.member]))


def _write_bundle(job: Job, error: training.NonFiniteError, good: training.TrainState) -> None:
    """Keep the step at fault, which follows from the last good state of the model that failed."""
    config = job.config
    batches: Iterable[Any]
    if job.streamed:
        batches = data.batches(
            job.train,
            config.batch_size,
            seed=config.seed,
            step=int(good.step),
            process_index=0,
            process_count=1,
        )
    else:
        order = epochs.order_left(good, len(job.train), config.batch_size)
        batches = (job.train[batch] for batch in order)
    folder, num_train = job.folder / "failure", len(job.train)
    error.add_note(failure.write(folder, error, good, config, num_train, batches, job.preprocess))


@contextlib.contextmanager
def _ended_with_the_others(job: Job) -> Iterator[None]:
    """End at once where another process has gone: on the usual way out, JAX and Orbax wait for it.

    What sees it first may also be JAX's own watch, which ends this process from within.
    """
    try:
        yield
    except Exception as error:
        # Orbax has its own waits for the others, whose errors are of any kind.
        of_others = isinstance(error, jax.errors.JaxRuntimeError | TimeoutError)
        lost = distributed.is_lost_connection(error)
        if jax.process_count() == 1 or not (of_others or lost):
            raise
        _leave(job, error)


def _leave(job: Job, error: Exception) -> NoReturn:
    print(
        f"error: {distributed.no_answer(error)}. To go on: the same command with --resume --out "
        f"{shlex.quote(str(job.folder))}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
