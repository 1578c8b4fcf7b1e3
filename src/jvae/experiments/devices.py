"""The devices that a run's settings ask for."""

import contextlib
import os

import jax
import rich.console
from jax.sharding import Mesh

from jvae import cores, distributed
from jvae.experiments.config import Config, ConfigError


def start(config: Config) -> None:
    """Join the other processes, and give an ensemble a device for each core it can use.

    To be called before anything else of JAX is used.

    Raises:
      ConfigError: the other processes cannot be joined.
    """
    if config.distributed or config.coordinator is not None:
        try:
            distributed.initialize(config.coordinator, config.num_processes, config.process_id)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"the processes of this run could not be joined: {error}") from error
    elif config.seeds > 1 and "JAX_NUM_CPU_DEVICES" not in os.environ:
        share = _largest_share(config.seeds, cores.count())
        wanted = share if config.devices == "auto" else config.devices
        # Where JAX is at work already, as in a notebook, its devices are what they are.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", wanted)


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
            raise ConfigError(f"--devices must be at most the {available} ({kind}) here, got {k}")
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
