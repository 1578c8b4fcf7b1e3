"""The devices and the processes that a run's settings ask for."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import rich.console
from jax.sharding import Mesh

from jvae import cores, distributed
from jvae.experiments.config import Config, ConfigError
from jvae.experiments.interrupt import default_signals

# What each process of a run has for itself.
_OWN = {"coordinator", "process_id"}


def start(config: Config) -> None:
    """Join the other processes, and make of a CPU as many devices as the run is to have.

    To be called before anything else of JAX is used.

    Raises:
      ConfigError: the other processes cannot be joined, or have other settings.
    """
    if config.distributed or config.coordinator is not None:
        try:
            with default_signals():
                distributed.initialize(config.coordinator, config.num_processes, config.process_id)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"the processes of this run could not be joined: {error}") from error
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        wanted = _share_of_cpu(config)
        # Where JAX is at work already, as in a notebook, its devices are what they are.
        with contextlib.suppress(RuntimeError):
            if wanted > 1:
                jax.config.update("jax_num_cpu_devices", wanted)
    settings = dataclasses.asdict(config)
    check_alike({name: value for name, value in settings.items() if name not in _OWN})


def _share_of_cpu(config: Config) -> int:
    """Those asked for, or for an ensemble one for each core it can use."""
    if config.devices != "auto":
        return config.devices
    return _largest_share(config.seeds, cores.count())


def check_alike(given: Mapping[str, Any]) -> None:
    """Refuse, in all processes, what is not the same in all: each would train another model.

    Args:
      given: to the run, by name; as JSON can say it.

    Raises:
      ConfigError: says what differs, and where.
    """
    first, *others = map(json.loads, distributed.texts(json.dumps(given, default=str)))
    for process, other in enumerate(others, start=1):
        differing = [
            f"{name} is {other.get(name)} in process {process}, {first.get(name)} in process 0"
            for name in sorted(first.keys() | other.keys())
            if other.get(name) != first.get(name)
        ]
        if differing:
            raise ConfigError(
                "the processes of a run need the same command and the same data: "
                + "; ".join(differing)
            )


def choose(config: Config) -> Mesh | None:
    """The devices to train on; None for a single one, which needs no placement.

    Raises:
      ConfigError: there are fewer than asked for, or they cannot share the work equally.
    """
    available = jax.local_device_count()
    if config.devices != "auto":
        k = config.devices
        if k > available:
            kind = jax.default_backend()
            more = "; JAX_NUM_CPU_DEVICES says how many a CPU is to be" if kind == "cpu" else ""
            raise ConfigError(
                f"--devices must be at most the {available} ({kind}) here, got {k}{more}"
            )
    elif jax.process_count() > 1:
        k = available
    else:
        k = 1 if config.seeds == 1 else _largest_share(config.seeds, available)
    num = k * jax.process_count()
    what, size = (
        ("--batch-size", config.batch_size) if config.seeds == 1 else ("--seeds", config.seeds)
    )
    if size % num:
        raise ConfigError(f"{what} must be a multiple of the {num} devices, got {size}")
    return distributed.make_mesh(k) if num > 1 else None


def console() -> rich.console.Console:
    """Where a run speaks: of several processes, the first does."""
    return rich.console.Console(quiet=not distributed.is_first_process())


def _largest_share(work: int, most: int) -> int:
    """The largest number up to `most` that divides `work`."""
    return max(k for k in range(1, most + 1) if work % k == 0)
