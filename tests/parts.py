"""Parts of a model that stand in for Linen modules."""

from typing import Any

from jaxtyping import Array, PRNGKeyArray


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
