"""Gaussians with all their covariances."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, PRNGKeyArray

from jvae import threefry
from jvae.distributions import DiagonalGaussian


@struct.dataclass
class FullGaussian:
    """N(loc, L Lᵀ) of one vector, L lower triangular; `jax.vmap` makes more of them.

    Attributes:
      loc: [dim] means.
      log_diagonal: [dim] log of the diagonal of L.
      lower: [dim, dim] whose entries below the diagonal are those of L; the others mean nothing.
    """

    loc: Any
    log_diagonal: Any
    lower: Any

    @classmethod
    def fit(cls, samples: Float[Array, "num dim"]) -> "FullGaussian":
        """The Gaussian with the samples' mean and covariance; it takes more samples than dim."""
        centred = samples - samples.mean(axis=0, keepdims=True)
        L = jnp.linalg.cholesky(centred.T @ centred / (samples.shape[0] - 1))
        return cls(samples.mean(axis=0), jnp.log(jnp.diag(L)), L)

    @property
    def scale_tril(self) -> Float[Array, "dim dim"]:
        """L."""
        return jnp.tril(self.lower, -1) + jnp.diag(jnp.exp(self.log_diagonal))

    @property
    def mean(self) -> Float[Array, "dim"]:
        """[dim] expectation."""
        return self.loc

    def sample(self, key: PRNGKeyArray) -> Float[Array, "dim"]:
        """One draw [dim], μ + L ε."""
        return self.sample_and_log_prob(key)[0]

    def log_prob(self, value: Float[Array, "dim"]) -> Float[Array, ""]:
        """Log-density in nats of one vector [dim]."""
        solve = jax.scipy.linalg.solve_triangular
        return self._log_prob_of_noise(solve(self.scale_tril, value - self.loc, lower=True))

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, "dim"], Float[Array, ""]]:
        """A draw [dim] and its log-density in nats, taken from the noise itself."""
        eps = threefry.normal(key, self.loc.shape, self.loc.dtype)
        return self.loc + self.scale_tril @ eps, self._log_prob_of_noise(eps)

    def _log_prob_of_noise(self, eps: Array) -> Array:
        terms = -0.5 * jnp.square(eps) - self.log_diagonal - 0.5 * math.log(2 * math.pi)
        return terms.sum()


def full_covariance(q: DiagonalGaussian) -> FullGaussian:
    """The same distribution of one vector, with covariances (of zero) to its name."""
    return FullGaussian(q.loc, q.log_scale, jnp.zeros((q.loc.size, q.loc.size), q.loc.dtype))
