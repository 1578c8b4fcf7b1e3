"""The processor's cores that this process may use."""

import os


def count() -> int:
    """How many there are: a scheduler may give a process fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
