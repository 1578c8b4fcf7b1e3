"""Work over examples, so many at a time that memory is bounded, and on the devices they lie on."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key, PRNGKeyArray

from jvae.chunks import map_in_chunks
from jvae.estimators import sampling
from jvae.models import Params

# Rows of decoder output at once: enough to keep matrix products busy, few enough for a cache.
_ROWS = 5000
# What the rows of large examples may take together.
_BYTES = 2**25


def rows_at_once(params: Params) -> int:
    """How many values of x a chunk may hold."""
    bytes_per_row = 4 * math.prod(params.model.data_shape)
    return max(1, min(_ROWS, _BYTES // bytes_per_row))


def examples_at_once(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """How many examples a chunk may hold, so that each array of theirs is within `BYTES_AT_ONCE`.

    Args:
      function: of one example; its traced program shows what arrays it makes.
      arguments: of all examples, arrays [num, ...].
    """

    def bytes_of_arrays(num: int) -> Iterator[int]:
        some = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((num, *leaf.shape[1:]), leaf.dtype), arguments
        )
        return _bytes_of_arrays(jax.make_jaxpr(jax.vmap(function))(*some).jaxpr)

    # Weights that are converted, say, are one array for all examples.
    growth = [two - one for one, two in zip(bytes_of_arrays(1), bytes_of_arrays(2), strict=True)]
    return max(1, sampling.BYTES_AT_ONCE // max(1, *growth))


def _bytes_of_arrays(jaxpr: jax.extend.core.Jaxpr) -> Iterator[int]:
    """Of every array that a program makes."""
    made: list[Any] = [variable.aval for equation in jaxpr.eqns for variable in equation.outvars]
    yield from (array.size * array.dtype.itemsize for array in made)
    for inside in jax.extend.core.subjaxprs(jaxpr):
        yield from _bytes_of_arrays(inside)


def mesh_of(x: Array | np.ndarray) -> Mesh | None:
    """The devices that examples are split over (`jvae.distributed.split_examples`), or None."""
    sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return None
    return sharding.mesh if isinstance(sharding.mesh, Mesh) else None


def map_on_devices(
    function: Callable[..., Any], arguments: tuple[Any, ...], size: int, mesh: Mesh | None
) -> Any:
    """`jax.vmap(function)(*arguments)`, at most `size` at once on each device."""

    def map_here(*arguments: Any) -> Any:
        if size <= 1:
            return jax.lax.map(lambda row: function(*row), arguments)
        return map_in_chunks(lambda rows: jax.vmap(function)(*rows), arguments, size)

    if mesh is None:
        return map_here(*arguments)
    split = PartitionSpec(mesh.axis_names)
    specs = tuple(split for _ in arguments)
    # Each device works by itself, so that there is no variance over the mesh to check.
    on_devices = jax.shard_map(
        map_here, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False
    )
    return on_devices(*arguments)


def map_examples(
    function: Callable[[Array, PRNGKeyArray], Any],
    params: Params,
    x: Array,
    key: Key[Array, "..."],
    *,
    rows_per_example: int,
    mesh: Mesh | None = None,
) -> Any:
    """`function(x, key)` of every example, each with a key of its own.

    Args:
      function: from one example [*data_shape] and a key to a pytree of arrays.
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key, or one for each example, [*batch].
      rows_per_example: how many values of x `function` holds at once.
      mesh: `mesh_of(x)`, known only outside `jit`; each device maps over the examples it has.

    Returns:
      The pytree, its arrays with [*batch] in front.
    """
    data_shape = params.model.data_shape
    batch = x.shape[: x.ndim - len(data_shape)]
    flat = x.reshape(math.prod(batch), *data_shape)
    keys = key.reshape(-1) if key.ndim else jax.random.split(key, flat.shape[0])
    size = rows_at_once(params) // rows_per_example
    results = map_on_devices(function, (flat, keys), size, mesh)
    return jax.tree.map(lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), results)
