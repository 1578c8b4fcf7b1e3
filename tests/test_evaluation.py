import dataclasses
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import linear_gaussian
import numpy as np
import pytest
from linear_gaussian import Exact
from parts import CountingEncoder
from scipy import stats
from standard_errors import SIGMAS, assert_mean_is

import jvae
from jvae import evaluation
from jvae.estimators import log_mean_exp, sampling
from jvae.evaluation import datasets
from jvae.evaluation.estimates import from_log_weights
from jvae.evaluation.examples import examples_at_once, map_on_devices, rows_at_once

KEY = jax.random.key(3)


def data(dim: int, num: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(num, dim)).astype(np.float32)


@pytest.mark.parametrize("num_samples", [1, 30])
@pytest.mark.parametrize(("data_dim", "latent_dim", "scale"), [(3, 1, 0.7), (7, 5, 1.5)])
def test_weights_average_to_px(
    data_dim: int, latent_dim: int, scale: float, num_samples: int
) -> None:
    # An overdispersed q bounds the weights, so that their variance is finite.
    params = linear_gaussian.with_posterior(
        linear_gaussian.make(data_dim, latent_dim, scale), shift=0.3, inflation=2.0
    )
    x = data(data_dim, 3)
    copies = jnp.asarray(np.broadcast_to(x, (4000, 3, data_dim)))
    estimates = np.asarray(jvae.log_likelihood(params, copies, KEY, num_samples=num_samples))
    assert estimates.shape == (4000, 3)
    assert_mean_is(np.exp(estimates - Exact.of(params).log_px(x)), np.ones(3))


@pytest.mark.parametrize("num_samples", [1, 2, 4999, 5000, 5001, 12_500])
def test_at_the_posterior_the_estimate_is_exact(num_samples: int) -> None:
    params = linear_gaussian.with_posterior(linear_gaussian.make(4, 2, 1.0))
    x = data(4, 5)
    result = evaluation.importance_sampling(params, jnp.asarray(x), KEY, num_samples=num_samples)
    np.testing.assert_allclose(result.estimate, Exact.of(params).log_px(x), rtol=2e-5)
    np.testing.assert_allclose(result.ess, num_samples, rtol=1e-6)
    if num_samples > 1:
        # Equal weights but for the rounding of their logs.
        np.testing.assert_array_less(result.stderr, 2e-5 / math.sqrt(num_samples))


# Below, at, across and far beyond one chunk of samples, or of examples.
@pytest.mark.parametrize(
    ("batch", "num_samples"),
    [((2,), 1), ((2,), 5001), ((3,), 5000), ((), 7), ((2, 3), 1800), ((4201,), 2)],
)
def test_exactly_the_samples_asked_for_are_used(batch: tuple[int, ...], num_samples: int) -> None:
    params = linear_gaussian.make(4, 2, 1.0)
    exact = Exact.of(params)
    num = math.prod(batch)
    x = data(4, num)
    loc, scale = exact.q(x)
    keys = jax.vmap(partial(jax.random.split, num=num_samples))(jax.random.split(KEY, num))
    eps = jax.jit(jax.vmap(jax.vmap(lambda key: jax.random.normal(key, (2,)))))(keys)
    eps = np.asarray(eps, np.float64)
    z = loc[:, None] + scale[:, None] * eps
    residual = (x[:, None] - z @ exact.W.T - exact.b) / exact.sigma
    log_w = 0.5 * ((eps**2).sum(-1) - (z**2).sum(-1) - (residual**2).sum(-1))
    log_w += np.log(scale).sum(-1)[:, None] - 2 * math.log(2 * math.pi)
    top = log_w.max(axis=1, keepdims=True)
    w = np.exp(log_w - top)
    deviation = w.std(axis=1, ddof=1) if num_samples > 1 else np.inf
    expected = evaluation.LogLikelihood(
        estimate=np.log(w.mean(axis=1)) + top[:, 0],
        stderr=deviation / w.mean(axis=1) / math.sqrt(num_samples),
        ess=w.sum(axis=1) ** 2 / (w**2).sum(axis=1),
    )

    given = jnp.asarray(x.reshape(*batch, 4))
    result = evaluation.importance_sampling(params, given, KEY, num_samples=num_samples)
    for got, wanted in zip(result, expected, strict=True):
        assert got.shape == batch
        np.testing.assert_allclose(np.ravel(got), wanted, rtol=1e-4, atol=1e-5)
    estimates = jvae.log_likelihood(params, given, KEY, num_samples=num_samples)
    np.testing.assert_array_equal(estimates, result.estimate)


def test_a_part_has_the_numbers_that_it_has_in_the_whole() -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), data(4, 7)
    whole = evaluation.importance_sampling(params, x, KEY, num_samples=9)
    keys = jax.random.split(KEY, 7)
    part = evaluation.importance_sampling(params, x[2:5], keys[2:5], num_samples=9)
    for got, wanted in zip(part, whole, strict=True):
        np.testing.assert_allclose(got, wanted[2:5], rtol=1e-6)
    square = evaluation.importance_sampling(
        params, x[:6].reshape(2, 3, 4), keys[:6].reshape(2, 3), num_samples=9
    )
    np.testing.assert_allclose(square.estimate.ravel(), whole.estimate[:6], rtol=1e-6)
    for few in (keys[:2], keys[:3, None]):
        with pytest.raises(ValueError, match=re.escape(f"or (3,) of them, got {few.shape}")):
            evaluation.importance_sampling(params, x[:3], few, num_samples=9)


def test_the_estimate_errs_as_theory_says() -> None:
    """E_q[(p(z|x) / q(z|x))²] = Πⱼ c / √(2c - 1) exp(δ² / Sⱼ(2c - 1)) for q = N(m + δ, c S)."""
    shift, inflation, num_samples = 0.3, 2.0, 5000
    params = linear_gaussian.with_posterior(
        linear_gaussian.make(4, 2, 1.0), shift=shift, inflation=inflation
    )
    exact, x = Exact.of(params), data(4, 300)
    S = np.diag(exact.posterior_covariance)
    width = 2 * inflation - 1
    second_moment = np.prod(inflation / math.sqrt(width) * np.exp(shift**2 / (S * width)))
    error = math.sqrt((second_moment - 1) / num_samples)
    result = evaluation.importance_sampling(params, jnp.asarray(x), KEY, num_samples=num_samples)
    errors = np.asarray(result.estimate, np.float64) - exact.log_px(x)
    # By theory's standard error, and by the estimate's own.
    for scores in (errors / error, errors / np.asarray(result.stderr)):
        assert (np.abs(scores) < SIGMAS).all()
        low, high = stats.chi2(300).interval(1 - 6e-7)
        assert low < (scores**2).sum() < high
    # 1 / second_moment is what ESS / K tends to.
    np.testing.assert_allclose(result.ess.mean() / num_samples, 1 / second_moment, rtol=0.01)


# weights, their mean, standard error of its log, effective sample size
WEIGHTS = [
    ([1, 1, 1, 1], 1, 0, 4),
    ([1, 3], 2, 0.5, 1.6),
    ([1, 0], 0.5, 1, 1),
    ([2, 2, 8, 0], 3, math.sqrt(12) / 6, 2),
    ([5], 5, math.inf, 1),
    ([0, 0], 0, math.inf, 0),
]


@pytest.mark.parametrize("log_scale", [0.0, 1000.0, -1000.0])
@pytest.mark.parametrize(("weights", "mean", "stderr", "ess"), WEIGHTS)
def test_what_weights_say(
    weights: list[int], mean: float, stderr: float, ess: float, log_scale: float
) -> None:
    with np.errstate(divide="ignore"):
        log_w = np.log(np.array(weights, np.float32)) + np.float32(log_scale)
        log_mean = np.log(mean)
    result = from_log_weights(jnp.asarray(log_w)[:, None])
    expected = (log_mean + log_scale, stderr, ess)
    for got, wanted in zip(result, expected, strict=True):
        np.testing.assert_allclose(got, [wanted], rtol=3e-4 if log_scale else 1e-6, atol=1e-4)


def test_the_error_of_very_many_samples_is_no_overflow() -> None:
    log_w = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
    w = np.exp(log_w.astype(np.float64))
    expected = w.std(ddof=1) / w.mean() / math.sqrt(len(w))
    np.testing.assert_allclose(from_log_weights(jnp.asarray(log_w)).stderr, expected, rtol=1e-3)


def log_likelihood_of_ess(ess: list[float]) -> evaluation.LogLikelihood:
    zeros = jnp.zeros(len(ess))
    return evaluation.LogLikelihood(zeros, zeros, jnp.asarray(ess))


def test_an_estimate_on_few_samples_warns() -> None:
    evaluation.warn_if_unreliable(log_likelihood_of_ess([5.0, 70.0]))
    with pytest.warns(UserWarning, match="of 2 of 3 examples.*fewer than 5.*least 1.2"):
        evaluation.warn_if_unreliable(log_likelihood_of_ess([4.9, 70.0, 1.2]))
    with pytest.warns(UserWarning, match="of 1 of 1 examples.*least nan"):
        evaluation.warn_if_unreliable(log_likelihood_of_ess([math.nan]))
    with pytest.warns(UserWarning, match="fewer than 80"):
        evaluation.warn_if_unreliable(log_likelihood_of_ess([5.0, 90.0]), min_ess=80)
    scalar = evaluation.LogLikelihood(*(jnp.float32(1),) * 3)
    with pytest.warns(UserWarning, match="of 1 of 1"):
        evaluation.warn_if_unreliable(scalar)


@pytest.mark.parametrize(
    ("estimator", "advice", "not_advised"),
    [
        ("importance_sampling", "more samples, or annealed importance sampling", "temperatures"),
        ("app_d", "more samples, or annealed importance sampling", "temperatures"),
        ("ais", "take more temperatures, or more chains", "samples,"),
    ],
)
def test_the_warning_says_what_helps_this_estimator(
    estimator: Any, advice: str, not_advised: str
) -> None:
    with pytest.warns(UserWarning, match=advice) as caught:
        evaluation.warn_if_unreliable(log_likelihood_of_ess([1.0]), estimator=estimator)
    assert not_advised not in str(caught[0].message)


@pytest.mark.usefixtures("unchecked")
def test_an_estimator_of_another_name_is_refused() -> None:
    name: Any = "bdmc"
    with pytest.raises(ValueError, match="one of importance_sampling, ais, app_d, got 'bdmc'"):
        evaluation.warn_if_unreliable(log_likelihood_of_ess([9.0]), estimator=name)


@pytest.mark.parametrize(
    ("data_shape", "rows"), [((28, 28), 5000), ((64, 64, 3), 682), ((4000, 4000), 1)]
)
def test_rows_of_large_examples_are_few(data_shape: tuple[int, ...], rows: int) -> None:
    params = jax.eval_shape(
        lambda: jvae.init(jvae.VAE.mlp(data_shape, hidden=(1,)), jax.random.key(0))
    )
    assert rows_at_once(params) == rows


# Of one kind: (params, x, key) -> LogLikelihood.
ESTIMATORS: dict[str, Callable[..., evaluation.LogLikelihood]] = {
    "importance_sampling": partial(evaluation.importance_sampling, num_samples=20),
    "ais": partial(evaluation.ais, num_temperatures=3, num_chains=4, num_leapfrog=2),
    "app_d": partial(evaluation.app_d, num_samples=5, num_transitions=3),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_take_any_batch_and_ensembles(name: str) -> None:
    estimator = ESTIMATORS[name]
    models = [linear_gaussian.make(3, 2, 1.0, seed=seed) for seed in (0, 1)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    x = jnp.asarray(data(3, 6).reshape(2, 3, 3))
    together = jax.jit(jax.vmap(estimator, (0, None, None)))(params, x, KEY)
    compiled = jax.jit(estimator)
    first, second = (compiled(one, x, KEY) for one in models)
    assert (np.abs(first.estimate - second.estimate) > 0.2).any()
    for member, alone in enumerate((first, second)):
        for a, b in zip(alone, together, strict=True):
            assert a.shape == (2, 3)
            # Chains of HMC turn a difference of rounding into a larger one.
            np.testing.assert_allclose(b[member], a, rtol=0.02)
    assert [part.shape for part in jax.eval_shape(estimator, models[0], x[0, 0], KEY)] == [()] * 3


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_refuse_what_is_wrong(name: str) -> None:
    params, x = linear_gaussian.make(3, 2, 1.0), jnp.zeros((2, 3))
    with pytest.raises(TypeError, match="typed key"):
        ESTIMATORS[name](params, x, jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match=r"x must have shape .*\(2, 3, 1\)"):
        ESTIMATORS[name](params, x[..., None], KEY)
    with pytest.raises(TypeError, match="floating"):
        ESTIMATORS[name](params, x.astype(int), KEY)


def largest_array(jaxpr: Any) -> int:
    """Elements of the largest intermediate, inside loops too."""
    sizes = [math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars]
    inner = [p for eqn in jaxpr.eqns for p in jax.tree.leaves(list(eqn.params.values()))]
    return max([*sizes, *(largest_array(p.jaxpr) for p in inner if hasattr(p, "jaxpr"))])


def test_memory_is_bounded() -> None:
    """200 examples with 5,000 samples under the paper's model, compiled and not run."""
    params = jax.eval_shape(lambda: jvae.init(jvae.VAE.mlp(), jax.random.key(0)))
    x = jax.ShapeDtypeStruct((200, 28, 28), jnp.float32)

    def largest_and_temporary_bytes(num_samples: int) -> tuple[int, int]:
        log_likelihood = jax.jit(partial(jvae.log_likelihood, num_samples=num_samples))
        traced = log_likelihood.trace(params, x, KEY)
        analysis: Any = traced.lower().compile().memory_analysis()
        return largest_array(traced.jaxpr.jaxpr), analysis.temp_size_in_bytes

    largest, temporary = largest_and_temporary_bytes(5000)
    # 5,000 rows of pixels are 16 MB; XLA may hold a few such arrays.
    assert largest <= rows_at_once(params) * 784
    assert temporary < 100e6
    # A sample more is a key (8 bytes) and a weight (4), which loops may copy, but no image.
    with_20000 = largest_and_temporary_bytes(20_000)
    assert with_20000[0] == largest
    assert with_20000[1] - temporary < 10 * 12 * 15_000


@pytest.mark.parametrize(
    ("estimator", "settings"),
    [
        ("app_d", {"num_samples": 5, "num_leapfrog": 2, "num_transitions": 3}),
        ("bdmc", {"num_examples": 3, "num_temperatures": 4, "num_leapfrog": 2}),  # with ais inside
    ],
)
def test_where_wider_types_are_allowed_32_bits_stay_32(
    estimator: str, settings: dict[str, Any]
) -> None:
    params = linear_gaussian.make(4, 2, 1.0)
    x = () if estimator == "bdmc" else (jnp.asarray(data(4, 3)),)
    estimate = partial(getattr(evaluation, estimator), params, *x, KEY, **settings)
    narrow = estimate()
    with jax.enable_x64(True):
        wide = estimate()
    for found, expected in zip(wide, narrow, strict=True):
        assert found.dtype == expected.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 500])
def test_bounds_by_example_do_not_depend_on_the_batch(batch_size: int) -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), jnp.asarray(data(4, 10))
    keys = jax.random.split(KEY, 10)
    expected = jax.jit(jax.vmap(jvae.iwae, (None, 0, 0)))(params, x, keys)
    by_example = partial(evaluation.bound_by_example, bound=jvae.iwae, batch_size=batch_size)
    np.testing.assert_allclose(jax.jit(by_example)(params, x, KEY), expected, rtol=1e-5)


def test_bounds_of_equal_partials_are_compiled_once() -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), jnp.asarray(data(4, 10))
    encoder = CountingEncoder(params.model.encoder)
    counted = jvae.Params(params.weights, dataclasses.replace(params.model, encoder=encoder))
    calls = []
    for num_samples in (3, 3, 4):
        bound = partial(jvae.iwae, num_samples=num_samples)
        found = evaluation.bound_by_example(counted, x, KEY, bound=bound)
        calls.append(len(encoder.shapes))
        keys = jax.random.split(KEY, 10)
        expected = jax.vmap(bound, (None, 0, 0))(params, x, keys)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert 0 < calls[0] == calls[1] < calls[2]


def test_partials_that_are_not_quite_equal_are_told_apart() -> None:
    """3.0 equals 3, and is another argument; an array has no hash."""

    def bound(params: jvae.Params, x: jax.Array, key: jax.Array, *, beta: Any) -> jax.Array:
        value = beta if isinstance(beta, int) else 10 * beta
        return jnp.full(x.shape[:-1], value, jnp.float32)

    params, x = linear_gaussian.make(4, 2, 1.0), jnp.asarray(data(4, 2))
    for beta, expected in ((3, 3), (3.0, 30), (3, 3), (jnp.float32(3), 30)):
        found = evaluation.bound_by_example(params, x, KEY, bound=partial(bound, beta=beta))
        np.testing.assert_array_equal(found, [expected] * 2)


def test_no_more_examples_at_once_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), jnp.asarray(data(4, 3))
    sizes = []

    def spy(function: Any, arguments: Any, size: int, mesh: Any) -> jax.Array:
        sizes.append(size)
        return map_on_devices(function, arguments, size, mesh)

    monkeypatch.setattr(datasets, "map_on_devices", spy)
    for size in (2, 3):
        # A bound of its own, or what was compiled before would do.
        bound = partial(jvae.iwae, num_samples=17)
        evaluation.bound_by_example(params, x, KEY, bound=bound, batch_size=size)
    assert sizes == [2, 3]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("num_samples", "examples"), [(1, 85598), (1000, 85), (100_000, 1)])
def test_the_more_draws_the_fewer_examples_at_once(
    num_samples: int, examples: int, precision: str
) -> None:
    """A draw of MNIST's logits has 3,136 bytes, of which 2²⁸ are allowed, whatever weights take."""
    model = jvae.VAE.mlp(precision=precision)
    params = jax.eval_shape(lambda: jvae.init(model, jax.random.key(0)))
    keys = jax.eval_shape(lambda: jax.random.split(KEY, 500))

    def at_once(params: jvae.Params) -> Any:
        bound = partial(jvae.iwae, params, num_samples=num_samples)
        x = jax.ShapeDtypeStruct((500, 28, 28), jnp.float32)
        assert examples_at_once(bound, (x, keys)) == examples
        return ()

    jax.eval_shape(at_once, params)


def test_memory_of_bounds_by_example_is_bounded() -> None:
    """With 5,000 draws of each of 500 MNIST images, which are 7.8 GB."""
    params = jax.eval_shape(lambda: jvae.init(jvae.VAE.mlp(), jax.random.key(0)))
    x = jax.ShapeDtypeStruct((500, 28, 28), jnp.float32)
    by_example = partial(evaluation.bound_by_example, bound=partial(jvae.iwae, num_samples=5000))
    traced = jax.jit(by_example).trace(params, x, KEY)
    assert largest_array(traced.jaxpr.jaxpr) <= sampling.BYTES_AT_ONCE / 4


def test_likelihood_is_compiled_once_a_shape() -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), jnp.asarray(data(4, 2))
    encoder = CountingEncoder(params.model.encoder)
    counted = jvae.Params(params.weights, dataclasses.replace(params.model, encoder=encoder))
    jvae.log_likelihood(counted, x, KEY, num_samples=3)
    calls = len(encoder.shapes)
    jvae.log_likelihood(counted, x + 1, jax.random.key(1), num_samples=3)
    assert len(encoder.shapes) == calls > 0


def test_log_mean_exp_neither_overflows_nor_loses_a_zero_weight() -> None:
    log_w = jnp.array([[1000.0, -1000.0, -jnp.inf], [1000.0, -1000.0, 0.0]])
    np.testing.assert_allclose(log_mean_exp(log_w), [1000.0, -1000.0, -math.log(2)], rtol=1e-6)
