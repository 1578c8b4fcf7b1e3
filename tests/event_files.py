"""What TensorBoard shows of a folder of event files, read without it."""

import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX.proto import event_pb2


def events(file: Path) -> Iterator[Any]:
    """The events of a file; one cut short at its end does not count."""
    rest = file.read_bytes()
    while len(rest) >= 12:
        (length,) = struct.unpack("<Q", rest[:8])
        if len(rest) < length + 16:
            return
        yield event_pb2.Event.FromString(rest[12 : 12 + length])
        rest = rest[length + 16 :]


def values(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """By tag, the steps with their values.

    Files are read in the order of their names. Where one says that the run restarts at a step,
    what was read from that step on is dropped.
    """
    read: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for file in sorted(folder.iterdir()):
        for event in events(file):
            if event.HasField("session_log"):
                assert event.session_log.status == event_pb2.SessionLog.START
                for tag, series in read.items():
                    read[tag] = [(step, value) for step, value in series if step < event.step]
            for value in event.summary.value:
                read[value.tag].append((event.step, value))
    return dict(read)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """By tag, the steps with their numbers, which event files hold in float32."""
    return {
        tag: [(step, value.simple_value) for step, value in series]
        for tag, series in values(folder).items()
        if series[0][1].HasField("simple_value")
    }
