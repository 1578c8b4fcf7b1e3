"""Exact expectations over the draws of a bound, differentiable in the weights.

Over two draws of a one-dimensional Gaussian z by Gauss-Hermite quadrature, of a discrete z by
enumeration. A bound of two draws is a functional of log w and log q, each [2, batch, node]:
whatever it is, its expectation and the gradient of that are exact here.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import jvae

Functional = Callable[[Array, Array], Array]
NUM_NODES = 40


class Nodes(NamedTuple):
    """Draws of one z for every example, with their probabilities; [batch, node, …]."""

    z: Array
    log_q: Array
    log_w: Array
    probability: Array


def gaussian_nodes(params: jvae.Params, x: Array, *, fixed: bool = False) -> Nodes:
    """Of a linear-Gaussian model with one latent; `fixed` z do not move with q's parameters."""
    encoder, decoder = (params.weights[n]["params"]["output"] for n in ("encoder", "decoder"))
    sigma = params.model.decoder.family.scale
    eps, mass = np.polynomial.hermite_e.hermegauss(NUM_NODES)
    outputs = x @ encoder["kernel"] + encoder["bias"][None]
    loc, log_scale = outputs[:, :1], 0.5 * outputs[:, 1:]
    z = loc + jnp.exp(log_scale) * eps[None]
    z = jax.lax.stop_gradient(z) if fixed else z
    log_q = _log_normal((z - loc) * jnp.exp(-log_scale)) - log_scale
    mean = z[..., None] * decoder["kernel"][0][None, None] + decoder["bias"][None, None]
    log_px_z = _log_normal((x[:, None] - mean) / sigma).sum(-1) - x.shape[-1] * math.log(sigma)
    log_w = log_px_z + _log_normal(z) - log_q
    probability = jnp.broadcast_to(jnp.asarray(mass / mass.sum())[None], z.shape)
    return Nodes(z, log_q, log_w, probability)


def discrete_nodes(params: jvae.Params, x: Array, *, fixed: bool = False) -> Nodes:
    """Of a model with Bernoulli z and fair prior; not `fixed`, q's parameters move the masses."""
    bits = params.model.encoder.event_shape[0]
    z = jnp.asarray(list(itertools.product([0.0, 1.0], repeat=bits)), x.dtype)
    encoder, decoder = (params.weights[n]["params"]["output"] for n in ("encoder", "decoder"))
    sigma = params.model.decoder.family.scale
    logits = (x @ encoder["kernel"] + encoder["bias"][None])[:, None]
    log_q = jax.nn.log_sigmoid((2 * z - 1)[None] * logits).sum(-1)
    mean = (z @ decoder["kernel"] + decoder["bias"][None])[None]
    log_px_z = _log_normal((x[:, None] - mean) / sigma).sum(-1) - x.shape[-1] * math.log(sigma)
    probability = jnp.exp(jax.lax.stop_gradient(log_q) if fixed else log_q)
    return Nodes(z, log_q, log_px_z - bits * math.log(2) - log_q, probability)


def _log_normal(value: Array) -> Array:
    return -0.5 * value**2 - 0.5 * math.log(2 * math.pi)


def expectation(functional: Functional, nodes: Nodes) -> Array:
    """E[functional(log w, log q)] over two independent draws, [batch]."""

    def pairs(each: Array) -> Array:
        batch, num = each.shape
        both = (each[:, :, None], each[:, None, :])
        return jnp.stack([jnp.broadcast_to(a, (batch, num, num)) for a in both]).reshape(
            2, batch, num * num
        )

    values = functional(pairs(nodes.log_w), pairs(nodes.log_q))
    return (values * pairs(nodes.probability).prod(axis=0)).sum(axis=-1)


def in_float64(function: Callable[..., Any], params: jvae.Params, x: np.ndarray) -> Any:
    """`function(params, x)` in float64, as NumPy arrays."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda w: jnp.asarray(np.asarray(w), jnp.float64), params)
        return jax.tree.map(np.asarray, jax.jit(function)(wide, jnp.asarray(x, jnp.float64)))
