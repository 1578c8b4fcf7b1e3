"""The `jvae` command, and how every command ends: one line for the user, a code for the shell."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Annotated, NoReturn

import jax

from jvae import distributed
from jvae.checkpoint import CheckpointError, UnwritableError
from jvae.data import DataError
from jvae.experiments import compilation_cache
from jvae.experiments.config import ConfigError
from jvae.experiments.interrupt import Interrupted
from jvae.experiments.run_folder import RunFolderError

REFUSALS = (ConfigError, DataError, RunFolderError, CheckpointError)
# The others of a run are lost with process 0, which lets them say first why they end.
LAST_SECONDS = 3


def run(command: Callable[[], object]) -> None:
    """Call `command` and end the process with what its errors mean.

    Exit codes: 2 for settings or data that cannot be, 1 for a bound that is not finite, a part
    that is not installed or a disk that is full, 128 + the signal after Ctrl-C or SIGTERM.

    One of several processes that fails ends at once, whatever the error.
    """
    try:
        _run(command)
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        _leave(error)


def _leave(error: BaseException) -> NoReturn:
    """End at once: on the usual way out JAX waits for the others, and these may wait for us.

    Now they see a broken connection.
    """
    code = 1
    with contextlib.suppress(OSError):  # nobody may be listening
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else code
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
    if distributed.is_first_process():
        with contextlib.suppress(BaseException):  # a second Ctrl-C
            time.sleep(LAST_SECONDS)
    os._exit(code)


def _run(command: Callable[[], object]) -> None:
    try:
        signal.signal(signal.SIGTERM, _terminate)
        compilation_cache.enable()
        try:
            command()
        finally:  # `--help` too ends in a SystemExit: a closed pipe is met here, not at exit
            sys.stdout.flush()
    except (FloatingPointError, ImportError, UnwritableError) as error:
        _end(_said(error), 1)
    except REFUSALS as error:
        _end(_said(error), 2)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except Interrupted as error:
        _end(str(error), error.exit_code)
    except BrokenPipeError:  # the reader of `jvae … | head` has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized():
            raise
        _end(f"error: {distributed.no_answer(error)}", 1)
    except OSError as error:  # a full disk, say
        _end(_said(error), 1)
    except distributed.OtherProcessError as error:
        _end(f"error: {error}", 1)
    except KeyboardInterrupt:
        _end("Interrupted.", 130)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    """Leave by way of every `finally`: temporary folders are removed."""
    del frame
    raise Interrupted("Terminated.", signum)


def _said(error: Exception) -> str:
    return "\n".join([f"error: {error}", *getattr(error, "__notes__", ())])


def _end(message: str, exit_code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(exit_code)


def main() -> None:
    """`jvae train …`, `jvae evaluate …`, `jvae compare …`, `jvae replay …`."""
    try:
        import tyro

        from jvae.experiments import assessment, compare, post_mortem, train
    except ModuleNotFoundError as missing:
        _end(f"error: no module {missing.name!r}: pip install 'jvae[experiments]'", 1)

    def command() -> None:
        config = tyro.cli(
            Annotated[train.Config, tyro.conf.subcommand("train")]
            | Annotated[assessment.Config, tyro.conf.subcommand("evaluate")]
            | Annotated[compare.Config, tyro.conf.subcommand("compare")]
            | Annotated[post_mortem.Config, tyro.conf.subcommand("replay")],
            prog="jvae",
            description="Auto-Encoding Variational Bayes.",
        )
        if isinstance(config, train.Config):
            train.run(config)
        elif isinstance(config, assessment.Config):
            assessment.run(config)
        elif isinstance(config, compare.Config):
            compare.run(config)
        else:
            post_mortem.run(config)

    run(command)
