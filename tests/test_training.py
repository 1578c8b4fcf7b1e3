"""A step ascends the bound, a loop of epochs ends well or says why, and the whole learns PCA."""

import math

import jax
import jax.numpy as jnp
import linear_gaussian
import numpy as np
import optax
import pytest
from jaxtyping import Array, PRNGKeyArray
from toy import KEY, assert_trees_equal, data, flat, toy_bound, toy_params

import jvae
from jvae import training
from jvae.training import StepInfo, TrainState

# A step.


def test_a_step_ascends_the_mean_bound() -> None:
    x = data(4)
    state = training.init(toy_params(0.5), optax.sgd(0.1), KEY)
    step = training.make_step(toy_bound, optax.sgd(0.1))
    for done in range(3):
        before = flat(state.params)
        expected = -0.5 * ((np.asarray(x) - before) ** 2).sum(axis=-1).mean()
        state, info = step(state, x)
        np.testing.assert_allclose(info.bound, expected, rtol=1e-6)
        np.testing.assert_allclose(
            flat(state.params), before + 0.1 * (np.asarray(x).mean(axis=0) - before), rtol=1e-6
        )
        assert state.step == done + 1
        assert_trees_equal(jax.random.key_data(state.key), jax.random.key_data(KEY))


def test_a_step_gives_the_bound_its_documented_key() -> None:
    params, x = linear_gaussian.make(4, 2, 1.0), data(3, 4)
    state = training.init(params, optax.sgd(0.1), KEY)
    keys = [
        training.step_keys(state),
        training.step_keys(state._replace(step=state.step + 1)),
    ]
    assert len({tuple(jax.random.key_data(key).tolist()) for step in keys for key in step}) == 6
    step = training.make_step(jvae.elbo, optax.sgd(0.0))
    for key in keys:
        state, info = step(state, x)
        expected = jax.jit(jvae.elbo)(params, x, key.bound).mean()
        np.testing.assert_allclose(info.bound, expected, rtol=1e-6)


def test_a_step_is_traced_once_a_shape() -> None:
    traces = []

    def counted(params: jvae.Params, x: Array, key: PRNGKeyArray) -> Array:
        traces.append(x.shape)
        return toy_bound(params, x, key)

    state = training.init(toy_params(), optax.adam(0.1), KEY)
    step = training.make_step(counted, optax.adam(0.1))
    for _ in range(3):
        state, _ = step(state, data(4))
    assert traces == [(4, 5)]
    state, _ = step(state, data(6))
    assert traces == [(4, 5), (6, 5)]

    traces.clear()
    epoch = training.make_epoch(step, batch_size=2)
    for _ in range(3):
        state, _ = epoch(state, data(8))
    assert traces == [(2, 5)]


def test_settings_of_the_bound_follow_their_schedules() -> None:
    traces = []

    def weighted(
        params: jvae.Params, x: Array, key: PRNGKeyArray, *, beta: Array, shift: Array
    ) -> Array:
        traces.append(x.shape)
        return beta * toy_bound(params, x, key) + shift

    x, optimizer = data(4), optax.sgd(0.1)
    # From a step that is not the first, as a resumed run has.
    state = training.init(toy_params(0.5), optimizer, KEY)._replace(step=jnp.int32(3))
    scheduled = {"beta": optax.linear_schedule(0.0, 1.0, 10), "shift": lambda step: 2.0 * step}
    step = training.make_step(weighted, optimizer, scheduled=scheduled)
    for t in range(3, 6):
        before = flat(state.params)
        plain = -0.5 * ((np.asarray(x) - before) ** 2).sum(axis=-1).mean()
        state, info = step(state, x)
        np.testing.assert_allclose(info.bound, t / 10 * plain + 2 * t, rtol=1e-6)
        move = 0.1 * t / 10 * (np.asarray(x).mean(axis=0) - before)
        np.testing.assert_allclose(flat(state.params), before + move, rtol=1e-5)
    assert traces == [(4, 5)]


def test_a_moving_kl_weight_ends_as_the_elbo() -> None:
    params, x, optimizer = linear_gaussian.make(4, 2, 1.0), data(3, 4), optax.sgd(0.1)
    scheduled = {"beta": optax.linear_schedule(0.0, 1.0, 2)}
    annealed = training.make_step(jvae.beta_elbo, optimizer, scheduled=scheduled)
    plain = training.make_step(jvae.elbo, optimizer)
    for t, equal in ((0, False), (1, False), (2, True), (9, True)):
        states = [
            training.init(params, optimizer, KEY)._replace(step=jnp.int32(t)) for _ in range(2)
        ]
        (one, info), (other, expected) = annealed(states[0], x), plain(states[1], x)
        same = np.isclose(info.bound, expected.bound, rtol=1e-6)
        close = [
            np.allclose(a, b, rtol=1e-5)
            for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True)
        ]
        assert same == all(close) == equal


def test_init_leaves_the_callers_arrays_alone() -> None:
    params, key = toy_params(), jax.random.key(1)
    # An optimizer whose state is the weights themselves, as that of optax.contrib.prodigy.
    keeper = optax.GradientTransformation(lambda p: p, lambda g, s, p=None: (g, s))
    state = training.init(params, keeper, key)
    training.make_step(toy_bound, keeper)(state, data(4))
    np.testing.assert_array_equal(flat(params), np.zeros(5))
    jax.random.normal(key)


def test_an_ensemble_learns_as_its_members() -> None:
    x, optimizer = data(6, 4), optax.adam(0.1)
    step = training.make_step(jvae.elbo, optimizer)
    keys = jax.random.split(KEY, 3)
    members = [linear_gaussian.make(4, 2, 1.0, seed=seed) for seed in range(3)]
    ensemble = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    states = jax.vmap(lambda p, k: training.init(p, optimizer, k))(ensemble, keys)
    together, bounds = jax.jit(jax.vmap(step, in_axes=(0, None)))(states, x)
    for i, params in enumerate(members):
        alone, info = step(training.init(params, optimizer, keys[i]), x)
        np.testing.assert_allclose(np.asarray(bounds.bound)[i], info.bound, rtol=1e-5)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(np.asarray(a)[i], b, rtol=1e-4, atol=1e-6),
            together.params,
            alone.params,
        )


# The loop.


def test_fit_runs_the_epochs_and_reports_each() -> None:
    state = training.init(toy_params(), optax.sgd(0.1), KEY)
    epoch = training.make_epoch(training.make_step(toy_bound, optax.sgd(0.1)), 4)
    reports: list[int] = []

    def report(state: TrainState, info: StepInfo) -> bool:
        assert isinstance(info.bound, np.ndarray)
        assert info.bound.shape == (2,)
        reports.append(int(state.step))
        return len(reports) == 3

    ended = training.fit(state, epoch, data(8), num_epochs=10, on_epoch=report)
    assert reports == [2, 4, 6]
    assert ended.step == 6
    assert training.fit(state, epoch, data(8), num_epochs=0) is state


def test_the_same_seed_gives_the_same_weights_bit_for_bit() -> None:
    params, optimizer = linear_gaussian.make(4, 2, 1.0), optax.adam(0.01)
    epoch = training.make_epoch(training.make_step(jvae.elbo, optimizer), 3)

    def run(seed: int, *num_epochs: int) -> TrainState:
        state = training.init(params, optimizer, jax.random.key(seed))
        for num in num_epochs:
            state = training.fit(state, epoch, data(8, 4), num_epochs=num)
        return state

    assert_trees_equal(run(0, 3).params, run(0, 3).params)
    # A run continued from a state is the run that never stopped.
    assert_trees_equal(run(0, 3).params, run(0, 1, 2).params)
    leaves = zip(*(jax.tree.leaves(run(seed, 1).params) for seed in (0, 1)), strict=True)
    assert all((a != b).any() for a, b in leaves)


def counter_bound(params: jvae.Params, x: Array, key: PRNGKeyArray) -> Array:
    """Under SGD of rate 1 the decoder weight counts the steps, and the bound breaks at the 6th."""
    w = params.weights["decoder"]["w"][0]
    return jnp.full(len(x), jnp.where(w > 4.5, jnp.nan, w))


def test_a_bound_that_is_not_finite_is_reported_with_its_step() -> None:
    state = training.init(toy_params(), optax.sgd(1.0), KEY)
    epoch = training.make_epoch(training.make_step(counter_bound, optax.sgd(1.0)), 2)
    reports: list[int] = []
    with pytest.raises(training.NonFiniteError, match=r"nan at step 5; .* step 3") as error:
        training.fit(
            state,
            epoch,
            data(6),
            num_epochs=10,
            on_epoch=lambda state, info: reports.append(int(state.step)),
        )
    assert reports == [3]
    assert error.value.step == 5
    assert math.isnan(error.value.bound)
    good = error.value.last_good_state
    assert good.step == 3
    assert good.params.weights["decoder"]["w"][0] == 3.0
    # It can be trained on.
    assert epoch(good, data(6))[1].bound[0] == 3.0


def test_weights_that_are_not_finite_are_reported() -> None:
    def steep(params: jvae.Params, x: Array, key: PRNGKeyArray) -> Array:
        # √w has the value 0 and an infinite gradient at 0.
        return jnp.full(len(x), jnp.sqrt(params.weights["decoder"]["w"][0]))

    state = training.init(toy_params(), optax.sgd(1.0), KEY)
    epoch = training.make_epoch(training.make_step(steep, optax.sgd(1.0)), 2)
    with pytest.raises(training.NonFiniteError) as error:
        training.fit(state, epoch, data(2), num_epochs=1)
    assert error.value.step == 0
    assert error.value.last_good_state.step == 0


# The whole.


def test_a_linear_gaussian_vae_learns_probabilistic_pca() -> None:
    """Tipping & Bishop (1999): with σ fixed, W Wᵀ keeps the top eigenvalues of the covariance.

    Its columns may be orthogonal, so that q reaches the posterior and the ELBO log p(x).
    """
    num, data_dim, latent_dim, sigma = 512, 5, 2, 0.5
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(data_dim, latent_dim))
    z, noise = generator.normal(size=(num, latent_dim)), generator.normal(size=(num, data_dim))
    x = (z @ mixing.T + 0.5 * noise + 1).astype(np.float32)
    covariance = np.cov(x.T, bias=True)
    eigenvalues = np.linalg.eigvalsh(covariance)[::-1]
    kept = np.concatenate([eigenvalues[:latent_dim], np.full(data_dim - latent_dim, sigma**2)])
    assert (eigenvalues[:latent_dim] > sigma**2).all()
    best = -0.5 * (np.log(2 * math.pi * kept) + eigenvalues / kept).sum()

    num_epochs, batch_size = 600, 64
    steps = num_epochs * num // batch_size
    optimizer = training.make_optimizer("adam", optax.cosine_decay_schedule(0.03, steps))
    state = training.init(linear_gaussian.make(data_dim, latent_dim, sigma), optimizer, KEY)
    epoch = training.make_epoch(training.make_step(jvae.elbo, optimizer), batch_size)
    state = training.fit(state, epoch, jnp.asarray(x), num_epochs=num_epochs)

    exact = linear_gaussian.Exact.of(state.params)
    log_px, gap = exact.log_px(x).mean(), exact.kl_to_posterior(x).mean()
    # Nothing exceeds the optimum; the noise of the last steps leaves under 0.001 nats.
    assert best - 1e-3 < log_px <= best
    assert 0 <= gap < 1e-3
