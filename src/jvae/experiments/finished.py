"""A finished run: its settings, its weights, and its data exactly as it had them."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jvae
from jvae import checkpoint, data
from jvae.experiments import config as common
from jvae.experiments import inputs, run_folder
from jvae.experiments.run_folder import RunFolderError

# Settings that a run may be older than.
_HELD_OUT = ("validation_fraction", "split_seed")


class Settings(NamedTuple):
    """What `config.json` says of a finished run.

    Attributes:
      name: of the dataset, or its path.
      split: what `inputs.load` needs beside `config` to hold out the same test part.
      config: likelihood, binarisation, where the data is and what is held out of it; the rest
        are defaults.
      seeds: of the models.
      latent_dim: of the models.
      protocol: of the run.
    """

    name: str
    split: dict[str, Any]
    config: common.Config
    seeds: list[int]
    latent_dim: int
    protocol: dict[str, Any]


class FinishedRun(NamedTuple):
    """What is to be evaluated.

    Attributes:
      folder: of the run.
      seeds: of the models.
      params: of each.
      weights_sha256: of the file of each.
      protocol: of the run.
      inputs: its data.
    """

    folder: Path
    seeds: list[int]
    params: list[jvae.Params]
    weights_sha256: list[str]
    protocol: dict[str, Any]
    inputs: inputs.Inputs


def read(folder: Path) -> Settings:
    """What its folder says of a finished run.

    Raises:
      RunFolderError: no run is there, or none that is finished.
      ConfigError: a setting that cannot be.
    """
    saved = run_folder.read_settings(folder)
    run_folder.read_result(folder)
    try:
        directory = saved["data_dir"]
        return Settings(
            name=saved["data"] if "data" in saved else saved["dataset"],
            split={"test_fraction": saved["test_fraction"]} if "test_fraction" in saved else {},
            config=common.Config(
                data_dir=None if directory is None else Path(directory),
                **{name: saved[name] for name in ("likelihood", "binarisation", "stream_above")},
                **{name: saved[name] for name in _HELD_OUT if name in saved},
            ),
            seeds=list(range(saved["seed"], saved["seed"] + saved["seeds"])),
            latent_dim=saved["latent_dim"],
            protocol=dict(saved["protocol"]),
        )
    except KeyError as error:
        raise RunFolderError(f"{folder / 'config.json'} is of no run: no {error}") from error
    except (TypeError, ValueError) as error:
        raise RunFolderError(f"{folder / 'config.json'} is of no run ({error})") from error


def load(
    folder: Path, settings: Settings, *, name: str | None = None, data_dir: Path | None = None
) -> FinishedRun:
    """The weights of a run, and its data.

    Args:
      folder: of the run.
      settings: from `read`.
      name: the path of the data, where it is no longer the run's.
      data_dir: likewise the folder of all datasets.

    Raises:
      CheckpointError: weights that are missing or damaged.
      DataError: the data is missing, or is not what the run had.
      ConfigError: as `inputs.prepare`.
    """
    files = weight_files(folder, settings.seeds)
    params = [checkpoint.load(file) for file in files]
    config = settings.config
    if data_dir is not None:
        config = dataclasses.replace(config, data_dir=data_dir)
    try:
        dataset = inputs.load(name or settings.name, config, **settings.split)
    except data.DataError as error:
        raise data.DataError(
            f"{error} (the data of {folder}; if it was moved: --data or --data-dir)"
        ) from error
    _check_same(settings.protocol, "dataset_sha256", dataset.sha256, dataset.source, folder)
    x = inputs.prepare(dataclasses.replace(dataset, valid=None), config)
    test_sha256 = data.content_sha256(np.asarray(x.test))
    _check_same(settings.protocol, "test_x_sha256", test_sha256, dataset.source, folder)
    hashes = [sha256(file) for file in files]
    return FinishedRun(folder, settings.seeds, params, hashes, settings.protocol, x)


def weight_files(folder: Path, seeds: list[int]) -> list[Path]:
    """The file of each model of a run."""
    if len(seeds) == 1:
        return [folder / "model.safetensors"]
    return [folder / "models" / f"seed_{seed}.safetensors" for seed in seeds]


def sha256(file: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _check_same(protocol: dict[str, Any], name: str, found: str, source: str, folder: Path) -> None:
    if protocol.get(name) != found:
        raise data.DataError(
            f"{source} is not the data of {folder}: {name} is {found}, was {protocol.get(name)}"
        )
