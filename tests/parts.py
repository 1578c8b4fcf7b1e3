"""Parts of a model that stand in for Linen modules."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jvae import distributions


class CountingEncoder:
    """Any object with init and apply stands in for a Linen module."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.shapes: list[tuple[int, ...]] = []

    def init(self, key: PRNGKeyArray, x: Array) -> Any:
        return self.inner.init(key, x)

    def apply(self, weights: Any, x: Array) -> Any:
        self.shapes.append(x.shape)
        return self.inner.apply(weights, x)


@dataclasses.dataclass(frozen=True)
class FairBits:
    """A prior of independent fair bits."""

    num: int

    def init(self, key: PRNGKeyArray) -> dict[str, Any]:
        return {}

    def apply(self, weights: Any) -> distributions.Bernoulli:
        return distributions.Bernoulli(jnp.zeros(self.num, jnp.float32))
