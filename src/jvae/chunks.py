"""Work over many arguments a chunk at a time, so that memory is bounded."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def map_in_chunks(function: Callable[[Any], Any], arguments: Any, size: int) -> Any:
    """`function(arguments)` of a function that treats the first axis as a batch, `size` at once.

    The chunks are of one size, so that the function is compiled once: what the last one lacks is
    filled with the first arguments again, fewer than there are chunks.

    Args:
      function: from a pytree of arrays [num, ...] to one of arrays [num, ...], such as a `vmap`.
      arguments: a pytree of arrays [num, ...].
      size: how many rows `function` may be given, at most; at least one is.
    """
    num = jax.tree.leaves(arguments)[0].shape[0]
    num_chunks = max(1, math.ceil(num / max(1, size)))
    size = max(1, math.ceil(num / num_chunks))
    if num_chunks == 1:
        return function(arguments)
    if num % size:
        order = np.arange(num_chunks * size) % num
        arguments = jax.tree.map(lambda leaf: leaf[order], arguments)
    chunks = jax.tree.map(lambda leaf: leaf.reshape(num_chunks, size, *leaf.shape[1:]), arguments)
    results = jax.lax.map(function, chunks)
    return jax.tree.map(
        lambda leaf: leaf.reshape(num_chunks * size, *leaf.shape[2:])[:num], results
    )
