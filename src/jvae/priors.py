"""Priors p(z): modules without inputs that return a distribution over z."""

import flax.linen as nn
import jax.numpy as jnp

from jvae.distributions import DiagonalGaussian


class StandardNormal(nn.Module):
    """p(z) = N(0, I), the prior of Kingma & Welling (2014), Section 3; it has no weights.

    Attributes:
      latent_dim: size of z.
    """

    latent_dim: int

    @nn.compact
    def __call__(self) -> DiagonalGaussian:
        """The distribution of z [latent]."""
        zeros = jnp.zeros(self.latent_dim, jnp.float32)
        return DiagonalGaussian(loc=zeros, log_scale=zeros)
