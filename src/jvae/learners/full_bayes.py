"""Full variational Bayes: a Gaussian over the generative weights, as there is one over latents."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, Shaped

from jvae import training
from jvae.checks import check_between, check_count, check_key
from jvae.distributions import DiagonalGaussian
from jvae.estimators import Bound, elbo
from jvae.estimators.sampling import draw, encode, over_draws
from jvae.estimators.sgvb import closed_form
from jvae.evaluation import bound_by_example
from jvae.learners.base import Learner
from jvae.learners.noisy_layers import NoisyDecoder, NoisyWeights
from jvae.models import VAE, Params, prior

# A tenth of the standard deviation that the paper draws weights with: the first steps see their
# draw almost as it is, and σ grows wherever the data does not hold a weight. From noise as large
# as the weights, units would be given up before they have learned anything.
INITIAL_SCALE = 0.01


@struct.dataclass
class WeightPosterior:
    """q(θ) = N(μ, σ²), a diagonal Gaussian over every generative weight; the encoder's are points.

    It stands where `jvae.Params` stand in a `jvae.training.TrainState`.

    Attributes:
      mean: the `jvae.Params` with θ = μ, which every function of jvae takes.
      log_scale: log σ of every weight θ, {"decoder": …, "prior": …} as in `mean.weights`.
    """

    mean: Params
    log_scale: dict[str, Any]


def weight_posterior(params: Params, *, scale: float = INITIAL_SCALE) -> WeightPosterior:
    """A q(θ) around given weights: μ = θ, and one σ for all.

    Args:
      params: from `jvae.init`.
      scale: σ.

    Raises:
      TypeError: `scale` is no number.
      ValueError: `scale` is not positive and finite.
    """
    scale = check_between("scale", scale, float(np.finfo(np.float32).tiny))
    theta = {name: weights for name, weights in params.weights.items() if name != "encoder"}
    log_scale = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.log(scale)), theta)
    return WeightPosterior(mean=params, log_scale=log_scale)


@jax.jit
def sample_weights(posterior: WeightPosterior, key: PRNGKeyArray) -> Params:
    """A draw θ = μ + σ ⊙ ζ, ζ ~ N(0, I), with the encoder's φ beside it.

    Kingma & Welling (2014), App. F.

    Args:
      posterior: q(θ).
      key: a typed PRNG key.

    Raises:
      TypeError: `key` is no typed key.
    """
    check_key(key)
    gaussians = _gaussians(posterior)
    keys = jax.random.split(key, len(gaussians))
    draws = [q.sample(own_key) for q, own_key in zip(gaussians, keys, strict=True)]
    theta = jax.tree.unflatten(jax.tree.structure(posterior.log_scale), draws)
    return dataclasses.replace(posterior.mean, weights=posterior.mean.weights | theta)


@jax.jit
def kl_of_weights(posterior: WeightPosterior) -> Float[Array, ""]:
    """KL(q(θ) ‖ N(0, I)) = ½ Σ (σ² + μ² - 1 - log σ²), in nats for the whole dataset.

    Kingma & Welling (2014), App. F.

    Args:
      posterior: q(θ).
    """
    total = jnp.zeros((), jnp.float32)
    for q in _gaussians(posterior):
        zeros = jnp.zeros_like(q.loc)
        total += q.kl(DiagonalGaussian(zeros, zeros, q.event_ndim))
    return total


def full_bayes_bound(
    posterior: WeightPosterior,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    *,
    dataset_size: int,
    num_samples: int = 1,
) -> Float[Array, "*batch"]:
    """The bound on log p(X) of a whole dataset over its size, by one draw of θ for all of x.

        log p(xᵢ|zᵢ, θ) - KL(q(z|xᵢ) ‖ p(z)) - KL(q(θ) ‖ p(θ)) / N,  θ = μ + σ ⊙ ζ,  p(θ) = N(0, I)

    Kingma & Welling (2014), App. F, whose estimator is N times the mean over a minibatch: unbiased
    for a bound on log ∫ p(X|θ) p(θ) dθ. Here it is over N, nats an example as in all bounds.

    Args:
      posterior: q(θ), and the encoder.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      dataset_size: N.
      num_samples: L, the draws of z an example, all with the same θ.

    Returns:
      [*batch] nats.

    Raises:
      TypeError: as `jvae.elbo`, or `dataset_size` is no static int.
      ValueError: as `jvae.elbo`, or `dataset_size` is below 1.
    """
    check_key(key)
    weights_key, z_key = jax.random.split(key)
    params = sample_weights(posterior, weights_key)
    share = _share_of_kl(posterior, dataset_size)
    return elbo(params, x, z_key, num_samples=num_samples) - share


def local_full_bayes_bound(
    posterior: WeightPosterior,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    *,
    dataset_size: int,
    num_samples: int = 1,
) -> Float[Array, "*batch"]:
    """`full_bayes_bound` in expectation, with a θ of its own for every draw of z.

    The decoder's θ is drawn by what it does to each layer, y ~ N(h μ_W + μ_b, h² σ_W² + σ_b²):
    the local reparameterisation of Kingma, Salimans & Welling (2015), Section 2.3. An example's
    value (L = 1) has the law that it has in `full_bayes_bound`, but the examples of a batch are
    independent: over random batches of M, the variance of their mean is less by 1 - 1/M of that
    which θ alone gives to the mean over all data.

    Args:
      posterior: q(θ), and the encoder. All the decoder's weights are those of `nn.Dense` layers.
        Weights of the prior, if it has any, are drawn once for all of x.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      dataset_size: N.
      num_samples: L, the draws of z an example.

    Returns:
      [*batch] nats.

    Raises:
      TypeError: as `full_bayes_bound`.
      ValueError: as `full_bayes_bound`, or the decoder has weights of other layers.
    """
    check_key(key)
    decoder_key, prior_key, z_key = jax.random.split(key, 3)
    log_scale = dict(posterior.log_scale)
    decoder_mean, decoder_log_scale = posterior.mean.weights["decoder"], log_scale.pop("decoder")
    params = sample_weights(WeightPosterior(posterior.mean, log_scale), prior_key)
    model = params.model
    decoder = NoisyDecoder(model.decoder, model.data_shape)
    noisy_model = VAE(model.data_shape, model.encoder, decoder, model.prior)
    q, x, keys = encode(params, x, z_key, num_samples)

    def log_px_z(draws: tuple[Key[Array, "num"], Int[Array, "num"]]) -> Float[Array, "num *batch"]:
        keys, numbers = draws
        noisy = NoisyWeights(decoder_mean, decoder_log_scale, decoder_key, first=numbers[0])
        own = Params(params.weights | {"decoder": noisy}, noisy_model)
        return draw(own, q, x, keys)[1].px_z

    log_px_z_of_each = over_draws(log_px_z, (keys, jnp.arange(len(keys))), x)
    bound = log_px_z_of_each.mean(axis=0) - closed_form("kl", q, prior(params))
    return bound - _share_of_kl(posterior, dataset_size)


def make_learner(
    optimizer: optax.GradientTransformation,
    *,
    dataset_size: int,
    bound: Bound = full_bayes_bound,
    initial_scale: float = INITIAL_SCALE,
) -> Learner:
    """Ascend the bound on log p(X) in a Gaussian over the generative weights, and in the encoder.

    Kingma & Welling (2014), App. F.

    Args:
      optimizer: as `jvae.training.make_step` takes it. It needs no MAP prior: p(θ) is in the bound.
      dataset_size: N, the examples in the training set.
      bound: `full_bayes_bound`, `local_full_bayes_bound` or another function
        `(posterior, x, key, *, dataset_size) -> [*batch] nats`.
      initial_scale: σ of every weight before the first step.

    Returns:
      A learner whose state is a `jvae.training.TrainState` with a `WeightPosterior` as `params`.
    """
    ascended = functools.partial(bound, dataset_size=dataset_size)
    return Learner(
        init=lambda params, key: training.init(
            weight_posterior(params, scale=initial_scale), optimizer, key
        ),
        step=training.make_step(ascended, optimizer),
    )


def held_out_bound(
    posterior: WeightPosterior,
    x: Shaped[Array | np.ndarray, "num ..."],
    key: PRNGKeyArray,
    *,
    num_weights: int = 8,
    batch_size: int = 500,
) -> Float[Array, "weights num"]:
    """The ELBO of new examples at several draws of θ, whose mean over draws bounds log p(x|X).

        log E_q(θ)[p(x|θ)] ≥ E_q(θ)[log p(x|θ)] ≥ E_q(θ)[ELBO(x; θ, φ)]

    where q(θ) stands for the posterior p(θ|X) of the training set X. There is no KL of θ: that is
    the price of what q(θ) knows of X, not of x.

    Args:
      posterior: q(θ), and the encoder.
      x: float [num, *data_shape].
      key: a typed PRNG key.
      num_weights: draws of θ, each for all examples.
      batch_size: examples at once.

    Returns:
      [num_weights, num] nats.

    Raises:
      TypeError: as `jvae.elbo`, or `num_weights` is no static int.
      ValueError: as `jvae.elbo`, or `num_weights` is below 1.
    """
    check_key(key)

    def at_one_draw(key: PRNGKeyArray) -> Float[Array, "num"]:
        weights_key, z_key = jax.random.split(key)
        params = sample_weights(posterior, weights_key)
        return bound_by_example(params, x, z_key, bound=elbo, batch_size=batch_size)

    keys = jax.random.split(key, check_count("num_weights", num_weights))
    return jnp.stack([at_one_draw(own_key) for own_key in keys])


def _gaussians(posterior: WeightPosterior) -> list[DiagonalGaussian]:
    """q(θ) leaf by leaf, in the order of those of `log_scale`."""
    means = {name: posterior.mean.weights[name] for name in posterior.log_scale}
    leaves = zip(jax.tree.leaves(means), jax.tree.leaves(posterior.log_scale), strict=True)
    return [DiagonalGaussian(mean, log_scale, mean.ndim) for mean, log_scale in leaves]


def _share_of_kl(posterior: WeightPosterior, dataset_size: int) -> Float[Array, ""]:
    # As a float: N may exceed 32 bits.
    return kl_of_weights(posterior) / float(check_count("dataset_size", dataset_size))
