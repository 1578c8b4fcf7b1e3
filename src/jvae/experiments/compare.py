"""Results of several runs side by side, if they are results of one protocol.

jvae compare --help
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.table
import tyro

from jvae.experiments import evaluations
from jvae.experiments.results import show_warning
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
    headers = ("run", "epochs", "seed", f"test ELBO, {unit}", "-log p(x)", "± s.e. over")
    table = rich.table.Table(*headers)
    for name, result in results.items():
        table.add_row(
            name,
            str(result["epochs"]),
            str(result["seed"]),
            _with_error(result, "test_elbo"),
            _with_error(result, "test_nll"),
            result["stderr_over"],
        )
    console.print(table)
    for name, result in results.items():
        for warning in result.get("warnings", ()):
            show_warning(console, f"{name}: {warning}")
    _show_evaluations(console, config.runs)


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
        if what := _differences(protocols[first], protocols[other]):
            raise RunFolderError(f"{first} and {other} do not compare: {what}")


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    differing = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    return "; ".join(f"{key} is {_short(a.get(key))} and {_short(b.get(key))}" for key in differing)


def _show_evaluations(console: rich.console.Console, folders: Sequence[Path]) -> None:
    """What `jvae evaluate` found, with a column a run.

    A part whose settings differ between two runs is left out, and a line says why.
    """
    found = {folder: evaluations.read_current(folder) for folder in folders}
    parts = {str(f): {} if e is None else e["parts"] for f, e in found.items()}
    shared: list[str] = []
    left_out: list[str] = []
    for part in dict.fromkeys(name for of_run in parts.values() for name in of_run):
        reason = _why_apart(part, parts)
        if reason:
            left_out.append(f"{part} is left out: {reason}")
        else:
            shared.append(part)
    if shared:
        over = {str(folder): of_run["stderr_over"] for folder, of_run in found.items() if of_run}
        console.print(_evaluations_table(shared, parts, over))
    for line in left_out:
        console.print(line, soft_wrap=True)


def _why_apart(part: str, parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Why the numbers of a part do not compare; empty where they do."""
    lacking = [name for name, of_run in parts.items() if part not in of_run]
    if lacking:
        return f"{', '.join(lacking)} has no evaluation of it with its present weights"
    first, *others = parts
    for other in others:
        a, b = (_without_seeds(parts[name][part]["settings"]) for name in (first, other))
        if what := _differences(a, b):
            return f"{first} and {other} do not compare: {what}"
    return ""


def _without_seeds(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Estimates with other noise compare."""
    return {
        name: _without_seeds(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name != "seed"
    }


def _evaluations_table(
    shared: Sequence[str], parts: Mapping[str, Mapping[str, Any]], over: Mapping[str, str]
) -> rich.table.Table:
    """A column a run, which says what its errors are over."""
    columns = (f"{name}\n± s.e. over {over[name]}" for name in parts)
    table = rich.table.Table("part", "quantity", *columns)
    for part in shared:
        shown = [evaluations.shown(of_run[part]["results"]) for of_run in parts.values()]
        # An ensemble may have what a single model has not.
        for quantity in dict.fromkeys(name for of_run in shown for name in of_run):
            table.add_row(part, quantity, *(of_run.get(quantity, "-") for of_run in shown))
    return table


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _with_error(result: Mapping[str, Any], name: str) -> str:
    if name not in result:
        return "-"
    return f"{result[name]:.2f} ± {result[f'{name}_stderr']:.2f}"
