import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import linear_gaussian
import numpy as np
import pytest
from jaxtyping import Array, PRNGKeyArray
from linear_gaussian import Exact
from parts import CountingEncoder
from standard_errors import ROUNDING, SIGMAS, assert_mean_is, mean_and_error
from weights import random_params

import jvae
from jvae.estimators import TABLE, sampling

KEY = jax.random.key(11)
NUM_DRAWS = 20_000
# data size, latent size, σ
MODELS = [(3, 1, 0.7), (4, 2, 1.0), (7, 5, 1.5)]
BOUNDS: dict[str, Callable[..., Array]] = {
    "sgvb_a": jvae.sgvb_a,
    "sgvb_b": jvae.sgvb_b,
    "iwae": jvae.iwae,
    "beta_elbo": partial(jvae.beta_elbo, beta=3.0),
    "free_bits_elbo": partial(jvae.free_bits_elbo, free_nats=0.5),
}


def data(dim: int, num: int = 3) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(num, dim)).astype(np.float32)


def draws(
    bound: Callable[..., Array], params: jvae.Params, x: np.ndarray, seed: int = 0, **settings: Any
) -> np.ndarray:
    """The bound for many keys, [draw, batch]."""
    keys = jax.random.split(jax.random.key(seed), NUM_DRAWS)
    given = jnp.asarray(x)
    values = jax.jit(jax.vmap(lambda key: bound(params, given, key, **settings)))(keys)
    return np.asarray(values, np.float64)


def once(bound: Callable[..., Array], params: jvae.Params, x: Array, **settings: Any) -> np.ndarray:
    """The bound for one key: compiled, for speed."""
    return np.asarray(jax.jit(partial(bound, **settings))(params, x, KEY))


def normal_log_prob(value: np.ndarray, loc: np.ndarray, scale: Any) -> np.ndarray:
    terms = -0.5 * ((value - loc) / scale) ** 2 - np.log(scale * math.sqrt(2 * math.pi))
    return np.asarray(terms.sum(axis=-1))


# Equation 1 and its consequences, where every term is exact.


@pytest.mark.parametrize(("data_dim", "latent_dim", "scale"), MODELS)
def test_the_oracle_meets_equation_1(data_dim: int, latent_dim: int, scale: float) -> None:
    params, x = linear_gaussian.make(data_dim, latent_dim, scale), data(data_dim)
    exact = Exact.of(params)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda w: jnp.asarray(np.asarray(w), jnp.float64), params)
        elbo = linear_gaussian.elbo(wide, jnp.asarray(x, jnp.float64))
    np.testing.assert_allclose(elbo, exact.log_px(x) - exact.kl_to_posterior(x), rtol=1e-10)
    # Far above the Monte Carlo errors below: a KL of the wrong sign cannot pass.
    assert (exact.kl_to_posterior(x) > 0.2).all()


@pytest.mark.parametrize(("name", "num_samples"), [("sgvb_a", 1), ("sgvb_b", 1), ("sgvb_b", 4)])
@pytest.mark.parametrize(("data_dim", "latent_dim", "scale"), MODELS)
def test_sgvb_is_log_px_less_the_kl_to_the_posterior(
    data_dim: int, latent_dim: int, scale: float, name: str, num_samples: int
) -> None:
    params, x = linear_gaussian.make(data_dim, latent_dim, scale), data(data_dim)
    exact = Exact.of(params)
    values = draws(BOUNDS[name], params, x, num_samples=num_samples)
    assert_mean_is(values, exact.log_px(x) - exact.kl_to_posterior(x))


@pytest.mark.parametrize(("name", "num_samples"), [("sgvb_a", 1), ("iwae", 2), ("iwae", 7)])
@pytest.mark.parametrize(("data_dim", "latent_dim", "scale"), MODELS)
def test_at_the_posterior_every_draw_is_log_px(
    data_dim: int, latent_dim: int, scale: float, name: str, num_samples: int
) -> None:
    params = linear_gaussian.with_posterior(linear_gaussian.make(data_dim, latent_dim, scale))
    x = data(data_dim)
    expected = np.broadcast_to(Exact.of(params).log_px(x), (20, 3))
    keys = jax.random.split(KEY, 20)
    bound = partial(BOUNDS[name], num_samples=num_samples)
    values = jax.jit(jax.vmap(lambda key: bound(params, jnp.asarray(x), key)))(keys)
    np.testing.assert_allclose(values, expected, rtol=2e-5)


def test_variance_of_a_and_b_at_the_two_ends(
    record_property: Callable[[str, object], None],
) -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), data(4)
    blind = linear_gaussian.with_decoder(params, np.zeros((4, 2)), x[0])
    params = linear_gaussian.with_posterior(params)
    variances = {
        (end, name): draws(BOUNDS[name], p, x).var(axis=0)
        for end, p in (("posterior", linear_gaussian.with_posterior(params)), ("blind", blind))
        for name in ("sgvb_a", "sgvb_b")
    }
    for (end, name), variance in variances.items():
        record_property(f"variance of {name} at {end}", variance.tolist())
    # q = p(z|x) makes every weight p(x): A has no variance. A decoder blind to z makes log p(x|z)
    # a constant: B has none. No value is exact beyond the rounding of its terms.
    rounding = (ROUNDING * 10) ** 2
    assert (variances["posterior", "sgvb_a"] < rounding).all()
    assert (variances["posterior", "sgvb_b"] > 0.01).all()
    assert (variances["blind", "sgvb_b"] < rounding).all()
    assert (variances["blind", "sgvb_a"] > 0.01).all()


@pytest.mark.parametrize(("data_dim", "latent_dim", "scale"), MODELS[1:])
def test_importance_weights_average_to_px_and_the_bound_tightens(
    data_dim: int, latent_dim: int, scale: float
) -> None:
    # An overdispersed q bounds the weights, so that their variance is finite.
    params = linear_gaussian.with_posterior(
        linear_gaussian.make(data_dim, latent_dim, scale), shift=0.3, inflation=2.0
    )
    x = data(data_dim)
    log_px, kl = Exact.of(params).log_px(x), Exact.of(params).kl_to_posterior(x)
    gaps = []
    for seed, num_samples in enumerate([1, 2, 8]):
        log_ratio = draws(jvae.iwae, params, x, seed, num_samples=num_samples) - log_px
        assert_mean_is(np.exp(log_ratio), np.ones(3))
        gaps.append(mean_and_error(log_ratio))
    np.testing.assert_array_less(np.abs(gaps[0][0] + kl), SIGMAS * gaps[0][1] + ROUNDING)
    for (looser, error), (tighter, other) in itertools.pairwise(gaps):
        # Independent draws: the variances of the two means add up.
        assert (tighter - looser > SIGMAS * np.hypot(error, other)).all()
    assert (gaps[-1][0] < SIGMAS * gaps[-1][1]).all()


@pytest.mark.parametrize(("name", "num_samples"), [("sgvb_a", 1), ("sgvb_b", 3)])
def test_gradients_average_to_the_exact_gradient(name: str, num_samples: int) -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), jnp.asarray(data(4))
    exact = jax.jit(jax.grad(lambda p: linear_gaussian.elbo(p, x).sum()))(params)
    keys = jax.random.split(KEY, NUM_DRAWS)
    bound = partial(BOUNDS[name], num_samples=num_samples)
    gradient = jax.grad(lambda p, key: bound(p, x, key).sum())
    estimates = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(params, keys)
    for network in ("encoder", "decoder"):
        expected = jax.tree.leaves(exact.weights[network])
        assert all(np.any(leaf) for leaf in expected)
        for estimate, leaf in zip(
            jax.tree.leaves(estimates.weights[network]), expected, strict=True
        ):
            assert_mean_is(estimate, leaf)


# The same draws by a loop, in float64 from the weights.


@pytest.mark.parametrize("num_samples", [1, 5])
@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_are_their_formulas_over_the_split_keys(name: str, num_samples: int) -> None:
    params, x = linear_gaussian.make(4, 2, 0.8), data(4)
    exact = Exact.of(params)
    loc, scale = exact.q(x)
    draw = jax.jit(lambda key: jvae.posterior(params, jnp.asarray(x)).sample(key))
    z = np.stack([draw(key) for key in jax.random.split(KEY, num_samples)])
    log_px_z = normal_log_prob(x, z @ exact.W.T + exact.b, exact.sigma)
    log_w = log_px_z + normal_log_prob(z, np.zeros(2), 1.0) - normal_log_prob(z, loc, scale)
    kl = 0.5 * (loc**2 + scale**2 - 1 - np.log(scale**2))
    expected = {
        "sgvb_a": log_w.mean(axis=0),
        "sgvb_b": log_px_z.mean(axis=0) - kl.sum(axis=-1),
        "iwae": np.log(np.exp(log_w - log_w.max()).mean(axis=0)) + log_w.max(),
        "beta_elbo": log_px_z.mean(axis=0) - 3 * kl.sum(axis=-1),
        "free_bits_elbo": log_px_z.mean(axis=0) - np.maximum(kl, 0.5).sum(axis=-1),
    }[name]
    assert (kl < 0.5).any()
    assert (kl > 0.5).any()
    values = once(BOUNDS[name], params, jnp.asarray(x), num_samples=num_samples)
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_the_bernoulli_bound_sums_over_pixels(bernoulli_params: jvae.Params) -> None:
    x = np.random.default_rng(0).integers(0, 2, (4, 2, 3)).astype(np.float32)
    q = jvae.posterior(bernoulli_params, jnp.asarray(x))
    z = q.sample(jax.random.split(KEY, 1)[0])
    y = np.asarray(jvae.likelihood(bernoulli_params, z).mean, np.float64)
    log_px_z = np.log(np.where(x == 1, y, 1 - y)).sum(axis=(1, 2))
    loc, scale = (np.asarray(a, np.float64) for a in (q.loc, q.scale))
    kl = 0.5 * (loc**2 + scale**2 - 1 - 2 * np.log(scale)).sum(axis=1)
    values = once(jvae.elbo, bernoulli_params, jnp.asarray(x))
    np.testing.assert_allclose(values, log_px_z - kl, rtol=1e-5)


def test_a_bernoulli_vae_by_quadrature() -> None:
    """p(x) = ∫ p(z) p(x|z) dz on a grid, for every binary x."""
    params = random_params(jvae.VAE.mlp((4,), 1, hidden=(6,)), scale=1.0)
    # q the prior: weights p(x|z) ≤ 1 are bounded.
    encoder = jax.tree.map(jnp.zeros_like, params.weights["encoder"])
    params = dataclasses.replace(params, weights={**params.weights, "encoder": encoder})
    hidden, output = (
        jax.tree.map(lambda w: np.asarray(w, np.float64), params.weights["decoder"]["params"][n])
        for n in ("hidden_0", "output")
    )
    z = np.linspace(-10, 10, 4001)[:, None]
    logits = np.tanh(z @ hidden["kernel"] + hidden["bias"]) @ output["kernel"] + output["bias"]
    x = np.array(list(itertools.product([0.0, 1.0], repeat=4)), np.float32)
    signs = (2 * x - 1)[:, None, :]
    px_z = np.exp(-np.logaddexp(0, -signs * logits).sum(axis=-1))
    density = np.exp(-0.5 * z[:, 0] ** 2) / math.sqrt(2 * math.pi)
    px = np.trapezoid(px_z * density, z[:, 0], axis=1)
    np.testing.assert_allclose(px.sum(), 1, rtol=1e-10)
    log_ratio = draws(jvae.iwae, params, x, num_samples=3) - np.log(px)
    assert_mean_is(np.exp(log_ratio), np.ones(16))
    for bound in (jvae.sgvb_a, jvae.sgvb_b):
        mean, error = mean_and_error(draws(bound, params, x) - np.log(px))
        assert (mean < -SIGMAS * error).all()


# Relations between the bounds, at one key.


def test_special_cases() -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), jnp.asarray(data(4))
    assert jvae.elbo is jvae.sgvb_b
    sgvb_a, iwae = once(jvae.sgvb_a, params, x), once(jvae.iwae, params, x, num_samples=1)
    np.testing.assert_allclose(iwae, sgvb_a, rtol=1e-6)
    elbo = once(jvae.elbo, params, x, num_samples=3)
    beta_elbo = once(jvae.beta_elbo, params, x, beta=1.0, num_samples=3)
    np.testing.assert_allclose(beta_elbo, elbo, rtol=1e-6)
    free_bits_elbo = once(jvae.free_bits_elbo, params, x, free_nats=0.0, num_samples=3)
    np.testing.assert_allclose(free_bits_elbo, elbo, rtol=1e-6)


def test_beta_and_free_bits_only_lower_the_bound() -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), jnp.asarray(data(4))
    for bound in (
        lambda beta: jvae.beta_elbo(params, x, KEY, beta=beta),
        lambda free_nats: jvae.free_bits_elbo(params, x, KEY, free_nats=free_nats),
    ):
        # Traced, as a schedule gives it.
        values = np.asarray(jax.jit(jax.vmap(bound))(jnp.array([0.0, 0.5, 1.0, 4.0])))
        assert (np.diff(values, axis=0) <= 0).all()
        assert (values[0] > values[-1]).all()


@pytest.mark.parametrize("name", ["sgvb_b", "iwae"])
def test_minibatch_elbo_is_n_over_m_times_the_sum(name: str) -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), jnp.asarray(data(4, num=6))
    minibatch_elbo = partial(jvae.minibatch_elbo, dataset_size=60, bound=BOUNDS[name])
    for batch in (x, x.reshape(2, 3, 4), x[0]):
        value = once(minibatch_elbo, params, batch)
        each = once(BOUNDS[name], params, batch)
        assert value.shape == ()
        np.testing.assert_allclose(value, 60 / each.size * each.sum(), rtol=1e-6)
    if name == "sgvb_b":
        default = once(jvae.minibatch_elbo, params, x[0], dataset_size=60)
        np.testing.assert_allclose(default, value, rtol=1e-6)


def test_a_dataset_may_be_larger_than_32_bits() -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), jnp.asarray(data(4))
    value = once(partial(jvae.minibatch_elbo, dataset_size=2**40), params, x)
    np.testing.assert_allclose(value, 2.0**40 * once(jvae.elbo, params, x).mean(), rtol=1e-6)


def test_minibatch_elbo_is_unbiased_over_all_minibatches() -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), data(4, num=6)

    def exact(params: jvae.Params, x: Array, key: PRNGKeyArray) -> Array:
        return linear_gaussian.elbo(params, x)

    @jax.jit
    def estimate(batch: Array) -> Array:
        return jvae.minibatch_elbo(params, batch, KEY, dataset_size=6, bound=exact)

    estimates = [
        estimate(jnp.asarray(x[list(chosen)])) for chosen in itertools.combinations(range(6), 2)
    ]
    expected = linear_gaussian.elbo(params, jnp.asarray(x)).sum()
    np.testing.assert_allclose(np.mean(estimates), expected, rtol=1e-6)
    assert np.std(estimates) > 0.1


# The shared contract.


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("name", BOUNDS)
def test_one_number_an_example(name: str, batch: tuple[int, ...]) -> None:
    params = linear_gaussian.make(4, 2, 1.0)
    x = jnp.broadcast_to(jnp.asarray(data(4)[0]), (*batch, 4))
    values = once(BOUNDS[name], params, x, num_samples=2)
    assert values.shape == batch
    assert values.dtype == np.float32
    # Each example has noise of its own, though all are equal.
    assert len(np.unique(values)) == math.prod(batch)


@pytest.mark.parametrize("name", BOUNDS)
def test_x_is_encoded_once(name: str) -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), jnp.asarray(data(4))
    encoder = CountingEncoder(params.model.encoder)
    counted = jvae.Params(params.weights, dataclasses.replace(params.model, encoder=encoder))
    values = once(BOUNDS[name], counted, x, num_samples=7)
    assert encoder.shapes == [(3, 4)]
    assert values.shape == (3,)


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_transform(name: str) -> None:
    x = jnp.asarray(data(4))
    members = [linear_gaussian.make(4, 2, 1.0, seed=seed) for seed in range(3)]
    traces = 0

    @jax.jit
    def bound(params: jvae.Params, x: Array, key: PRNGKeyArray) -> Array:
        nonlocal traces
        traces += 1
        return BOUNDS[name](params, x, key, num_samples=2)

    values = [np.asarray(bound(params, x, KEY)) for params in members]
    np.testing.assert_array_equal(values[0], bound(members[0], x, jax.random.key(11)))
    assert (values[0] != bound(members[0], x, jax.random.key(12))).all()
    assert traces == 1
    bound(members[0], x[:2], KEY)
    assert traces == 2

    eager = BOUNDS[name](members[0], x, KEY, num_samples=2)
    np.testing.assert_allclose(eager, values[0], rtol=1e-5)
    ensemble = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    together = jax.jit(jax.vmap(bound, (0, None, None)))(ensemble, x, KEY)
    np.testing.assert_allclose(together, values, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda params: BOUNDS[name](params, x, KEY).sum()))(members[0])
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("num_samples", "error", "words"),
    [
        (0, ValueError, "num_samples must be at least 1, got 0"),
        (-3, ValueError, "num_samples must be at least 1, got -3"),
        (2.0, TypeError, "num_samples must be a static int, got float"),
        (True, TypeError, "num_samples must be a static int, got bool"),
        (None, TypeError, "num_samples must be a static int, got NoneType"),
    ],
)
@pytest.mark.parametrize("name", [*BOUNDS, "log_likelihood"])
def test_a_number_of_samples_that_is_none_is_refused(
    name: str, num_samples: Any, error: type[Exception], words: str
) -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), jnp.asarray(data(4))
    bound: Callable[..., Any] = BOUNDS.get(name, jvae.log_likelihood)
    with pytest.raises(error, match=words):
        bound(params, x, KEY, num_samples=num_samples)


@pytest.mark.usefixtures("unchecked")
def test_a_traced_number_is_refused() -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), jnp.asarray(data(4))
    with pytest.raises(TypeError, match="num_samples must be a static int"):
        jax.jit(lambda n: jvae.elbo(params, x, KEY, num_samples=n))(3)
    with pytest.raises(TypeError, match="dataset_size must be a static int"):
        jax.jit(lambda n: jvae.minibatch_elbo(params, x, KEY, dataset_size=n))(3)
    with pytest.raises(ValueError, match="dataset_size must be at least 1, got 0"):
        jvae.minibatch_elbo(params, x, KEY, dataset_size=0)


@dataclasses.dataclass(frozen=True)
class NoKL:
    """A posterior that can be sampled, and no more."""

    inner: Any

    def sample_and_log_prob(self, key: PRNGKeyArray) -> tuple[Array, Array]:
        value, log_prob = self.inner.sample_and_log_prob(key)
        return value, log_prob


@dataclasses.dataclass(frozen=True)
class NoKLFamily:
    """The family of `NoKL`."""

    outputs_per_entry: int = 2

    def __call__(self, outputs: tuple[Array, ...], event_ndim: int) -> NoKL:
        return NoKL(jvae.Gaussian()(outputs, event_ndim))


def test_a_posterior_without_a_closed_form_is_sent_to_sgvb_a() -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), jnp.asarray(data(4))
    encoder = params.model.encoder.clone(family=NoKLFamily())
    without = jvae.Params(params.weights, dataclasses.replace(params.model, encoder=encoder))
    np.testing.assert_array_equal(once(jvae.sgvb_a, without, x), once(jvae.sgvb_a, params, x))
    for name in ("sgvb_b", "beta_elbo", "free_bits_elbo"):
        with pytest.raises(TypeError, match=r"NoKL has no closed-form kl.*jvae\.sgvb_a"):
            BOUNDS[name](without, x, KEY)


def test_saturated_decoders_train() -> None:
    """Weights a thousand times too large give finite bounds and finite gradients."""
    params = random_params(jvae.VAE.mlp((6,), 2, hidden=(4,)), scale=1.0)
    decoder = jax.tree.map(lambda w: 1e4 * w, params.weights["decoder"])
    params = dataclasses.replace(params, weights={**params.weights, "decoder": decoder})
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (5, 6)), jnp.float32)
    value_and_grad = jax.value_and_grad(lambda params: jvae.elbo(params, x, KEY).mean())
    value, gradient = jax.jit(value_and_grad)(params)
    assert value < -1e3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradient)))


# Many draws.


@pytest.mark.parametrize("name", ["sgvb_b", "iwae"])
def test_draws_in_chunks_are_the_same_draws(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = linear_gaussian.make(4, 2, 0.7)
    x, key = jnp.ones((3, 4)), jax.random.key(0)

    def value_and_gradient() -> Any:
        def mean(params: jvae.Params) -> Array:
            return getattr(jvae, name)(params, x, key, num_samples=11).mean()

        return jax.jit(jax.value_and_grad(mean))(params)

    at_once = value_and_gradient()
    monkeypatch.setattr(sampling, "BYTES_AT_ONCE", 4 * 12 * 4)  # four draws, so 4 + 4 + 3
    in_chunks = value_and_gradient()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), in_chunks, at_once)


@pytest.mark.parametrize("name", TABLE)
def test_memory_does_not_grow_with_the_draws(name: str) -> None:
    """5,000 logits of 100 MNIST images are 1.6 GB, and a gradient would keep several of them."""
    params = jax.eval_shape(lambda: jvae.init(jvae.VAE.mlp(), jax.random.key(0)))
    x = jax.ShapeDtypeStruct((100, 28, 28), jnp.float32)

    def loss(params: jvae.Params, x: Array) -> Array:
        return -TABLE[name].bound(params, x, jax.random.key(0), num_samples=5000).mean()

    memory = jax.jit(jax.grad(loss)).lower(params, x).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 6 * sampling.BYTES_AT_ONCE
