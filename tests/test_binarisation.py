import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from standard_errors import SIGMAS

from jvae import binarisation, data, threefry

KEY = jax.random.key(4)
FIXED = binarisation.fixed_draw_key()
EACH_VISIT = {
    "none": False,
    "given": False,
    "dynamic": True,
    "static": False,
    "threshold": False,
    "dequantised": True,
}


def images(num: int, seed: int = 0) -> jax.Array:
    generator = np.random.default_rng(seed)
    return jnp.asarray(generator.integers(0, 256, (num, 5, 3)), jnp.uint8)


def test_grey_is_the_value_over_255() -> None:
    values = jnp.arange(256, dtype=jnp.uint8)
    grey = binarisation.grey(values, KEY)
    assert grey.dtype == jnp.float32
    np.testing.assert_allclose(grey, np.arange(256) / 255, rtol=1e-7)


def test_bernoulli_is_exact_at_black_and_white() -> None:
    x = binarisation.bernoulli(jnp.repeat(jnp.array([0, 255], jnp.uint8), 1_000_000), KEY)
    np.testing.assert_array_equal(x, np.repeat([0.0, 1.0], 1_000_000))


@pytest.mark.parametrize("value", [1, 2, 64, 127, 128, 200, 254])
def test_bernoulli_has_the_probability_of_the_value(value: int) -> None:
    num, p = 1_000_000, value / 255
    x = np.asarray(binarisation.bernoulli(jnp.full(num, value, jnp.uint8), KEY), np.float64)
    error = math.sqrt(p * (1 - p) / num)
    assert abs(x.mean() - p) < SIGMAS * error + 2**-17
    # The two halves share words of randomness, and are independent for all that, as neighbours
    # are: the product of two centred draws has mean 0 and standard deviation p (1 - p).
    for one, other in ((x[0::2], x[1::2]), np.split(x, 2)):
        products = (one - p) * (other - p)
        assert abs(products.mean()) < SIGMAS * p * (1 - p) / math.sqrt(num / 2)


def test_bernoulli_probabilities_are_the_nearest_sixteen_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over every 16-bit number once, a value is 1 round(2¹⁶ · value / 255) times."""
    halves = np.arange(2**16, dtype=np.uint16)
    words = jnp.asarray(halves.view(np.uint32))
    monkeypatch.setattr(threefry, "words", lambda key, num: words)
    count = jax.jit(lambda value: binarisation.bernoulli(jnp.full(2**16, value), KEY).sum())
    counts = [count(jnp.uint8(value)) for value in range(256)]
    np.testing.assert_array_equal(counts, np.round(2**16 * np.arange(256) / 255))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 7), (2, 28, 28)])
def test_bernoulli_takes_any_shape(shape: tuple[int, ...]) -> None:
    x = binarisation.bernoulli(jnp.full(shape, 255, jnp.uint8), KEY)
    np.testing.assert_array_equal(x, np.ones(shape))
    assert x.dtype == jnp.float32


def test_bernoulli_is_a_function_of_its_key() -> None:
    grey = jnp.full(1000, 128, jnp.uint8)
    first, again = binarisation.bernoulli(grey, KEY), jax.jit(binarisation.bernoulli)(grey, KEY)
    np.testing.assert_array_equal(first, again)
    other = np.asarray(binarisation.bernoulli(grey, jax.random.key(5)))
    # Independent fair coins agree in half of a thousand places.
    agreement = (np.asarray(first) == other).mean()
    assert abs(agreement - 0.5) < SIGMAS * 0.5 / math.sqrt(1000)


# Dequantisation.


def cells(num: int) -> tuple[np.ndarray, np.ndarray]:
    """Every value with `num` draws of its pixel, times 256, in float64: [256, num]."""
    values = np.repeat(np.arange(256, dtype=np.uint8)[:, None], num, axis=1)
    x = binarisation.dequantise(jnp.asarray(values), KEY)
    assert x.dtype == jnp.float32
    return values, 256 * np.asarray(x, np.float64)


def test_a_dequantised_pixel_lies_in_the_cell_of_its_value() -> None:
    """In [value / 256, (value + 1) / 256): the image can be had back."""
    values, scaled = cells(2**15)
    np.testing.assert_array_equal(np.floor(scaled), values)
    assert scaled.max() < 256


def test_no_draw_takes_white_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever bits are drawn, u is at most the largest float32 below 1."""

    monkeypatch.setattr(threefry, "words", lambda key, num: jnp.full(num, 2**32 - 1, jnp.uint32))
    x = np.asarray(binarisation.dequantise(jnp.array([0, 255], jnp.uint8), KEY))
    assert 0.99 / 256 < x[0] < 1 / 256
    assert 255.99 / 256 < x[1] < 1


def test_a_dequantised_pixel_is_uniform_in_its_cell() -> None:
    """Mean 1/2 and variance 1/12 of u; its fourth central moment is 1/80."""
    num = 2**15
    values, scaled = cells(num)
    u = scaled - values
    # float32 keeps 255 + u to within 2⁻¹⁷.
    mean_error = math.sqrt(1 / 12 / num)
    assert (np.abs(u.mean(axis=1) - 1 / 2) < SIGMAS * mean_error + 2**-17).all()
    variance_error = math.sqrt((1 / 80 - 1 / 144) / num)
    squares = ((u - 1 / 2) ** 2).mean(axis=1)
    assert (np.abs(squares - 1 / 12) < SIGMAS * variance_error + 2**-17).all()
    # Neighbours are independent: their centred product has mean 0, standard deviation 1/12. So
    # are a value's and that of the value 128 above, which share words.
    for one, other in ((u[:, ::2], u[:, 1::2]), np.split(u, 2)):
        products = (one - 1 / 2) * (other - 1 / 2)
        error = 1 / 12 / math.sqrt(products.shape[1])
        assert (np.abs(products.mean(axis=1)) < SIGMAS * error + 2**-17).all()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 7)])
def test_dequantise_takes_any_shape_and_is_a_function_of_its_key(shape: tuple[int, ...]) -> None:
    grey = jnp.full(shape, 77, jnp.uint8)
    x = binarisation.dequantise(grey, KEY)
    assert x.shape == shape
    np.testing.assert_array_equal(x, jax.jit(binarisation.dequantise)(grey, KEY))
    assert (x != binarisation.dequantise(grey, jax.random.key(5))).any()


def test_threshold_is_one_from_128_up() -> None:
    x = binarisation.threshold(jnp.arange(256, dtype=jnp.uint8), KEY)
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(x, np.repeat([0.0, 1.0], 128))


# The protocols.


def test_every_protocol_is_in_the_table() -> None:
    assert EACH_VISIT.keys() == binarisation.BINARISATIONS.keys()


def test_each_protocol_has_its_likelihoods() -> None:
    expected = {
        "none": {"bernoulli", "gaussian"},
        "given": {"bernoulli"},
        "dynamic": {"bernoulli"},
        "static": {"bernoulli"},
        "threshold": {"bernoulli"},
        "dequantised": {"gaussian"},
    }
    table = binarisation.BINARISATIONS
    assert {name: set(known.likelihoods) for name, known in table.items()} == expected


def test_one_protocol_draws_the_training_images_once() -> None:
    table = binarisation.BINARISATIONS
    assert [name for name, known in table.items() if known.train_once is not None] == ["static"]


def test_a_description_begins_with_the_protocols_name() -> None:
    descriptions = {name: known.description for name, known in binarisation.BINARISATIONS.items()}
    assert all(text.startswith(f"{name}: ") for name, text in descriptions.items())
    assert len(set(descriptions.values())) == len(descriptions)


@pytest.mark.parametrize("name", EACH_VISIT)
def test_a_prepared_dataset(name: str) -> None:
    train, test = images(8), images(4, seed=1)
    if name == "given":
        train, test = ((part // 128) * jnp.uint8(255) for part in (train, test))
    prepared = binarisation.prepare(name, train, test, FIXED)
    assert prepared.train.shape == train.shape
    assert prepared.train.dtype == jnp.uint8
    assert prepared.test.shape == test.shape
    assert prepared.test.dtype == jnp.float32
    visits = [
        np.asarray(jax.jit(prepared.preprocess)(prepared.train, jax.random.key(seed)))
        for seed in (0, 1)
    ]
    assert visits[0].shape == train.shape
    assert visits[0].dtype == np.float32
    assert (visits[0] != visits[1]).any() == EACH_VISIT[name]
    for x in (*visits, np.asarray(prepared.test)):
        if name in ("none", "dequantised"):
            assert len(np.unique(x)) > 40
            assert 0 <= x.min() < x.max() <= 1
        else:
            assert set(np.unique(x)) == {0.0, 1.0}


def test_protocols_are_what_they_say() -> None:
    train, test = images(8), images(4, seed=1)
    for name, expected in (
        ("none", lambda images: images / np.float32(255)),
        ("given", lambda images: images / np.float32(255)),
        ("threshold", lambda images: (images >= 128).astype(np.float32)),
    ):
        prepared = binarisation.prepare(name, train, test, FIXED)
        x = prepared.preprocess(prepared.train, KEY)
        np.testing.assert_allclose(x, expected(np.asarray(train)), rtol=1e-6)
        np.testing.assert_allclose(prepared.test, expected(np.asarray(test)), rtol=1e-6)
    for name, draw in (
        ("dynamic", binarisation.bernoulli),
        ("dequantised", binarisation.dequantise),
    ):
        prepared = binarisation.prepare(name, train, test, FIXED)
        np.testing.assert_array_equal(prepared.train, train)
        np.testing.assert_array_equal(prepared.preprocess(train, KEY), draw(train, KEY))
        # The test images are drawn with the second of the fixed key's children.
        np.testing.assert_array_equal(prepared.test, draw(test, jax.random.split(FIXED)[1]))


def test_the_draws_of_recorded_results_stay() -> None:
    """Results on the embedded digits were obtained on these bits."""
    digits = data.load("mnist_5k")
    drawn = "86cf7d59eaa7208ea41eb7691f891bf520aa2054f72a42c05fb22e39278e7e24"
    for name, train in (
        ("dynamic", data.content_sha256(digits.train)),
        ("static", "f157a05e7d7b1b26a86f4da2f29ab49bcfe4f4a746473d1943490442c67f7763"),
    ):
        prepared = binarisation.prepare(name, digits.train, digits.test, FIXED)
        assert data.content_sha256(np.asarray(prepared.train)) == train
        assert data.content_sha256(np.asarray(prepared.test, np.uint8)) == drawn


@pytest.mark.parametrize("name", ["static", "dynamic"])
def test_what_is_drawn_once_has_the_probability_of_its_value(name: str) -> None:
    grey = jnp.full((40_000, 2), 51, jnp.uint8)
    prepared = binarisation.prepare(name, grey, grey, FIXED)
    error = math.sqrt(0.2 * 0.8 / 80_000)
    train = prepared.preprocess(prepared.train, KEY)
    assert abs(train.mean() - 0.2) < SIGMAS * error
    assert abs(prepared.test.mean() - 0.2) < SIGMAS * error
    # Training and test pixels are drawn apart: all equal pixels agree in 0.2² + 0.8² of places.
    agreement = (train == prepared.test).mean()
    assert abs(agreement - 0.68) < SIGMAS * math.sqrt(0.68 * 0.32 / 80_000)


def test_everybody_has_one_test_set() -> None:
    """The draw of the test images is that of the fixed key, whatever the training images."""
    test = images(4, seed=1)
    dequantised = [
        binarisation.prepare("dequantised", images(num), test, key).test
        for num, key in ((8, FIXED), (3, FIXED), (3, KEY))
    ]
    np.testing.assert_array_equal(dequantised[0], dequantised[1])
    assert (dequantised[0] != dequantised[2]).any()
    static, dynamic = (
        binarisation.prepare(name, images(num), test, FIXED)
        for name, num in (("static", 8), ("dynamic", 3))
    )
    np.testing.assert_array_equal(static.test, dynamic.test)
    other = binarisation.prepare("static", images(8), test, KEY)
    assert (other.test != static.test).any()
    assert (other.train != static.train).any()


def test_the_fixed_key_is_no_runs_key() -> None:
    seeds = jax.vmap(jax.random.key)(jnp.arange(1000))
    runs = np.concatenate([jax.random.key_data(seeds), *_children(seeds)])
    fixed = jax.random.key_data(jnp.stack([FIXED, *jax.random.split(FIXED)]))
    assert not (runs[:, None] == np.asarray(fixed)[None]).all(axis=-1).any()


def test_the_fixed_draw_is_the_same_whatever_the_default_generator() -> None:
    test = images(4, seed=1)
    with jax.default_prng_impl("rbg"):
        key = binarisation.fixed_draw_key()
        assert jax.random.key(0).dtype == jax.random.key(0, impl="rbg").dtype
        elsewhere = {
            name: np.asarray(binarisation.prepare(name, test[:0], test, key).test)
            for name in ("dynamic", "dequantised")
        }
    assert key.dtype == FIXED.dtype == jax.random.key(0, impl="threefry2x32").dtype
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(FIXED))
    for name, drawn in elsewhere.items():
        here = binarisation.prepare(name, test[:0], test, FIXED).test
        np.testing.assert_array_equal(drawn, here)


def _children(keys: jax.Array) -> list[np.ndarray]:
    split = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    return [np.asarray(jax.random.key_data(split[:, i])) for i in range(3)]


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown binarisation 'statik'.*'static'"):
        binarisation.prepare("statik", images(1), images(1), FIXED)
