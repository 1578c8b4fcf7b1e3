"""An epoch in memory and a streamed one: each is its steps, on the documented keys and order."""

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
from toy import KEY, assert_trees_equal, data, toy_bound, toy_params

import jvae
from jvae import binarisation, networks, training
from jvae.training import StepInfo, TrainState

# In memory.


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


# A call a step.


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


# Streamed.


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
