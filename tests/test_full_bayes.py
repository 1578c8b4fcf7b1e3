"""Full variational Bayes, held against exact evidence, exact moments and the MAP criterion."""

import dataclasses
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import linear_gaussian
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from jaxtyping import Array, PRNGKeyArray
from standard_errors import SIGMAS, assert_mean_is, mean_and_error
from weights import random_params

import jvae
from jvae import distributions, threefry, training
from jvae.estimators import sampling
from jvae.learners import aevb, full_bayes, noisy_layers
from jvae.learners.full_bayes import (
    WeightPosterior,
    full_bayes_bound,
    held_out_bound,
    kl_of_weights,
    local_full_bayes_bound,
    sample_weights,
    weight_posterior,
)

KEY = jax.random.key(5)
NUM_DRAWS = 20_000
BOUNDS = [full_bayes_bound, local_full_bayes_bound]
both_bounds = pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.__name__)
Bound = Callable[..., Array]


# Models whose every expectation is exact.


@dataclasses.dataclass(frozen=True)
class LearnedPrior:
    """p(z) = N(ν, I), ν a weight."""

    latent_dim: int

    def init(self, key: PRNGKeyArray) -> Any:
        return {"loc": jax.random.normal(key, (self.latent_dim,))}

    def apply(self, weights: Any) -> Any:
        return distributions.DiagonalGaussian(weights["loc"], jnp.zeros_like(weights["loc"]))


@dataclasses.dataclass(frozen=True)
class WithoutInput:
    """A decoder that sees nothing of z: of affine maps the bias is left."""

    inner: Any

    def init(self, key: PRNGKeyArray, z: Array) -> Any:
        return self.inner.init(key, z[..., :0])

    def apply(self, weights: Any, z: Array) -> Any:
        return self.inner.apply(weights, z[..., :0])


def linear_posterior(seed: int = 0) -> WeightPosterior:
    """Over a linear-Gaussian model of 3 data and 2 latent dimensions, whose prior has a weight."""
    params = linear_gaussian.make(3, 2, 0.8, seed=seed)
    model = dataclasses.replace(params.model, prior=LearnedPrior(2))
    return with_spread(random_params(model, seed=seed))


def with_spread(params: jvae.Params, *, low: float = 0.1, high: float = 0.6) -> WeightPosterior:
    """Every weight with a σ of its own."""
    posterior = weight_posterior(params)
    generator = np.random.default_rng(1)
    log_scale = jax.tree.map(
        lambda leaf: jnp.asarray(np.log(generator.uniform(low, high, leaf.shape)), jnp.float32),
        posterior.log_scale,
    )
    return WeightPosterior(posterior.mean, log_scale)


def expected_bound(posterior: WeightPosterior, x: Array, dataset_size: int) -> Array:
    """The bound of a linear-Gaussian model whose prior is N(ν, I), in closed form, [batch] nats.

    E(x - W z - b)² is the square of its mean and the variances of W z, which is E W² E z² less the
    square of its mean, and of b.
    """
    weights, log_scale = posterior.mean.weights, posterior.log_scale
    encoder, decoder = (weights[n]["params"]["output"] for n in ("encoder", "decoder"))
    W, b = decoder["kernel"], decoder["bias"][None]
    var_W, var_b, var_nu = (
        jnp.exp(2 * scale)
        for scale in (
            log_scale["decoder"]["params"]["output"]["kernel"],
            log_scale["decoder"]["params"]["output"]["bias"][None],
            log_scale["prior"]["loc"][None],
        )
    )
    nu = weights["prior"]["loc"][None]
    loc, log_var = jnp.split(x @ encoder["kernel"] + encoder["bias"][None], 2, axis=-1)
    var = jnp.exp(log_var)
    square = (x - loc @ W - b) ** 2 + (loc**2 + var) @ (W**2 + var_W) - loc**2 @ W**2 + var_b
    sigma = posterior.mean.model.decoder.family.scale
    log_px_z = -0.5 * square / sigma**2 - math.log(sigma * math.sqrt(2 * math.pi))
    kl = 0.5 * ((loc - nu) ** 2 + var_nu + var - 1 - log_var)
    return log_px_z.sum(-1) - kl.sum(-1) - kl_by_hand(posterior) / dataset_size


def kl_by_hand(posterior: WeightPosterior) -> Array:
    means = {name: posterior.mean.weights[name] for name in posterior.log_scale}
    terms = jax.tree.map(
        lambda m, s: 0.5 * (jnp.exp(2 * s) + m**2 - 1 - 2 * s).sum(), means, posterior.log_scale
    )
    return jax.tree.reduce(jnp.add, terms)


@dataclasses.dataclass(frozen=True)
class MeanModel:
    """x ~ N(b, s² I), b ~ N(0, I): what is left of a VAE whose decoder sees nothing of z.

    Its q(z|x) is p(z), so that the only latent variable is b, whose posterior is diagonal.
    """

    x: np.ndarray
    s: float = 0.8

    def posterior(self, loc: np.ndarray, scale: float) -> WeightPosterior:
        """q(b) = N(loc, scale² I)."""
        dim = self.x.shape[1]
        model = jvae.VAE.mlp((dim,), 1, hidden=(), likelihood=jvae.Gaussian(scale=self.s))
        model = dataclasses.replace(model, decoder=WithoutInput(model.decoder))
        params = jax.tree.map(jnp.zeros_like, random_params(model))
        params.weights["decoder"]["params"]["output"]["bias"] = jnp.asarray(loc, jnp.float32)
        return weight_posterior(params, scale=scale)

    @property
    def exact(self) -> tuple[np.ndarray, float]:
        """Mean and standard deviation of b's posterior."""
        precision = 1 + len(self.x) / self.s**2
        return self.x.sum(axis=0) / self.s**2 / precision, precision**-0.5

    @property
    def log_evidence(self) -> float:
        """log p(X): each dimension's column is N(0, s² I + 1 1ᵀ)."""
        num = len(self.x)
        covariance = self.s**2 * np.eye(num) + 1
        square = np.einsum("nd,nm,md->", self.x, np.linalg.inv(covariance), self.x)
        log_det = np.linalg.slogdet(2 * math.pi * covariance)[1]
        return -0.5 * (square + self.x.shape[1] * log_det)


@pytest.fixture(scope="module")
def mean_model() -> MeanModel:
    return MeanModel(np.random.default_rng(2).normal(0.7, 1.0, size=(6, 2)))


@functools.cache
def drawing(bound: Bound, dataset_size: int) -> Bound:
    one = functools.partial(bound, dataset_size=dataset_size)
    return jax.jit(jax.vmap(one, in_axes=(None, None, 0)))


def draws_of(
    bound: Bound, posterior: WeightPosterior, x: np.ndarray, dataset_size: int
) -> np.ndarray:
    """Values [draw, batch]."""
    keys = jax.random.split(KEY, NUM_DRAWS)
    values = drawing(bound, dataset_size)(posterior, jnp.asarray(x, jnp.float32), keys)
    return np.asarray(values, np.float64)


# Expectations.


@both_bounds
def test_values_and_gradients_have_their_exact_means(bound: Bound) -> None:
    posterior, num = linear_posterior(), 7
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3)), jnp.float32)
    one = functools.partial(bound, dataset_size=num, num_samples=2)

    def total(posterior: WeightPosterior, key: PRNGKeyArray) -> tuple[Array, Array]:
        values = one(posterior, x, key)
        return values.sum(), values

    keys = jax.random.split(KEY, NUM_DRAWS)
    draws = jax.jit(jax.vmap(jax.grad(total, has_aux=True), in_axes=(None, 0)))
    gradients, values = draws(posterior, keys)
    assert_mean_is(values, expected_bound(posterior, x, num))
    exact = jax.grad(lambda q: expected_bound(q, x, num).sum())(posterior)
    for found, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(exact), strict=True):
        assert_mean_is(found, expected)


@both_bounds
@pytest.mark.parametrize(
    ("W", "b", "scale"), [(0.9, 0.2, 0.2), (-1.5, 1.0, 0.6), (0.1, -0.5, 1.0)], ids=str
)
def test_the_gap_to_the_evidence_is_that_of_theory(
    bound: Bound, W: float, b: float, scale: float
) -> None:
    """log p(X) - bound = KL(q(θ) ‖ p(θ|X)) + E_q(θ) Σᵢ KL(q(z|xᵢ) ‖ p(z|xᵢ, θ)), all by quadrature.

    A whole VAE, x ~ N(W z + b, s²), with one data and one latent dimension.
    """
    s, x = 0.7, np.array([-1.2, 0.1, 0.4, 1.9, 2.3])
    params = linear_gaussian.make(1, 1, s)
    params = linear_gaussian.with_decoder(params, np.array([[W]]), np.array([b]))
    q_z = linear_gaussian.Exact.of(params).q(x[:, None])
    posterior = weight_posterior(params, scale=scale)

    def log_joint(W: np.ndarray, b: np.ndarray) -> np.ndarray:
        """log p(X, θ) on a grid."""
        var = W[..., None] ** 2 + s**2
        log_px = -0.5 * ((x - b[..., None]) ** 2 / var + np.log(2 * math.pi * var))
        return log_px.sum(-1) - 0.5 * (W**2 + b**2) - math.log(2 * math.pi)

    grid = np.linspace(-9, 9, 901)
    on_grid = log_joint(*np.meshgrid(grid, grid, indexing="ij"))
    log_evidence = np.log(np.exp(on_grid).sum()) + 2 * np.log(grid[1] - grid[0])

    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    eps_W, eps_b = np.meshgrid(nodes, nodes, indexing="ij")
    weights = np.outer(weights, weights) / (2 * math.pi)
    at_W, at_b = W + scale * eps_W, b + scale * eps_b
    log_q = -0.5 * (eps_W**2 + eps_b**2) - math.log(2 * math.pi * scale**2)
    kl = (weights * (log_q - log_joint(at_W, at_b))).sum() + log_evidence
    var = 1 / (1 + at_W[..., None] ** 2 / s**2)
    mean = var * at_W[..., None] * (x - at_b[..., None]) / s**2
    loc, sd = (part[:, 0] for part in q_z)
    kl_z = 0.5 * ((sd**2 + (loc - mean) ** 2) / var - 1 - np.log(sd**2 / var))
    gap = kl + (weights[..., None] * kl_z).sum()
    assert kl > 0
    assert gap > kl

    values = draws_of(bound, posterior, x[:, None], dataset_size=5)
    assert_mean_is(values.sum(axis=1), log_evidence - gap)


@both_bounds
@pytest.mark.parametrize(
    ("shift", "inflation"), [(0.0, 1.0), (0.3, 1.0), (0.0, 0.5), (0.2, 2.0)], ids=str
)
def test_the_bound_is_the_evidence_where_q_is_the_posterior(
    bound: Bound, shift: float, inflation: float, mean_model: MeanModel
) -> None:
    loc, scale = mean_model.exact
    posterior = mean_model.posterior(loc + shift, scale * inflation)
    gap = 2 * 0.5 * (inflation**2 + (shift / scale) ** 2 - 1 - 2 * math.log(inflation))
    values = draws_of(bound, posterior, mean_model.x, dataset_size=6)
    assert_mean_is(values.sum(axis=1), mean_model.log_evidence - gap)


# Variances.


def variance_with_one_draw(model: MeanModel, x: np.ndarray, loc: np.ndarray, scale: float) -> float:
    """Of the mean over x of log N(x; b, s² I), b ~ N(loc, scale² I)."""
    square = scale**2 * (x.mean(axis=0) - loc) ** 2
    return float((0.5 * scale**4 + square).sum() / model.s**4)


def variance_with_local_draws(
    model: MeanModel, x: np.ndarray, loc: np.ndarray, scale: float
) -> float:
    """The same with a b for each of x."""
    each = [variance_with_one_draw(model, row[None], loc, scale) for row in x]
    return float(np.mean(each)) / len(x)


@pytest.mark.parametrize(
    ("bound", "variance"),
    [
        (full_bayes_bound, variance_with_one_draw),
        (local_full_bayes_bound, variance_with_local_draws),
    ],
    ids=["one draw", "local"],
)
def test_variances_are_exact(
    bound: Bound, variance: Callable[..., float], mean_model: MeanModel
) -> None:
    """Of values and of gradients, which in μ are local noise's over M exactly."""
    loc, scale = np.array([0.1, -0.3]), 0.4
    posterior = mean_model.posterior(loc, scale)
    x = jnp.asarray(mean_model.x, jnp.float32)

    def mean(posterior: WeightPosterior, key: PRNGKeyArray) -> Array:
        return bound(posterior, x, key, dataset_size=6).mean()

    keys = jax.random.split(KEY, NUM_DRAWS)
    draws = jax.jit(jax.vmap(jax.value_and_grad(mean), in_axes=(None, 0)))
    values, gradients = jax.tree.map(np.asarray, draws(posterior, keys))

    rows = mean_model.x.mean(axis=0)[None] if bound is full_bayes_bound else mean_model.x
    s, num = mean_model.s, len(rows)
    square = ((rows - loc) ** 2).mean(axis=0)
    by_hand = {
        "value": variance(mean_model, mean_model.x, loc, scale),
        "mean": np.full(2, scale**2 / s**4 / num),
        "log_scale": scale**2 * (square + 2 * scale**2) / s**4 / num,
    }
    found = {
        "value": values,
        "mean": gradients.mean.weights["decoder"]["params"]["output"]["bias"],
        "log_scale": gradients.log_scale["decoder"]["params"]["output"]["bias"],
    }
    for name, expected in by_hand.items():
        centred = found[name] - found[name].astype(np.float64).mean(axis=0)
        assert_mean_is(centred**2, expected)


@pytest.mark.parametrize("at_once", [1, 2, 5], ids=lambda num: f"{num} at once")
def test_every_draw_has_local_noise_of_its_own(
    at_once: int, mean_model: MeanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where draws of z are taken in chunks: a fifth of one draw's variance, of five draws."""
    monkeypatch.setattr(sampling, "BYTES_AT_ONCE", 4 * mean_model.x.size * at_once)
    loc, scale = np.array([0.1, -0.3]), 0.4
    posterior, x = mean_model.posterior(loc, scale), jnp.asarray(mean_model.x, jnp.float32)

    def mean(key: PRNGKeyArray) -> Array:
        return local_full_bayes_bound(posterior, x, key, dataset_size=6, num_samples=5).mean()

    values = np.asarray(jax.jit(jax.vmap(mean))(jax.random.split(KEY, NUM_DRAWS)), np.float64)
    variance = variance_with_local_draws(mean_model, mean_model.x, loc, scale) / 5
    assert_mean_is((values - values.mean()) ** 2, variance)


def test_no_two_layers_of_two_draws_have_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()

    def normal(key: PRNGKeyArray, *shape_and_dtype: Any) -> Array:
        used.add(jax.random.key_data(key).tobytes())
        return threefry.normal(key, *shape_and_dtype)

    monkeypatch.setattr(noisy_layers, "threefry", SimpleNamespace(normal=normal))
    decoder = jvae.VAE.mlp((4,), latent_dim=2, hidden=(3, 3)).decoder
    z = jnp.zeros((1, 2))
    mean = decoder.init(KEY, z)
    log_scale = jax.tree.map(jnp.zeros_like, mean)
    for first in map(jnp.int32, range(6)):
        weights = noisy_layers.NoisyWeights(mean, log_scale, KEY, first)
        noisy_layers.NoisyDecoder(decoder, (4,)).apply(weights, z)
    assert len(used) == 6 * 3


def test_local_noise_is_less_by_what_the_examples_of_a_batch_share(mean_model: MeanModel) -> None:
    """Over random batches of M: less by (1 - 1 / M) Var_θ(mean over the data), as documented."""
    loc, scale, num = np.array([0.1, -0.3]), 0.4, 3
    posterior = mean_model.posterior(loc, scale)
    data = jnp.asarray(mean_model.x, jnp.float32)

    def means(key: PRNGKeyArray) -> list[Array]:
        batch_key, key = jax.random.split(key)
        x = data[jax.random.randint(batch_key, (num,), 0, len(data))]
        return [bound(posterior, x, key, dataset_size=6).mean() for bound in BOUNDS]

    one, local = jax.jit(jax.vmap(means))(jax.random.split(KEY, 2 * NUM_DRAWS))
    squares = [(values - values.mean()) ** 2 for values in map(np.asarray, (one, local))]
    shared = variance_with_one_draw(mean_model, mean_model.x, loc, scale)
    assert_mean_is(squares[0] - squares[1], (1 - 1 / num) * shared)


def test_an_example_has_one_law_and_a_batch_has_two() -> None:
    """With hidden layers too: the same mean and variance, and copies of an example independent."""
    model = jvae.VAE.mlp((4,), latent_dim=2, hidden=(3,))
    posterior = with_spread(random_params(model, scale=1.0), low=0.5, high=1.0)
    x = np.tile(np.array([1.0, 0.0, 1.0, 1.0]), (2, 1))
    one, local = (draws_of(bound, posterior, x, dataset_size=10) for bound in BOUNDS)
    centre = one.mean()
    for power in (1, 2):
        (found, error), (expected, other) = (
            mean_and_error((values[:, 0] - centre) ** power) for values in (local, one)
        )
        assert abs(found - expected) < SIGMAS * math.hypot(error, other)
    assert_mean_is((local[:, 0] - local.mean()) * (local[:, 1] - local.mean()), 0.0)
    shared, error = mean_and_error((one[:, 0] - centre) * (one[:, 1] - centre))
    assert shared > 10 * error


# q(θ).


def test_kl_is_that_of_numpyro() -> None:
    posterior = with_spread(random_params(jvae.VAE.mlp((2, 3), 2, hidden=(4,))), high=2.0)
    expected = 0.0
    for mean, log_scale in zip(
        jax.tree.leaves(posterior.mean.weights["decoder"]),
        jax.tree.leaves(posterior.log_scale),
        strict=True,
    ):
        q = dist.Normal(np.asarray(mean), np.exp(log_scale))
        expected += float(dist.kl_divergence(q, dist.Normal(0.0, 1.0)).sum())
    assert float(jax.jit(kl_of_weights)(posterior)) == pytest.approx(expected, rel=1e-5)


def test_draws_of_weights_are_independent_with_their_scales() -> None:
    posterior = linear_posterior()
    draw = jax.jit(jax.vmap(sample_weights, in_axes=(None, 0)))
    draws = draw(posterior, jax.random.split(KEY, 20_000))
    for leaf, own in zip(
        jax.tree.leaves(draws.weights["encoder"]),
        jax.tree.leaves(posterior.mean.weights["encoder"]),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf, jnp.broadcast_to(own[None], leaf.shape))
    noises = []
    for name, log_scale in posterior.log_scale.items():
        noise = jax.tree.map(
            lambda drawn, mean, s: ((drawn - mean[None]) / jnp.exp(s)[None]).reshape(20_000, -1),
            draws.weights[name],
            posterior.mean.weights[name],
            log_scale,
        )
        noises += jax.tree.leaves(noise)
    zeta = np.concatenate(noises, axis=1).astype(np.float64)
    assert zeta.shape[1] == 3 * 2 + 3 + 2
    assert_mean_is(zeta, np.zeros(11))
    assert_mean_is(zeta[:, :, None] * zeta[:, None], np.eye(11))


def test_a_posterior_is_made_around_weights() -> None:
    params = linear_gaussian.make(3, 2, 1.0)
    posterior = weight_posterior(params, scale=0.2)
    assert posterior.mean is params
    assert posterior.log_scale.keys() == {"decoder", "prior"}
    for leaf in jax.tree.leaves(posterior.log_scale):
        np.testing.assert_allclose(np.exp(leaf), 0.2, rtol=1e-6)


# The limit of points.


def without_noise_of_z() -> jvae.Params:
    """q(z|x) with σ = e⁻³⁰, so that z is its mean in float32."""
    params = linear_gaussian.make(3, 2, 0.8)
    exact = linear_gaussian.Exact.of(params)
    return linear_gaussian.with_encoder(params, exact.A, exact.a, 0 * exact.B, np.full(2, -60.0))


@both_bounds
def test_without_a_spread_it_is_the_map_criterion(bound: Bound) -> None:
    """N times the mean bound is Σ ELBO + log p(θ) + H(q), of which H alone tends to -∞."""
    params, scale, num = without_noise_of_z(), 1e-12, 7
    x = jnp.asarray(np.random.default_rng(4).normal(size=(5, 3)), jnp.float32)
    posterior = weight_posterior(params, scale=scale)
    theta = np.concatenate(
        [np.ravel(leaf) for leaf in jax.tree.leaves(params.weights["decoder"])]
    ).astype(np.float64)
    log_prior = -0.5 * (theta**2 + math.log(2 * math.pi)).sum()
    entropy = theta.size * (0.5 * math.log(2 * math.pi * math.e) + math.log(scale))
    expected = jax.jit(jvae.elbo)(params, x, KEY) + (log_prior + entropy) / num
    found = jax.jit(functools.partial(bound, dataset_size=num))(posterior, x, KEY)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@both_bounds
def test_without_a_spread_a_step_is_that_of_map(bound: Bound) -> None:
    params, num = without_noise_of_z(), 7
    x = jnp.asarray(np.random.default_rng(4).normal(size=(5, 3)), jnp.float32)
    map_learner = aevb.make_learner(training.make_optimizer("sgd", 0.1, map_dataset_size=num))
    expected, _ = map_learner.step(map_learner.init(params, KEY), x)
    learner = full_bayes.make_learner(
        optax.sgd(0.1), dataset_size=num, bound=bound, initial_scale=1e-12
    )
    state, _ = learner.step(learner.init(params, KEY), x)
    for found, other, before in zip(
        *map(jax.tree.leaves, (state.params.mean, expected.params, params)), strict=True
    ):
        np.testing.assert_allclose(found, other, rtol=1e-5, atol=1e-6)
        assert np.abs(np.asarray(other) - np.asarray(before)).max() > 1e-3 or before.size == 0


# Learning.


@both_bounds
def test_the_learner_finds_the_posterior(bound: Bound) -> None:
    x = np.random.default_rng(2).normal(0.7, 1.0, size=(60, 2)).astype(np.float32)
    model = MeanModel(x.astype(np.float64))
    start = model.posterior(np.zeros(2), 0.1).mean
    num_steps = 1500
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, num_steps))
    learner = full_bayes.make_learner(optimizer, dataset_size=60, bound=bound)
    epoch = training.make_epoch(learner.step, batch_size=60)
    state = training.ensemble([learner.init(start, jax.random.key(seed)) for seed in (1, 2)])
    state, _ = epoch(state, x, np.tile(np.arange(60, dtype=np.int32), (num_steps, 1)))
    loc, scale = model.exact
    for member in training.members(state):
        found = jax.tree.map(np.asarray, member.params)
        bias = found.mean.weights["decoder"]["params"]["output"]["bias"]
        own = np.exp(found.log_scale["decoder"]["params"]["output"]["bias"])
        ratio = own / scale
        gap = 0.5 * (ratio**2 + ((bias - loc) / scale) ** 2 - 1 - 2 * np.log(ratio)).sum()
        assert gap < 0.1  # nats; it starts above 50


def test_members_of_an_ensemble_learn_as_alone() -> None:
    learner = full_bayes.make_learner(optax.adam(0.1), dataset_size=12)
    epoch = training.make_epoch(learner.step, batch_size=4)
    x = np.random.default_rng(4).normal(size=(12, 3)).astype(np.float32)
    states = [
        learner.init(linear_gaussian.make(3, 2, 1.0, seed=seed), jax.random.key(seed))
        for seed in (1, 2)
    ]
    together, info = epoch(training.ensemble(states), x)
    for i, (member, state) in enumerate(zip(training.members(together), states, strict=True)):
        alone, own = epoch(state, x)
        np.testing.assert_allclose(info.bound[:, i], own.bound, rtol=1e-5)
        for a, b in zip(*map(jax.tree.leaves, (member.params, alone.params)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_map_prior_beside_q_is_refused() -> None:
    optimizer = training.make_optimizer("adam", 0.1, map_dataset_size=10)
    learner = full_bayes.make_learner(optimizer, dataset_size=10)
    with pytest.raises(TypeError, match=r"one on jvae\.Params, got WeightPosterior: a learner"):
        learner.init(linear_gaussian.make(3, 2, 1.0), KEY)


# The bound of new examples.


def test_the_held_out_bound_is_the_elbo_under_q() -> None:
    posterior = linear_posterior()
    x = jnp.asarray(np.random.default_rng(3).normal(size=(3, 3)), jnp.float32)
    held_out = functools.partial(held_out_bound, posterior, x, num_weights=2, batch_size=2)
    values = jax.jit(jax.vmap(held_out))(jax.random.split(KEY, 5000))
    assert values.shape == (5000, 2, 3)
    without_kl = expected_bound(posterior, x, 1) + kl_by_hand(posterior)
    assert_mean_is(values.reshape(-1, 3), without_kl)


def test_all_new_examples_are_seen_with_the_same_weights(mean_model: MeanModel) -> None:
    posterior = mean_model.posterior(np.zeros(2), 0.5)
    x = jnp.asarray(np.tile(mean_model.x[:1], (4, 1)), jnp.float32)
    values = np.asarray(held_out_bound(posterior, x, KEY, num_weights=3))
    np.testing.assert_allclose(values, np.tile(values[:, :1], (1, 4)), rtol=1e-6)
    assert len(np.unique(values[:, 0])) == 3


# Shapes and refusals.


def shape_of(bound: Bound, posterior: WeightPosterior, x: Array) -> tuple[int, ...]:
    return jax.eval_shape(functools.partial(bound, dataset_size=5), posterior, x, KEY).shape


@both_bounds
def test_batches_of_any_rank(bound: Bound) -> None:
    for batch in ((2, 3), (2,), ()):
        assert shape_of(bound, linear_posterior(), jnp.ones((*batch, 3))) == batch


class Convolution(nn.Module):
    """A dense layer, and a convolution of its outputs."""

    @nn.compact
    def __call__(self, z: Array) -> Any:
        h = nn.Dense(4)(z)[..., None]
        return distributions.Bernoulli(nn.Conv(1, (2,))(h)[..., 0])


class Twice(nn.Module):
    """A layer that is called twice."""

    @nn.compact
    def __call__(self, z: Array) -> Any:
        dense = nn.Dense(z.shape[-1])
        return distributions.Bernoulli(nn.Dense(4)(dense(dense(z))))


class EachPixel(nn.Module):
    """A layer that every pixel of an example is given to."""

    @nn.compact
    def __call__(self, z: Array) -> Any:
        h = nn.Dense(4)(z)[..., None]
        return distributions.Bernoulli(nn.Dense(1)(h)[..., 0])


class Copies(nn.Module):
    """Many layers in one, over a new axis."""

    @nn.compact
    def __call__(self, z: Array) -> Any:
        layers = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None,
            axis_size=4, out_axes=-1,
        )  # fmt: skip
        return distributions.Bernoulli(layers(1)(z)[..., 0, :])


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (Convolution(), "this one has the weights params/Conv_0/bias, params/Conv_0/kernel: use"),
        (Twice(), "this one calls its layer params/Dense_0 in another way: use"),
        (EachPixel(), "applies params/Dense_1 to 12 rows for 3 of z: use full_bayes_bound"),
        (Copies(), "use full_bayes_bound"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_local_noise_is_refused_where_it_would_be_wrong(decoder: Any, message: str) -> None:
    model = dataclasses.replace(jvae.VAE.mlp((4,), 2, hidden=(3,)), decoder=decoder)
    posterior = weight_posterior(random_params(model))
    assert shape_of(full_bayes_bound, posterior, jnp.ones((3, 4))) == (3,)
    with pytest.raises(ValueError, match=message):
        shape_of(local_full_bayes_bound, posterior, jnp.ones((3, 4)))


@pytest.mark.parametrize("scale", [1e-12, 0.1])
def test_layers_without_bias_and_input_have_finite_gradients(scale: float) -> None:
    """Where h is 0 throughout, a layer's outputs have no variance."""

    class NoBias(nn.Module):
        @nn.compact
        def __call__(self, z: Array) -> Any:
            return distributions.Bernoulli(nn.Dense(4, use_bias=False)(jax.nn.relu(0 * z)))

    model = dataclasses.replace(jvae.VAE.mlp((4,), 2, hidden=(3,)), decoder=NoBias())
    posterior = weight_posterior(random_params(model), scale=scale)

    def total(posterior: WeightPosterior) -> Array:
        return local_full_bayes_bound(posterior, jnp.ones((3, 4)), KEY, dataset_size=5).sum()

    gradient = jax.jit(jax.grad(total))(posterior)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@both_bounds
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"key": jax.random.key_data(KEY)}, TypeError, "key must be a typed key"),
        ({"dataset_size": 0}, ValueError, "dataset_size must be at least 1, got 0"),
        ({"dataset_size": 1.5}, TypeError, "dataset_size must be a static int, got float"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
    ],
    ids=str,
)
def test_wrong_arguments(
    bound: Bound, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"x": jnp.ones(3), "key": KEY, "dataset_size": 5} | settings
    with pytest.raises(error, match=message):
        bound(linear_posterior(), **arguments)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_is_positive_and_finite(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be finite and at least"):
        weight_posterior(linear_gaussian.make(3, 2, 1.0), scale=scale)
