"""A VAE is three conditional distributions: q(z|x), p(z) and p(x|z).

`VAE` describes them and holds no arrays; `init` draws their weights; `Params` carries both
through jit, grad and vmap.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jvae import networks, priors
from jvae.checks import check_count, check_key


@dataclasses.dataclass(frozen=True)
class VAE:
    """The description of a model: immutable, hashable, no arrays.

    Each part is a Linen module, or any hashable object with Linen's `init(key, *inputs)` and
    `apply(weights, *inputs)`, that returns a distribution.

    Attributes:
      data_shape: shape of one example x.
      encoder: x -> q(z|x), the recognition model with weights φ.
      decoder: z -> p(x|z), with weights θ.
      prior: () -> p(z), its weights part of θ.
    """

    data_shape: tuple[int, ...]
    encoder: Any
    decoder: Any
    prior: Any

    @classmethod
    def mlp(
        cls,
        data_shape: Iterable[int] = (28, 28),
        latent_dim: int = 20,
        hidden: Iterable[int] = (500,),
        activation: str | networks.Activation = "tanh",
        likelihood: str | networks.Family = "bernoulli",
        initialiser: str = "paper",
        precision: str = "float32",
    ) -> "VAE":
        """The models of Kingma & Welling (2014), App. C; the defaults are its MNIST model.

        Args:
          data_shape: shape of one example x.
          latent_dim: size of z.
          hidden: the encoder's hidden layers, which the decoder has in reverse; () makes both
            affine, so that with a fixed scale the model is linear-Gaussian.
          activation: a name in `jvae.networks.ACTIVATIONS` or a named function.
          likelihood: "bernoulli", "gaussian", `jvae.Bernoulli()` or `jvae.Gaussian(...)`.
          initialiser: "paper" (every weight and bias from N(0, variance 0.01)) or "lecun"
            (variance 1 / fan-in, zero biases).
          precision: "float32", or "bfloat16" for layers that compute in 16 bits where the hardware
            gains by it; weights, distributions and bounds stay float32.

        Raises:
          TypeError: an argument of the wrong kind.
          ValueError: a size below 1 or an unknown name.
        """
        data_shape, hidden = _sizes("data_shape", data_shape), _sizes("hidden", hidden)
        latent_dim = check_count("latent_dim", latent_dim)
        if isinstance(activation, str):
            _check_name("activation", activation, networks.ACTIVATIONS)
        elif not callable(activation):
            raise TypeError(f"activation must be a name or a function, got {activation!r}")
        # By name, since some of JAX's functions cannot be pickled.
        names = [name for name, known in networks.ACTIVATIONS.items() if activation is known]
        activation = names[0] if names else activation
        _check_name("initialiser", initialiser, networks.INITIALISERS)
        _check_name("precision", precision, networks.PRECISIONS)
        if isinstance(likelihood, str):
            _check_name("likelihood", likelihood, networks.FAMILIES)
            likelihood = networks.FAMILIES[likelihood]
        elif isinstance(likelihood, type) or not isinstance(likelihood, networks.Family):
            raise TypeError(
                f"likelihood must be one of {sorted(networks.FAMILIES)}, jvae.Bernoulli() or "
                f"jvae.Gaussian(...), got {likelihood!r}"
            )
        mlp = functools.partial(
            networks.MLP, activation=activation, initialiser=initialiser, precision=precision
        )
        return cls(
            data_shape=data_shape,
            encoder=mlp(
                input_ndim=len(data_shape),
                event_shape=(latent_dim,),
                family=networks.Gaussian(),
                hidden=hidden,
            ),
            decoder=mlp(
                input_ndim=1,
                event_shape=data_shape,
                family=likelihood,
                hidden=hidden[::-1],
            ),
            prior=priors.StandardNormal(latent_dim),
        )


@struct.dataclass
class Params:
    """The weights of a model, as a pytree that knows its model.

    Attributes:
      weights: the leaves, {"encoder": φ, "decoder": θ, "prior": θ}.
      model: the model they belong to, static under every transformation.
    """

    weights: Any
    model: Any = struct.field(pytree_node=False)


def init(model: VAE, key: PRNGKeyArray) -> Params:
    """Draw the weights of `model`.

    Args:
      model: the description, as `VAE.mlp()` makes.
      key: a typed PRNG key.

    Raises:
      TypeError: `model` is no model or cannot be hashed and compared (it holds a list, an array,
        a lambda; the message names the field), or `key` is no typed key.
    """
    check_key(key)
    missing = [n for n in ("data_shape", "encoder", "decoder", "prior") if not hasattr(model, n)]
    if missing:
        raise TypeError(
            f"model must be as jvae.VAE is, got {type(model).__name__} without {', '.join(missing)}"
        )
    _check_static(model)
    return Params(weights=_init_weights(model, key), model=model)


@functools.partial(jax.jit, static_argnums=0)
def _init_weights(model: VAE, key: PRNGKeyArray) -> dict[str, Any]:
    encoder_key, decoder_key, prior_key, z_key = jax.random.split(key, 4)
    prior_weights = model.prior.init(prior_key)
    z = model.prior.apply(prior_weights).sample(z_key)
    return {
        "encoder": model.encoder.init(encoder_key, jnp.zeros(model.data_shape)),
        "decoder": model.decoder.init(decoder_key, z),
        "prior": prior_weights,
    }


def posterior(params: Params, x: Shaped[Array | np.ndarray, "..."]) -> Any:
    """q(z|x), the recognition model.

    Args:
      params: from `init`.
      x: float [*batch, *data_shape].

    Returns:
      A distribution with batch shape [*batch]; for `VAE.mlp` a diagonal Gaussian with `loc`
      and `scale` [*batch, latent]. Kingma & Welling (2014), eq. 9.

    Raises:
      TypeError: `params` is no `Params`, or `x` is not floating point.
      ValueError: `x` does not end in the model's `data_shape`.
    """
    x = check_data(params, x)
    return params.model.encoder.apply(params.weights["encoder"], x)


def prior(params: Params) -> Any:
    """p(z), with an empty batch shape.

    Raises:
      TypeError: `params` is no `Params`.
    """
    _check_params(params)
    return params.model.prior.apply(params.weights["prior"])


def likelihood(params: Params, z: Any) -> Any:
    """p(x|z), the generative model.

    Args:
      params: from `init`.
      z: float [*batch, latent], or the pytree that the model's prior samples.

    Returns:
      A distribution with batch shape [*batch] and `mean` [*batch, *data_shape].
      Kingma & Welling (2014), App. C.

    Raises:
      TypeError: `params` is no `Params`, or `z` is not floating point where the prior is.
      ValueError: `z` does not end in the shape of a sample of the prior, or is another pytree.
    """
    _check_params(params)
    expected = jax.eval_shape(lambda p: prior(p).sample(jax.random.key(0)), params)
    given: Any = jax.tree.structure(z)
    wanted: Any = jax.tree.structure(expected)
    if given != wanted:
        raise ValueError(f"z must be {wanted}, as the prior samples it, got {given}")
    z = jax.tree.map(_check_latent, expected, z)
    return params.model.decoder.apply(params.weights["decoder"], z)


def sample(params: Params, key: PRNGKeyArray, num: int) -> Float[Array, "num ..."]:
    """New data: the means of p(x|z) at `num` draws z ~ p(z), [num, *data_shape].

    For draws of x itself, `jvae.likelihood(params, z).sample(key)`.
    Kingma & Welling (2014), Fig. 5.

    Raises:
      TypeError: `key` is no typed key or `num` no static int.
      ValueError: `num` is below 1.
    """
    check_key(key)
    keys = jax.random.split(key, check_count("num", num))
    z = jax.vmap(prior(params).sample)(keys)
    return likelihood(params, z).mean


def reconstruct(
    params: Params, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray
) -> Float[Array, "..."]:
    """The mean of p(x|z) at one draw z ~ q(z|x), [*batch, *data_shape].

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` does not end in the model's `data_shape`.
    """
    check_key(key)
    return likelihood(params, posterior(params, x).sample(key)).mean


def check_data(params: Params, x: Any) -> Float[Array, "..."]:
    """Return `x` as a float array that ends in the model's `data_shape`.

    Raises:
      TypeError: `params` is no `Params`, or `x` is not floating point.
      ValueError: `x` has another trailing shape.
    """
    _check_params(params)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"x must be floating point, got {x.dtype} of shape {x.shape}: convert it first, 8-bit "
            "images with x / 255.0"
        )
    _check_trailing("x", x, params.model.data_shape)
    return x


def _check_latent(expected: jax.ShapeDtypeStruct, z: Any) -> Array:
    z = jnp.asarray(z)
    if jnp.issubdtype(expected.dtype, jnp.floating) and not jnp.issubdtype(z.dtype, jnp.floating):
        raise TypeError(f"z must be floating point, got {z.dtype} of shape {z.shape}")
    _check_trailing("z", z, expected.shape)
    return z


def _check_trailing(name: str, array: Array, trailing: tuple[int, ...]) -> None:
    if array.shape[max(array.ndim - len(trailing), 0) :] != trailing:
        raise ValueError(f"{name} must have shape [*batch, *{trailing}], got {array.shape}")


def _sizes(name: str, values: Iterable[int]) -> tuple[int, ...]:
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a tuple of ints, got {values!r}: write ({values!r},)")
    return tuple(check_count(name, value) for value in values)


def _check_params(params: Any) -> None:
    if not isinstance(params, Params):
        raise TypeError(
            f"params must be jvae.Params, as jvae.init(model, key) makes, got "
            f"{type(params).__name__}"
        )


def _check_name(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}: expected one of {sorted(known)}")


def _check_static(model: Any) -> None:
    """A static field of a pytree is hashed and compared at every dispatch of a jitted function."""
    for path, value in _fields("model", model):
        if isinstance(value, functools.partial) or "<" in getattr(value, "__qualname__", ""):
            raise TypeError(
                f"{path} is a lambda, a partial or a function inside a function, which make equal "
                "models unequal (each would compile anew): use a function of a module"
            )
        try:
            hash(value)
            bool(operator.eq(value, value))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{path} = {type(value).__name__} cannot be hashed and compared ({error}): a "
                "model holds no arrays, and tuples in place of lists and dicts"
            ) from error


def _fields(path: str, value: Any) -> Iterable[tuple[str, Any]]:
    """The innermost values first, so that an error names the field at fault."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            if field.name not in ("parent", "name"):  # Linen's own
                yield from _fields(f"{path}.{field.name}", getattr(value, field.name))
    yield path, value
