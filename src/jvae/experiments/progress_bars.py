"""Progress bars, shown on a terminal alone."""

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


def of_epochs(console: rich.console.Console) -> Progress:
    """Epochs done out of all, with a task's `status`."""
    status = TextColumn("{task.fields[status]}")
    return _progress(console, TextColumn("epoch"), MofNCompleteColumn(), BarColumn(), status)


def of_examples(console: rich.console.Console) -> Progress:
    """Examples done out of all, of each task."""
    return _progress(console, TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())


def of_study(console: rich.console.Console) -> Progress:
    """The share of a study's steps that is done, with a task's `status`."""
    description, status = TextColumn("{task.description}"), TextColumn("{task.fields[status]}")
    return _progress(console, description, BarColumn(), TaskProgressColumn(), status)


def _progress(console: rich.console.Console, *columns: ProgressColumn) -> Progress:
    return Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
