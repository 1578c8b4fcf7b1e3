"""Save and restore: a training state with Orbax, the weights of a model in one portable file."""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from orbax.checkpoint import checkpoint_managers, multihost

from jvae import distributed, models, networks, priors
from jvae.drafts import written_whole
from jvae.leaves import named
from jvae.models import Params
from jvae.training import State, StateT

Checkpoints: TypeAlias = ocp.CheckpointManager
# Of the values of each checkpoint, in a file beside them.
CHECKSUMS = "sha256.json"

# The parts that a description in a file may name.
_PARTS: dict[str, Any] = {
    part.__name__: part
    for part in (
        models.VAE,
        networks.MLP,
        *map(type, networks.FAMILIES.values()),
        priors.StandardNormal,
    )
}


# What errors of tensorstore say of a disk or a network, which may be well again tomorrow. What is
# missing is damage, whatever the system's error.
_PASSING = re.compile(
    "os_error_code=|UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|PERMISSION_DENIED|ABORTED"
    "|CANCELLED|INTERNAL|UNKNOWN"
)
_MISSING = re.compile("NOT_FOUND")
# Several processes wait for each other to write so long; alone, one may take Orbax's 20 minutes.
_SAVE_SECONDS = 180
_ORBAX = str(Path(ocp.__file__).parent)
_TASK_OF_ORBAX = re.compile(
    rf"^(future|task): <Task \w+ name=\S+ coro=<\S+ (running|done, defined) at {re.escape(_ORBAX)}",
    re.MULTILINE,
)
# What bytes that are no weights of a model raise; the last of a description nested without end.
_NO_WEIGHTS = (
    *(OSError, ValueError, TypeError, AttributeError),
    *(safetensors.SafetensorError, RecursionError),
)


class CheckpointError(RuntimeError):
    """A checkpoint that is missing or does not fit; the message says what to do."""


class UnwritableError(CheckpointError):
    """A checkpoint that could not be written: the disk is full, say."""


class LostError(CheckpointError):
    """A checkpoint for which no other can stand in is missing, or cannot be used."""


class _UnusableError(Exception):
    """A checkpoint that an earlier one may stand in for; the message goes on after its name."""


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Orbax's policy to preserve the checkpoints of the steps that a function names."""

    steps: Callable[[], Collection[int]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> Sequence[bool]:
        """Whether each checkpoint is of one of the steps."""
        del context
        wanted = self.steps()
        return [checkpoint.step in wanted for checkpoint in checkpoints]


@contextmanager
def open_checkpoints(
    directory: Path, *, also_keep: Callable[[], Collection[int]] = tuple
) -> Iterator[Checkpoints]:
    """The checkpoints in `directory`, of which the latest two stay, and those that are wanted.

    Saves are atomic and run beside the training; leaving the context waits for them.

    Args:
      directory: made when missing.
      also_keep: asked at each save for the steps to keep beside the latest two.

    Raises:
      UnwritableError: the directory cannot be made, or on leaving, the last save failed.
    """
    latest = checkpoint_managers.LatestN(2)
    policy = checkpoint_managers.AnyPreservationPolicy([latest, _Steps(also_keep)])
    waits = {"timeout_secs": _SAVE_SECONDS} if jax.process_count() > 1 else {}
    options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,
        preservation_policy=policy,
        async_options=ocp.AsyncOptions(**waits),
    )
    _hush_what_is_left_unfinished()
    with _orbax_quiet():
        with _unwritable(directory):
            checkpoints = ocp.CheckpointManager(
                directory.absolute(), options=options, item_handlers=ocp.StandardCheckpointHandler()
            )
        try:
            yield checkpoints
        finally:
            # A save that failed is told of by the first wait, after which all can be closed.
            try:
                with _unwritable(directory):
                    checkpoints.wait_until_finished()
            finally:
                with _unwritable(directory):
                    checkpoints.close()


def save_state(checkpoints: Checkpoints, state: State) -> None:
    """Save `state` under its step, unless that step is there already, with its checksum beside it.

    Raises:
      UnwritableError: this save or the one before it failed.
    """
    step = int(state.step)
    if step not in checkpoints.all_steps():
        directory = Path(checkpoints.directory)
        with _unwritable(directory):
            # Before the checkpoint: one that is killed in between leaves a line that none needs.
            _write_checksum(directory, step, _sha256(state), among=checkpoints.all_steps())
            checkpoints.save(step, args=ocp.args.StandardSave(state))


def restore(checkpoints: Checkpoints, step: int, like: StateT) -> StateT:
    """The state saved under `step`.

    Args:
      checkpoints: from `open_checkpoints`.
      step: of the state.
      like: a state of the same model, optimizer and key; its other values do not matter.

    Raises:
      LostError: it is missing, damaged or not of this run.
      UnwritableError: a save before it failed.
      CheckpointError: it cannot be read, and may be whole.
    """
    directory = Path(checkpoints.directory)
    with _unwritable(directory):
        checkpoints.wait_until_finished()
    if step not in checkpoints.all_steps():
        raise LostError(f"checkpoint {step} in {directory} is missing")
    try:
        return _restore(checkpoints, step, like)
    except _UnusableError as error:
        raise LostError(f"checkpoint {step} in {directory} {error}") from error


def restore_latest(
    checkpoints: Checkpoints,
    like: StateT,
    *,
    on_damaged: Callable[[str], object] = warnings.warn,
) -> StateT:
    """The state saved last, or where it is damaged or not of this run the one before it.

    Args:
      checkpoints: from `open_checkpoints`.
      like: a state of the same model, optimizer and key; its other values do not matter.
      on_damaged: told in one line of each checkpoint that is passed over. Once an earlier one was
        read, it is renamed to `STEP.unusable`, out of the way of the run that goes on.

    Raises:
      CheckpointError: there is none, none can be used, or one cannot be read that may be whole.
    """
    directory = Path(checkpoints.directory)
    with _unwritable(directory):
        checkpoints.wait_until_finished()
    unusable: dict[int, str] = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            state = _restore(checkpoints, step, like)
        except _UnusableError as error:
            unusable[step] = str(error)
            continue
        for later, reason in unusable.items():
            on_damaged(f"checkpoint {later} in {directory} {reason}: going on from {step}")
            _set_aside(directory / str(later))
        if unusable:
            multihost.sync_global_processes("jvae: unusable checkpoints are out of the way")
            checkpoints.reload()
        return state
    if unusable:
        step, reason = next(iter(unusable.items()))
        raise CheckpointError(
            f"no checkpoint in {directory} can be gone on from: {step} {reason}. Put a copy in its "
            "place, or delete that folder to start over"
        )
    raise CheckpointError(f"no checkpoint in {directory}")


def _restore(checkpoints: Checkpoints, step: int, like: StateT) -> StateT:
    try:
        # Looked at first: a restore that fails half-way leaves Orbax's tasks behind.
        metadata = checkpoints.item_metadata(step)
        saved = _shapes(getattr(metadata, "tree", metadata))
        if not saved:
            raise FileNotFoundError("its description is missing")
        wanted = _shapes(like._replace(key=jax.random.key_data(like.key)))
        if differing := sorted(name for name, _ in saved.items() ^ wanted.items()):
            name = differing[0]
            raise _UnusableError(
                f"is of another model or optimizer ({name} is {saved.get(name, 'missing')}, "
                f"expected {wanted.get(name, 'nothing')})"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        state: StateT = checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))
    except _UnusableError:
        raise
    except Exception as error:  # for damage Orbax raises any kind of it
        if _is_no_matter_of_files(error):
            raise
        reason = _reason(error)
        if not _may_pass(error):
            raise _UnusableError(f"is damaged ({reason})") from error
        raise CheckpointError(
            f"checkpoint {step} in {checkpoints.directory} cannot be read ({reason}): try again"
        ) from error
    # A run's key never changes.
    found, expected = (jax.random.key_data(one.key).tolist() for one in (state, like))
    if found != expected:
        raise _UnusableError(f"is of another run (its key is {found}, expected {expected})")
    sha256 = _sha256(state)
    if (saved_as := _read_checksums(Path(checkpoints.directory)).get(str(step), sha256)) != sha256:
        raise _UnusableError(
            f"is damaged or of another run (its values have the checksum {sha256[:8]}…, those "
            f"that were saved {saved_as[:8]}…)"
        )
    return state


def _sha256(state: State) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.ascontiguousarray(distributed.to_numpy(leaf)).view(np.uint8).data)
    return digest.hexdigest()


def _read_checksums(directory: Path) -> dict[str, str]:
    """Of each step; none where there is no file, as beside older checkpoints, or a damaged one."""
    try:
        found = json.loads((directory / CHECKSUMS).read_text())
    except (OSError, ValueError):
        return {}
    return {step: str(of) for step, of in found.items()} if isinstance(found, dict) else {}


def _write_checksum(directory: Path, step: int, sha256: str, among: Collection[int]) -> None:
    if jax.process_index() != 0:
        return
    others = {s: of for s, of in _read_checksums(directory).items() if s in set(map(str, among))}
    with written_whole(directory / CHECKSUMS) as draft:
        draft.write_text(json.dumps(others | {str(step): sha256}, indent=2) + "\n")


def _cause(error: BaseException) -> BaseException:
    """The error that was first: Orbax raises another one from it, with pages of its arguments."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: Exception) -> str:
    cause = _cause(error)
    line = str(cause).partition("\n")[0].partition(" [tensorstore_spec")[0]
    return textwrap.shorten(line, 200, placeholder=" …") or type(cause).__name__


def _is_no_matter_of_files(error: Exception) -> bool:
    """Whether it is of memory or of another process."""
    cause = _cause(error)
    kinds = (TimeoutError, MemoryError, jax.errors.JaxRuntimeError)
    return isinstance(cause, kinds) or distributed.is_lost_connection(cause)


def _may_pass(error: Exception) -> bool:
    cause = _cause(error)
    if isinstance(cause, OSError):
        return not isinstance(cause, FileNotFoundError | IsADirectoryError | NotADirectoryError)
    if type(cause) is RuntimeError:  # of threads, say
        return True
    said = str(cause)
    return not _MISSING.match(said) and _PASSING.search(said) is not None


def _set_aside(path: Path) -> None:
    """Rename a checkpoint to what Orbax takes for none."""
    if jax.process_index() == 0:
        aside = path.with_name(f"{path.name}.unusable")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


@contextmanager
def _unwritable(directory: Path) -> Iterator[None]:
    """Say in a line what Orbax says in hundreds; tensorstore raises ValueError for a full disk."""
    try:
        yield
    except TimeoutError:  # of another process
        raise
    except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
        if code := _system_code(error):
            raise UnwritableError(f"cannot write {directory}: {os.strerror(code)}") from error
        if isinstance(error, jax.errors.JaxRuntimeError) or distributed.is_lost_connection(error):
            raise
        raise UnwritableError(f"cannot use {directory}: {_reason(error)}") from error


def _system_code(error: BaseException | None) -> int | None:
    """The system's code of an error, or of the one that it hides.

    With several processes, Orbax waits for the others after a write that failed, in vain.
    """
    while error is not None:
        found = re.search(r"os_error_code='(\d+)'", str(error))
        code = int(found[1]) if found else getattr(error, "errno", None)
        if code:
            return code
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def _orbax_quiet() -> Iterator[None]:
    """Orbax logs the errors that it raises, once in every thread that they pass."""
    log = logging.getLogger("absl")

    def is_news(record: logging.LogRecord) -> bool:
        return not (record.exc_info and record.pathname.startswith(_ORBAX))

    log.addFilter(is_news)
    try:
        yield
    finally:
        log.removeFilter(is_news)


@functools.cache
def _hush_what_is_left_unfinished() -> None:
    """Orbax leaves behind what it had begun beside a save or restore that failed.

    That complains when it is done, or is collected at the end of the process, to nobody's use.
    """
    report = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        late = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        if not late and not (code and code.co_filename.startswith(_ORBAX)):
            report(unraisable)

    def is_news(record: logging.LogRecord) -> bool:
        error = record.exc_info and record.exc_info[1]
        # Of tasks that were gathered, the error's traceback alone says whose they are.
        began = traceback.extract_tb(error.__traceback__, limit=1) if error else []
        in_orbax = any(frame.filename.startswith(_ORBAX) for frame in began)
        return not in_orbax and not _TASK_OF_ORBAX.search(record.getMessage())

    sys.unraisablehook = hook
    # The error of the first of its tasks is raised; those of the others nobody asks for.
    logging.getLogger("asyncio").addFilter(is_news)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf by its name, or of what stands for one in Orbax's descriptions."""
    leaves = named(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def save(path: str | os.PathLike[str], params: Params) -> None:
    """Write weights and the description of their model to one file, in the safetensors format.

    The file is written whole or not at all, and equal weights make equal files. It needs no code
    of a training run to be read, and nothing in it is executed.

    Args:
      path: the file; by convention it ends in `.safetensors`.
      params: of a model made of jvae's own networks, as `VAE.mlp` makes.

    Raises:
      CheckpointError: a part of the model that a file cannot describe, such as an activation
        given as a function.
      UnwritableError: the file cannot be written.
    """
    path = Path(path)
    description = json.dumps(_describe(params.model, "model"))
    content = safetensors.numpy.save(
        {name: np.asarray(leaf) for name, leaf in named(params.weights).items()},
        metadata={"model": description},  # of several, safetensors writes the order at random
    )
    try:
        with written_whole(path) as draft:
            draft.write_bytes(content)
    except OSError as error:
        raise UnwritableError(f"cannot write {path}: {error.strerror}") from error


def load(path: str | os.PathLike[str]) -> Params:
    """Read what `save` wrote.

    Returns:
      The model with its weights.

    Raises:
      CheckpointError: no such file, a damaged one, or one of something else.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = _build(json.loads(metadata["model"]))
        if not isinstance(model, models.VAE):
            raise TypeError("it describes no model")
        abstract = jax.eval_shape(lambda: models.init(model, jax.random.key(0)))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except KeyError as error:
        raise CheckpointError(f"{path}: no weights of jvae, {error} is missing") from error
    except _NO_WEIGHTS as error:
        raise CheckpointError(f"{path}: not a whole file of weights ({error})") from error
    return Params(weights=fill(abstract.weights, found, f"{path}", "its model"), model=model)


def fill(like: Any, found: Mapping[str, np.ndarray], where: str, owner: str) -> Any:
    """The tree `like` with the arrays `found` under the names on the way to its leaves.

    Args:
      like: a tree of arrays or of their shapes.
      found: the arrays by name.
      where: they were found, for the message.
      owner: of the tree, for the message.

    Raises:
      CheckpointError: names the first array that is missing, too many or of another form.
    """
    wanted, given = _forms(named(like)), _forms(found)
    if differing := sorted(name for name, _ in wanted.items() ^ given.items()):
        name = differing[0]
        raise CheckpointError(
            f"{where}: {name} is {given.get(name, 'missing')}, {owner} has "
            f"{wanted.get(name, 'none')}"
        )
    leaves = [jnp.asarray(found[name]) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _forms(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{array.dtype} {array.shape}" for name, array in arrays.items()}


def _describe(value: Any, where: str) -> Any:
    """`value` as JSON: parts by their name and fields."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [_describe(item, where) for item in value]
    if _PARTS.get(type(value).__name__) is type(value):
        fields = {
            field.name: _describe(getattr(value, field.name), f"{where}.{field.name}")
            for field in dataclasses.fields(value)
            if field.init and field.name not in ("parent", "name")  # Linen's own
        }
        return {"part": type(value).__name__, **fields}
    raise CheckpointError(
        f"{where} is {value!r}: a file can hold numbers, names and {', '.join(_PARTS)} only"
    )


def _build(description: Any) -> Any:
    if isinstance(description, list):
        return tuple(_build(item) for item in description)
    if isinstance(description, dict):
        fields = {name: _build(value) for name, value in description.items() if name != "part"}
        return _PARTS[description["part"]](**fields)
    return description
