"""A linear-Gaussian model on which the limit of every estimator's gradient is exact.

    z ~ N(0, I),  x|z ~ N(W z + b, σ² I),  q(z|x) = N(A x + a, diag exp(B x + c))

The importance weight w = p(x, z) / q(z|x) is then the exponential of a quadratic, and all bounds
made of its powers follow from one function, the logarithm of its moments under q.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

import jvae
from jvae.estimators import Row
from jvae.experiments.gradient_moments import flat_by_network

# What Rainforth et al. (2018), Section 4 take: sizes, q's variance and the offset of every weight.
DIM = 20
NUM_DATA = 1024
VARIANCE_OF_Q = 2 / 3
OFFSET = 0.01


class Study(NamedTuple):
    """A model, and data [NUM_DATA, DIM] that it is nearly the best for."""

    params: jvae.Params
    x: Float[Array, "num dim"]


def near_the_optimum(key: PRNGKeyArray) -> Study:
    """The model of Rainforth et al. (2018), Section 4, with every weight a little off.

    Data are of x = z + μ + ε with μ ~ N(0, I), z and ε ~ N(0, I), of 20 dimensions. The model has
    W = I, b the mean of the data, σ = 1, and q the posterior's mean at the variance 2/3, where the
    posterior's is 1/2; then every weight is moved by a draw of N(0, 0.01²).
    """
    mean_key, data_key, offset_key = jax.random.split(key, 3)
    mu = jax.random.normal(mean_key, (DIM,))
    x = mu[None] + jnp.sqrt(2.0) * jax.random.normal(data_key, (NUM_DATA, DIM))
    b, eye, zeros = x.mean(axis=0), jnp.eye(DIM), jnp.zeros((DIM, DIM))
    model = jvae.VAE.mlp((DIM,), DIM, hidden=(), likelihood=jvae.Gaussian(scale=1.0))
    log_variance = jnp.full(DIM, jnp.log(VARIANCE_OF_Q))
    outputs = {
        "encoder": {
            "kernel": jnp.concatenate([0.5 * eye, zeros], axis=1),
            "bias": jnp.concatenate([-0.5 * b, log_variance]),
        },
        "decoder": {"kernel": eye, "bias": b},
    }
    weights = {name: {"params": {"output": output}} for name, output in outputs.items()}
    leaves, structure = jax.tree.flatten({**weights, "prior": {}})
    keys = jax.random.split(offset_key, len(leaves))
    moved = [
        leaf + OFFSET * jax.random.normal(own, leaf.shape)
        for leaf, own in zip(leaves, keys, strict=True)
    ]
    return Study(jvae.Params(weights=jax.tree.unflatten(structure, moved), model=model), x)


class _Given(NamedTuple):
    """The Gaussians at one example, and p(x|z) = N(W z + b, σ² I)."""

    W: Array
    b: Array
    sigma: float
    q_mean: Array
    q_precision: Array  # [latent], of a diagonal
    p_mean: Array
    p_precision: Array  # [latent, latent], of p(z|x)
    log_px: Array

    def log_moment(self, c: float | Array) -> Array:
        """The log of E_q[w^c]; its derivative by c is E[log w] under q w^c, normalised.

        ∫ N(m, P⁻¹)^c N(μ, Λ⁻¹)^(1-c) is that of a Gaussian with precision cP + (1-c)Λ.
        """
        P, Lambda = self.p_precision, jnp.diag(self.q_precision)
        Q = c * P + (1 - c) * Lambda
        h = c * P @ self.p_mean + (1 - c) * self.q_precision * self.q_mean
        determinants = c * _log_det(P) + (1 - c) * _log_det(Lambda) - _log_det(Q)
        squares = c * self.p_mean @ P @ self.p_mean
        squares += (1 - c) * (self.q_precision * self.q_mean**2).sum()
        squares -= h @ jnp.linalg.solve(Q, h)
        return c * self.log_px + 0.5 * (determinants - squares)

    def mean_log_weight(self, c: float) -> Array:
        """E[log w] under q w^c: the ELBO at c = 0."""
        return jax.grad(self.log_moment)(jnp.asarray(c, self.log_px.dtype))

    def kl_per_dim(self) -> Array:
        """KL(q(z|x) ‖ p(z)) of each latent."""
        variance = 1 / self.q_precision
        return 0.5 * (variance + self.q_mean**2 - 1 - jnp.log(variance))

    def log_q_under_posterior(self) -> Array:
        """E_p(z|x)[log q(z|x)], with p(z|x) a constant."""
        mean, precision = jax.lax.stop_gradient((self.p_mean, self.p_precision))
        square = jnp.diag(jnp.linalg.inv(precision)) + (mean - self.q_mean) ** 2
        return _log_normal_mean(square, jnp.log(self.q_precision)).sum()


def _log_det(matrix: Array) -> Array:
    return jnp.linalg.slogdet(matrix)[1]


def _log_normal_mean(square: Array, log_precision: Array) -> Array:
    """E[log N(z; m, 1 / precision)] where E[(z - m)²] is `square`."""
    return 0.5 * (log_precision - jnp.log(2 * jnp.pi) - square * jnp.exp(log_precision))


def _decoder(params: jvae.Params) -> tuple[Array, Array, float]:
    dim = params.model.encoder.event_shape[0]
    zeros = jnp.zeros((1, dim), jnp.float64)
    b = jvae.likelihood(params, zeros).mean[0]
    W = (jvae.likelihood(params, jnp.eye(dim, dtype=jnp.float64)).mean - b[None]).T
    return W, b, params.model.decoder.family.scale


def _given(params: jvae.Params, x: Array) -> _Given:
    W, b, sigma = _decoder(params)
    q = jvae.posterior(params, x)
    P = jnp.eye(W.shape[1]) + W.T @ W / sigma**2
    mean = jnp.linalg.solve(P, W.T @ (x - b) / sigma**2)
    # log p(x) = log p(x, z) - log p(z|x), at z = the posterior's mean.
    square = mean @ mean + ((x - W @ mean - b) ** 2).sum() / sigma**2
    log_px = -0.5 * (square + _log_det(P) + len(b) * jnp.log(2 * jnp.pi * sigma**2))
    return _Given(W, b, sigma, q.loc, jnp.exp(-2 * q.log_scale), mean, P, log_px)


def _sleep(params: jvae.Params) -> Array:
    """E log q(z|x) over (x, z) ~ p, p a constant.

    y = z - A x - a and t = B x + c are Gaussian together, so that E[y² exp(-t)] is
    exp(-E t + Var t / 2) ((E y - Cov(y, t))² + Var y).
    """
    W, b, sigma = jax.lax.stop_gradient(_decoder(params))
    dim = len(b)
    at_zero, at_units = (
        jvae.posterior(params, points)
        for points in (jnp.zeros((1, dim), jnp.float64), jnp.eye(dim, dtype=jnp.float64))
    )
    a, c = at_zero.loc[0], 2 * at_zero.log_scale[0]
    A, B = (at_units.loc - a[None]).T, (2 * at_units.log_scale - c[None]).T
    covariance_x = W @ W.T + sigma**2 * jnp.eye(dim)
    mean_y, mean_t = -A @ b - a, B @ b + c
    variance_y = 1 - 2 * jnp.diag(A @ W) + jnp.diag(A @ covariance_x @ A.T)
    variance_t = jnp.diag(B @ covariance_x @ B.T)
    covariance = jnp.diag(B @ W) - jnp.diag(B @ covariance_x @ A.T)
    square = ((mean_y - covariance) ** 2 + variance_y) * jnp.exp(variance_t / 2 - mean_t)
    return -0.5 * (jnp.log(2 * jnp.pi) + mean_t + square).sum()


def _elbo(given: _Given) -> Array:
    return given.mean_log_weight(0.0)


def _tvo(given: _Given, partition: int) -> Array:
    return sum(
        (given.mean_log_weight(i / partition) / partition for i in range(partition)),
        start=jnp.zeros(()),
    )


# From the Gaussians at an example, and the row's settings, to what its estimate tends to.
LIMITS: Mapping[str, Callable[..., Array]] = MappingProxyType(
    {
        "elbo": _elbo,
        "sgvb_a": _elbo,
        "stl": _elbo,
        "score_function": _elbo,
        "beta_elbo": lambda given, beta: _elbo(given) - (beta - 1) * given.kl_per_dim().sum(),
        "free_bits_elbo": lambda given, free_nats: (
            _elbo(given) + (given.kl_per_dim() - jnp.maximum(free_nats, given.kl_per_dim())).sum()
        ),
        **dict.fromkeys(("iwae", "dreg", "vimco", "miwae", "piwae"), lambda given: given.log_px),
        "ciwae": lambda given, beta: beta * _elbo(given) + (1 - beta) * given.log_px,
        "renyi": lambda given, alpha: given.log_moment(1 - alpha) / (1 - alpha),
        "cubo": lambda given, order: given.log_moment(order) / order,
        "tvo": _tvo,
        "rws": lambda given: given.log_px + given.log_q_under_posterior(),
        "wake_theta": lambda given: given.log_px,
        "wake_phi": lambda given: given.log_q_under_posterior(),
    }
)


def limit_of_gradient(
    name: str, row: Row, params: jvae.Params, x: Float[Array, "batch data"]
) -> dict[str, Float[np.ndarray, "num_weights"]] | None:
    """What the mean of an estimator's gradient tends to as K → ∞, exactly, in float64.

    An estimator that is unbiased for a target without K has this mean at every K.

    Args:
      name: of the row in `jvae.estimators.TABLE`.
      row: whose settings, and its function's defaults, count.
      params: of a linear-Gaussian model.
      x: float [batch, data].

    Returns:
      For φ and θ the gradient of the mean over the batch, in the order of
      `gradient_moments.flat_by_network`; None where no limit is written down for this row.
    """
    if name != "sleep_phi" and name not in LIMITS:
        return None
    arguments = inspect.signature(row.bound).parameters
    settings = {
        key: argument.default
        for key, argument in arguments.items()
        if key not in ("params", "x", "key", "num_samples", "num_outer")
        and key in inspect.signature(LIMITS.get(name, _sleep)).parameters
    }

    def value(params: jvae.Params) -> Array:
        if name == "sleep_phi":
            return _sleep(params)
        limit = LIMITS[name]
        return jax.vmap(lambda x: limit(_given(params, x), **settings))(wide_x).mean()

    with jax.enable_x64(True):
        wide, wide_x = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (params, x)
        )
        found = jax.jit(jax.grad(value))(wide)
        return {network: np.asarray(flat) for network, flat in flat_by_network(found).items()}
