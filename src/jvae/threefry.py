"""The random bits of `jax.random.bits`, in one pass over memory on CPU.

JAX compiles the 20 rounds of its generator as a loop on CPU, and writes all words to memory after
each four. Written out, they are one fused pass.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, UInt32

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
