"""Results of several runs side by side, if they are results of one protocol.

jvae compare --help
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.console
import rich.table
import tyro

from jvae.experiments.run_folder import RunFolderError, read_result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compare runs of one protocol; results of different data never share a table."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of finished runs."""


def run(config: Config) -> None:
    """Print a row a run.

    Raises:
      RunFolderError: no run, one that is not finished, or runs of different protocols.
    """
    results = {str(folder): read_result(folder) for folder in config.runs}
    check_comparable(results)
    console = rich.console.Console()
    unit = next(iter(results.values()))["protocol"]["units"]
    table = rich.table.Table("run", "epochs", "seed", f"test ELBO, {unit}", "-log p(x)")
    for name, result in results.items():
        table.add_row(
            name,
            str(result["epochs"]),
            str(result["seed"]),
            _with_error(result, "test_elbo"),
            _with_error(result, "test_nll"),
        )
    console.print(table)
    console.print(f"± standard error over {results.popitem()[1]['stderr_over']}")


def check_comparable(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse results of different protocols: they are densities of different data.

    Args:
      results: contents of `result.json` by the name of their run.

    Raises:
      RunFolderError: names two runs, and all in which their protocols differ.
    """
    protocols = {
        name: {**result["protocol"], "test_nll_estimator": result.get("test_nll_estimator")}
        for name, result in results.items()
    }
    for protocol in protocols.values():
        del protocol["dataset"]  # a name: its hash is what counts
    if not protocols:
        raise RunFolderError("give at least one run to compare")
    first, *others = protocols
    for other in others:
        a, b = protocols[first], protocols[other]
        differing = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
        if differing:
            what = "; ".join(
                f"{key} is {_short(a.get(key))} and {_short(b.get(key))}" for key in differing
            )
            raise RunFolderError(f"{first} and {other} do not compare: {what}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _with_error(result: Mapping[str, Any], name: str) -> str:
    if name not in result:
        return "-"
    return f"{result[name]:.2f} ± {result[f'{name}_stderr']:.2f}"
