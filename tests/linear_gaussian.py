"""Everything exact about a linear-Gaussian VAE, from its weights, in float64.

    z ~ N(0, I),  x|z ~ N(W z + b, σ² I),  q(z|x) = N(A x + a, diag exp(B x + c))

so that p(x) = N(b, W Wᵀ + σ² I) and p(z|x) = N(S Wᵀ (x - b) / σ², S), S = (I + WᵀW / σ²)⁻¹.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from weights import random_params

import jvae


def make(data_dim: int, latent_dim: int, scale: float, *, seed: int = 0) -> jvae.Params:
    """A model with weights of order 1, so that q is far from p(z|x) and from p(z)."""
    model = jvae.VAE.mlp((data_dim,), latent_dim, hidden=(), likelihood=jvae.Gaussian(scale=scale))
    return random_params(model, seed=seed)


def with_decoder(params: jvae.Params, W: np.ndarray, b: np.ndarray) -> jvae.Params:
    """The model with p(x|z) = N(W z + b, σ² I)."""
    return _with_output(params, "decoder", W.T, b)


def with_encoder(
    params: jvae.Params, A: np.ndarray, a: np.ndarray, B: np.ndarray, c: np.ndarray
) -> jvae.Params:
    """The model with q(z|x) = N(A x + a, diag exp(B x + c))."""
    kernel, bias = np.concatenate([A.T, B.T], axis=1), np.concatenate([a, c])
    return _with_output(params, "encoder", kernel, bias)


def with_posterior(
    params: jvae.Params, *, shift: float = 0.0, inflation: float = 1.0
) -> jvae.Params:
    """The model with orthogonal columns of W, so that p(z|x) is diagonal, and q close to it.

    q has the posterior's mean plus `shift` and its variance times `inflation`; by default it is
    the posterior. Where inflation > 1 the importance weights are bounded.
    """
    W = Exact.of(params).W
    lengths = np.linalg.norm(W, axis=0)
    params = with_decoder(params, np.linalg.qr(W)[0] * lengths, Exact.of(params).b)
    exact = Exact.of(params)
    S = exact.posterior_covariance
    np.testing.assert_allclose(S, np.diag(np.diag(S)), atol=1e-6)
    A = S @ exact.W.T / exact.sigma**2
    c = np.log(inflation * np.diag(S))
    return with_encoder(params, A, shift - A @ exact.b, np.zeros_like(A), c)


def _with_output(
    params: jvae.Params, network: str, kernel: np.ndarray, bias: np.ndarray
) -> jvae.Params:
    output = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    weights = {**params.weights, network: {"params": {"output": output}}}
    return dataclasses.replace(params, weights=weights)


@dataclasses.dataclass(frozen=True)
class Exact:
    """The matrices of a model and what follows from them; x is [batch, data]."""

    W: np.ndarray
    b: np.ndarray
    sigma: float
    A: np.ndarray
    a: np.ndarray
    B: np.ndarray
    c: np.ndarray

    @classmethod
    def of(cls, params: jvae.Params) -> "Exact":
        """Read the weights of `params`."""
        encoder, decoder = (
            jax.tree.map(lambda w: np.asarray(w, np.float64), params.weights[n]["params"]["output"])
            for n in ("encoder", "decoder")
        )
        (A, B), (a, c) = np.split(encoder["kernel"].T, 2), np.split(encoder["bias"], 2)
        sigma = params.model.decoder.family.scale
        return cls(decoder["kernel"].T, decoder["bias"], sigma, A, a, B, c)

    @property
    def posterior_covariance(self) -> np.ndarray:
        """S [latent, latent]."""
        latent_dim = self.W.shape[1]
        return np.linalg.inv(np.eye(latent_dim) + self.W.T @ self.W / self.sigma**2)

    def posterior_mean(self, x: np.ndarray) -> np.ndarray:
        """E[z|x], [batch, latent]."""
        return (x - self.b) @ self.W @ self.posterior_covariance / self.sigma**2

    def log_px(self, x: np.ndarray) -> np.ndarray:
        """log p(x), [batch] nats."""
        covariance = self.W @ self.W.T + self.sigma**2 * np.eye(len(self.b))
        square = np.einsum("ni,ij,nj->n", x - self.b, np.linalg.inv(covariance), x - self.b)
        return -0.5 * (square + np.linalg.slogdet(2 * math.pi * covariance)[1])

    def q(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard deviations of q(z|x), each [batch, latent]."""
        return x @ self.A.T + self.a, np.exp(0.5 * (x @ self.B.T + self.c))

    def kl_to_posterior(self, x: np.ndarray) -> np.ndarray:
        """KL(q(z|x) ‖ p(z|x)), [batch] nats."""
        loc, scale = self.q(x)
        S = self.posterior_covariance
        precision = np.linalg.inv(S)
        distance = loc - self.posterior_mean(x)
        trace = scale**2 @ np.diag(precision)
        square = np.einsum("ni,ij,nj->n", distance, precision, distance)
        log_det = np.linalg.slogdet(S)[1] - 2 * np.log(scale).sum(axis=1)
        return 0.5 * (trace + square - loc.shape[1] + log_det)


def elbo(params: jvae.Params, x: Array) -> Array:
    """The ELBO in closed form, [batch] nats, differentiable in the weights: eq. 3 with

    E_q[log p(x|z)] = log N(x; W μ + b, σ² I) - Σⱼ sⱼ² ‖Wⱼ‖² / 2σ².
    """
    encoder, decoder = (params.weights[n]["params"]["output"] for n in ("encoder", "decoder"))
    sigma = params.model.decoder.family.scale
    loc, log_var = jnp.split(x @ encoder["kernel"] + encoder["bias"][None], 2, axis=-1)
    W_rows = decoder["kernel"]
    residual = x - loc @ W_rows - decoder["bias"][None]
    square = (residual**2).sum(-1) + jnp.exp(log_var) @ (W_rows**2).sum(-1)
    log_px_z = -0.5 * square / sigma**2 - x.shape[-1] * math.log(sigma * math.sqrt(2 * math.pi))
    kl = 0.5 * (loc**2 + jnp.exp(log_var) - 1 - log_var).sum(-1)
    return log_px_z - kl


def log_q_of_dreams(params: jvae.Params, x: Array) -> Array:
    """E[log q(z|x)] over x, z ~ p with one latent, from the moments of two numbers,

    d = z - A x - a and v = B x + c: they are jointly normal, and e⁻ᵛ tilts d's mean by -cov(d, v).
    For each row of x, which they do not depend on, [batch] nats; differentiable in q's weights.
    """
    encoder, decoder = (params.weights[n]["params"]["output"] for n in ("encoder", "decoder"))
    (A, B), (a, c) = encoder["kernel"].T, encoder["bias"]
    W, b = (jax.lax.stop_gradient(decoder[name]) for name in ("kernel", "bias"))
    cov = W.T @ W + params.model.decoder.family.scale**2 * jnp.eye(len(b))
    v, var_v = B @ b + c, B @ cov @ B
    d, var_d, cov_dv = -A @ b - a, 1 - 2 * W[0] @ A + A @ cov @ A, W[0] @ B - A @ cov @ B
    square = jnp.exp(-v + var_v / 2) * ((d - cov_dv) ** 2 + var_d)
    return jnp.broadcast_to(-0.5 * (square + v + math.log(2 * math.pi)), x.shape[:1])
