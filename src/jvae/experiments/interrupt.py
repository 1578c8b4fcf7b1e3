"""Ctrl-C and SIGTERM as a request that training looks at between epochs."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Which signal asked for an end, if one did."""

    signum: int | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it."""
        return 128 + (self.signum or 0)


@contextmanager
def catch_interrupt() -> Iterator[Interrupt]:
    """Note the first SIGINT or SIGTERM in the result; a second one ends the process at once."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt  # only the main thread may handle signals
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(signum: int, frame: FrameType | None) -> None:
        del frame
        interrupt.signum = signum
        for s, handler in before.items():
            signal.signal(s, handler)

    for s in before:
        signal.signal(s, note)
    try:
        yield interrupt
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
