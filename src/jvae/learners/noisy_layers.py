"""Decoders whose weights are Gaussian, drawn by what they do to each layer: local noise."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jvae import threefry
from jvae.leaves import named


class NoisyWeights(NamedTuple):
    """The weights that a `NoisyDecoder` takes.

    Attributes:
      mean: the decoder's own weights, taken as means.
      log_scale: their log standard deviations, in the same structure.
      key: a typed PRNG key, of all the noise.
      first: the number, among the draws of an example, of the first one decoded: of draws that
        are decoded in parts each part has noise of its own.
    """

    mean: Any
    log_scale: Any
    key: PRNGKeyArray
    first: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class NoisyDecoder:
    """A decoder that has weights of its own for every z, each drawn from a diagonal Gaussian.

    A dense layer's outputs are then independent Gaussians, of mean h μ_W + μ_b and variance
    h² σ_W² + σ_b², and are drawn as such: the local reparameterisation of Kingma, Salimans &
    Welling (2015), Section 2.3.

    Attributes:
      decoder: z -> p(x|z), all of whose weights are those of `nn.Dense` layers.
      data_shape: shape of one example x.
    """

    decoder: Any
    data_shape: tuple[int, ...]

    def apply(self, weights: NoisyWeights, z: Any) -> Any:
        """Of each z a draw of p(x|z), with its own weights.

        Raises:
          ValueError: the decoder has weights of other layers, or a layer is used more than once
            for a z: its outputs would depend on each other.
        """
        unused = named(weights.log_scale)
        num_leaves = len(unused)
        rows: dict[str, int] = {}

        def add_noise(
            call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
        ) -> Any:
            outputs = call(*args, **kwargs)
            layer = context.module
            if type(layer) is not nn.Dense or context.method_name != "__call__":
                return outputs
            (h,) = (*args, *kwargs.values())
            name = "/".join(("params", *layer.path))
            mean = layer.variables["params"]
            log_scale = {leaf: unused.pop(f"{name}/{leaf}", None) for leaf in mean}
            if any(s is None or s.shape != mean[leaf].shape for leaf, s in log_scale.items()):
                raise _refusal(f"calls its layer {name} in another way")
            rows[name] = math.prod(h.shape[:-1])
            # A layer has a kernel at least, so that no two layers of two parts have one number.
            key = jax.random.fold_in(weights.key, weights.first * num_leaves + len(rows))
            variance = jnp.square(h) @ jnp.exp(2 * log_scale["kernel"])
            if "bias" in log_scale:
                variance += jnp.broadcast_to(jnp.exp(2 * log_scale["bias"]), variance.shape)
            noise = _sqrt(variance) * threefry.normal(key, variance.shape, variance.dtype)
            return outputs + noise.astype(outputs.dtype)

        with nn.intercept_methods(add_noise):
            distribution = self.decoder.apply(weights.mean, z)
        if unused:
            raise _refusal(f"has the weights {', '.join(unused)}")
        expected = math.prod(distribution.mean.shape) // math.prod(self.data_shape)
        several = [name for name, num in rows.items() if num != expected]
        if several:
            raise _refusal(f"applies {several[0]} to {rows[several[0]]} rows for {expected} of z")
        return distribution


def _sqrt(variance: Float[Array, "..."]) -> Float[Array, "..."]:
    positive = variance > 0  # the root's gradient at 0, of a layer without input, is infinite
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)


def _refusal(what: str) -> ValueError:
    return ValueError(
        "local reparameterisation is for decoders whose weights are all of nn.Dense layers, each "
        f"called once on a row for each z; this one {what}: use full_bayes_bound"
    )
