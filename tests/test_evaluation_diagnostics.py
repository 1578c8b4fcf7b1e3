import math
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import linear_gaussian
import numpy as np
import pytest
from jaxtyping import Array
from linear_gaussian import Exact
from scipy import special
from standard_errors import SIGMAS, assert_mean_is, mean_and_error

import jvae
from jvae import evaluation
from jvae.evaluation.gaps import encoder_family

KEY = jax.random.key(3)


def data(dim: int, num: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(num, dim)).astype(np.float32)


def with_dead_latent() -> jvae.Params:
    """Three latents, of which q has the prior for the second, whatever x is."""
    params = linear_gaussian.make(5, 3, 1.0)
    exact = Exact.of(params)
    alive = np.array([1.0, 0.0, 1.0])
    A, a, B, c = (alive * part.T for part in (exact.A, exact.a, exact.B, exact.c))
    return linear_gaussian.with_encoder(params, A.T, a.T, B.T, c.T)


def kl_terms(params: jvae.Params, x: np.ndarray) -> np.ndarray:
    loc, scale = Exact.of(params).q(x)
    return np.asarray(0.5 * (loc**2 + scale**2 - 1) - np.log(scale))


@pytest.mark.parametrize("batch", [(30,), (5, 6)])
def test_active_units_are_those_whose_mean_varies(batch: tuple[int, ...]) -> None:
    params, x = with_dead_latent(), data(5, 30)
    given = jnp.asarray(x.reshape(*batch, 5))
    assert evaluation.active_units(params, given).tolist() == [True, False, True]
    variance = Exact.of(params).q(x)[0].var(axis=0)
    for threshold in (0.999 * variance[0], 1.001 * variance[0], 0.999 * variance[2]):
        active = evaluation.active_units(params, given, threshold=float(threshold))
        assert active.tolist() == (variance > threshold).tolist()


def test_a_constant_mean_of_some_size_is_inactive() -> None:
    params = with_dead_latent()
    exact = Exact.of(params)
    params = linear_gaussian.with_encoder(
        params, exact.A, exact.a + np.array([0, 100.0, 0]), exact.B, exact.c
    )
    assert evaluation.active_units(params, data(5, 30)).tolist() == [True, False, True]
    assert not evaluation.collapsed_dimensions(params, data(5, 30)).any()


def test_kl_of_every_latent() -> None:
    params, x = with_dead_latent(), data(5, 30)
    expected = kl_terms(params, x).mean(axis=0)
    kl = evaluation.kl_per_dimension(params, jnp.asarray(x.reshape(5, 6, 5)))
    np.testing.assert_allclose(kl, expected, rtol=1e-5, atol=1e-6)
    assert evaluation.collapsed_dimensions(params, x).tolist() == [False, True, False]
    threshold = float(1.001 * expected[0])
    collapsed = evaluation.collapsed_dimensions(params, x, threshold=threshold)
    assert collapsed.tolist() == (expected < threshold).tolist()


def test_the_mean_kl_is_mutual_information_and_marginal_kl() -> None:
    """Against quadrature: of one latent q(z) is a mixture on a line."""
    params, x = linear_gaussian.make(3, 1, 1.0), data(3, 12)
    loc, scale = (part[:, 0] for part in Exact.of(params).q(x))
    z = np.linspace(-30, 30, 200_001)
    log_q = -0.5 * ((z[:, None] - loc) / scale) ** 2 - np.log(scale * math.sqrt(2 * math.pi))
    log_qz = special.logsumexp(log_q, axis=1) - math.log(12)
    log_pz = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    width = z[1] - z[0]
    entropy = 0.5 * np.log(2 * math.pi * math.e * scale**2).mean()
    mutual_information = -(np.exp(log_qz) * log_qz).sum() * width - entropy
    marginal_kl = (np.exp(log_qz) * (log_qz - log_pz)).sum() * width
    np.testing.assert_allclose(
        mutual_information + marginal_kl, kl_terms(params, x).mean(), rtol=1e-6
    )
    assert min(mutual_information, marginal_kl) > 0.1

    keys = jax.random.split(KEY, 3000)
    decomposition = partial(evaluation.kl_decomposition, num_samples=2)
    parts = jax.jit(jax.vmap(decomposition, (None, None, 0)))(params, jnp.asarray(x), keys)
    assert_mean_is(parts.mutual_information.mean(axis=1), mutual_information)
    assert_mean_is(parts.marginal_kl.mean(axis=1), marginal_kl)


@pytest.mark.parametrize("num", [2, 10])
def test_of_the_population_mutual_information_is_more_and_the_marginal_kl_less(num: int) -> None:
    """With x ~ N(b, Σ) the aggregate posterior is a Gaussian, and both are known."""
    params = linear_gaussian.make(3, 2, 1.0)
    exact = Exact.of(params)
    zeros, c = np.zeros((2, 3)), np.full(2, -1.0)
    params = linear_gaussian.with_encoder(params, exact.A, exact.a, zeros, c)
    Sigma = exact.W @ exact.W.T + exact.sigma**2 * np.eye(3)
    mean = exact.A @ exact.b + exact.a
    covariance = exact.A @ Sigma @ exact.A.T + np.diag(np.exp(c))
    log_det = np.linalg.slogdet(covariance)[1]
    mutual_information = 0.5 * (log_det - c.sum())
    marginal_kl = 0.5 * (np.trace(covariance) + mean @ mean - 2 - log_det)

    sets = np.random.default_rng(1).multivariate_normal(exact.b, Sigma, (3000, num))
    keys = jax.random.split(KEY, len(sets))
    decomposition = jax.jit(jax.vmap(evaluation.kl_decomposition, (None, 0, 0)))
    parts = decomposition(params, jnp.asarray(sets, jnp.float32), keys)
    (low, low_error), (high, high_error) = (mean_and_error(part.mean(axis=1)) for part in parts)
    assert low < mutual_information - SIGMAS * low_error
    assert high > marginal_kl + SIGMAS * high_error
    # By as much: their sum has no bias.
    assert_mean_is(sum(parts).mean(axis=1), mutual_information + marginal_kl)


def test_the_two_ends_of_mutual_information() -> None:
    params, x = linear_gaussian.make(3, 2, 1.0), data(3, 50).reshape(5, 10, 3)
    A, a, zeros = 1000 * Exact.of(params).A, np.zeros(2), np.zeros((2, 3))
    # Posteriors that tell every example from every other: log N, exactly.
    telling = linear_gaussian.with_encoder(params, A, a, zeros, np.full(2, -4.0))
    parts = evaluation.kl_decomposition(telling, jnp.asarray(x), KEY)
    assert parts.mutual_information.shape == parts.marginal_kl.shape == (5, 10)
    np.testing.assert_allclose(parts.mutual_information, math.log(50), atol=5e-3)
    # Posteriors that are all one: nothing.
    silent = linear_gaussian.with_encoder(params, zeros, a + 1, zeros, np.full(2, -1.0))
    parts = evaluation.kl_decomposition(silent, jnp.asarray(x), KEY, num_samples=3)
    np.testing.assert_allclose(parts.mutual_information, 0, atol=1e-5)


def correlated() -> jvae.Params:
    """Columns of W that are almost one, so that p(z|x) is far from diagonal."""
    params = linear_gaussian.make(4, 2, 1.0)
    exact = Exact.of(params)
    W = exact.W[:, :1] + 0.3 * exact.W
    return linear_gaussian.with_decoder(params, W, exact.b)


def gap(params: jvae.Params, x: np.ndarray, family: Any) -> evaluation.InferenceGap:
    log_px = jnp.asarray(Exact.of(params).log_px(x), jnp.float32)
    return evaluation.inference_gap(params, jnp.asarray(x), KEY, log_px, family=family)


def test_the_gap_of_diagonal_gaussians() -> None:
    """The best diagonal q has the posterior's mean and 1 / Λⱼⱼ: KL = ½ (Σ log Λⱼⱼ - log det Λ)."""
    params, x = correlated(), data(4, 3)
    exact = Exact.of(params)
    precision = np.linalg.inv(exact.posterior_covariance)
    approximation = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    assert approximation > 0.1
    found = gap(params, x, encoder_family)
    # log w at the optimum is -½ εᵀ R ε + ½ εᵀ ε, R of unit diagonal: its variance is ½ ‖R - I‖².
    R = precision / np.sqrt(np.outer(np.diag(precision), np.diag(precision)))
    error = math.sqrt(0.5 * ((R - np.eye(2)) ** 2).sum() / 1000)
    # What the ascent leaves is of second order in a step of Adam.
    slack = SIGMAS * error + 0.003
    np.testing.assert_allclose(found.approximation, approximation, atol=slack)
    # The amortisation gap is the rest, of which no part depends on the family but for its best q.
    in_full = gap(params, x, evaluation.full_covariance)
    total, total_in_full = np.sum(found, axis=0), np.sum(in_full, axis=0)
    np.testing.assert_allclose(total, total_in_full, atol=1e-4)
    keys = jax.random.split(KEY, 2000)
    log_w = jax.jit(jax.vmap(jvae.sgvb_a, (None, None, 0)))(params, jnp.asarray(x), keys)
    error = np.asarray(log_w).std(axis=0) / math.sqrt(1000)
    np.testing.assert_array_less(np.abs(total - exact.kl_to_posterior(x)), SIGMAS * error)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_family_that_holds_the_posterior_closes_the_gap(diagonal: bool) -> None:
    params, x = correlated(), data(4, 3)
    family: Any = evaluation.full_covariance
    if diagonal:
        exact = Exact.of(linear_gaussian.with_posterior(params))
        params = linear_gaussian.with_decoder(params, exact.W, exact.b)
        family = encoder_family
    found = gap(params, x, family)
    assert (Exact.of(params).kl_to_posterior(x) > 0.2).all()
    # The path derivative has no noise there: what is left is rounding.
    np.testing.assert_allclose(found.approximation, 0, atol=1e-4)


def test_the_gap_of_a_batch_and_of_an_estimate_of_another_shape() -> None:
    params, x = linear_gaussian.make(3, 2, 1.0), jnp.asarray(data(3, 6))
    few = partial(evaluation.inference_gap, num_steps=2, num_samples=3)

    def shapes(x: Array, log_px: Array) -> list[tuple[int, ...]]:
        return [part.shape for part in jax.eval_shape(few, params, x, KEY, log_px)]

    assert shapes(x.reshape(2, 3, 3), jnp.zeros((2, 3))) == [(2, 3)] * 2
    assert shapes(x[0], jnp.zeros(())) == [()] * 2
    with pytest.raises(ValueError, match=r"shape \(6,\) of the batch, got \(2, 3\)"):
        shapes(x, jnp.zeros((2, 3)))


@pytest.mark.usefixtures("unchecked")
def test_log_px_may_be_a_list_of_the_right_length() -> None:
    params, x = linear_gaussian.make(3, 2, 1.0), jnp.asarray(data(3, 2))
    few = partial(evaluation.inference_gap, params, x, KEY, num_steps=2, num_samples=3)
    given: Any = [-3.0, -4.0]
    for a, b in zip(few(given), few(jnp.asarray(given)), strict=True):
        np.testing.assert_array_equal(a, b)
    longer: Any = [*given, -5.0]
    with pytest.raises(ValueError, match=r"shape \(2,\) of the batch, got \(3,\)"):
        few(longer)


def test_an_estimate_that_is_too_low_takes_the_gap_below_zero() -> None:
    """Of a q that is wider than the posterior, from one sample: E[log w] is the ELBO."""
    params = linear_gaussian.with_posterior(linear_gaussian.make(4, 2, 1.0), inflation=3.0)
    x = data(4, 200)
    exact = Exact.of(params)
    one = evaluation.importance_sampling(params, jnp.asarray(x), KEY, num_samples=1)
    few = partial(evaluation.inference_gap, num_steps=400, num_samples=16)
    gap = jax.jit(few)(params, jnp.asarray(x), jax.random.key(8), one.estimate)
    # The family holds the posterior, so that the true gap is 0; the encoder's is all of the KL.
    mean, error = mean_and_error(gap.approximation)
    kl = exact.kl_to_posterior(x).mean()
    assert abs(mean + kl) < SIGMAS * error
    assert mean < -SIGMAS * error
    with pytest.warns(UserWarning, match="log_px is too low") as caught:
        evaluation.warn_if_negative(gap)
    (warning,) = caught
    assert str(warning.message).startswith(
        f"the mean approximation gap of the encoder's family is {mean:.3g} ± {error:.2g} nats"
    )


@pytest.mark.parametrize(
    ("approximation", "amortisation", "warned"),
    [
        ([0.0, 0.0], [0.0, 0.0], []),
        ([-1.0, 1.5], [-2.0, 2.5], []),  # single ones may be, by noise
        ([-1.0, 0.5], [0.0, 1.0], ["approximation gap of full is -0.25 ± 0.75 nats"]),
        ([1.0, 1.0], [-1.0, 0.0], ["amortisation gap of full is -0.5 ± 0.5 nats"]),
        ([-1.0], [-2.0], ["gap of full is -1 ± inf nats", "gap of full is -2 ± inf nats"]),
        ([math.nan, 1.0], [1.0, 1.0], ["approximation gap of full is nan"]),
    ],
)
def test_a_mean_gap_below_zero_warns(
    approximation: list[float], amortisation: list[float], warned: list[str]
) -> None:
    gap = evaluation.InferenceGap(jnp.asarray(approximation), jnp.asarray(amortisation))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluation.warn_if_negative(gap, family="full")
    assert len(caught) == len(warned)
    for warning, text in zip(caught, warned, strict=True):
        assert text in str(warning.message)


@pytest.mark.usefixtures("unchecked")
def test_a_posterior_without_kl_of_every_latent_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = linear_gaussian.make(3, 2, 1.0)
    monkeypatch.delattr(jvae.distributions.DiagonalGaussian, "kl_per_dim")
    jax.clear_caches()
    with pytest.raises(TypeError, match="no closed-form KL of every latent"):
        evaluation.kl_per_dimension(params, data(3, 7))
