"""Encoders and decoders: multilayer perceptrons that return a distribution (App. C).

A network is a trunk of hidden layers and one affine output layer. What the outputs mean is a
family: `Bernoulli()` or `Gaussian(...)`, a hashable map from outputs to a distribution.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers
from jaxtyping import Array, Float

from jvae import distributions

Activation = Callable[[Array], Array]

ACTIVATIONS: dict[str, Activation] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
}


class Initialiser(NamedTuple):
    """How a layer's kernel and bias are drawn."""

    kernel: initializers.Initializer
    bias: initializers.Initializer


# The paper draws every parameter from N(0, 0.01). It writes Gaussians by their variance
# throughout, so 0.01 is read as one: a standard deviation of 0.1.
INITIALISERS: dict[str, Initialiser] = {
    "paper": Initialiser(initializers.normal(0.1), initializers.normal(0.1)),
    "lecun": Initialiser(initializers.lecun_normal(), initializers.zeros),
}


# What layers compute in, with mixed precision (Micikevicius et al., 2018) where it is not the
# precision of weights and inputs. 8 bits of exponent need no scaling of the loss.
PRECISIONS: dict[str, Any] = {"float32": None, "bfloat16": jnp.bfloat16}


@runtime_checkable
class Family(Protocol):
    """A hashable map from a network's outputs to a distribution."""

    @property
    def outputs_per_entry(self) -> int:
        """How many numbers the network gives for each entry of the event."""
        ...

    def __call__(self, outputs: tuple[Float[Array, "..."], ...], event_ndim: int) -> Any:
        """From `outputs_per_entry` arrays [*batch, *event] to a distribution."""
        ...


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Family of binary data: one output an entry, its logit (App. C.1)."""

    @property
    def outputs_per_entry(self) -> int:
        """How many numbers the network gives for each entry of the event."""
        return 1

    def __call__(
        self, outputs: tuple[Float[Array, "..."], ...], event_ndim: int
    ) -> distributions.Bernoulli:
        """From (logits [*batch, *event],) to the distribution."""
        (logits,) = outputs
        return distributions.Bernoulli(logits, event_ndim)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Family of real data: mean and, unless `scale` fixes it, log-variance (App. C.2).

    Attributes:
      scale: a fixed standard deviation σ > 0 shared by all entries, or None to learn log σ²
        as a second output of the network.
      sigmoid_mean: pass the mean through a sigmoid, for data in (0, 1) as Frey Face.

    Raises:
      TypeError: `scale` is no Python number.
      ValueError: `scale` or its inverse is not positive and finite as a float32.
    """

    scale: float | None = None
    sigmoid_mean: bool = False

    def __post_init__(self) -> None:
        if self.scale is None:
            return
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float):
            raise TypeError(f"scale must be a Python number or None, got {self.scale!r}")
        tiny = float(np.finfo(np.float32).tiny)
        if not tiny <= self.scale <= 1 / tiny:
            raise ValueError(
                "scale and its inverse must be positive and finite as float32, or scale None, "
                f"got {self.scale!r}"
            )

    @property
    def outputs_per_entry(self) -> int:
        """How many numbers the network gives for each entry of the event."""
        return 2 if self.scale is None else 1

    def __call__(
        self, outputs: tuple[Float[Array, "..."], ...], event_ndim: int
    ) -> distributions.DiagonalGaussian:
        """From (means, log-variances) or (means,), each [*batch, *event], to the distribution."""
        loc = jax.nn.sigmoid(outputs[0]) if self.sigmoid_mean else outputs[0]
        log_scale = (
            0.5 * outputs[1] if self.scale is None else jnp.full_like(loc, math.log(self.scale))
        )
        return distributions.DiagonalGaussian(loc, log_scale, event_ndim)


FAMILIES: dict[str, Family] = {"bernoulli": Bernoulli(), "gaussian": Gaussian()}


class MLP(nn.Module):
    """A conditional distribution whose parameters are an MLP of its input.

    Kingma & Welling (2014), App. C: with one tanh layer, the paper's encoders and decoders.

    Attributes:
      input_ndim: how many trailing axes of the input make one example; they are flattened.
      event_shape: shape of one value of the distribution.
      family: what the outputs mean.
      hidden: sizes of the hidden layers; () gives affine maps.
      activation: the nonlinearity after each hidden layer, by name or as a named function.
      initialiser: a name in `INITIALISERS`.
      precision: a name in `PRECISIONS`, of the layers; weights and distributions are float32.
    """

    input_ndim: int
    event_shape: tuple[int, ...]
    family: Family
    hidden: tuple[int, ...] = (500,)
    activation: str | Activation = "tanh"
    initialiser: str = "paper"
    precision: str = "float32"

    @nn.compact
    def __call__(self, inputs: Float[Array, "..."]) -> Any:
        """From [*batch, *input] to a distribution with batch shape [*batch]."""
        activation = (
            ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation
        )
        kernel_init, bias_init = INITIALISERS[self.initialiser]
        dense = functools.partial(
            nn.Dense,
            dtype=PRECISIONS[self.precision],
            kernel_init=kernel_init,
            bias_init=bias_init,
        )
        batch = inputs.shape[: inputs.ndim - self.input_ndim]
        h = inputs.reshape(math.prod(batch), math.prod(inputs.shape[len(batch) :]))
        for i, size in enumerate(self.hidden):
            h = activation(dense(size, name=f"hidden_{i}")(h))
        # All outputs in one matrix product: faster than a small one each.
        k = self.family.outputs_per_entry
        output = dense(k * math.prod(self.event_shape), name="output")(h)
        # Densities and sums over an event lose too much in 16 bits, which inputs may have as well.
        dtype = jnp.promote_types(inputs.dtype, jnp.float32)
        parts = jnp.split(output.astype(dtype), k, axis=-1)
        outputs = tuple(part.reshape(*batch, *self.event_shape) for part in parts)
        return self.family(outputs, len(self.event_shape))
