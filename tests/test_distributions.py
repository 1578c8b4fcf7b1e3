import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import numpyro.distributions as numpyro_dist
import pytest
from standard_errors import SIGMAS, assert_mean_is

from jvae.distributions import Bernoulli, DiagonalGaussian

# batch shape, event shape, event_ndim
SHAPES = [
    ((), (3,), 1),
    ((2, 4), (3,), 1),
    ((4,), (2, 3), 2),
    ((4,), (), 0),
]
FAMILIES = ["gaussian", "bernoulli"]


def draw(family: str, shape: tuple[int, ...], event_ndim: int, seed: int) -> tuple[Any, Any]:
    """A random distribution and NumPyro's of the same parameters."""
    a, b = 2 * np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    if family == "gaussian":
        ours: Any = DiagonalGaussian(jnp.asarray(a), jnp.asarray(0.3 * b), event_ndim)
        theirs = numpyro_dist.Normal(a, np.exp(0.3 * b))
    else:
        ours = Bernoulli(jnp.asarray(a), event_ndim)
        theirs = numpyro_dist.Bernoulli(logits=a)
    return ours, theirs.to_event(event_ndim)


def outcomes(size: int) -> np.ndarray:
    return np.array(list(itertools.product([0.0, 1.0], repeat=size)), np.float32)


@pytest.mark.parametrize(("batch", "event", "event_ndim"), SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_prob_and_mean_are_numpyros(
    family: str, batch: tuple[int, ...], event: tuple[int, ...], event_ndim: int
) -> None:
    ours, theirs = draw(family, (*batch, *event), event_ndim, seed=0)
    value = np.random.default_rng(1).normal(size=(5, *batch, *event)).astype(np.float32)
    if family == "bernoulli":
        value = (value > 0).astype(np.float32)
    with jax.numpy_rank_promotion("allow"):
        expected, mean = jax.jit(lambda p, value: (p.log_prob(value), p.mean))(theirs, value)
    log_prob = ours.log_prob(jnp.asarray(value))
    assert log_prob.shape == (5, *batch)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.mean, mean, rtol=1e-6)


@pytest.mark.parametrize(("batch", "event", "event_ndim"), SHAPES)
def test_gaussian_kl_is_numpyros(
    batch: tuple[int, ...], event: tuple[int, ...], event_ndim: int
) -> None:
    p, numpyro_p = draw("gaussian", (*batch, *event), event_ndim, seed=0)
    q, numpyro_q = draw("gaussian", event, event_ndim, seed=1)
    with jax.numpy_rank_promotion("allow"):
        kl = jax.jit(lambda p, q: numpyro_dist.kl_divergence(p, q.expand(batch)))
        expected = kl(numpyro_p, numpyro_q)
    np.testing.assert_allclose(p.kl(q), expected, rtol=1e-5)
    per_dim = p.kl_per_dim(q)
    assert per_dim.shape == (*batch, *event)
    event_axes = tuple(range(len(batch), len(batch) + len(event)))
    np.testing.assert_allclose(per_dim.sum(event_axes), p.kl(q), rtol=1e-6)
    np.testing.assert_allclose(p.kl(p), np.zeros(batch), atol=1e-6)


@pytest.mark.parametrize("distance", [0.0, 1e-3, 1e-5, 1e-8])
def test_kl_vanishes_like_a_square(distance: float) -> None:
    zeros = jnp.zeros(1000)
    log_scale = distance * jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)
    per_dim = DiagonalGaussian(zeros, log_scale).kl_per_dim(DiagonalGaussian(zeros, zeros))
    # ½ (exp(2t) - 1) - t = t² + O(t³), of which float32 leaves the rounding of t.
    t = np.asarray(log_scale, np.float64)
    np.testing.assert_array_less(
        np.abs(per_dim - t**2), 2 * np.abs(t) ** 3 + 2**-22 * np.abs(t) + 1e-40
    )


def test_location_and_scale_broadcast() -> None:
    loc, log_scale = jnp.arange(6.0).reshape(2, 3), jnp.array([0.0, 1.0, 2.0])
    mixed = DiagonalGaussian(loc, log_scale)
    full = DiagonalGaussian(loc, jnp.broadcast_to(log_scale, (2, 3)))
    for a, b in zip(
        mixed.sample_and_log_prob(jax.random.key(0)),
        full.sample_and_log_prob(jax.random.key(0)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(mixed.log_prob(loc + 1), full.log_prob(loc + 1), rtol=1e-6)


def test_kl_to_standard_normal_is_appendix_b() -> None:
    p, _ = draw("gaussian", (4, 3), 1, seed=0)
    zeros = jnp.zeros(3)
    variance = np.exp(2 * np.asarray(p.log_scale, np.float64))
    expected = -0.5 * (1 + np.log(variance) - np.asarray(p.loc, np.float64) ** 2 - variance)
    np.testing.assert_allclose(p.kl_per_dim(DiagonalGaussian(zeros, zeros)), expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_gaussian_density_integrates_to_one_around_its_mean(scale: float) -> None:
    # The trapezoid rule on ±10σ in steps of σ/10 is exact for a Gaussian to float64.
    z = scale * np.linspace(-10, 10, 201)
    p = DiagonalGaussian(jnp.array([scale / 3]), jnp.log(jnp.array([scale])))
    density = np.exp(np.asarray(p.log_prob(jnp.asarray(z[:, None], jnp.float32)), np.float64))
    np.testing.assert_allclose(np.trapezoid(density, z), 1, rtol=1e-5)
    np.testing.assert_allclose(np.trapezoid(density * z, z), scale / 3, rtol=1e-5)
    np.testing.assert_allclose(np.trapezoid(density * z**2, z), scale**2 * 10 / 9, rtol=1e-5)


@pytest.mark.parametrize(
    ("p", "q"), [((0.0, 1.0), (0.0, 1.0)), ((1.0, 0.5), (-1.0, 2.0)), ((0.3, 2.0), (0.0, 0.7))]
)
def test_gaussian_kl_by_quadrature(p: tuple[float, float], q: tuple[float, float]) -> None:
    ours, other = (DiagonalGaussian(jnp.array([m]), jnp.log(jnp.array([s]))) for m, s in (p, q))
    z = np.linspace(-25, 25, 5001)
    log_p, log_q = (
        -0.5 * ((z - loc) / scale) ** 2 - math.log(scale * math.sqrt(2 * math.pi))
        for loc, scale in (p, q)
    )
    expected = np.trapezoid(np.exp(log_p) * (log_p - log_q), z)
    np.testing.assert_allclose(ours.kl(other), expected, rtol=1e-5, atol=1e-6)


def test_bernoulli_sums_to_one_and_kl_is_the_sum_over_outcomes() -> None:
    (p, _), (q, _) = draw("bernoulli", (6,), 1, seed=0), draw("bernoulli", (6,), 1, seed=1)
    log_p, log_q = (np.asarray(d.log_prob(jnp.asarray(outcomes(6))), np.float64) for d in (p, q))
    np.testing.assert_allclose(np.exp(log_p).sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(p.kl(q), (np.exp(log_p) * (log_p - log_q)).sum(), rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_have_the_mean_and_the_covariance(family: str) -> None:
    p, _ = draw(family, (3,), 1, seed=0)
    draws = jax.jit(jax.vmap(p.sample))(jax.random.split(jax.random.key(0), 40_000))
    assert_mean_is(draws, p.mean)
    centred = np.asarray(draws - p.mean[None], np.float64)
    products = np.einsum("ni,nj->nij", centred, centred)
    variance = p.scale**2 if family == "gaussian" else p.mean * (1 - p.mean)
    assert_mean_is(products, np.diag(np.asarray(variance, np.float64)))
    if family == "bernoulli":
        assert set(np.unique(draws)) == {0.0, 1.0}


@pytest.mark.parametrize(("batch", "event", "event_ndim"), SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sample_comes_with_its_log_prob(
    family: str, batch: tuple[int, ...], event: tuple[int, ...], event_ndim: int
) -> None:
    p, _ = draw(family, (*batch, *event), event_ndim, seed=0)
    key = jax.random.key(3)
    value, log_prob = p.sample_and_log_prob(key)
    assert value.shape == (*batch, *event)
    np.testing.assert_array_equal(value, p.sample(key))
    np.testing.assert_allclose(log_prob, p.log_prob(value), rtol=1e-5, atol=1e-5)


LOGITS = np.array([0, 1, 20, 88.8, 1e2, 1e4, 1e30], np.float32)
LOGITS = np.concatenate([LOGITS, -LOGITS])


def log_sigmoid(logits: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -logits.astype(np.float64))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_bernoulli_is_right_at_saturated_logits(value: float) -> None:
    def log_prob(logit: jax.Array) -> jax.Array:
        return Bernoulli(logit, event_ndim=0).log_prob(jnp.array(value))

    def at_logits(function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return jax.jit(jax.vmap(function))(jnp.asarray(LOGITS))

    # x·l and softplus(l) are rounded to 2⁻²³ |l|; beyond 100 both are exact, so that their
    # difference is too.
    exact = log_sigmoid(LOGITS if value else -LOGITS)
    tolerance = 2**-23 * np.minimum(np.abs(LOGITS), 100) + 1e-6 * np.abs(exact)
    np.testing.assert_array_less(np.abs(at_logits(log_prob) - exact), tolerance + 2**-23)
    sigmoid = np.exp(log_sigmoid(LOGITS))
    np.testing.assert_allclose(at_logits(jax.grad(log_prob)), value - sigmoid, atol=2**-23)
    for outer, inner in itertools.product([jax.jacfwd, jax.jacrev], repeat=2):
        second = at_logits(outer(inner(log_prob)))
        np.testing.assert_allclose(second, -sigmoid * (1 - sigmoid), atol=2**-23)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_means_of_numpys_saturated_logits(dtype: type) -> None:
    logits: np.ndarray = np.array([0, 3, 11, 90, 1000, -3, -11, -90, -1000], dtype)
    mean = Bernoulli(logits).mean
    np.testing.assert_allclose(mean, np.exp(log_sigmoid(logits.astype(np.float32))), atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_bernoulli_is_right_at_saturated_logits_of_16_bits(dtype: np.dtype) -> None:
    logits = jnp.array([0, 3, 10.4, 11, 90, 6e4], dtype)
    logits = jnp.concatenate([logits, -logits])

    def log_prob(logit: jax.Array) -> jax.Array:
        return Bernoulli(logit, event_ndim=0).log_prob(jnp.zeros((), dtype))

    eps = float(jnp.finfo(dtype).eps)
    exact = log_sigmoid(-np.asarray(logits, np.float32))
    found = np.asarray(jax.vmap(log_prob)(logits), np.float64)
    np.testing.assert_allclose(found, exact, rtol=2 * eps, atol=eps)
    gradient = np.asarray(jax.vmap(jax.grad(log_prob))(logits), np.float64)
    np.testing.assert_allclose(gradient, -np.exp(log_sigmoid(np.asarray(logits))), atol=2 * eps)


def test_bernoulli_kl_is_right_at_saturated_logits() -> None:
    def kl(logit: jax.Array, other: jax.Array) -> jax.Array:
        return Bernoulli(logit, event_ndim=0).kl(Bernoulli(other, event_ndim=0))

    logits, others = np.array(list(itertools.product(LOGITS, repeat=2)), np.float32).T
    p, q = np.exp(log_sigmoid(logits)), np.exp(log_sigmoid(others))
    exact = p * (log_sigmoid(logits) - log_sigmoid(others))
    exact += (1 - p) * (log_sigmoid(-logits) - log_sigmoid(-others))
    # As above, and 1 - σ(l) is rounded to 2⁻²⁴ of a softplus of at most 100 that it multiplies.
    tolerance = 1e-6 * (1 + np.abs(exact) + np.minimum(np.abs(logits), 100))
    given = jnp.asarray(logits), jnp.asarray(others)
    np.testing.assert_array_less(np.abs(jax.vmap(kl)(*given) - exact), tolerance)
    by_logit, by_other = jax.jit(jax.vmap(jax.grad(kl, (0, 1))))(*given)
    np.testing.assert_allclose(by_other, q - p, atol=2**-22)
    # d/dl KL = σ'(l) (l - l'), and σ' is rounded to 2⁻²³.
    difference = logits.astype(np.float64) - others
    error = np.abs(by_logit - p * (1 - p) * difference)
    np.testing.assert_array_less(error, 2**-22 * (1 + np.abs(difference)))


# log σ is rounded to 2⁻²⁴ · 70, which is the relative error of σ; ε² has twice that.
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e-3, 1.0, 1e3, 1e10, 1e30])
def test_gaussian_is_right_at_tiny_and_huge_scales(scale: float) -> None:
    eps, log_scale = 1.5, jnp.log(jnp.float32(scale))

    def log_prob(value: jax.Array, log_scale: jax.Array) -> jax.Array:
        return DiagonalGaussian(jnp.zeros(()), log_scale, event_ndim=0).log_prob(value)

    given = jnp.float32(eps * scale), log_scale
    exact = -0.5 * eps**2 - math.log(scale) - 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(log_prob(*given), exact, rtol=2e-5)
    gradient = jax.grad(log_prob, (0, 1))(*given)
    np.testing.assert_allclose(gradient, (-eps / scale, eps**2 - 1), rtol=3e-5)
    # The same noise at another scale: log q differs by log σ alone, even where z rounds to μ.
    key = jax.random.key(0)
    z, log_q = DiagonalGaussian(jnp.ones(4), jnp.full(4, log_scale)).sample_and_log_prob(key)
    _, log_q_of_unit = DiagonalGaussian(jnp.ones(4), jnp.zeros(4)).sample_and_log_prob(key)
    np.testing.assert_allclose(log_q, log_q_of_unit - 4 * math.log(scale), rtol=1e-6)
    assert np.isfinite(z).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_gaussian_kl_is_right_at_tiny_and_huge_scales(scale: float) -> None:
    def kl(log_scale: jax.Array, other_log_scale: jax.Array) -> jax.Array:
        zero = jnp.zeros(())
        return DiagonalGaussian(zero, log_scale, 0).kl(DiagonalGaussian(zero, other_log_scale, 0))

    given = jnp.log(jnp.float32(scale)), jnp.log(jnp.float32(2 * scale))
    np.testing.assert_allclose(kl(*given), math.log(2) + 1 / 8 - 1 / 2, rtol=1e-4)
    np.testing.assert_allclose(jax.grad(kl, (0, 1))(*given), (1 / 4 - 1, 1 - 1 / 4), rtol=1e-4)
    tiny_in_unit = kl(jnp.float32(-69.0), jnp.zeros(()))
    np.testing.assert_allclose(tiny_in_unit, 69 - 0.5, rtol=1e-6)


# 1 / σ is beyond float32's largest number at -90, its root at -200; σ at 90 and 200. With it ε of
# 1 and of float32's smallest number.
OUT_OF_RANGE = [(-200.0, math.inf, math.inf), (-90.0, math.inf, 2.0**-126 * math.exp(90))]
OUT_OF_RANGE += [(90.0, 0.0, 0.0), (200.0, 0.0, 0.0)]


@pytest.mark.parametrize(("log_scale", "eps_of_one", "eps_of_tiny"), OUT_OF_RANGE)
def test_gaussian_is_right_where_its_scale_is_no_float32(
    log_scale: float, eps_of_one: float, eps_of_tiny: float
) -> None:
    def of(loc: jax.Array, log_scale: jax.Array) -> DiagonalGaussian:
        return DiagonalGaussian(loc, log_scale, event_ndim=0)

    given = jnp.ones(()), jnp.float32(log_scale)
    log_prob = jax.value_and_grad(lambda *given: of(*given).log_prob(jnp.ones(())), (0, 1))
    kl = jax.value_and_grad(lambda *two: of(*two[:2]).kl(of(*two[2:])), (0, 1, 2, 3))
    largest = -log_scale - 0.5 * math.log(2 * math.pi)
    for run in (lambda f: f, jax.jit):
        value, gradient = run(log_prob)(*given)
        np.testing.assert_allclose(value, largest, rtol=1e-6)
        np.testing.assert_array_equal(gradient, (0, -1))
        assert jax.tree.leaves(run(kl)(*given, *given)) == [0] * 5
        for value, eps in ((1.0, eps_of_one), (2.0**-126, eps_of_tiny)):
            at_zero = run(DiagonalGaussian.log_prob)(
                of(jnp.zeros(()), given[1]), jnp.float32(value)
            )
            np.testing.assert_allclose(at_zero, largest - 0.5 * eps**2, rtol=1e-5)


KEY = jax.random.key(0)
UNIT = DiagonalGaussian(jnp.zeros(20), jnp.zeros(20))


def _log_weight(p: DiagonalGaussian, _: jax.Array) -> jax.Array:
    z, log_p = p.sample_and_log_prob(KEY)
    return UNIT.log_prob(z) - log_p


# Of N(0, σ²) in 20 dimensions and ε: what is compiled, and its exact value of log σ² and ε.
OF_LOG_VARIANCES: dict[str, tuple[Callable[..., jax.Array], Callable[..., np.ndarray]]] = {
    "kl": (lambda p, _: p.kl(UNIT), lambda v, _: 0.5 * (np.exp(v) - 1 - v)),
    "kl from": (lambda p, _: UNIT.kl(p), lambda v, _: 0.5 * (np.exp(-v) - 1 + v)),
    "log_prob": (
        lambda p, eps: p.log_prob(eps) - UNIT.log_prob(eps),
        lambda v, eps: 0.5 * (eps**2 * (1 - np.exp(-v)) - v),
    ),
    "log_prob of ε": (
        lambda p, eps: p.log_prob(p.scale * eps) - UNIT.log_prob(eps),
        lambda v, _: -0.5 * v,
    ),
    "weight of a draw": (_log_weight, lambda v, eps: 0.5 * (v + eps**2 * (1 - np.exp(v)))),
}


# Large sums are compiled in another way than small ones, on CPU by another library.
@pytest.mark.parametrize("num", [100, 1000, 5000])
@pytest.mark.parametrize("name", OF_LOG_VARIANCES)
def test_log_variances_may_be_given_flat(name: str, num: int) -> None:
    function, exact = OF_LOG_VARIANCES[name]

    @jax.jit
    def compiled(log_variance: jax.Array, eps: jax.Array) -> jax.Array:
        log_scale = (0.5 * log_variance).reshape(num, 20)
        return function(DiagonalGaussian(jnp.zeros((num, 20)), log_scale), eps)

    log_variance = np.random.default_rng(0).normal(size=(num, 20)).astype(np.float32)
    eps = jax.random.normal(KEY, (num, 20))
    terms = exact(log_variance.astype(np.float64), np.asarray(eps, np.float64))
    np.testing.assert_allclose(
        compiled(log_variance.ravel(), eps), terms.sum(1), rtol=1e-5, atol=1e-4
    )


def _gaussian_log_prob(loc: jax.Array, log_scale: jax.Array, value: jax.Array) -> jax.Array:
    return DiagonalGaussian(loc, log_scale).log_prob(value)


def _gaussian_sample(loc: jax.Array, log_scale: jax.Array, _: jax.Array) -> jax.Array:
    z, log_q = DiagonalGaussian(loc, log_scale).sample_and_log_prob(jax.random.key(0))
    return (z**3).sum() + log_q


def _gaussian_kl(loc: jax.Array, log_scale: jax.Array, other: jax.Array) -> jax.Array:
    return DiagonalGaussian(loc, log_scale).kl(DiagonalGaussian(other, jnp.sin(other)))


def _bernoulli_log_prob(logits: jax.Array, value: jax.Array, _: jax.Array) -> jax.Array:
    return Bernoulli(logits).log_prob(value)


def _bernoulli_kl(logits: jax.Array, other: jax.Array, _: jax.Array) -> jax.Array:
    return Bernoulli(logits).kl(Bernoulli(other))


@pytest.mark.parametrize(
    "function",
    [_gaussian_log_prob, _gaussian_sample, _gaussian_kl, _bernoulli_log_prob, _bernoulli_kl],
)
def test_both_modes_agree_with_finite_differences(function: Callable[..., jax.Array]) -> None:
    with jax.enable_x64(True):
        arguments = tuple(jnp.asarray(np.random.default_rng(0).normal(size=(3, 4))))
        # Central differences of step 1e-4 err by O(1e-8), and by O(1e-4) in second derivatives.
        jax.test_util.check_grads(
            jax.jit(function), arguments, order=2, modes=["fwd", "rev"], eps=1e-4, rtol=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_distribution_is_a_pytree(family: str) -> None:
    p, _ = draw(family, (4, 3), 1, seed=0)
    value = p.sample(jax.random.key(0))
    by_row = jax.jit(jax.vmap(lambda p, value: p.log_prob(value)))(p, value)
    np.testing.assert_allclose(by_row, p.log_prob(value), rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(4, 2), (4, 1), (3, 4), (1,), ()])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_event_of_another_shape_is_refused(family: str, shape: tuple[int, ...]) -> None:
    p, _ = draw(family, (4, 3), 1, seed=0)
    with pytest.raises(ValueError, match=rf"\(3,\).*{re.escape(str(shape))}"):
        p.log_prob(jnp.zeros(shape))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("method", ["kl", "kl_per_dim"])
def test_kl_is_refused_where_it_has_no_meaning(method: str) -> None:
    gaussian, _ = draw("gaussian", (4, 3), 1, seed=0)
    bernoulli, _ = draw("bernoulli", (4, 3), 1, seed=0)
    kl = getattr(gaussian, method)
    with pytest.raises(TypeError, match=r"DiagonalGaussian to Bernoulli.*sgvb_a"):
        kl(bernoulli)
    with pytest.raises(ValueError, match="event_ndim differs: 1 and 2"):
        kl(draw("gaussian", (4, 3), 2, seed=0)[0])
    with pytest.raises(ValueError, match=r"(?=.*3).*2"):
        kl(draw("gaussian", (4, 2), 1, seed=0)[0])
    with pytest.raises(TypeError, match="Bernoulli to DiagonalGaussian"):
        bernoulli.kl(gaussian)


def test_sampling_noise_is_independent_over_the_batch() -> None:
    z = DiagonalGaussian(jnp.zeros((1000, 2)), jnp.zeros((1000, 2))).sample(jax.random.key(0))
    assert len(np.unique(z)) == 2000
    # A correlation of n pairs has standard error 1/√n.
    correlation = np.corrcoef(np.asarray(z).T)[0, 1]
    assert abs(correlation) < SIGMAS / math.sqrt(1000)
