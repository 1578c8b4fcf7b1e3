import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvae import threefry


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
@pytest.mark.parametrize("num", [0, 1, 2, 5, 1001])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_words_are_those_of_jax(seed: int, num: int, impl: str) -> None:
    key = jax.random.fold_in(jax.random.key(seed, impl=impl), 7)
    np.testing.assert_array_equal(threefry.words(key, num), jax.random.bits(key, (num,)))


def test_words_are_drawn_under_jit_and_vmap() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = jax.jit(jax.vmap(lambda key: threefry.words(key, 9)))(keys)
    np.testing.assert_array_equal(drawn, jax.vmap(lambda key: jax.random.bits(key, (9,)))(keys))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 501)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_normals_are_those_of_jax(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, impl: str
) -> None:
    key = jax.random.fold_in(jax.random.key(0, impl=impl), 7)
    drawn = threefry.normal(key, shape, dtype)
    assert drawn.dtype == dtype
    np.testing.assert_array_equal(drawn, jax.random.normal(key, shape, dtype))


@pytest.mark.usefixtures("unchecked")
def test_normals_take_one_key() -> None:
    with pytest.raises(ValueError, match="must be one key"):
        threefry.normal(jax.random.split(jax.random.key(0), 2), (2,))


def test_normals_are_drawn_under_jit_and_vmap() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = jax.jit(jax.vmap(lambda key: threefry.normal(key, (9, 5))))(keys)
    expected = jax.vmap(lambda key: jax.random.normal(key, (9, 5)))(keys)
    np.testing.assert_array_equal(drawn, expected)
