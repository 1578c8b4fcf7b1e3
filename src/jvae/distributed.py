"""Several devices, of one process or of many: what lies where.

Batches are split over the devices, and the weights are on all of them; plain `jit` does the rest.
"""

import functools
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray, Shaped

from jvae.checks import check_count
from jvae.training import Preprocess, StateT

Tree = TypeVar("Tree")
Result = TypeVar("Result")

# A process that has not been heard of for so long is taken for dead, and the others end.
HEARTBEAT_SECONDS = 30
# At its end, a process waits for the others so long.
SHUTDOWN_SECONDS = 60
# As long as JAX waits, which then ends the process with a dump of its stack.
JOIN_SECONDS = 300


class OtherProcessError(RuntimeError):
    """Another process of the run has stopped."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Join the other processes of a run, before anything else of JAX is used.

    Args:
      coordinator: "host:port" of process 0; by default what Slurm, Kubernetes, MPI or the TPU
        pod that this process runs in says.
      num_processes: how many there are, beside `coordinator`.
      process_id: which this is, from 0.

    Raises:
      RuntimeError: they could not be joined.
      ValueError: `coordinator` is no address, no cluster was found, or it does not say all three.
    """
    if coordinator is not None:
        address = _address(coordinator)
        if process_id:
            _wait_for(coordinator, address)
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal()):
        raise ValueError(f"coordinator must be host:port, got {coordinator!r}")
    return host.strip("[]"), int(port)  # of IPv6 in brackets


def _wait_for(coordinator: str, address: tuple[str, int]) -> None:
    """Wait until process 0 listens."""
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            with socket.create_connection(address, timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"process 0 does not answer at {coordinator} after {JOIN_SECONDS:g} s ({error})"
                ) from error
        time.sleep(0.1)


def make_mesh(devices_per_process: int | None = None) -> Mesh:
    """A mesh of one axis, "devices", over the devices of all processes.

    Args:
      devices_per_process: how many of each process's devices; by default all.

    Raises:
      TypeError: it is no int.
      ValueError: it is below 1, or a process has fewer.
    """
    if devices_per_process is None:
        chosen = jax.devices()
    else:
        k = check_count("devices_per_process", devices_per_process)
        by_process = [
            [device for device in jax.devices() if device.process_index == index]
            for index in range(jax.process_count())
        ]
        fewest = min(map(len, by_process))
        if k > fewest:
            raise ValueError(f"devices_per_process must be at most the {fewest} there are, got {k}")
        chosen = [device for devices in by_process for device in devices[:k]]
    return jax.make_mesh((len(chosen),), ("devices",), (AxisType.Auto,), devices=chosen)


def _split(mesh: Mesh) -> NamedSharding:
    """The first axis shared out over the devices."""
    return NamedSharding(mesh, PartitionSpec("devices"))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Arrays, keys among them, on every device of `mesh`, given alike in every process."""
    return jax.tree.map(lambda leaf: _place(leaf, NamedSharding(mesh, PartitionSpec())), tree)


def place_members(state: StateT, mesh: Mesh) -> StateT:
    """An ensemble with its members shared out over the devices of `mesh`.

    Raises:
      ValueError: the devices cannot have equal shares.
    """
    if len(state.key) % mesh.size:
        raise ValueError(f"{len(state.key)} members cannot be shared by {mesh.size} devices")
    split = _split(mesh)
    members = jax.tree.map(lambda leaf: _place(leaf, split), state._replace(step=None))
    return members._replace(step=replicate(state.step, mesh))


def _place(leaf: Any, sharding: NamedSharding) -> Array:
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
    # `device_put` refuses typed keys on devices of other processes.
    data = _place(jax.random.key_data(leaf), sharding)
    return _wrap_keys(jax.random.key_impl(leaf), sharding)(data)


@functools.cache
def _wrap_keys(impl: Any, sharding: NamedSharding) -> Callable[[Array], Array]:
    """From keys' data to the keys, on devices; cached, so that it is compiled once."""
    return jax.jit(functools.partial(jax.random.wrap_key_data, impl=impl), out_shardings=sharding)


def split_batches(mesh: Mesh, preprocess: Preprocess | None = None) -> Preprocess:
    """`preprocess` for `make_epoch`, after which each device goes on with its part of a batch.

    From there on XLA splits the work along the batch and sums the gradients over the devices.

    Args:
      mesh: from `make_mesh`.
      preprocess: as `make_epoch` takes it.
    """
    split = _split(mesh)

    def preprocess_part(images: Array, key: PRNGKeyArray) -> Array:
        images = jax.lax.with_sharding_constraint(images, split)
        x = images if preprocess is None else preprocess(images, key)
        return jax.lax.with_sharding_constraint(x, split)

    return preprocess_part


def join_batches(
    batches: Iterable[Shaped[np.ndarray, "..."]], mesh: Mesh
) -> Iterator[Shaped[Array, "..."]]:
    """Batches over all devices from each process's own share, such as `jvae.data.batches` gives."""
    split = _split(mesh)
    for batch in batches:
        yield jax.make_array_from_process_local_data(split, batch)


def split_examples(
    x: Shaped[Array | np.ndarray, "num ..."], mesh: Mesh
) -> Shaped[Array, "padded ..."]:
    """Examples, given alike in every process, shared out over the devices of `mesh`.

    `jvae.log_likelihood`, `jvae.evaluation.importance_sampling` and `bound_by_example` work on
    them where they lie. Where their number is no multiple of the devices', the first ones stand
    again at the end: cut the results with `to_host(...)[:num]`.
    """
    padded = -(-len(x) // mesh.size) * mesh.size
    return _place(np.resize(x, (padded, *x.shape[1:])), _split(mesh))


def to_host(tree: Tree) -> Tree:
    """Arrays on one device of this process, from such as lie on several."""

    def whole(leaf: Array) -> Any:
        array = jnp.asarray(to_numpy(leaf))
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
        return array

    return jax.tree.map(whole, tree)


def to_numpy(leaf: Any) -> np.ndarray:
    """The whole of an array, of keys their data, wherever it lies; every process has to ask."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def is_first_process() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def largest(number: int) -> int:
    """The largest `number` of all processes; every one has to ask."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.asarray(number)).max())


def is_lost_connection(error: BaseException) -> bool:
    """Whether it says that another process could not be reached; no type of its own does."""
    return "Gloo" in str(error)


def no_answer(error: Exception) -> str:
    """What an error of JAX most likely means where there are several processes."""
    reason = str(error).partition("\n")[0]
    return f"a device does not answer; another process may have ended ({reason})"


def texts(text: str) -> list[str]:
    """The `text` of each process, in their order; every one has to ask."""
    if jax.process_count() == 1:
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    padded = np.zeros(largest(len(content)), np.uint8)
    padded[: len(content)] = content
    return [bytes(row).rstrip(b"\0").decode() for row in multihost_utils.process_allgather(padded)]


def on_every_process(do: Callable[[], Result]) -> Result:
    """Call `do` in every process; where it raises in one, all stop.

    Raises:
      OtherProcessError: in those that have not failed themselves; in the others, their own error.
    """
    failed: BaseException | None = None
    try:
        result = do()
    except BaseException as error:
        failed = error
    stopped = largest(0 if failed is None else jax.process_index() + 1)
    if failed is not None:
        raise failed
    if stopped:
        raise OtherProcessError(f"process {stopped - 1} has stopped: its message says why")
    return result


def on_first_process(do: Callable[[], object]) -> None:
    """Call `do` in process 0; where it raises there, all processes stop.

    Raises:
      OtherProcessError: in the other processes, where process 0 has failed; there, its own error.
    """
    on_every_process(lambda: do() if is_first_process() else None)
