"""Every learner's updates, against what they are in expectation on linear-Gaussian models."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import linear_gaussian
import numpy as np
import optax
import pytest
import quadrature
from jaxtyping import Array, PRNGKeyArray
from linear_gaussian import Exact
from runs import assert_same_state
from standard_errors import ROUNDING, SIGMAS, assert_mean_is

import jvae
from jvae import checkpoint, learners, training
from jvae.learners import Learner, aevb, full_bayes, mcem, moving_baseline, wake_sleep

KEY = jax.random.key(3)
SGD = optax.sgd(1.0)  # whose update is the gradient


def data(dim: int, num: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(num, dim)).astype(np.float32)


def leaves(params: jvae.Params, network: str) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params.weights[network])]


def updates(after: jvae.Params, before: jvae.Params) -> jvae.Params:
    return jax.tree.map(lambda a, b: a - b, after, before)


def exact_gradient(
    expected: Callable[[jvae.Params, Array], Array], params: jvae.Params, x: np.ndarray
) -> jvae.Params:
    gradient = jax.grad(lambda params, x: expected(params, x).mean())
    return quadrature.in_float64(gradient, params, x)


def assert_updates_are(found: jvae.Params, wanted: jvae.Params, network: str) -> None:
    """The updates [draw, ...] are `wanted` on average, which is no mere zero."""
    for estimate, leaf in zip(leaves(found, network), leaves(wanted, network), strict=True):
        assert_mean_is(estimate, leaf)
        assert np.any(np.abs(leaf) > 0.02)


# Wake-sleep.


def test_the_two_phases_of_wake_sleep_are_their_expectations() -> None:
    """θ ascends E_q[log p(x, z)], whose gradient is the ELBO's; φ ascends E_p(x,z)[log q(z|x)]."""
    params, x = linear_gaussian.make(3, 1, 0.9, seed=1), data(3, 2)
    learner = wake_sleep.make_learner(SGD)

    def update(key: PRNGKeyArray) -> tuple[jvae.Params, Array]:
        state, info = learner.step(learner.init(params, key), x)
        return updates(state.params, params), info.bound

    found, bounds = jax.jit(jax.vmap(update))(jax.random.split(KEY, 20_000))
    wake = exact_gradient(linear_gaussian.elbo, params, x)
    sleep = exact_gradient(linear_gaussian.log_q_of_dreams, params, x)
    assert_updates_are(found, wake, "decoder")
    assert_updates_are(found, sleep, "encoder")
    assert_mean_is(bounds, linear_gaussian.elbo(params, jnp.asarray(x)).mean())


# Monte Carlo EM.


def whitened(exact: Exact, x: np.ndarray, z: Any) -> np.ndarray:
    """z [..., num, latent] as it would be of N(0, I), if it is of p(z|x), x [num, data]."""
    L = np.linalg.cholesky(exact.posterior_covariance)
    return (np.asarray(z, np.float64) - exact.posterior_mean(x)) @ np.linalg.inv(L).T


def posterior_samples(exact: Exact, x: np.ndarray, num: int) -> np.ndarray:
    """Exact draws of p(z|x), [num, batch, latent]."""
    L = np.linalg.cholesky(exact.posterior_covariance)
    eps = np.random.default_rng(2).normal(size=(num, len(x), len(L)))
    return (exact.posterior_mean(x) + eps @ L.T).astype(np.float32)


def test_chains_converge_to_the_posterior_at_the_acceptance_asked_for() -> None:
    params, x, copies = linear_gaussian.make(4, 2, 0.3), data(4, 3), 1000
    dataset = mcem.visits(np.repeat(x, copies, axis=0))
    learner = mcem.make_learner(optax.set_to_zero(), num_examples=3 * copies)

    def visit(state: mcem.State, _: None) -> tuple[mcem.State, mcem.Info]:
        return learner.step(state, dataset)

    @jax.jit
    def run(params: jvae.Params) -> tuple[mcem.State, mcem.Info]:
        return jax.lax.scan(visit, learner.init(params, KEY), length=80)

    state, info = run(params)
    # Of a number from 0 to 1 with mean 0.9 the standard deviation is 0.3 at most.
    np.testing.assert_allclose(info.acceptance[40:], 0.9, atol=SIGMAS * 0.3 / math.sqrt(3 * copies))
    deviation = whitened(Exact.of(params), np.repeat(x, copies, axis=0), state.chains)
    for own in deviation.reshape(3, copies, 2):
        assert_mean_is(own, np.zeros(2))
        assert_mean_is(own[:, :, None] * own[:, None], np.eye(2))
    # The prior, from which they came, is another distribution: of samples of p(z|x) the mean
    # square would be 1 to 0.03.
    start = learner.init(params, KEY).chains
    start = whitened(Exact.of(params), np.repeat(x, copies, axis=0), start)
    assert (np.square(start).mean(axis=0) > 1.5).any()


def log_px(params: jvae.Params, x: Array) -> Array:
    """log p(x), differentiable: its gradient is E_p(z|x)[∇θ log p(x, z)], Fisher's identity."""
    decoder = params.weights["decoder"]["params"]["output"]
    W, sigma = decoder["kernel"].T, params.model.decoder.family.scale
    covariance = W @ W.T + sigma**2 * jnp.eye(len(W))
    logpdf = partial(jax.scipy.stats.multivariate_normal.logpdf, mean=decoder["bias"])
    log_p: Array = jax.vmap(lambda x: jnp.asarray(logpdf(x, cov=covariance)))(x)
    return log_p


def most_likely(params: jvae.Params, x: np.ndarray) -> jvae.Params:
    """The θ that maximises Σ log p(x) with σ as it is: Tipping & Bishop (1999), Section 3.2."""
    exact, latent_dim = Exact.of(params), params.model.prior.latent_dim
    eigenvalues, U = np.linalg.eigh(np.cov(x.T, bias=True))
    lengths = np.sqrt(eigenvalues[-latent_dim:] - exact.sigma**2)
    return linear_gaussian.with_decoder(params, U[:, -latent_dim:] * lengths, x.mean(axis=0))


@pytest.mark.parametrize("fitted", [False, True])
def test_the_expected_update_is_the_gradient_of_log_px(fitted: bool) -> None:
    """And so zero at the maximum of the likelihood, where chains are of the posterior."""
    params, x, num = linear_gaussian.make(3, 2, 0.4), data(3, 6), 4000
    params = most_likely(params, x) if fitted else params
    learner = mcem.make_learner(SGD, num_examples=6, num_updates=1)
    start = learner.init(params, KEY)._replace(log_step_size=jnp.float32(-1.5))

    def update(key: PRNGKeyArray, chains: Array) -> tuple[jvae.Params, Array, Array]:
        state, info = learner.step(start._replace(key=key, chains=chains), mcem.visits(x))
        return updates(state.params, params), info.bound, info.acceptance

    chains = posterior_samples(Exact.of(params), x, num)
    found, bounds, acceptance = jax.jit(jax.vmap(update))(jax.random.split(KEY, num), chains)
    assert 0.3 < acceptance.mean() < 0.999
    wanted = exact_gradient(log_px, params, x)
    if fitted:
        for estimate in leaves(found, "decoder"):
            assert_mean_is(estimate, np.zeros(estimate.shape[1:]))
            assert np.any(np.abs(estimate) > 0.1)
    else:
        assert_updates_are(found, wanted, "decoder")
    # The bound that is none: log p(x) less the entropy of p(z|x).
    exact = Exact.of(params)
    entropy = 0.5 * np.linalg.slogdet(2 * math.pi * math.e * exact.posterior_covariance)[1]
    assert_mean_is(bounds, exact.log_px(x).mean() - entropy)


def test_weights_are_updated_several_times_with_where_the_chains_are_then() -> None:
    params, x, index = linear_gaussian.make(3, 2, 0.9), data(3, 4), np.array([5, 0, 3, 1])
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1))
    learner = mcem.make_learner(optimizer, num_examples=7, num_updates=3)
    start = learner.init(params, KEY)
    state, info = learner.step(learner.init(params, KEY), mcem.Visit(x, index))
    # Chains: those of the minibatch, and no others.
    moved = (np.asarray(state.chains) != np.asarray(start.chains)).all(axis=1)
    assert set(np.flatnonzero(moved)) <= set(index.tolist())
    assert moved.sum() >= 3
    z = state.chains[index]

    def mean_log_joint(params: jvae.Params) -> Array:
        log_px_z = jvae.likelihood(params, z).log_prob(jnp.asarray(x))
        return (log_px_z + jvae.prior(params).log_prob(z)).mean()

    expected = params
    for done in range(3):
        value, gradient = jax.value_and_grad(mean_log_joint)(expected)
        if not done:
            np.testing.assert_allclose(info.bound, value, rtol=ROUNDING)
        expected = jax.tree.map(lambda w, g: w + 0.1 * (g - 0.1 * w), expected, gradient)
    for network in ("decoder", "prior"):
        for found, leaf in zip(
            leaves(state.params, network), leaves(expected, network), strict=True
        ):
            np.testing.assert_allclose(found, leaf, rtol=1e-5, atol=1e-6)
    # No optimizer reaches the encoder, not by a decay either.
    jax.tree.map(
        np.testing.assert_array_equal, state.params.weights["encoder"], params.weights["encoder"]
    )
    assert (state.step, start.step) == (1, 0)
    np.testing.assert_allclose(state.log_step_size, 0.5 * (info.acceptance - 0.9), rtol=1e-5)


def test_the_batch_may_have_any_axes() -> None:
    params, x = linear_gaussian.make(3, 2, 0.9), data(3, 6)
    learner = mcem.make_learner(SGD, num_examples=8)
    index = np.array([7, 2, 4, 1, 0, 3])
    flat, _ = learner.step(learner.init(params, KEY), mcem.Visit(x, index))
    nested = mcem.Visit(x.reshape(2, 3, 3), index.reshape(2, 3))
    assert_same_state(learner.step(learner.init(params, KEY), nested)[0], flat)
    one, _ = learner.step(learner.init(params, KEY), mcem.Visit(x[0], np.array(7)))
    moved = (one.chains != learner.init(params, KEY).chains).any(axis=1)
    assert set(np.flatnonzero(moved)) <= {7}


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"num_examples": 0}, ValueError, "num_examples must be at least 1, got 0"),
        ({"num_updates": 2.0}, TypeError, "num_updates must be a static int, got float"),
        ({"num_leapfrog": 0}, ValueError, "num_leapfrog must be at least 1, got 0"),
        ({"target_acceptance": 1.5}, ValueError, "target_acceptance must be .* at most 1, got 1.5"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_of_mcem_that_cannot_be_are_refused(
    settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        mcem.make_learner(SGD, **{"num_examples": 4} | settings)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (np.zeros((2, 3), np.float32), TypeError, r"a Visit\(x, indices\), got .*mcem.visits"),
        (mcem.visits(np.zeros((2, 4), np.float32)), ValueError, r"x must have shape .*\(2, 4\)"),
        (mcem.visits(np.zeros((2, 3), np.uint8)), TypeError, "x must be floating point"),
        (
            mcem.Visit(np.zeros((2, 3), np.float32), np.arange(3)),
            ValueError,
            r"indices must .*\(2,\)",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_batch_that_is_no_visit_is_refused(x: Any, error: type[Exception], words: str) -> None:
    learner = mcem.make_learner(SGD, num_examples=4)
    with pytest.raises(error, match=words):
        learner.step(learner.init(linear_gaussian.make(3, 2, 0.9), KEY), x)


# All learners, in the one loop.


class Run(NamedTuple):
    """A learner, its epoch of batches of 8, and its data."""

    learner: Learner
    epoch: training.Epoch
    data: Any


def noisy(images: Array, key: PRNGKeyArray) -> Array:
    return images / jnp.float32(64) + 0.1 * jax.random.normal(key, images.shape)


IMAGES = np.random.default_rng(0).integers(0, 256, (24, 3), np.uint8)
OPTIMIZER = training.make_optimizer("adagrad", 0.05, map_dataset_size=24)
PLAIN = training.make_optimizer("adagrad", 0.05)


def run_of(learner: Learner, data: Any = IMAGES, preprocess: training.Preprocess = noisy) -> Run:
    return Run(learner, training.make_epoch(learner.step, 8, preprocess), data)


RUNS = {
    "aevb": run_of(aevb.make_learner(OPTIMIZER)),
    "wake_sleep": run_of(wake_sleep.make_learner(OPTIMIZER)),
    "moving_baseline": run_of(moving_baseline.make_learner(OPTIMIZER)),
    "full_bayes": run_of(full_bayes.make_learner(PLAIN, dataset_size=24)),
    "mcem": run_of(
        mcem.make_learner(OPTIMIZER, num_examples=24), mcem.visits(IMAGES), mcem.on_images(noisy)
    ),
}


def start(run: Run, seed: int) -> Any:
    return run.learner.init(linear_gaussian.make(3, 2, 0.9, seed=seed), jax.random.key(seed))


def test_every_learner_is_run() -> None:
    assert {"Learner", *RUNS} == set(learners.__all__)


@pytest.mark.parametrize("name", RUNS)
def test_an_epoch_trains_any_learner_alone_and_in_an_ensemble(name: str) -> None:
    run = RUNS[name]
    alone = [run.epoch(start(run, seed), run.data) for seed in range(2)]
    state, info = run.epoch(training.ensemble([start(run, seed) for seed in range(2)]), run.data)
    assert type(state) is type(alone[0][0])
    assert state.step == 3
    for seed, (member, (expected, own)) in enumerate(
        zip(training.members(state), alone, strict=True)
    ):
        key, wanted = (jax.random.key_data(one.key) for one in (member, expected))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            member._replace(key=key),
            expected._replace(key=wanted),
        )
        jax.tree.map(
            lambda a, b, seed=seed: np.testing.assert_allclose(a[:, seed], b, rtol=1e-4, atol=1e-5),
            info,
            own,
        )
    fitted = [one.params.mean if name == "full_bayes" else one.params for one, _ in alone]
    first, second = (leaves(params, "decoder") for params in fitted)
    assert all((a != b).all() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_where_wider_types_are_allowed_32_bits_stay_32(name: str) -> None:
    learner, x = RUNS[name].learner, data(3, 8)
    batch = mcem.visits(x) if name == "mcem" else x
    narrow = learner.step(start(RUNS[name], 0), batch)
    with jax.enable_x64(True):
        wide = learner.step(start(RUNS[name], 0), batch)
    for found, expected in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True):
        assert found.dtype == expected.dtype
        if jnp.issubdtype(expected.dtype, jnp.number):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(
    name: str, tmp_path: Path
) -> None:
    run = RUNS[name]
    reports: list[Any] = []
    whole = training.fit(
        start(run, 0),
        run.epoch,
        run.data,
        num_epochs=2,
        on_epoch=lambda state, info: reports.append(info),
    )
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save_state(
            checkpoints, training.fit(start(run, 0), run.epoch, run.data, num_epochs=1)
        )
        middle = checkpoint.restore_latest(checkpoints, start(run, 0))
    assert type(middle) is type(whole)
    assert_same_state(training.fit(middle, run.epoch, run.data, num_epochs=1), whole)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(reports))
    if name == "mcem":
        acceptance = np.stack([info.acceptance for info in reports])
        assert acceptance.shape == (2, 3)
        assert ((acceptance > 0) & (acceptance <= 1)).all()


@pytest.mark.parametrize("stops", [False, True], ids=["whole", "resumed"])
@pytest.mark.parametrize("name", ["aevb", "mcem"])
def test_steps_skipped_in_a_row_are_counted_however_many_updates_one_has(
    name: str, stops: bool
) -> None:
    optimizer, images = training.skip_non_finite(SGD), np.full((6, 3), np.nan, np.float32)
    learner, data = {
        "aevb": (aevb.make_learner(optimizer), images),
        "mcem": (mcem.make_learner(optimizer, num_examples=6), mcem.visits(images)),
    }[name]
    state, epoch = start(run_of(learner), 0), training.make_epoch(learner.step, 2)
    if stops:
        state = training.fit(state, epoch, data, num_epochs=2, max_skipped=8)
    with pytest.raises(training.NonFiniteError, match=r"last 8 steps .* up to step 7;"):
        training.fit(state, epoch, data, num_epochs=4, max_skipped=8)


# The score function.


def test_the_baseline_is_a_moving_average_of_the_bounds_before() -> None:
    slow = optax.sgd(1e-4)
    learner, x = moving_baseline.make_learner(slow, decay=0.6), data(3, 4)
    state = learner.init(linear_gaussian.make(3, 2, 0.9), KEY)
    expected = 0.0
    for rate in (1.0, 0.5, 0.4, 0.4):  # the larger of 1 - decay and 1 / (t + 1)
        before = jax.tree.map(jnp.copy, state)
        state, info = learner.step(state, x)
        np.testing.assert_allclose(before.baseline, expected, rtol=1e-6)
        expected += rate * (float(info.bound) - expected)
        # The step is that of the bound with this baseline, which the gradient takes as it is.
        bound = partial(jvae.score_function, baseline=before.baseline)
        plain = training.TrainState(before.step, before.params, before.opt_state, before.key)
        other, _ = training.make_step(bound, slow)(plain, x)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            state.params,
            other.params,
        )


def test_the_moving_average_takes_noise_from_the_gradient() -> None:
    """Far from 0 the naive gradient is mostly the score times the mean of log w."""
    learner, x = moving_baseline.make_learner(SGD), 5 + data(3, 4)
    state = learner.init(linear_gaussian.make(3, 2, 0.9), KEY)
    baseline = learner.step(jax.tree.map(jnp.copy, state), x)[0].baseline

    def squares(baseline: Array, key: PRNGKeyArray) -> Array:
        def bound(params: jvae.Params) -> Array:
            return jvae.score_function(params, x, key, baseline=baseline).mean()

        gradient = jax.grad(bound)(state.params).weights["encoder"]
        return jnp.stack([jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradient)]).sum()

    keys = jax.random.split(jax.random.key(1), 1000)
    noise = jax.jit(jax.vmap(squares, in_axes=(None, 0)))
    saved = np.asarray(noise(jnp.zeros(()), keys) - noise(baseline, keys), np.float64)
    assert saved.mean() > SIGMAS * saved.std(ddof=1) / math.sqrt(len(keys))


def test_a_step_that_is_skipped_leaves_no_trace_in_the_baseline() -> None:
    """Nor in how many of the first are averaged equally."""
    learner = moving_baseline.make_learner(training.skip_non_finite(optax.set_to_zero()))
    params, x = linear_gaussian.make(3, 2, 0.9), data(3, 4)
    exact, zeros = Exact.of(params), np.zeros((2, 3))
    params = linear_gaussian.with_encoder(params, zeros, exact.a, zeros, exact.c)
    state, taken = learner.init(params, KEY), list[float]()
    # At 1e16 the bound, of the order of x², is finite, and its gradient, of x³, is not.
    for factor in (1e16, np.nan, 1, 1e16, 1, np.nan, 1):
        state, info = learner.step(state, x * np.float32(factor))
        assert info.skipped == (factor != 1)
        assert np.isfinite(info.bound) == (not np.isnan(factor))
        taken += [] if info.skipped else [float(info.bound)]
        np.testing.assert_allclose(state.baseline, np.mean(taken) if taken else 0, rtol=1e-6)


def test_an_update_of_mcem_that_is_not_finite_can_be_left_out() -> None:
    params, optimizer = linear_gaussian.make(3, 2, 0.9), training.skip_non_finite(SGD)
    learner = mcem.make_learner(optimizer, num_examples=2)
    x = data(3, 2)
    for value, skips in ((1.0, False), (np.nan, True)):
        state, info = learner.step(learner.init(params, KEY), mcem.visits(x * np.float32(value)))
        assert info.skipped == skips
        # Five updates, but one step.
        assert state.opt_state.notfinite_count == state.opt_state.total_notfinite == skips
        assert np.isfinite(state.chains).all()
        assert (
            any(
                (a != b).any()
                for a, b in zip(
                    leaves(state.params, "decoder"), leaves(params, "decoder"), strict=True
                )
            )
            != skips
        )
