"""What the studies of the paper share: settings, the rule of the step size, counts of samples."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from faces import frey_like

import jvae
from jvae import data, training
from jvae.evaluation import bound_by_example
from jvae.experiments import paper
from jvae.experiments.paper import BATCH_SIZE, STEP_SIZES, Keys
from jvae.learners import aevb


@pytest.fixture(scope="module")
def frey() -> paper.Data:
    return paper.of_images(frey_like(), frey_like().train, "grey")


@pytest.fixture(scope="module")
def fit(frey: paper.Data) -> paper.Fit:
    return paper.make_fit(aevb.make_learner, paper.make_model("frey_face", 2, hidden=3), frey)


# More than a pass of two batches, and two chunks.
STEPS = 11


def ignore(steps: int) -> None:
    del steps


# Settings.


@pytest.mark.parametrize(
    ("name", "latent_dim", "hidden", "event", "outputs"),
    [("mnist", 3, 500, (28, 28), 784), ("frey_face", 2, 200, (28, 20), 2 * 560)],
)
def test_the_models_are_the_papers(
    name: str, latent_dim: int, hidden: int, event: tuple[int, ...], outputs: int
) -> None:
    model = paper.make_model(name, latent_dim)
    shapes = jax.eval_shape(lambda: jvae.init(model, jax.random.key(0))).weights
    pixels = math.prod(event)
    assert shapes["encoder"]["params"]["hidden_0"]["kernel"].shape == (pixels, hidden)
    assert shapes["encoder"]["params"]["output"]["kernel"].shape == (hidden, 2 * latent_dim)
    assert shapes["decoder"]["params"]["hidden_0"]["kernel"].shape == (latent_dim, hidden)
    assert shapes["decoder"]["params"]["output"]["kernel"].shape == (hidden, outputs)


def test_every_weight_is_drawn_with_variance_a_hundredth() -> None:
    weights = jvae.init(paper.make_model("frey_face", 2), jax.random.key(0)).weights
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(weights)])
    assert flat.var() == pytest.approx(0.01, rel=5 * math.sqrt(2 / flat.size))
    assert abs(flat.mean()) < 5 * 0.1 / math.sqrt(flat.size)


def test_the_mean_of_a_face_is_between_black_and_white() -> None:
    params = jvae.init(paper.make_model("frey_face", 2, hidden=3), jax.random.key(0))
    mean = jvae.likelihood(params, 1e3 * np.ones((1, 2), np.float32)).mean
    assert 0 <= float(mean.min()) <= float(mean.max()) <= 1


def test_grey_targets_are_the_pixels_and_say_so(frey: paper.Data) -> None:
    dataset = frey_like()
    np.testing.assert_allclose(frey.test, dataset.test / 255, rtol=1e-6)
    x = frey.preprocess(frey.train[:2], jax.random.key(0))
    np.testing.assert_allclose(x, dataset.train[:2] / 255, rtol=1e-6)
    assert frey.protocol["targets"] == "grey"
    assert "can be driven without bound" in frey.protocol["targets_meaning"]


def test_bounds_are_shown_on_as_many_training_examples_as_there_are_of_test(
    frey: paper.Data,
) -> None:
    rows = {row.tobytes() for row in np.asarray(frey.train)}
    shown = np.round(np.asarray(frey.shown) * 255).astype(np.uint8)
    assert len(shown) == len(frey.test) == 30
    assert len({row.tobytes() for row in shown} & rows) == 30


def test_dynamic_targets_are_binary_digits_and_dequantised_faces() -> None:
    digits = paper.load("mnist_5k", "dynamic", num_train=150)
    assert digits.protocol["num_train"] == digits.num_train == len(digits.train) == 150
    assert len(digits.test) == 1000
    assert len(digits.shown) == 150
    for x in (digits.shown, digits.test, digits.preprocess(digits.train[:9], jax.random.key(1))):
        assert set(np.unique(x)) == {0, 1}
    dataset = frey_like()
    faces = paper.of_images(dataset, dataset.train, "dynamic")
    noise = 256 * np.asarray(faces.test) - dataset.test
    assert 0 <= noise.min() < noise.max() < 1


def test_fewer_training_examples_are_the_first_of_one_order() -> None:
    few, more = (paper.load("mnist_5k", "grey", num_train=num) for num in (5, 9))
    np.testing.assert_array_equal(few.train, more.train[:5])
    with pytest.raises(data.DataError, match="mnist_5k has 4000 training examples, not 4001"):
        paper.load("mnist_5k", "grey", num_train=4001)


def test_where_mnist_cannot_be_had_the_message_says_what_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_network(name: str, data_dir: object) -> None:
        raise data.NoNetworkError(f"{name} is not here")

    monkeypatch.setattr(data, "load", no_network)
    with pytest.raises(data.DataError, match=r"(?s)mnist is not here.*--datasets mnist_5k"):
        paper.load("mnist", "grey")
    with pytest.raises(data.DataError, match=r"frey_face is not here$"):
        paper.load("frey_face", "grey")


# Counts.


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (2, [2]),
        (100, [100]),
        (101, [100, 101]),
        (300, [100, 130, 180, 240, 300]),
        (
            2000,
            [100, 130, 180, 240, 320, 420, 560, 750, 1000, 1300, 1800, 2000],
        ),
    ],
)
def test_checkpoints_are_even_on_a_log_axis(last: int, expected: list[int]) -> None:
    assert paper.log_spaced(last) == expected


def test_a_million_steps_have_eight_checkpoints_a_decade() -> None:
    found = paper.log_spaced(10**6)
    assert len(found) == 4 * 8 + 1
    ratios = np.array(found[1:]) / np.array(found[:-1])
    # Two digits of 1.0, 1.3, 1.8, …, each of which is within 1.4 % of even.
    np.testing.assert_allclose(ratios, 10 ** (1 / 8), rtol=0.05)


@pytest.mark.parametrize("steps", [0, 1, 9, 10, 111, 100, 399, 10_000])
def test_chunks_add_up(steps: int) -> None:
    found = list(paper.chunks(steps))
    assert sum(found) == steps
    assert set(found) <= {100, 10, 1}
    assert found == sorted(found, reverse=True)
    assert all(found.count(length) < 10 for length in (10, 1))


def test_batches_go_through_the_data_pass_by_pass() -> None:
    stream = paper.batches(jax.random.key(0), 350)
    rows = np.stack(list(itertools.islice(stream, 9)))
    assert rows.shape == (9, BATCH_SIZE)
    passes = rows.reshape(3, 300)
    assert all(len(set(of_one)) == 300 for of_one in passes.tolist())
    assert len({of_one.tobytes() for of_one in passes}) == 3


# Training.


def counting_epoch(state: Any, examples: Any, order: np.ndarray) -> Any:
    """Takes no step; its state counts the examples of each member."""
    del examples
    assert order.shape[0] == 2
    assert order.shape[2] == BATCH_SIZE
    return state + order.shape[1] * BATCH_SIZE, None


def test_states_are_after_exactly_so_many_samples(frey: paper.Data) -> None:
    fit = paper.Fit(init=lambda size, keys: None, epoch=counting_epoch, data=frey)
    told: list[int] = []
    keys = [Keys.of(0), Keys.of(1)]
    checkpoints = [3, 10, 125, 240]
    states = paper.train(fit, np.zeros(2, int), keys, checkpoints, advance=told.append)
    assert [state.tolist() for state in states] == [[100 * n, 100 * n] for n in checkpoints]
    assert sum(told) == 240


@pytest.fixture(scope="module")
def alone(frey: paper.Data) -> Callable[..., Any]:
    """A model trained by itself, with the step size in the optimizer as users have it."""
    num = frey.num_train

    @functools.cache
    def learner_and_epoch(step_size: float) -> Any:
        optimizer = training.make_optimizer("adagrad", step_size, map_dataset_size=num)
        learner = aevb.make_learner(optimizer)
        return learner, training.make_epoch(learner.step, BATCH_SIZE, frey.preprocess)

    def train(step_size: float, seed: int) -> jvae.Params:
        learner, epoch = learner_and_epoch(step_size)
        keys = Keys.of(seed)
        params = jvae.init(paper.make_model("frey_face", 2, hidden=3), keys.init)
        order = np.stack(list(itertools.islice(paper.batches(keys.order, num), STEPS)))
        return epoch(learner.init(params, keys.train), frey.train, order)[0].params

    return train


def assert_same_weights(a: jvae.Params, b: jvae.Params) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def test_a_seed_goes_the_way_that_it_would_go_alone(
    fit: paper.Fit, alone: Callable[..., Any]
) -> None:
    seeds = (0, 3, 5)
    keys = [Keys.of(seed) for seed in seeds]
    states = paper.train(fit, paper.begin(fit, 0.02, seeds), keys, [1, STEPS], advance=ignore)
    first, last = states
    assert int(first.step) == 1
    assert int(last.step) == STEPS
    for i, seed in ((0, 0), (2, 5)):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], last.params)
        assert_same_weights(own, alone(0.02, seed))


def test_bounds_are_of_each_member_and_part(fit: paper.Fit) -> None:
    keys = [Keys.of(0), Keys.of(1)]
    state = paper.begin(fit, 0.02, (0, 1))
    found = paper.measure(fit.data, state, keys)
    for i, own in enumerate(keys):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], state.params)
        split = jax.random.split(jax.random.fold_in(own.bounds, 0))
        for part, x, key in zip(
            ("train", "test"), (fit.data.shown, fit.data.test), split, strict=True
        ):
            expected = bound_by_example(params, x, key, bound=jvae.elbo)
            np.testing.assert_allclose(found[part][i], expected, rtol=1e-6)


def test_the_step_size_is_the_one_with_the_best_training_bound_at_the_start(
    fit: paper.Fit, alone: Callable[..., Any]
) -> None:
    told: list[int] = []
    trial = paper.choose_step_size(fit, 4, num_steps=STEPS, advance=told.append)
    assert sum(told) == STEPS
    key = jax.random.split(jax.random.fold_in(Keys.of(4).bounds, STEPS))[0]
    expected = {}
    for size in STEP_SIZES:
        values = bound_by_example(alone(size, 4), fit.data.shown, key, bound=jvae.elbo)
        expected[size] = float(values.mean())
    assert trial.bounds == pytest.approx(expected, rel=1e-4)
    assert trial.step_size == max(expected, key=expected.__getitem__)
    assert len({round(bound, 3) for bound in expected.values()}) == 3
    assert trial.settings["step_size"] == trial.step_size
    assert f"after {STEPS} steps" in trial.settings["step_size_rule"]


@pytest.mark.parametrize(
    ("found", "chosen"),
    [([math.nan, 1.0, 2.0], 0.1), ([3.0, 1.0, math.inf], 0.01), ([-5.0, -math.inf, -6.0], 0.01)],
)
def test_a_step_size_that_is_not_finite_is_not_chosen(
    found: list[float], chosen: float, fit: paper.Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper, "train", lambda *args, **kwargs: iter([None]))
    monkeypatch.setattr(paper, "measure", lambda *args: {"train": list(np.array(found)[:, None])})
    trial = paper.choose_step_size(fit, 0, num_steps=1, advance=ignore)
    assert trial.step_size == chosen
    assert [bound is None for bound in trial.bounds.values()] == [
        not math.isfinite(bound) for bound in found
    ]
    monkeypatch.setattr(paper, "measure", lambda *args: {"train": [np.full(1, math.nan)] * 3})
    with pytest.raises(FloatingPointError, match="keeps the bound finite"):
        paper.choose_step_size(fit, 0, num_steps=1, advance=ignore)
