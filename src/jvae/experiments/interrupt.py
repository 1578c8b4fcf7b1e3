"""Ctrl-C and SIGTERM: noted where the work in hand is to be finished first, or acted on at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):  # as KeyboardInterrupt: no error, and no handler's of errors
    """SIGINT or SIGTERM came; once a run catches it, the message says how to go on."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum  # as shells report it


class Interrupt:
    """What `catch_interrupt` gives.

    Attributes:
      deferred: whether the first signal is to be noted rather than raised.
      signum: the signal noted, None as long as none was.
    """

    deferred: bool = False
    signum: int | None = None


@contextmanager
def default_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the process at once, as while JAX waits for others to join.

    No Python runs meanwhile. On leaving, both have their handlers again; JAX would put a mere note
    in the place of SIGTERM's.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in before.items():
            if handler is not None:  # of another language
                signal.signal(s, handler)


@contextmanager
def catch_interrupt() -> Iterator[Interrupt]:
    """Turn SIGINT and SIGTERM into `Interrupted`, or into a note while `deferred`.

    A second signal is raised even then. Outside the main thread, where Python lets nobody handle
    signals, nothing is caught.
    """
    interrupt = Interrupt()

    def handle(signum: int, frame: FrameType | None) -> None:
        del frame
        if not interrupt.deferred or interrupt.signum is not None:
            raise Interrupted(signal.strsignal(signum) or "", signum)
        interrupt.signum = signum

    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
