"""Ctrl-C and SIGTERM as a request that training looks at between epochs."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):  # noqa: N818 - as KeyboardInterrupt, it is no error
    """A signal ended the run; the message says what was saved and how to go on."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum  # as shells report it


class Interrupt:
    """The signal that asked for an end, None as long as none did."""

    signum: int | None = None


@contextmanager
def catch_interrupt() -> Iterator[Interrupt]:
    """Note the first SIGINT or SIGTERM in the result; a second one acts at once.

    Outside the main thread, where Python lets nobody handle signals, nothing is caught.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for s, handler in before.items():
            signal.signal(s, handler)

    def note(signum: int, frame: FrameType | None) -> None:
        del frame
        interrupt.signum = signum
        restore()

    for s in before:
        signal.signal(s, note)
    try:
        yield interrupt
    finally:
        restore()
