"""Every row of the table of bounds, proved on models where all expectations are exact."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import linear_gaussian
import numpy as np
import pytest
import quadrature
from jaxtyping import Array, PRNGKeyArray
from linear_gaussian import Exact
from parts import CountingEncoder, FairBits
from standard_errors import ROUNDING, assert_mean_is, mean_and_error
from weights import random_params

import jvae
from jvae.estimators import TABLE, log_power_mean
from jvae.networks import MLP

KEY = jax.random.key(3)
NUM_DRAWS = 20_000
PARTITION = (0.0, 0.3)
Test = TypeVar("Test", bound=Callable[..., None])


# The tests that prove each row, by name: README's table has them.
PROOFS: dict[str, list[str]] = {}


def proves(*names: str) -> Callable[[Test], Test]:
    """Note that the test is a proof of these rows."""

    def note(test: Test) -> Test:
        for name in names:
            PROOFS.setdefault(name, []).append(test.__name__)
        return test

    return note


def data(dim: int, num: int = 2) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(num, dim)).astype(np.float32)


def leaves(params: jvae.Params, network: str) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params.weights[network])]


def values_and_gradients(
    bound: Callable[..., Array], params: jvae.Params, x: np.ndarray, num_draws: int, seed: int = 0
) -> tuple[np.ndarray, jvae.Params]:
    """Values [draw, batch], and the gradients of their sums over the batch, stacked."""

    def total(params: jvae.Params, key: PRNGKeyArray) -> tuple[Array, Array]:
        values = bound(params, jnp.asarray(x), key)
        return values.sum(), values

    keys = jax.random.split(jax.random.key(seed), num_draws)
    gradient = jax.vmap(jax.grad(total, has_aux=True), in_axes=(None, 0))
    gradients, values = jax.jit(gradient)(params, keys)
    return np.asarray(values, np.float64), gradients


# The expectation of two draws and its gradients, exact.

stop = jax.lax.stop_gradient


def mean(log_w: Array, log_q: Array) -> Array:
    return log_w.mean(axis=0)


def log_mean(log_w: Array, log_q: Array) -> Array:
    return power(1.0, log_w, log_q)


def combined(log_w: Array, log_q: Array) -> Array:
    return 0.3 * mean(log_w, log_q) + 0.7 * log_mean(log_w, log_q)


def power(c: float, log_w: Array, log_q: Array) -> Array:
    return (jnp.logaddexp(c * log_w[0], c * log_w[1]) - np.log(2)) / c


def normalised(log_w: Array) -> Array:
    return jnp.exp(log_w - jnp.logaddexp(log_w[0], log_w[1])[None])


def thermodynamic(log_w: Array, log_q: Array) -> Array:
    points = [*PARTITION, 1.0]
    terms = [
        (right - left) * (normalised(left * log_w) * log_w).sum(axis=0)
        for left, right in itertools.pairwise(points)
    ]
    return sum(terms, start=jnp.zeros(log_w.shape[1:], log_w.dtype))


def covariance(log_w: Array, log_q: Array) -> Array:
    """∇E_π[f] = E_π[∇f] + E_π[(f - E_π[f]) ∇log π̃], π̃ = q w^β, f = log w: Masrani et al. (2019)."""
    points, total = [*PARTITION, 1.0], jnp.zeros(log_w.shape[1:], log_w.dtype)
    for left, right in itertools.pairwise(points):
        weights = stop(normalised(left * log_w))
        centred = stop(log_w - (weights * log_w).sum(axis=0, keepdims=True))
        score = log_q + left * log_w
        total += (right - left) * (weights * (log_w + centred * score)).sum(axis=0)
    return total


def weighted_log_q(log_w: Array, log_q: Array) -> Array:
    return (stop(normalised(log_w)) * log_q).sum(axis=0)


Expected = Callable[[jvae.Params, Array], Array]


def of(functional: quadrature.Functional, *, fixed: bool = False) -> Expected:
    return lambda params, x: quadrature.expectation(
        functional, quadrature.gaussian_nodes(params, x, fixed=fixed)
    )


def kl_weighted(beta: float, params: jvae.Params, x: Array) -> Array:
    kl = jvae.posterior(params, x).kl(jvae.prior(params))
    return linear_gaussian.elbo(params, x) + (1 - beta) * kl


def free_bits(free_nats: float, params: jvae.Params, x: Array) -> Array:
    kl = jvae.posterior(params, x).kl(jvae.prior(params))  # one latent: one term
    return linear_gaussian.elbo(params, x) + kl - jnp.maximum(free_nats, kl)


@dataclasses.dataclass(frozen=True)
class Case:
    """What two draws of a bound are in expectation; a gradient of None is exactly zero."""

    name: str
    settings: dict[str, Any]
    value: Expected
    theta: Expected | None
    phi: Expected | None


def case(name: str, value: Expected, **settings: Any) -> Case:
    return Case(name, {"num_samples": 2} | settings, value, value, value)


elbo, iwae = linear_gaussian.elbo, of(log_mean)
CASES = [
    case("elbo", elbo),
    case("sgvb_a", elbo),
    case("stl", elbo),
    case("score_function", elbo),
    case("score_function", elbo, num_samples=1, baseline=np.array([-5.0, 3.0], np.float32)),
    case("score_function", elbo, baseline="leave_one_out"),
    case("beta_elbo", partial(kl_weighted, 3.0), beta=3.0),
    case("free_bits_elbo", partial(free_bits, 0.5), free_nats=0.5),
    case("iwae", iwae),
    case("dreg", iwae),
    case("vimco", iwae),
    case("miwae", iwae, num_outer=2),
    case("ciwae", of(combined), beta=0.3),
    dataclasses.replace(case("piwae", iwae, num_samples=1, num_outer=2), phi=elbo),
    case("renyi", of(partial(power, 0.25)), alpha=0.75),
    case("renyi", of(partial(power, -0.5)), alpha=1.5),
    case("cubo", of(partial(power, 2.0)), order=2.0),
    dataclasses.replace(
        case("tvo", of(thermodynamic), partition=PARTITION), phi=of(covariance, fixed=True)
    ),
    dataclasses.replace(case("rws", iwae), phi=of(weighted_log_q, fixed=True)),
    dataclasses.replace(case("wake_theta", iwae), phi=None),
    dataclasses.replace(
        case("wake_phi", of(weighted_log_q)), theta=None, phi=of(weighted_log_q, fixed=True)
    ),
    dataclasses.replace(case("sleep_phi", linear_gaussian.log_q_of_dreams), theta=None),
]


def test_every_row_has_a_case() -> None:
    assert {case.name for case in CASES} == set(TABLE)


PARAMS, X = linear_gaussian.make(3, 1, 0.9, seed=1), data(3)


@functools.cache
def exactly(expected: Expected) -> tuple[np.ndarray, jvae.Params]:
    """What is expected and the gradient of its sum, which many cases share."""

    def total(params: jvae.Params, x: Array) -> tuple[Array, Array]:
        values = expected(params, x)
        return values.sum(), values

    gradient, values = quadrature.in_float64(jax.grad(total, has_aux=True), PARAMS, X)
    return values, gradient


@proves(*TABLE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.settings}")
def test_exact_in_expectation(case: Case) -> None:
    row = TABLE[case.name]
    expected, _ = exactly(case.value)
    bound = partial(row.function, **case.settings)
    values, gradients = values_and_gradients(bound, PARAMS, X, NUM_DRAWS)
    assert_mean_is(values, expected)
    if row.bounds == "lower":
        assert (expected < Exact.of(PARAMS).log_px(X)).all()
    several = row.num_samples_needed == 2 and row.bounds == "lower"
    if several and case.settings.get("alpha", 0) < 1:
        assert (expected > exactly(elbo)[0] + 0.01).all()
    for network, exact in (("decoder", case.theta), ("encoder", case.phi)):
        estimates = leaves(gradients, network)
        if exact is None:
            assert not any(np.any(leaf) for leaf in estimates)
            continue
        wanted = leaves(exactly(exact)[1], network)
        for estimate, leaf in zip(estimates, wanted, strict=True):
            assert_mean_is(estimate, leaf)
            assert np.any(np.abs(leaf) > 0.02)


def test_the_quadrature_has_enough_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def total(params: jvae.Params, x: Array) -> Array:
        functionals = (mean, log_mean, partial(power, 2.0), partial(power, -0.5), thermodynamic)
        return sum((of(f)(params, x).sum() for f in functionals), start=jnp.zeros(()))

    few = quadrature.in_float64(jax.value_and_grad(total), PARAMS, X)
    monkeypatch.setattr(quadrature, "NUM_NODES", 56)
    many = quadrature.in_float64(jax.value_and_grad(total), PARAMS, X)
    # The standard errors that the answers are held against are larger by far.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), few, many)
    np.testing.assert_allclose(exactly(of(mean))[0], exactly(elbo)[0], rtol=1e-9)


# z that cannot be reparameterised.


@proves("score_function", "vimco")
@pytest.mark.parametrize(
    ("name", "settings", "functional"),
    [
        ("score_function", {}, mean),
        ("score_function", {"baseline": "leave_one_out"}, mean),
        ("vimco", {}, log_mean),
    ],
)
def test_discrete_latents(
    name: str, settings: dict[str, Any], functional: quadrature.Functional
) -> None:
    model = jvae.VAE.mlp((3,), 2, hidden=(), likelihood=jvae.Gaussian(scale=0.9))
    encoder = MLP(input_ndim=1, event_shape=(2,), family=jvae.Bernoulli(), hidden=())
    model = dataclasses.replace(model, encoder=encoder, prior=FairBits(2))
    params, x = random_params(model, scale=0.7), data(3)

    def exact(params: jvae.Params, x: Array) -> Array:
        return quadrature.expectation(functional, quadrature.discrete_nodes(params, x))

    bound = partial(TABLE[name].function, num_samples=2, **settings)
    values, gradients = values_and_gradients(bound, params, x, NUM_DRAWS)
    assert_mean_is(values, quadrature.in_float64(exact, params, x))
    gradient = jax.grad(lambda p, x: exact(p, x).sum())
    wanted = quadrature.in_float64(gradient, params, x)
    for network in ("encoder", "decoder"):
        for estimate, leaf in zip(leaves(gradients, network), leaves(wanted, network), strict=True):
            assert_mean_is(estimate, leaf)
            assert np.any(np.abs(leaf) > 0.02)


# Relations at every draw.


six = partial(partial, num_samples=6)
two_of_three = partial(partial, num_samples=3, num_outer=2)
IWAE, SGVB_A = six(jvae.iwae), six(jvae.sgvb_a)
SPECIAL_CASES = [
    (six(jvae.stl), SGVB_A, "θ"),
    (six(jvae.score_function), SGVB_A, "θ"),
    (six(jvae.dreg), IWAE, "θ"),
    (six(jvae.vimco), IWAE, "θ"),
    (six(jvae.rws), IWAE, "θ"),
    (six(jvae.wake_theta), IWAE, "θ"),
    (partial(jvae.dreg, num_samples=1), partial(jvae.stl, num_samples=1), "θφ"),
    (six(jvae.miwae, num_outer=1), IWAE, "θφ"),
    (partial(jvae.miwae, num_samples=1, num_outer=6), SGVB_A, "θφ"),
    (six(jvae.ciwae, beta=0.0), IWAE, "θφ"),
    (six(jvae.ciwae, beta=1.0), SGVB_A, "θφ"),
    (two_of_three(jvae.piwae), IWAE, "θ"),
    (two_of_three(jvae.piwae), two_of_three(jvae.miwae), "φ only"),
    (six(jvae.piwae, num_outer=1), IWAE, "θφ"),
    (six(jvae.renyi, alpha=0.0), IWAE, "θφ"),
    (six(jvae.renyi, alpha=1.0), SGVB_A, "θφ"),
    (six(jvae.cubo, order=1), IWAE, "θφ"),
    (six(jvae.cubo, order=3.0), six(jvae.renyi, alpha=-2.0), "θφ"),
    (six(jvae.tvo, partition=1), SGVB_A, "θ"),
    (six(jvae.tvo, partition=(0,)), SGVB_A, "θ"),
    (six(jvae.tvo, partition=(0.75, 0.25, 0.5, 1.0)), six(jvae.tvo, partition=4), "θφ"),
]


@functools.cache
def at_twenty_keys(bound: Callable[..., Array]) -> tuple[np.ndarray, jvae.Params]:
    """`values_and_gradients`, which many cases share."""
    params, x = linear_gaussian.make(4, 2, 0.8), data(4, num=3)
    return values_and_gradients(bound, params, x, 20)


@proves(
    *("stl", "score_function", "dreg", "vimco", "rws", "wake_theta"),
    *("miwae", "ciwae", "piwae", "renyi", "cubo", "tvo"),
)
@pytest.mark.parametrize(
    ("one", "other", "equal_gradients"),
    SPECIAL_CASES,
    ids=[f"{one.func.__name__}-{other.func.__name__}" for one, other, _ in SPECIAL_CASES],
)
def test_special_cases(
    one: Callable[..., Array], other: Callable[..., Array], equal_gradients: str
) -> None:
    (values, gradients), (expected, wanted) = at_twenty_keys(one), at_twenty_keys(other)
    if "only" not in equal_gradients:
        np.testing.assert_allclose(values, expected, rtol=1e-5)
    for letter, network in (("θ", "decoder"), ("φ", "encoder")):
        same = [
            np.allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())
            for a, b in zip(leaves(gradients, network), leaves(wanted, network), strict=True)
        ]
        assert all(same) if letter in equal_gradients else not any(same)


leave_one_out = partial(jvae.score_function, baseline="leave_one_out")


@proves("stl", "dreg", "score_function")
@pytest.mark.parametrize(
    ("bound", "num_samples"),
    [(jvae.stl, 1), (jvae.stl, 4), (jvae.dreg, 1), (jvae.dreg, 4), (leave_one_out, 4)],
    ids=["stl-1", "stl-4", "dreg-1", "dreg-4", "leave_one_out-4"],
)
def test_vanishes_at_the_posterior(bound: Callable[..., Array], num_samples: int) -> None:
    params, x = linear_gaussian.with_posterior(linear_gaussian.make(4, 2, 0.8)), data(4)
    bound, plain = (partial(b, num_samples=num_samples) for b in (bound, jvae.iwae))
    _, gradients = values_and_gradients(bound, params, x, 500)
    _, with_score = values_and_gradients(plain, params, x, 500)
    for leaf, noisy in zip(
        leaves(gradients, "encoder"), leaves(with_score, "encoder"), strict=True
    ):
        # Of float32: the terms that cancel, on the scale of the gradient that keeps the score.
        assert np.abs(leaf).max() < 100 * ROUNDING * np.abs(noisy).max()
    assert all(np.any(leaf) for leaf in leaves(gradients, "decoder"))


@proves("dreg", "score_function")
@pytest.mark.parametrize(
    ("quiet", "noisy"),
    [
        (partial(jvae.dreg, num_samples=8), partial(jvae.iwae, num_samples=8)),
        (partial(leave_one_out, num_samples=4), partial(jvae.score_function, num_samples=4)),
        # log w is about -5 here.
        (partial(jvae.score_function, baseline=-5.0), jvae.score_function),
    ],
    ids=["dreg", "leave_one_out", "baseline"],
)
def test_lower_variance(
    quiet: Callable[..., Array],
    noisy: Callable[..., Array],
    record_property: Callable[[str, object], None],
) -> None:
    # q near the posterior, as training leaves it.
    params, x = linear_gaussian.make(4, 2, 0.8), data(4)
    params = linear_gaussian.with_posterior(params, shift=0.2, inflation=1.5)
    totals = []
    for bound in (quiet, noisy):
        _, gradients = values_and_gradients(bound, params, x, 4000)
        totals.append(sum(leaf.var(axis=0).sum() for leaf in leaves(gradients, "encoder")))
    record_property("ratio of variances", float(totals[0] / totals[1]))
    assert totals[0] < 0.7 * totals[1]


def test_a_traced_baseline_is_a_constant_to_the_gradient_of_what_made_it() -> None:
    params, x = linear_gaussian.make(4, 2, 0.8), jnp.asarray(data(4))
    gradient = jax.jit(jax.grad(lambda b: jvae.score_function(params, x, KEY, baseline=b).sum()))(
        jnp.ones(())
    )
    assert gradient == 0


# Powers of the weights.


@pytest.mark.parametrize(
    "c", [-30.0, -1.0, -1e-4, -1e-7, 0.0, 1e-12, 1e-7, 1e-3, 0.5, 1.0, 2.0, 40]
)
def test_power_means_keep_their_digits(c: float) -> None:
    log_w = np.random.default_rng(0).normal(-500, 5, size=(6, 4)).astype(np.float32)
    exact = log_w.astype(np.longdouble)
    largest = (c * exact).max(axis=0)
    # The series of log-mean-exp about the mean where the formula itself would lose digits.
    expected = (
        (largest + np.log(np.exp(c * exact - largest).mean(axis=0))) / c
        if abs(c) > 1e-5
        else exact.mean(axis=0) + c / 2 * exact.var(axis=0)
    )
    values, gradient = jax.jit(jax.vmap(jax.value_and_grad(log_power_mean), in_axes=(1, None)))(
        jnp.asarray(log_w), jnp.float32(c)
    )
    np.testing.assert_allclose(values, expected.astype(np.float64), rtol=1e-6)
    weights = np.exp(c * exact - largest)
    weights = (weights / weights.sum(axis=0)).T.astype(np.float64)
    np.testing.assert_allclose(gradient, weights, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num", [1000, 100_000])
def test_power_means_of_many_uneven_weights(num: int, c: float) -> None:
    """One weight outweighs all others: the mean of what is below the largest nears -1."""
    log_w = np.full(num, -40.0, np.float32)
    log_w[7] = -20.0
    exact = np.log(np.exp(c * (log_w.astype(np.float64) + 20)).mean()) / c - 20
    value = jax.jit(log_power_mean)(jnp.asarray(log_w), jnp.float32(c))
    np.testing.assert_allclose(value, exact, rtol=1e-6)


def test_power_means_of_weights_that_are_all_zero() -> None:
    assert log_power_mean(jnp.full((3, 2), -jnp.inf), 0.5).tolist() == [-jnp.inf, -jnp.inf]


@proves("renyi")
def test_falls_with_its_order() -> None:
    params, x = linear_gaussian.make(4, 2, 0.8), jnp.asarray(data(4))
    alphas = jnp.array([-2.0, 0.0, 0.5, 0.999, 1.0, 1.001, 2.0, 5.0])
    bound = jax.jit(jax.vmap(lambda alpha: jvae.renyi(params, x, KEY, alpha=alpha)))
    values = np.asarray(bound(alphas))
    assert (np.diff(values, axis=0) < 0).all()
    # Continuous at 1: its slope there is minus half the variance of log w.
    assert (values[3] - values[5] < 0.1).all()


@proves("cubo")
def test_above_log_px() -> None:
    # The weights are bounded: those of an overdispersed q.
    params = linear_gaussian.with_posterior(
        linear_gaussian.make(3, 1, 0.9, seed=1), shift=0.3, inflation=2.0
    )
    x = data(3)

    def second_moment(log_w: Array, log_q: Array) -> Array:
        return jnp.exp(2 * log_w).mean(axis=0)

    exact = 0.5 * np.log(quadrature.in_float64(of(second_moment), params, x))
    assert (exact > Exact.of(params).log_px(x) + 0.01).all()
    for num_samples in (1, 5):
        bound = partial(jvae.cubo, num_samples=num_samples)
        values, _ = values_and_gradients(bound, params, x, NUM_DRAWS)
        assert_mean_is(np.exp(2 * (values - exact)), np.ones(2))
        below, error = mean_and_error(values - exact)
        assert (below < -5 * error).all()


@proves("tvo")
def test_refining_raises_it_to_iwae() -> None:
    params, x = linear_gaussian.make(4, 2, 0.8), jnp.asarray(data(4, num=50))
    counts = [1, 2, 4, 8, 64, 512]
    tvo = [
        np.asarray(jax.jit(partial(jvae.tvo, num_samples=6, partition=n))(params, x, KEY))
        for n in counts
    ]
    iwae = np.asarray(jax.jit(partial(jvae.iwae, num_samples=6))(params, x, KEY))
    rounding = ROUNDING * np.abs(iwae)
    assert (np.diff(tvo, axis=0) > -rounding).all()
    assert ((tvo[1] - tvo[0]) > 0.01).mean() > 0.5
    # The integrand rises by 2 (tvo of two points - tvo of one) until ½, and by more until 1.
    finest = iwae - tvo[-1]
    assert (finest > -rounding).all()
    assert (finest < (iwae - tvo[0]) / 50 + rounding).all()


# What finite numbers of draws only approach.


def to_posterior(params: jvae.Params, x: Array) -> Array:
    """E_p(z|x)[log q(z|x)], [batch], by quadrature over the posterior, constant."""
    decoder = stop(params.weights["decoder"]["params"]["output"])
    W, b = decoder["kernel"][0], decoder["bias"]
    variance = 1 / (1 + W @ W / params.model.decoder.family.scale**2)
    loc = (x - b[None]) @ W * variance / params.model.decoder.family.scale**2
    eps, mass = np.polynomial.hermite_e.hermegauss(20)
    z = loc[:, None] + jnp.sqrt(variance) * eps[None]
    log_q = jax.vmap(jvae.posterior(params, x).log_prob, 1, 1)(z[..., None])
    return (log_q * (mass / mass.sum())[None]).sum(axis=-1)


def exact_tvo(params: jvae.Params, x: Array) -> Array:
    """The left Riemann sum whose expectations are integrals over a grid of z."""
    z = jnp.linspace(-12.0, 12.0, 2001, dtype=x.dtype)[:, None, None]
    q = jvae.posterior(params, x)
    log_q = q.log_prob(jnp.broadcast_to(z, (2001, x.shape[0], 1)))
    log_px_z = jvae.likelihood(params, z).log_prob(x[None])
    log_w = log_px_z + jvae.prior(params).log_prob(z) - log_q
    points, total = [*PARTITION, 1.0], jnp.zeros(x.shape[0], x.dtype)
    for left, right in itertools.pairwise(points):
        tempered = jax.nn.softmax(log_q + left * log_w, axis=0)
        total += (right - left) * (tempered * log_w).sum(axis=0)
    return total


@proves("wake_phi", "rws", "tvo")
@pytest.mark.parametrize(
    ("bound", "exact"),
    [
        (jvae.wake_phi, to_posterior),
        (jvae.rws, to_posterior),
        (partial(jvae.tvo, partition=PARTITION), exact_tvo),
    ],
    ids=["wake_phi", "rws", "tvo"],
)
def test_consistent(bound: Callable[..., Array], exact: Expected) -> None:
    """With 4,000 draws the bias, of order 1/4,000, is far below the error of the mean."""
    params = linear_gaussian.with_posterior(
        linear_gaussian.make(3, 1, 0.9, seed=1), shift=0.4, inflation=2.0
    )
    x = data(3)
    _, gradients = values_and_gradients(partial(bound, num_samples=4000), params, x, 60)
    gradient = jax.grad(lambda p, x: exact(p, x).sum())
    wanted = leaves(quadrature.in_float64(gradient, params, x), "encoder")
    for estimate, leaf in zip(leaves(gradients, "encoder"), wanted, strict=True):
        assert_mean_is(estimate, leaf)
        assert np.any(np.abs(leaf) > 0.1)


# The shared contract.


@pytest.mark.parametrize("name", TABLE)
def test_every_row_keeps_the_contract(name: str) -> None:
    members = [linear_gaussian.make(4, 2, 1.0, seed=seed) for seed in range(2)]
    encoder = CountingEncoder(members[0].model.encoder)
    model = dataclasses.replace(members[0].model, encoder=encoder)
    members = [jvae.Params(params.weights, model) for params in members]
    for batch in ((), (2, 3), (0,)):
        shape = jax.eval_shape(TABLE[name].bound, members[0], jnp.zeros((*batch, 4)), KEY)
        assert (shape.shape, shape.dtype) == (batch, np.float32)
    encoder.shapes.clear()

    def bound(params: jvae.Params, x: Array, key: PRNGKeyArray) -> Array:
        return TABLE[name].bound(params, x, key, num_samples=8)

    x = jnp.asarray(data(4, num=6)).reshape(2, 3, 4)
    compiled = jax.jit(bound)
    alone = [np.asarray(compiled(params, x, KEY)) for params in members]
    assert len(encoder.shapes) == 1, "x is encoded once, and the same shapes are traced once"
    assert encoder.shapes == [(8, 6, 4) if name == "sleep_phi" else (2, 3, 4)]
    assert len(np.unique(alone[0])) == 6
    assert (alone[0] != compiled(members[0], x, jax.random.key(4))).all()
    ensemble = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    together = jax.jit(jax.vmap(bound, (0, None, None)))(ensemble, x, KEY)
    np.testing.assert_allclose(together, alone, rtol=1e-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "settings", "error", "words"),
    [
        ("miwae", {"num_outer": 0}, ValueError, "num_outer must be at least 1, got 0"),
        ("piwae", {"num_outer": 1.5}, TypeError, "num_outer must be a static int, got float"),
        ("ciwae", {"beta": 1.5}, ValueError, "beta must be finite and at least 0 and at most 1"),
        ("ciwae", {"beta": -0.1}, ValueError, "got -0.1"),
        ("ciwae", {"beta": np.float32("nan")}, ValueError, "got nan"),
        ("ciwae", {"beta": "half"}, TypeError, "beta must be a number, got 'half'"),
        ("renyi", {"alpha": float("inf")}, ValueError, "alpha must be finite, got inf"),
        ("cubo", {"order": 0.5}, ValueError, "order must be finite and at least 1, got 0.5"),
        ("tvo", {"partition": 0}, ValueError, "partition must be at least 1, got 0"),
        ("tvo", {"partition": (0.0, 1.2)}, ValueError, "partition must be finite .* got 1.2"),
        ("tvo", {"partition": "half"}, TypeError, "partition must be a static int, got str"),
        ("vimco", {"num_samples": 1}, ValueError, "num_samples must be at least 2 .* got 1"),
        ("score_function", {"baseline": "loo"}, ValueError, "leave_one_out.*, got 'loo'"),
        (
            "score_function",
            {"baseline": np.zeros(3)},
            ValueError,
            r"shape \(\) or \(2,\), got \(3,",
        ),
        ("score_function", {"baseline": "leave_one_out"}, ValueError, "at least 2 .* got 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    name: str, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), jnp.asarray(data(4))
    with pytest.raises(error, match=words):
        jax.eval_shape(lambda: TABLE[name].function(params, x, KEY, **settings))


# The documents.

README = Path(__file__).parents[1] / "README.md"


def readme_table() -> str:
    """README's table; `PYTHONPATH=tests python -c "import test_bounds as t; t.write_readme()"`."""
    lines = [
        "| function | bound | gradient | source | proved in tests/test_bounds.py by |",
        "|---|---|---|---|---|",
    ]
    for name, row in TABLE.items():
        settings = ", ".join(f"{key}={value}" for key, value in row.settings.items())
        cells = [
            f"`{name}`" + (f", commands: `{settings}`" if settings else ""),
            f"{row.summary} ({row.bounds})",
            row.gradient,
            row.source,
            ", ".join(f"`{test.removeprefix('test_')}`" for test in PROOFS[name]),
        ]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


def around_the_table() -> tuple[str, str, str]:
    """README before, in and after its table."""
    before, rest = README.read_text("utf-8").split("<!-- bounds -->\n")
    table, after = rest.split("\n<!-- /bounds -->")
    return before, table, after


def write_readme() -> None:
    """Put the table as it should be into README."""
    before, _, after = around_the_table()
    text = f"{before}<!-- bounds -->\n{readme_table()}\n<!-- /bounds -->{after}"
    README.write_text(text, "utf-8")


def test_the_readme_has_the_table() -> None:
    assert around_the_table()[1] == readme_table()
