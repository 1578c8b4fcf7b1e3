"""Distributions as pytrees: the leaves are parameters, the last `event_ndim` axes one event.

Every distribution has `mean`, `sample(key)`, `log_prob(value)`, `sample_and_log_prob(key)` and,
where it is closed-form, `kl(other)`. Log-densities and divergences are in nats and are summed
over the event axes, so that they have the batch shape.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, PRNGKeyArray

from jvae import threefry


def _event_shape(event_ndim: int, value: Array) -> tuple[int, ...]:
    return value.shape[max(value.ndim - event_ndim, 0) :]


def _align(event_ndim: int, value: Array, *parameters: Array) -> tuple[Array, ...]:
    """Broadcast over batch axes only (a wrong event shape must never do so silently).

    The event comes back as one axis: on CPU XLA loops over two short axes more slowly.
    """
    event = _event_shape(event_ndim, parameters[0])
    for array in (value, *parameters):
        if _event_shape(event_ndim, array) != event:
            raise ValueError(f"expected the event shape {event} at the end of {array.shape}")
    size = math.prod(event)
    arrays = (a.reshape(*a.shape[: a.ndim - event_ndim], size) for a in (value, *parameters))
    return tuple(jnp.broadcast_arrays(*arrays))


@jax.custom_jvp
def _floored(exponent: Array) -> Array:
    """The exponent, with the lowest finite number for -inf, and the derivative of the identity.

    On CPU JAX 0.11.1 to 0.12.0.1 give a wrong sum of terms that hold both v and exp(v), where v is
    a reshaped multiple, as log σ is of log σ²: they take the multiple out of v as well. What is
    behind a maximum they leave as it is.
    """
    dtype = jnp.result_type(exponent, 1.0)
    return jnp.maximum(jnp.asarray(exponent, dtype), jnp.finfo(dtype).min)


_floored.defjvps(lambda tangent, _, exponent: tangent)


def _over_scale(distance: Array, log_scale: Array) -> Array:
    """The distance over σ: 0 for none, though 1 / σ itself were beyond the largest number."""
    exponent = _floored(-0.5 * log_scale)
    largest = math.log(float(jnp.finfo(exponent.dtype).max)) - 1e-4  # short of an infinite exp
    root = jnp.exp(jnp.minimum(exponent, largest))
    return distance * root * root


def _same_family(p: Any, q: Any) -> None:
    if type(p) is not type(q):
        raise TypeError(
            f"no closed-form KL from {type(p).__name__} to {type(q).__name__}: "
            "use a bound that needs none, such as jvae.sgvb_a"
        )
    if p.event_ndim != q.event_ndim:
        raise ValueError(f"event_ndim differs: {p.event_ndim} and {q.event_ndim}")


@struct.dataclass
class DiagonalGaussian:
    """N(loc, diag(scale²)), kept by its log-scale so that tiny and huge scales stay finite.

    Attributes:
      loc: [*batch, *event] means.
      log_scale: [*batch, *event] log standard deviations.
      event_ndim: how many trailing axes make one event.
    """

    loc: Any  # not Array: JAX builds pytrees of other things too
    log_scale: Any
    event_ndim: int = struct.field(pytree_node=False, default=1)

    @property
    def scale(self) -> Float[Array, "..."]:
        """[*batch, *event] standard deviations."""
        return jnp.exp(_floored(self.log_scale))

    @property
    def mean(self) -> Float[Array, "..."]:
        """[*batch, *event] expectation."""
        return self.loc

    def sample(self, key: PRNGKeyArray) -> Float[Array, "..."]:
        """One draw [*batch, *event] by the location-scale reparameterisation z = μ + σ ⊙ ε.

        Kingma & Welling (2014), eq. 4 and 9.
        """
        return self.sample_and_log_prob(key)[0]

    def log_prob(self, value: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log-density in nats, [*batch]; batch axes broadcast.

        Raises:
          ValueError: `value` does not end in the event shape.
        """
        value, loc, log_scale = _align(self.event_ndim, value, self.loc, self.log_scale)
        return self._log_prob_of_noise(_over_scale(value - loc, log_scale), log_scale)

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """A draw [*batch, *event] and its log-density [*batch] in nats.

        The density is taken from the noise itself, not from (z - μ) / σ: exact where σ is so
        small that z rounds to μ, and with the same gradient.
        """
        loc, log_scale = jnp.broadcast_arrays(self.loc, self.log_scale)
        eps = threefry.normal(key, loc.shape, loc.dtype)
        z = loc + jnp.exp(_floored(log_scale)) * eps
        return z, self._log_prob_of_noise(*_align(self.event_ndim, eps, log_scale))

    def _log_prob_of_noise(self, eps: Array, log_scale: Array) -> Array:
        terms = -0.5 * jnp.square(eps) - log_scale - 0.5 * math.log(2 * math.pi)
        return terms.sum(axis=-1)

    def kl(self, other: "DiagonalGaussian") -> Float[Array, "..."]:
        """KL(self ‖ other) in nats, [*batch].

        Kingma & Welling (2014), App. B, for a general diagonal Gaussian `other`.

        Raises:
          TypeError: `other` is of another family.
        """
        return self._kl_terms(other).sum(axis=-1)

    def kl_per_dim(self, other: "DiagonalGaussian") -> Float[Array, "..."]:
        """The terms [*batch, *event] whose sum over the event is `kl`, in nats.

        Raises:
          TypeError: `other` is of another family.
        """
        terms = self._kl_terms(other)
        return terms.reshape(*terms.shape[:-1], *_event_shape(self.event_ndim, self.loc))

    def _kl_terms(self, other: "DiagonalGaussian") -> Array:
        _same_family(self, other)
        loc, other_loc, log_scale, other_log_scale = _align(
            self.event_ndim, self.loc, other.loc, self.log_scale, other.log_scale
        )
        log_ratio = log_scale - other_log_scale  # of logs: no σ² to overflow or vanish
        distance = _over_scale(loc - other_loc, other_log_scale)
        # expm1: near q = p, where latents collapse to, exp(·) - 1 rounds to a negative KL.
        return 0.5 * (jnp.expm1(_floored(2 * log_ratio)) + jnp.square(distance)) - log_ratio


# One exp and one log1p a value, the exp shared with the gradient. The derivatives are given, since
# autodiff would make the second one wrong where a minimum or a maximum changes sides.
def _bounded_exp(logits: Array) -> Array:
    """eˡ, short of the largest number: softplus and sigmoid are l and 1 long before."""
    dtype = jnp.result_type(logits, 1.0)  # what JAX makes of NumPy's numbers, and of integers
    largest = 0.95 * math.log(float(jnp.finfo(dtype).max))
    return jnp.exp(jnp.minimum(jnp.asarray(logits, dtype), largest))


@jax.custom_jvp
def _sigmoid(logits: Array) -> Array:
    e = _bounded_exp(logits)
    return e / (1 + e)


@_sigmoid.defjvp
def _sigmoid_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (logits,), (tangent,) = primals, tangents
    e = jnp.exp(-jnp.abs(logits))  # σ(1 - σ) would vanish too early for large logits
    return _sigmoid(logits), tangent * e / jnp.square(1 + e)


@jax.custom_jvp
def _softplus(logits: Array) -> Array:
    return jnp.maximum(logits, jnp.log1p(_bounded_exp(logits)))


_softplus.defjvps(lambda tangent, _, logits: tangent * _sigmoid(logits))


@struct.dataclass
class Bernoulli:
    """Independent Bernoulli variables by their logits, never by probabilities.

    Attributes:
      logits: [*batch, *event] log odds.
      event_ndim: how many trailing axes make one event.
    """

    logits: Any
    event_ndim: int = struct.field(pytree_node=False, default=1)

    @property
    def mean(self) -> Float[Array, "..."]:
        """[*batch, *event] probabilities of 1."""
        return _sigmoid(self.logits)

    def sample(self, key: PRNGKeyArray) -> Float[Array, "..."]:
        """One draw [*batch, *event] of zeros and ones, as floats; not reparameterised."""
        return jax.random.bernoulli(key, self.mean).astype(self.logits.dtype)

    def log_prob(self, value: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log-probability in nats, [*batch]; batch axes broadcast.

        x log y + (1 - x) log(1 - y) of Kingma & Welling (2014), App. C.1, as x·l - softplus(l):
        finite, with a finite gradient, for saturated logits l. Values between 0 and 1 give the
        cross-entropy that "grey" targets train on, which is the density of nothing.

        Raises:
          ValueError: `value` does not end in the event shape.
        """
        value, logits = _align(self.event_ndim, value, self.logits)
        return (value * logits - _softplus(logits)).sum(axis=-1)

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """A draw [*batch, *event] and its log-probability [*batch] in nats."""
        value = self.sample(key)
        return value, self.log_prob(value)

    def kl(self, other: "Bernoulli") -> Float[Array, "..."]:
        """KL(self ‖ other) in nats, [*batch].

        Raises:
          TypeError: `other` is of another family.
        """
        _same_family(self, other)
        logits, other_logits = _align(self.event_ndim, self.logits, other.logits)
        # Σ_v p(v) log(p(v)/q(v)), each log-ratio of one sign's softplus: no ∞ - ∞ at saturation.
        ones = _sigmoid(logits) * (_softplus(-other_logits) - _softplus(-logits))
        zeros = _sigmoid(-logits) * (_softplus(other_logits) - _softplus(logits))
        return (ones + zeros).sum(axis=-1)
