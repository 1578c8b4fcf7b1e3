"""The numbers of `jax.random.bits` and `jax.random.normal`, in one pass over memory on CPU.

JAX compiles the 20 rounds of its generator as a loop on CPU, and writes all words to memory after
each four. Written out, they are one fused pass.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from jvae.checks import check_key

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def words(key: PRNGKeyArray, num: int) -> UInt32[Array, "num"]:
    """`num` uniform words: those of `jax.random.bits(key, (num,))`.

    Threefry-2x32 with 20 rounds, of Salmon et al. (2011), Section 3.3, counting from 0. A key of
    another generator is left to JAX.

    Args:
      key: a typed PRNG key.
      num: below 2³².
    """
    if jax.random.key_impl(key) != "threefry2x32":
        return jax.random.bits(key, (num,))
    first, second = jax.random.key_data(key)
    schedule = (first, second, first ^ second ^ _PARITY)
    x = jnp.full(num, schedule[0])  # the count's upper word is 0
    y = jax.lax.iota(jnp.uint32, num) + schedule[1]
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x = x + y
            y = (y << rotation | y >> (32 - rotation)) ^ x
        x = x + schedule[(i + 1) % 3]
        y = y + schedule[(i + 2) % 3] + jnp.uint32(i + 1)
    return x ^ y


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = np.float32
) -> Float[Array, "..."]:
    """Draws from N(0, 1): those of `jax.random.normal(key, shape, dtype)`.

    With `jax_threefry_partitionable`, as is JAX's default.

    Args:
      key: a typed PRNG key.
      shape: of the draws, below 2³² of them.
      dtype: of the draws; all but float32 are left to JAX.

    Raises:
      TypeError: `key` is no typed key.
      ValueError: `key` is an array of keys.
    """
    check_key(key)
    if np.dtype(dtype) != np.float32:
        return jax.random.normal(key, shape, dtype)
    # 23 random bits behind the exponent of 1 are a number in [1, 2), hence one in (-1, 1).
    mantissas = words(key, math.prod(shape)).reshape(shape) >> 9
    one = np.float32(1)
    fraction = jax.lax.bitcast_convert_type(mantissas | one.view(np.uint32), jnp.float32) - one
    low = np.nextafter(-one, one)
    return np.sqrt(np.float32(2)) * jax.lax.erf_inv(fraction * (one - low) + low)
