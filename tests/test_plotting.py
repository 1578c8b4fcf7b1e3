import jax
import jax.numpy as jnp
import numpy as np

from jvae import plotting


def test_a_grid_keeps_each_image_in_its_place() -> None:
    images = np.random.default_rng(0).uniform(size=(2, 3, 4, 5))
    (axes,) = plotting.image_grid(images, title="six images").axes
    drawn = np.asarray(axes.images[0].get_array())
    assert drawn.shape == (8, 15)
    for row in range(2):
        for column in range(3):
            cell = drawn[4 * row : 4 * row + 4, 5 * column : 5 * column + 5]
            np.testing.assert_array_equal(cell, images[row, column])


def test_reconstructions_stand_under_their_originals() -> None:
    x = np.random.default_rng(0).uniform(size=(6, 4, 5))
    (axes,) = plotting.reconstructions(x, x + 10, columns=3).axes
    drawn = np.asarray(axes.images[0].get_array())
    for i in range(6):
        row, column = divmod(i, 3)
        cell = drawn[8 * row : 8 * row + 8, 5 * column : 5 * column + 5]
        np.testing.assert_array_equal(cell, np.concatenate([x[i], x[i] + 10]))


def test_the_latent_grid_has_equal_steps_of_prior_probability() -> None:
    grid = plotting.latent_grid(5)
    probability = jax.scipy.stats.norm.cdf(grid)
    expected = (jnp.arange(5) + 0.5) / 5
    # float32's ndtri and ndtr each err by a few units in the last place.
    np.testing.assert_allclose(probability[2, :, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(probability[::-1, 2, 1], expected, rtol=1e-5)


def test_curves_show_the_records() -> None:
    records = [{"examples": 10, "a": -3.0, "b": -4.0}, {"examples": 20, "a": -1.0, "b": -2.0}]
    (axes,) = plotting.learning_curves(records, curves={"a": "train", "b": "test"}).axes
    drawn = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axes.lines}
    assert drawn == {"train": [[10, -3], [20, -1]], "test": [[10, -4], [20, -2]]}
    assert axes.get_xscale() == "log"
