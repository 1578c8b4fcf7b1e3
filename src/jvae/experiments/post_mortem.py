"""Take the step at which a run failed once more, and name the first tensor that went bad.

jvae replay --help
"""

import dataclasses
from pathlib import Path

import rich.box
import rich.console
import rich.markup
import rich.table
import tyro

from jvae import bundle, forensics
from jvae.experiments import failure, objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Replay a step that was not finite: a table of its tensors in the order of evaluation."""

    bundle: tyro.conf.Positional[Path]
    """The folder that the failed run left: RUN/failure."""


def run(config: Config) -> None:
    """Print the table, and that the step is finite where it is.

    Raises:
      CheckpointError: no bundle, or a damaged one.
      FloatingPointError: the step is not finite; the message names the first such tensor.
    """
    kept = bundle.load(
        config.bundle, lambda saved: objective.make_optimizer(*failure.settings_of(saved))
    )
    settings, num_train = failure.settings_of(kept.settings)
    found = forensics.examine(
        kept.state,
        kept.x,
        objective.make_bound(settings),
        objective.make_optimizer(settings, num_train),
    )
    console = rich.console.Console()
    console.print(_table(found.tensors, title=f"Step {kept.state.step} of {config.bundle}"))
    if found.verdict is not None:
        raise FloatingPointError(found.verdict)
    console.print("Every tensor is finite: the failure does not reproduce here.")


def _table(tensors: list[forensics.Tensor], *, title: str) -> rich.table.Table:
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("tensor", no_wrap=True, overflow="fold")
    for column in ("shape", "min", "max", "bad"):
        table.add_column(column, justify="right", no_wrap=True)
    for tensor in tensors:
        bad = tensor.num_non_finite
        table.add_row(
            rich.markup.escape(tensor.name),
            "×".join(map(str, tensor.shape)) or "scalar",
            f"{tensor.minimum:.3g}",
            f"{tensor.maximum:.3g}",
            f"{bad:,}" if bad else "",
            style="bold red" if bad else None,
        )
    return table
