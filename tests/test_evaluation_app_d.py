import warnings
from functools import partial

import jax
import jax.numpy as jnp
import linear_gaussian
import numpy as np
import pytest
from jaxtyping import Array
from linear_gaussian import Exact
from scipy import stats
from standard_errors import assert_mean_is

import jvae
from jvae import evaluation
from jvae.evaluation.posterior_samples import hmc_samples

KEY = jax.random.key(3)


def data(dim: int, num: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(num, dim)).astype(np.float32)


def test_the_mean_in_brackets_is_unbiased() -> None:
    """E[1 / p̂(x)] = 1 / p(x), which samples used both to fit and to evaluate q would miss."""
    params, x = linear_gaussian.make(4, 2, 1.0), data(4, 2)
    copies = jnp.asarray(np.broadcast_to(x, (400, 2, 4)))
    estimate = partial(evaluation.app_d, num_samples=20, num_transitions=50)
    result = jax.jit(estimate)(params, copies, KEY)
    errors = Exact.of(params).log_px(x) - np.asarray(result.estimate, np.float64)
    assert_mean_is(np.exp(errors), np.ones(2))


def test_samples_are_of_the_posterior_at_the_acceptance_asked_for() -> None:
    params, x = linear_gaussian.make(4, 2, 0.3), data(4, 1)
    exact = Exact.of(params)

    def log_joint(z: Array) -> Array:
        px_z = jvae.likelihood(params, z).log_prob(jnp.asarray(x[0]))
        return px_z + jvae.prior(params).log_prob(z)

    start = jax.random.normal(jax.random.key(8), (2000, 2))
    sample = jax.jit(lambda z, key: hmc_samples(log_joint, z, key, 4, 60))
    z, acceptance = sample(start, KEY)
    assert acceptance.shape == (60,)
    np.testing.assert_allclose(acceptance[30:].mean(), 0.9, atol=0.04)
    L = np.linalg.cholesky(exact.posterior_covariance)
    deviation = (np.asarray(z, np.float64) - exact.posterior_mean(x)) @ np.linalg.inv(L).T
    assert_mean_is(deviation, np.zeros(2))
    assert_mean_is(deviation[:, :, None] * deviation[:, None], np.eye(2))


def test_many_samples_give_log_px() -> None:
    params, x = linear_gaussian.make(5, 3, 0.5), data(5, 60)
    estimate = partial(evaluation.app_d, num_samples=150, num_transitions=50)
    result = jax.jit(estimate)(params, jnp.asarray(x), KEY)
    scores = (np.asarray(result.estimate) - Exact.of(params).log_px(x)) / np.asarray(result.stderr)
    low, high = stats.chi2(60).interval(1 - 1e-6)
    assert low < (scores**2).sum() < high
    # A Gaussian fitted to a Gaussian: the weights are near to equal.
    assert (np.asarray(result.ess) > 100).all()


@pytest.mark.parametrize("latent_dim", [4, 5])
def test_more_than_four_latents_warn(latent_dim: int) -> None:
    params, x = linear_gaussian.make(6, latent_dim, 1.0), jnp.asarray(data(6, 1))
    estimate = partial(evaluation.app_d, num_samples=8, num_transitions=1)
    if latent_dim == 4:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            jax.eval_shape(estimate, params, x, KEY)
    else:
        with pytest.warns(UserWarning, match="more than 4 latents, and this model has 5"):
            jax.eval_shape(estimate, params, x, KEY)


def test_no_more_samples_than_latents_is_refused() -> None:
    params, x = linear_gaussian.make(6, 3, 1.0), jnp.asarray(data(6, 1))
    with pytest.raises(ValueError, match=r"more than the 3 latents.*got 3"):
        evaluation.app_d(params, x, KEY, num_samples=3)


def test_the_full_gaussian_is_one() -> None:
    """Its density, its samples and its fit, against SciPy and NumPy."""
    generator = np.random.default_rng(0)
    loc, L = generator.normal(size=3), np.tril(generator.normal(size=(3, 3)))
    np.fill_diagonal(L, np.abs(np.diag(L)))
    above = np.triu(generator.normal(size=(3, 3)), 1)  # which is to mean nothing
    q = evaluation.FullGaussian(
        *(jnp.asarray(part, jnp.float32) for part in (loc, np.log(np.diag(L)), L + above))
    )
    exact = stats.multivariate_normal(loc, L @ L.T)
    z, log_q = jax.jit(jax.vmap(q.sample_and_log_prob))(jax.random.split(KEY, 20_000))
    np.testing.assert_allclose(log_q, exact.logpdf(z), atol=1e-3)
    np.testing.assert_allclose(jax.jit(jax.vmap(q.log_prob))(z), exact.logpdf(z), atol=1e-3)
    deviation = np.linalg.solve(L, (np.asarray(z, np.float64) - loc).T).T
    assert_mean_is(deviation, np.zeros(3))
    assert_mean_is(deviation[:, :, None] * deviation[:, None], np.eye(3))
    fitted = evaluation.FullGaussian.fit(z[:50])
    np.testing.assert_allclose(fitted.mean, z[:50].mean(axis=0), atol=1e-5)
    covariance = fitted.scale_tril @ fitted.scale_tril.T
    np.testing.assert_allclose(covariance, np.cov(z[:50].T), rtol=1e-3, atol=1e-4)


def test_a_diagonal_gaussian_in_full_is_the_same() -> None:
    q = jvae.distributions.DiagonalGaussian(jnp.array([1.0, -2.0]), jnp.array([0.3, -0.5]))
    full, z = evaluation.full_covariance(q), jnp.array([0.2, -1.0])
    np.testing.assert_allclose(full.log_prob(z), q.log_prob(z), rtol=1e-6)
    np.testing.assert_allclose(full.sample(KEY), q.sample(KEY), rtol=1e-6)
