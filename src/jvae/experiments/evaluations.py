"""`evaluation.json` of a run: a part is written when it is done, its numbers beside it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jvae.drafts import written_whole
from jvae.experiments import finished, run_folder
from jvae.experiments.finished import FinishedRun
from jvae.experiments.parts import LABELS, Arrays, Part


def begin(run: FinishedRun) -> tuple[dict[str, Any], bool]:
    """The content of `evaluation.json` as far as it is of these weights.

    Returns:
      The content, and whether parts of other weights were dropped.

    Raises:
      RunFolderError: there is one that cannot be read.
    """
    identity = {"seeds": run.seeds, "weights_sha256": run.weights_sha256}
    earlier = run_folder.read_evaluation(run.folder)
    if earlier is not None and identity.items() <= earlier.items():
        return earlier, False
    if earlier is not None:
        (run.folder / run_folder.EVALUATION).unlink()
        files = [part[kind] for part in earlier["parts"].values() for kind in ("arrays", "figure")]
        for file in files:
            if file is not None:
                (run.folder / file).unlink(missing_ok=True)
    over = "examples" if len(run.seeds) == 1 else "seeds"
    return {
        **identity,
        "stderr_over": over,
        "protocol": run.protocol,
        "parts": {},
    }, earlier is not None


def read_current(folder: Path) -> dict[str, Any] | None:
    """The content of a run's `evaluation.json`; None where there is none of its present weights.

    Raises:
      RunFolderError: there is one that cannot be read.
    """
    content = run_folder.read_evaluation(folder)
    if content is None:
        return None
    files = finished.weight_files(folder, content["seeds"])
    present = [finished.sha256(file) if file.exists() else None for file in files]
    return content if present == content["weights_sha256"] else None


def is_done(run: FinishedRun, content: Mapping[str, Any], part: Part) -> bool:
    """Whether a part is there with the same settings."""
    found = content["parts"].get(part.name)
    return found is not None and found["settings"] == part.settings and _file(run, found).exists()


def write(
    run: FinishedRun,
    content: dict[str, Any],
    part: Part,
    arrays: Arrays,
    *,
    warned: list[str],
    seconds: float,
) -> None:
    """Add a part to `content` and to the folder: a reader finds it whole or not at all.

    Raises:
      FloatingPointError: a number that is not finite.
    """
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            bad = np.count_nonzero(~np.isfinite(array))
            raise FloatingPointError(f"{part.name}: {name} is not finite in {bad} places")
    results = part.summarise(arrays)
    # Its name holds the settings, so that numbers of others are never taken for these.
    settings = json.dumps([run.weights_sha256, part.settings], sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
    found = {
        "settings": part.settings,
        "results": results,
        "warnings": warned,
        "arrays": f"evaluation/{part.name}-{digest}.npz",
        "figure": part.figure and f"figures/{part.figure}.png",
        "seconds": seconds,
        **run_folder.provenance(),
    }
    path = _file(run, found)
    path.parent.mkdir(exist_ok=True)
    numbers: dict[str, Any] = dict(arrays)
    with written_whole(path) as draft, draft.open("wb") as file:
        np.savez(file, **numbers)
    content["parts"][part.name] = found
    run_folder.write_json(run.folder / run_folder.EVALUATION, content)
    for old in path.parent.glob(f"{part.name}-*.npz"):
        if old != path:
            old.unlink()


def arrays(run: FinishedRun, content: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
    """The numbers of a part that is there, each [models, ...]."""
    with np.load(_file(run, content["parts"][name])) as file:
        return dict(file)


def shown(results: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of a part for a table, with their errors; lists are in the file alone."""
    table = {}
    for name, value in results.items():
        if not name.endswith("_stderr") and isinstance(value, int | float):
            number = str(value) if isinstance(value, int) else f"{value:.3f}"
            error = results.get(f"{name}_stderr")
            label = LABELS.get(name, name)
            table[label] = number if error is None else f"{number} ± {error:.3f}"
    return table


def _file(run: FinishedRun, found: Mapping[str, Any]) -> Path:
    return run.folder / str(found["arrays"])
