"""What the latents of a trained model are used for, over a dataset."""

import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped

from jvae.checks import check_count, check_key
from jvae.chunks import map_in_chunks
from jvae.evaluation.examples import rows_at_once
from jvae.models import Params, check_data, posterior, prior

# What the densities of draws under every q(z|x) of a dataset may take at once.
_BYTES = 2**25


class KLDecomposition(NamedTuple):
    """KL(q(z|x) ‖ p(z)), averaged over a dataset, in two parts.

    Attributes:
      mutual_information: [*batch] nats, of mean I(x; z) between the index of an example and z.
      marginal_kl: [*batch] nats, of mean KL(q(z) ‖ p(z)).
    """

    mutual_information: Float[Array, "*batch"]
    marginal_kl: Float[Array, "*batch"]


def active_units(
    params: Params, x: Shaped[Array | np.ndarray, "..."], *, threshold: float | int = 0.01
) -> Bool[Array, "latent"]:
    """Which latents vary with x: Var_x(E_q[zⱼ|x]) > threshold.

    Burda, Grosse & Salakhutdinov (2016).

    Args:
      params: from `jvae.init`; q(z|x) has a `mean`.
      x: float [*batch, *data_shape], a dataset.
      threshold: of the variance.

    Returns:
      [latent] booleans.

    Raises:
      TypeError: `x` is not floating point.
      ValueError: `x` has a wrong trailing shape.
    """
    return _mean_variance(params, _flat(params, x)) > threshold


@jax.jit
def _mean_variance(params: Params, x: Array) -> Array:
    means = map_in_chunks(lambda x: posterior(params, x).mean, x, rows_at_once(params))
    return means.var(axis=0)


def kl_per_dimension(
    params: Params, x: Shaped[Array | np.ndarray, "..."]
) -> Float[Array, "latent"]:
    """The mean over a dataset of every latent's KL(q(zⱼ|x) ‖ p(zⱼ)), [latent] nats.

    The terms of Kingma & Welling (2014), App. B, which add up to the mean KL.

    Args:
      params: from `jvae.init`; q and p(z) are diagonal Gaussians.
      x: float [*batch, *data_shape], a dataset.

    Raises:
      TypeError: `x` is not floating point, or q and p(z) are no diagonal Gaussians.
      ValueError: `x` has a wrong trailing shape.
    """
    return _kl_per_dimension(params, _flat(params, x))


@jax.jit
def _kl_per_dimension(params: Params, x: Array) -> Array:
    def kl(x: Array) -> Array:
        q, p = posterior(params, x), prior(params)
        if not hasattr(q, "kl_per_dim"):
            raise TypeError(f"{type(q).__name__} has no closed-form KL of every latent")
        return q.kl_per_dim(p)

    return map_in_chunks(jax.vmap(kl), x, rows_at_once(params)).mean(axis=0)


def collapsed_dimensions(
    params: Params, x: Shaped[Array | np.ndarray, "..."], *, threshold: float | int = 0.01
) -> Bool[Array, "latent"]:
    """Which latents have collapsed to the prior: a mean KL below `threshold` nats, [latent].

    Args:
      params: as `kl_per_dimension`.
      x: float [*batch, *data_shape], a dataset.
      threshold: nats.

    Raises:
      TypeError: as `kl_per_dimension`.
      ValueError: as `kl_per_dimension`.
    """
    return kl_per_dimension(params, x) < threshold


def kl_decomposition(
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    *,
    num_samples: int = 1,
) -> KLDecomposition:
    """Split the mean KL into the mutual information I(x; z) and the aggregate's KL(q(z) ‖ p(z)).

        1/N Σₙ KL(q(z|xₙ) ‖ p(z)) = I(x; z) + KL(q(z) ‖ p(z)),  q(z) = 1/N Σₙ q(z|xₙ)

    Hoffman & Johnson (2016). By Monte Carlo over z ~ q(z|xₙ), with q(z) the mixture over all
    N examples given, not over a minibatch: unbiased for this dataset, whose I(x; z) is at most
    log N. The two parts add up to log q(z|xₙ) - log p(z) at the draws, sample by sample.

    For the population that the examples are from, the first is a lower bound in expectation (Poole
    et al. 2019) and the second an upper bound, by as much. Near log N all examples are told apart,
    and the numbers say little but that N is too small.

    Args:
      params: from `jvae.init`.
      x: float [*batch, *data_shape], a dataset of N examples over all the batch axes.
      key: a typed PRNG key.
      num_samples: draws of z an example. The cost is N² num_samples densities.

    Returns:
      `KLDecomposition`, each [*batch] nats: an example's shares, whose means are the two parts; the
      standard errors of those are about the shares' standard deviations over √N.

    Raises:
      TypeError: `x` is not floating point, or `key` is no typed key.
      ValueError: `x` has a wrong trailing shape, or `num_samples` is below 1.
    """
    check_key(key)
    x = check_data(params, x)
    num_samples = check_count("num_samples", num_samples)
    terms = _kl_decomposition(params, _flat(params, x), key, num_samples)
    batch = x.shape[: x.ndim - len(params.model.data_shape)]
    return KLDecomposition(*(term.reshape(batch) for term in terms))


@functools.partial(jax.jit, static_argnums=3)
def _kl_decomposition(
    params: Params, x: Array, key: PRNGKeyArray, num_samples: int
) -> KLDecomposition:
    num = x.shape[0]
    all_q = map_in_chunks(jax.vmap(lambda x: posterior(params, x)), x, rows_at_once(params))

    def terms(example: tuple[Any, PRNGKeyArray]) -> KLDecomposition:
        q, key = example
        z, log_qz_x = q.sample_and_log_prob(key)
        log_qz = jax.nn.logsumexp(jax.vmap(lambda q: q.log_prob(z))(all_q)) - math.log(num)
        return KLDecomposition(log_qz_x - log_qz, log_qz - prior(params).log_prob(z))

    def draw(key: PRNGKeyArray) -> KLDecomposition:
        return map_in_chunks(jax.vmap(terms), (all_q, jax.random.split(key, num)), size)

    bytes_per_draw = 4 * sum(leaf.size for leaf in jax.tree.leaves(all_q))
    size = max(1, _BYTES // bytes_per_draw)
    draws = jax.lax.map(draw, jax.random.split(key, num_samples))
    return jax.tree.map(lambda leaf: leaf.mean(axis=0), draws)


def _flat(params: Params, x: Any) -> Array:
    """All of x [*batch, *data_shape] with one batch axis."""
    x = check_data(params, x)
    return x.reshape(-1, *params.model.data_shape)
