"""Binarisations of 8-bit images, as keyed pure functions.

Numbers obtained under two binarisations never compare: they are densities of different data.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from jvae.training import Preprocess


def grey(images: UInt8[Array, "..."], key: PRNGKeyArray) -> Float[Array, "..."]:
    """Pixels as numbers in [0, 1], value / 255; `key` is not used."""
    del key
    return images.astype(jnp.float32) / 255


def bernoulli(images: UInt8[Array, "..."], key: PRNGKeyArray) -> Float[Array, "..."]:
    """Pixels of 0 and 1, each 1 with probability value / 255.

    Two pixels share a 32-bit word of randomness, which halves the cost of a draw: probabilities
    are exact at 0 and 255 and within 2⁻¹⁷ between.
    """
    words = jax.random.bits(key, ((images.size + 1) // 2,), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)
    uniform = halves[: images.size].reshape(images.shape).astype(jnp.uint32)
    values = images.astype(jnp.uint32)
    probability = values * 257 + (values >> 7)  # round(2¹⁶ · value / 255)
    return (uniform < probability).astype(jnp.float32)


class Binarisation(NamedTuple):
    """One protocol.

    Attributes:
      description: one line, which results carry.
      train_once: what the training images become once, from uint8 to uint8.
      test_once: what the test images become once, from uint8 to uint8.
      each_visit: from a batch of uint8 training images to x.
    """

    description: str
    train_once: Preprocess
    test_once: Preprocess
    each_visit: Preprocess


class Prepared(NamedTuple):
    """A dataset under a protocol.

    Attributes:
      train: uint8 [num, *data_shape].
      test: float [num, *data_shape], x itself.
      preprocess: from a batch of `train` and a key to x.
    """

    train: UInt8[Array, "..."]
    test: Float[Array, "..."]
    preprocess: Preprocess


def fixed_draw_key() -> PRNGKeyArray:
    """The key of what is drawn once: results of all seeds stand on the same test set.

    Folded from an arbitrary number, so that no run's keys, which are split from
    `jax.random.key(seed)`, ever are this key or its children.
    """
    return jax.random.fold_in(jax.random.key(0), 20131220)


def _unchanged(images: Array, key: PRNGKeyArray) -> Array:
    del key
    return images


def _threshold(images: Array, key: PRNGKeyArray) -> Array:
    del key
    return jnp.where(images >= 128, 255, 0).astype(jnp.uint8)


def _draw(images: Array, key: PRNGKeyArray) -> Array:
    return (255 * bernoulli(images, key)).astype(jnp.uint8)


BINARISATIONS: dict[str, Binarisation] = {
    "none": Binarisation(
        "grey targets in [0, 1] under a Bernoulli likelihood: no density of anything",
        train_once=_unchanged,
        test_once=_unchanged,
        each_visit=grey,
    ),
    "dynamic": Binarisation(
        "dynamic: training pixels drawn Bernoulli(value) at each visit, test pixels once with a "
        "fixed key",
        train_once=_unchanged,
        test_once=_draw,
        each_visit=bernoulli,
    ),
    "static": Binarisation(
        "static: training and test pixels drawn Bernoulli(value) once with a fixed key",
        train_once=_draw,
        test_once=_draw,
        each_visit=grey,
    ),
    "threshold": Binarisation(
        "threshold: pixels are 1 where value >= 128",
        train_once=_threshold,
        test_once=_threshold,
        each_visit=grey,
    ),
}


def prepare(
    name: str,
    train: UInt8[Array | np.ndarray, "..."],
    test: UInt8[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
) -> Prepared:
    """Put a dataset under the protocol `name`.

    Args:
      name: a name in `BINARISATIONS`.
      train: uint8 [num, *data_shape].
      test: uint8 [num, *data_shape].
      key: for what is drawn once; `fixed_draw_key()` unless the draw itself is the subject.

    Raises:
      ValueError: an unknown name.
    """
    if name not in BINARISATIONS:
        raise ValueError(f"unknown binarisation {name!r}: expected one of {list(BINARISATIONS)}")
    protocol = BINARISATIONS[name]
    train_key, test_key = jax.random.split(key)
    train, test = jnp.asarray(train), jnp.asarray(test)
    return Prepared(
        train=protocol.train_once(train, train_key),
        test=grey(protocol.test_once(test, test_key), test_key),
        preprocess=protocol.each_visit,
    )
