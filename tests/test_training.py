import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import linear_gaussian
import numpy as np
import optax
import pytest
from jaxtyping import Array, PRNGKeyArray
from standard_errors import ROUNDING

import jvae
from jvae import binarisation, networks, training
from jvae.training import StepInfo, TrainState

KEY = jax.random.key(5)


def toy_params(value: float = 0.0) -> jvae.Params:
    """One encoder and one decoder weight; the bounds below need no model."""
    encoder, decoder = ({"w": jnp.full(size, value, jnp.float32)} for size in (2, 3))
    weights = {"encoder": encoder, "decoder": decoder, "prior": {}}
    return jvae.Params(weights, model="toy")


def toy_bound(params: jvae.Params, x: Array, key: PRNGKeyArray) -> Array:
    """-½ Σ (x - w)² over both weights, x [batch, 5]."""
    w = jnp.concatenate([params.weights[name]["w"] for name in ("encoder", "decoder")])
    return -0.5 * ((x - w[None]) ** 2).sum(axis=-1)


def data(num: int, dim: int = 5) -> Array:
    return jnp.asarray(np.random.default_rng(0).normal(1.0, 1.0, (num, dim)), jnp.float32)


def flat(params: jvae.Params) -> np.ndarray:
    """[encoder, decoder] weights of the toy."""
    w = [np.asarray(params.weights[name]["w"]) for name in ("encoder", "decoder")]
    return np.concatenate(w, axis=-1)


def assert_trees_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


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


# An epoch.


def recorder(state: TrainState, x: Array) -> tuple[TrainState, StepInfo]:
    """A step that reports its batch as its bound."""
    return state._replace(step=state.step + 1), StepInfo(bound=x)


def test_an_epoch_is_a_fresh_permutation() -> None:
    state = training.init(toy_params(), optax.sgd(0.1), KEY)
    epoch = training.make_epoch(recorder, batch_size=3)
    orders = []
    for _ in range(4):
        state, info = epoch(state, jnp.arange(12.0))
        assert info.bound.shape == (4, 3)
        orders.append(np.ravel(info.bound))
        np.testing.assert_array_equal(np.sort(orders[-1]), np.arange(12))
    assert len({tuple(order) for order in [*orders, np.arange(12.0)]}) == 5


def test_the_examples_left_over_are_others_each_epoch() -> None:
    state = training.init(toy_params(), optax.sgd(0.1), KEY)
    epoch = training.make_epoch(recorder, batch_size=4)
    visits = np.zeros(11)
    for _ in range(30):
        state, info = epoch(state, jnp.arange(11))
        seen = np.ravel(info.bound)
        assert len(set(seen.tolist())) == 8
        visits[seen] += 1
    # An example is left out of 30 epochs with probability (8/11)³⁰ < 1e-4 never.
    assert (visits < 30).all()
    # Visits are binomial(30, 8/11): within five standard deviations of the mean.
    assert (np.abs(visits - 30 * 8 / 11) < 5 * math.sqrt(30 * 8 / 11 * 3 / 11)).all()


def test_an_epoch_is_its_steps_with_the_documented_keys() -> None:
    def noisy(x: Array, key: PRNGKeyArray) -> Array:
        return x / 10 + jax.random.normal(key, x.shape)

    images = jnp.arange(7 * 4, dtype=jnp.uint8).reshape(7, 4)
    optimizer = optax.adam(0.01)
    step = training.make_step(jvae.elbo, optimizer)
    params = linear_gaussian.make(4, 2, 1.0)
    start = training.init(params, optimizer, KEY)
    end, info = training.make_epoch(step, 3, noisy)(start, images)

    state = training.init(params, optimizer, KEY)
    order = training.shuffled_batches(training.step_keys(state).shuffle, 7, 3)
    assert order.shape == (2, 3)
    for i, batch in enumerate(order):
        x = noisy(images[batch], training.step_keys(state).preprocess)
        state, alone = step(state, x)
        np.testing.assert_allclose(info.bound[i], alone.bound, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        end.params,
        state.params,
    )
    assert end.step == state.step == 2


def test_an_epoch_can_be_run_again_from_its_first_state() -> None:
    params, optimizer = linear_gaussian.make(4, 2, 1.0), optax.adam(0.01)
    epoch = training.make_epoch(training.make_step(jvae.elbo, optimizer), 2)
    start = training.init(params, optimizer, KEY)
    first, again = epoch(start, data(8, 4)), epoch(start, data(8, 4))
    assert_trees_equal(first[0].params, again[0].params)
    assert_trees_equal(first[1], again[1])
    assert start.step == 0


def test_an_epoch_takes_an_order_so_that_an_ensemble_can_share_it() -> None:
    state = training.init(toy_params(), optax.sgd(0.1), KEY)
    epoch = training.make_epoch(recorder, batch_size=3)
    order = np.array([[3, 1, 0], [2, 2, 5]])
    np.testing.assert_array_equal(epoch(state, jnp.arange(6), order)[1].bound, order)
    states = jax.vmap(lambda key: training.init(toy_params(), optax.sgd(0.1), key))(
        jax.random.split(KEY, 2)
    )
    _, info = jax.vmap(epoch, in_axes=(0, None, None))(states, jnp.arange(6), order)
    np.testing.assert_array_equal(info.bound, np.stack([order, order]))


@pytest.mark.parametrize("num_members", [1, 2])
@pytest.mark.parametrize("by_step", [False, True])
def test_data_may_be_a_tree_whose_rows_stay_together(
    by_step: bool, num_members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_convolves_on_cpu", lambda *_: by_step)
    states = [training.init(toy_params(), optax.sgd(0.1), key) for key in jax.random.split(KEY, 2)]
    state = states[0] if num_members == 1 else training.ensemble(states)
    num, generator = 12, np.random.default_rng(0)
    x = generator.random((num, 2, 3), np.float32)
    tree = {"x": x, "place": (np.arange(num),)}

    def doubled(batch: Any, key: PRNGKeyArray) -> Any:
        return {**batch, "x": 2 * batch["x"]}

    _, info = training.make_epoch(recorder, 4, doubled)(state, tree)
    members = () if num_members == 1 else (num_members,)
    (place,) = info.bound["place"]
    assert place.shape == (3, *members, 4)
    np.testing.assert_array_equal(np.sort(np.ravel(place)), np.repeat(np.arange(num), num_members))
    np.testing.assert_array_equal(info.bound["x"], 2 * x[np.asarray(place)])


@pytest.mark.parametrize("other", [np.zeros((7, 5)), np.zeros(())])
def test_data_of_unequal_lengths_is_refused(other: np.ndarray) -> None:
    state = training.init(toy_params(), optax.sgd(0.1), KEY)
    with pytest.raises(ValueError, match=r"arrays \[num, ...\] of one length, got .*\(8, 5\)"):
        training.make_epoch(recorder, 2)(state, (data(8), other))


@pytest.mark.parametrize("batch_size", [0, 9])
def test_a_batch_size_that_cannot_be_is_refused(batch_size: int) -> None:
    state = training.init(toy_params(), optax.sgd(0.1), KEY)
    with pytest.raises(ValueError, match=rf"batch_size must be at (least|most).*{batch_size}"):
        training.make_epoch(recorder, batch_size)(state, jnp.arange(8))


# A streamed epoch.


class ConvolvingEncoder(nn.Module):
    """q(z|x) by way of one convolution."""

    @nn.compact
    def __call__(self, x: Array) -> Any:
        h = nn.tanh(nn.Conv(2, (3, 3))(x.reshape(-1, 4, 4, 1)))
        outputs = nn.Dense(4)(h.reshape(*x.shape[:-2], -1))
        return networks.Gaussian()(tuple(jnp.split(outputs, 2, axis=-1)), 1)


def convolving() -> jvae.VAE:
    return dataclasses.replace(
        jvae.VAE.mlp(data_shape=(4, 4), latent_dim=2, hidden=(5,)), encoder=ConvolvingEncoder()
    )


@pytest.mark.parametrize("num_members", [1, 2])
@pytest.mark.parametrize("convolves", [True, False])
def test_convolutions_on_a_cpu_run_a_call_a_step(
    convolves: bool, num_members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their gradients are slow inside a loop; the epoch is the same one, to rounding."""
    model = convolving() if convolves else jvae.VAE.mlp(data_shape=(4, 4), latent_dim=2)
    optimizer = optax.sgd(0.01)
    by_step: list[int] = []
    streamed = training.make_streamed_epoch

    def counted(*parts: Any) -> training.Epoch:
        epoch = streamed(*parts)
        return lambda *args: by_step.append(1) or epoch(*args)  # type: ignore[func-returns-value]

    monkeypatch.setattr(training, "make_streamed_epoch", counted)
    step = training.make_step(jvae.elbo, optimizer)
    states = [
        training.init(jvae.init(model, jax.random.key(i)), optimizer, jax.random.key(i))
        for i in range(num_members)
    ]
    state = states[0] if num_members == 1 else training.ensemble(states)
    images = np.random.default_rng(0).random((12, 4, 4), np.float32)
    after, info = training.make_epoch(step, 4)(state, images)
    assert info.bound.shape == ((3,) if num_members == 1 else (3, num_members))
    assert sum(by_step) == (num_members if convolves else 0)
    expected = streamed(step)
    for one, start in zip(training.members(after), states, strict=True):
        order = training.shuffled_batches(training.step_keys(start).shuffle, 12, 4)
        wanted, _ = expected(start, listed(images[order]))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            one.params.weights,
            wanted.params.weights,
        )


def test_an_epoch_that_was_first_traced_is_still_a_call_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under `jit` it cannot be one, which says nothing of later calls."""
    calls: list[int] = []

    def streamed(*parts: Any) -> training.Epoch:
        def epoch(state: TrainState, batches: Any) -> tuple[TrainState, training.StepInfo]:
            calls.append(1)
            return state, training.StepInfo(bound=jnp.zeros(1))

        return epoch

    monkeypatch.setattr(training, "make_streamed_epoch", streamed)
    optimizer = optax.sgd(0.01)
    state = training.init(jvae.init(convolving(), jax.random.key(0)), optimizer, jax.random.key(0))
    epoch = training.make_epoch(training.make_step(jvae.elbo, optimizer), 4)
    images, order = jnp.zeros((4, 4, 4)), jnp.arange(4)[None]
    jax.eval_shape(lambda state: epoch(state, images, order), state)
    assert not calls
    epoch(state, images)
    assert calls


def listed(batches: np.ndarray) -> Callable[[int], Iterator[np.ndarray]]:
    """Batches [steps, batch, ...] of one epoch as a streamed epoch asks for them."""
    return lambda step: iter(batches[step:])


IMAGES = np.random.default_rng(2).integers(0, 256, (12, 4), np.uint8)
ORDER = np.random.default_rng(3).permutation(12).reshape(4, 3)


def scrambled(images: Array, key: PRNGKeyArray) -> Array:
    """Whose every bit is that of the batch or of the key."""
    return images ^ jax.random.bits(key, images.shape, jnp.uint8)


def test_a_streamed_epoch_preprocesses_as_an_epoch_in_memory() -> None:
    """Exactly: batches and random bits are integers."""
    state = training.init(toy_params(), optax.sgd(0.1), KEY)
    for preprocess in (binarisation.bernoulli, scrambled, None):
        in_memory, expected = training.make_epoch(recorder, 3, preprocess)(state, IMAGES, ORDER)
        streamed, info = training.make_streamed_epoch(recorder, preprocess)(
            state, listed(IMAGES[ORDER])
        )
        assert info.bound.shape == (4, 3, 4)
        assert_trees_equal(info, expected)
        assert streamed.step == in_memory.step == 4
        assert_trees_equal(jax.random.key_data(streamed.key), jax.random.key_data(KEY))


def test_a_streamed_epoch_is_an_epoch_in_memory_on_its_batches() -> None:
    """XLA compiles a scan's body and a call apart, so that sums may differ by their rounding."""
    optimizer = optax.sgd(0.01)
    step = training.make_step(jvae.elbo, optimizer)
    state = training.init(linear_gaussian.make(4, 2, 1.0), optimizer, KEY)
    expected = training.make_epoch(step, 3, binarisation.bernoulli)(state, IMAGES, ORDER)
    found = training.make_streamed_epoch(step, binarisation.bernoulli)(state, listed(IMAGES[ORDER]))
    assert found[1].bound.shape == (4,)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=ROUNDING, atol=ROUNDING),
        (found[0].params, found[1]),
        (expected[0].params, expected[1]),
    )


def test_a_streamed_epoch_continued_from_any_step_is_the_one_that_never_stopped() -> None:
    optimizer = optax.adam(0.01)
    step = training.make_step(jvae.elbo, optimizer)
    epoch = training.make_streamed_epoch(step, binarisation.bernoulli)
    start = training.init(linear_gaussian.make(4, 2, 1.0), optimizer, KEY)
    batches = IMAGES[ORDER]
    whole, info = epoch(start, listed(batches))
    for stop in (1, 2, 3):
        middle, before = epoch(start, listed(batches[:stop]))
        assert middle.step == stop
        end, after = epoch(middle, listed(batches))
        assert end.step == 4
        assert_trees_equal((end.params, end.opt_state), (whole.params, whole.opt_state))
        np.testing.assert_array_equal([*before.bound, *after.bound], info.bound)


def test_a_streamed_epoch_can_be_run_again_from_its_first_state() -> None:
    optimizer = optax.adam(0.01)
    epoch = training.make_streamed_epoch(training.make_step(jvae.elbo, optimizer))
    params = linear_gaussian.make(4, 2, 1.0)
    start = training.init(params, optimizer, KEY)
    x = np.asarray(data(8, 4)).reshape(4, 2, 4)
    first, again = epoch(start, listed(x)), epoch(start, listed(x))
    assert_trees_equal(first[0].params, again[0].params)
    assert_trees_equal(first[1], again[1])
    assert start.step == 0
    assert_trees_equal(start.params, params)


def test_fit_runs_streamed_epochs_each_from_where_the_last_ended() -> None:
    asked: list[int] = []

    def batches(step: int) -> Iterator[np.ndarray]:
        asked.append(step)
        return iter(np.asarray(data(8)).reshape(4, 2, 5)[step % 4 :])

    optimizer = optax.sgd(0.1)
    epoch = training.make_streamed_epoch(training.make_step(toy_bound, optimizer))
    state = training.init(toy_params(), optimizer, KEY)
    state = state._replace(step=state.step + 3)
    assert training.fit(state, epoch, batches, num_epochs=3).step == 12
    assert asked == [3, 4, 8]


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


# Optimizers, on gradients of the loss.


def updated(optimizer: optax.GradientTransformation, *gradients: list[float]) -> np.ndarray:
    """The toy's weights, from 2, after updates by the given gradients [5]."""
    params = toy_params(2.0)
    state = optimizer.init(params)
    for gradient in gradients:
        g = jnp.array(gradient)
        weights = {"encoder": {"w": g[:2]}, "decoder": {"w": g[2:]}, "prior": {}}
        updates, state = optimizer.update(jvae.Params(weights, params.model), state, params)
        params = optax.apply_updates(params, updates)
    return flat(params)


FIRST = [3.0, -2.0, 50.0, -4.0, 2.0]
SECOND = [4.0, 2.0, -50.0, 3.0, 2.0]
Expected = Callable[[np.ndarray, np.ndarray], np.ndarray]
FORMULAS: dict[str, Expected] = {
    "sgd": lambda g, h: 2 - 0.1 * (g + h),
    # The first step is the learning rate, whatever the gradient's size.
    "adagrad": lambda g, h: 2 - 0.1 * (np.sign(g) + h / np.sqrt(g**2 + h**2)),
    "adam": lambda g, h: (
        2
        - 0.1
        * (
            np.sign(g)
            + (0.09 * g + 0.1 * h) / 0.19 / np.sqrt((0.999e-3 * g**2 + 1e-3 * h**2) / 1.999e-3)
        )
    ),
}


def test_every_optimizer_is_in_the_table() -> None:
    assert FORMULAS.keys() == training.OPTIMIZERS.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_optimizers_are_their_formulas(name: str) -> None:
    expected = FORMULAS[name](np.array(FIRST), np.array(SECOND))
    np.testing.assert_allclose(
        updated(training.make_optimizer(name, 0.1), FIRST, SECOND), expected, rtol=1e-5
    )


def test_a_learning_rate_may_be_a_schedule() -> None:
    optimizer = training.make_optimizer("sgd", lambda step: 0.1 / (1 + step))
    expected = 2 - 0.1 * np.array(FIRST) - 0.05 * np.array(SECOND)
    np.testing.assert_allclose(updated(optimizer, FIRST, SECOND), expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_clipping_is_of_the_global_norm(scale: float) -> None:
    g = scale * np.array(FIRST)
    norm = math.sqrt((g**2).sum())
    step = 2 - updated(training.make_optimizer("sgd", 1.0, clip_norm=0.5), g.tolist())
    np.testing.assert_allclose(step, g * min(1, 0.5 / norm), rtol=1e-4)


def test_the_map_prior_pulls_the_decoder_alone() -> None:
    pull = np.array([0, 0, 1, 1, 1]) * 2.0 / 10
    g = np.array(FIRST)
    optimizer = training.make_optimizer("sgd", 0.1, map_dataset_size=10)
    np.testing.assert_allclose(updated(optimizer, FIRST), 2 - 0.1 * (g + pull), rtol=1e-6)
    # It is part of the criterion: what is clipped includes it.
    clipped = training.make_optimizer("sgd", 1.0, map_dataset_size=10, clip_norm=0.5)
    total = g + pull
    expected = 2 - 0.5 * total / math.sqrt((total**2).sum())
    np.testing.assert_allclose(updated(clipped, FIRST), expected, rtol=1e-5)


def test_the_map_prior_reaches_the_map_optimum() -> None:
    """Σᵢ -½ (xᵢ - w)² - ½ w² is greatest at Σᵢ xᵢ / (N + 1), without the prior at the mean."""
    x = data(4)
    optimizer = training.make_optimizer("sgd", 0.5, map_dataset_size=4)
    state, step = (
        training.init(toy_params(), optimizer, KEY),
        training.make_step(toy_bound, optimizer),
    )
    for _ in range(60):
        state, _ = step(state, x)
    total = np.asarray(x).sum(axis=0)
    expected = total / np.array([4, 4, 5, 5, 5])
    np.testing.assert_allclose(flat(state.params), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"name": "adagard"}, ValueError, "unknown optimizer 'adagard'.*'adagrad'"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm must be positive, got 0.0"),
        ({"clip_norm": math.nan}, ValueError, "clip_norm must be positive, got nan"),
        ({"map_dataset_size": 0}, ValueError, "dataset_size must be at least 1, got 0"),
        ({"map_dataset_size": 5.0}, TypeError, "dataset_size must be a static int, got float"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_of_an_optimizer_that_cannot_be_are_refused(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        training.make_optimizer(**{"name": "sgd", "learning_rate": 0.1, **arguments})


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
