"""From 8-bit images to data with a density, as keyed pure functions: binarisation, dequantisation.

Numbers obtained under two of them never compare: they are densities of different data.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8, UInt32

from jvae import threefry
from jvae.training import Preprocess


def grey(images: UInt8[Array, "..."], key: PRNGKeyArray) -> Float[Array, "..."]:
    """Pixels as numbers in [0, 1], value / 255; `key` is not used."""
    del key
    return images.astype(jnp.float32) / 255


def bernoulli(images: UInt8[Array, "..."], key: PRNGKeyArray) -> Float[Array, "..."]:
    """Pixels of 0 and 1, each 1 with probability value / 255.

    Of 16 random bits a pixel: probabilities are exact at 0 and 255 and within 2⁻¹⁷ between.
    """
    values = images.astype(jnp.uint32)
    probability = values * 257 + (values >> 7)  # round(2¹⁶ · value / 255)
    return (_uniform(key, images.shape) < probability).astype(jnp.float32)


def threshold(images: UInt8[Array, "..."], key: PRNGKeyArray) -> Float[Array, "..."]:
    """Pixels of 0 and 1, 1 where value >= 128; `key` is not used."""
    del key
    return (images >= 128).astype(jnp.float32)


def dequantise(images: UInt8[Array, "..."], key: PRNGKeyArray) -> Float[Array, "..."]:
    """Pixels in [0, 1): (value + u) / 256 with u uniform on the 2¹⁶ steps of [0, 1).

    A density of 8-bit numbers can be driven without bound; one of these cannot. Its mean bounds
    the images' own probability: log P(image) >= E[log p((image + u) / 256)] - D log 256 for D
    pixels. Theis et al. (2016), Section 3.1.
    """
    # 16 bits of u are what float32 can add to 8 without rounding a value into the next cell.
    u = _uniform(key, images.shape).astype(jnp.float32)
    return images.astype(jnp.float32) / 256 + u / 2**24


def _uniform(key: PRNGKeyArray, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Uniform on 0 … 2¹⁶ - 1; two numbers share a word, which halves the cost."""
    size = math.prod(shape)
    words = threefry.words(key, (size + 1) // 2)
    return jnp.concatenate([words >> 16, words & 0xFFFF])[:size].reshape(shape)


class Binarisation(NamedTuple):
    """One protocol.

    Attributes:
      description: one line, which results carry.
      likelihoods: names of those under which the data has a density.
      train_once: what the training images become once, from uint8 to uint8; None where they stay.
      each_visit: from a batch of uint8 training images to x.
      test_once: from the uint8 test images to x, drawn once.
    """

    description: str
    likelihoods: tuple[str, ...]
    train_once: Preprocess | None
    each_visit: Preprocess
    test_once: Preprocess


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


_DRAWN_ONCE = {"test": 20131220, "validation": 20140414}


def fixed_draw_key(part: str = "test") -> PRNGKeyArray:
    """The key of what is drawn once: results of all seeds stand on the same test set.

    Folded from an arbitrary number, so that no run's keys, which are split from
    `jax.random.key(seed)`, ever are this key or its children; and of one kind, whatever JAX's
    default is.

    Args:
      part: "test", which the training images of `static` share, or "validation".
    """
    return jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), _DRAWN_ONCE[part])


def _draw(images: Array, key: PRNGKeyArray) -> Array:
    return (255 * bernoulli(images, key)).astype(jnp.uint8)


BINARISATIONS: dict[str, Binarisation] = {
    "none": Binarisation(
        "none: pixels are value / 255; grey targets of a Bernoulli likelihood are no data of it, "
        "and a Gaussian density of 256 values can be driven without bound",
        likelihoods=("bernoulli", "gaussian"),
        train_once=None,
        each_visit=grey,
        test_once=grey,
    ),
    "given": Binarisation(
        "given: the data as it is, numbers or pixels of 0 and 1",
        likelihoods=("bernoulli",),
        train_once=None,
        each_visit=grey,
        test_once=grey,
    ),
    "dynamic": Binarisation(
        "dynamic: training pixels drawn Bernoulli(value) at each visit, test pixels once with a "
        "fixed key",
        likelihoods=("bernoulli",),
        train_once=None,
        each_visit=bernoulli,
        test_once=bernoulli,
    ),
    "static": Binarisation(
        "static: training and test pixels drawn Bernoulli(value) once with a fixed key",
        likelihoods=("bernoulli",),
        train_once=_draw,
        each_visit=grey,
        test_once=bernoulli,
    ),
    "threshold": Binarisation(
        "threshold: pixels are 1 where value >= 128",
        likelihoods=("bernoulli",),
        train_once=None,
        each_visit=threshold,
        test_once=threshold,
    ),
    "dequantised": Binarisation(
        "dequantised: pixels are (value + u) / 256, u uniform on [0, 1) at each visit, for the "
        "test pixels once with a fixed key",
        likelihoods=("gaussian",),
        train_once=None,
        each_visit=dequantise,
        test_once=dequantise,
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
    train = jnp.asarray(train)
    return Prepared(
        train=train if protocol.train_once is None else protocol.train_once(train, train_key),
        test=protocol.test_once(jnp.asarray(test), test_key),
        preprocess=protocol.each_visit,
    )
