from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Polygon, Rectangle

from jvae import plotting


@pytest.mark.parametrize(
    ("data_shape", "expected"),
    [
        ((28, 28), True),
        ((28, 20, 1), True),
        ((32, 32, 3), True),
        ((1, 1), True),
        ((8, 1), True),
        ((3, 24, 1), True),
        ((9, 1), False),
        ((3, 25), False),
        ((100, 3), False),  # a hundred measurements of three quantities
        ((784,), False),
        ((), False),
        ((32, 32, 2), False),
        ((32, 32, 4), False),  # transparency is no colour
        ((3, 32, 32), False),
        ((2, 8, 8, 3), False),
    ],
)
def test_images_have_one_or_three_channels_and_are_no_strips(
    data_shape: tuple[int, ...], expected: bool
) -> None:
    assert plotting.is_image(data_shape) == expected


def test_a_grid_keeps_each_image_in_its_place() -> None:
    images = np.random.default_rng(0).uniform(size=(2, 3, 4, 5))
    (axes,) = plotting.image_grid(images, title="six images").axes
    drawn = np.asarray(axes.images[0].get_array())
    assert drawn.shape == (8, 15)
    for row in range(2):
        for column in range(3):
            cell = drawn[4 * row : 4 * row + 4, 5 * column : 5 * column + 5]
            np.testing.assert_array_equal(cell, images[row, column])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_of_images_with_channels(channels: int) -> None:
    images = np.random.default_rng(0).uniform(size=(2, 3, 4, 5, channels))
    (axes,) = plotting.image_grid(images, title="six images").axes
    drawn = np.asarray(axes.images[0].get_array())
    assert drawn.shape == ((8, 15, 3) if channels == 3 else (8, 15))
    for row in range(2):
        for column in range(3):
            cell = drawn[4 * row : 4 * row + 4, 5 * column : 5 * column + 5]
            np.testing.assert_array_equal(cell.reshape(4, 5, channels), images[row, column])


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((256, 4), 1), ((4, 256), 1), ((257, 4), 2), ((4, 513, 3), 3), ((600, 300, 1), 3)],
)
def test_a_grid_shows_every_so_many_pixels_of_large_images(
    shape: tuple[int, ...], stride: int
) -> None:
    images = np.random.default_rng(0).uniform(size=(1, 2, *shape))
    (axes,) = plotting.image_grid(images, title="two images").axes
    drawn = np.asarray(axes.images[0].get_array())
    left, right = (np.squeeze(image[::stride, ::stride]) for image in images[0])
    np.testing.assert_array_equal(drawn, np.concatenate([left, right], axis=1))
    assert max(left.shape[:2]) <= plotting.MAX_SIDE


def test_a_grid_shows_what_is_outside_the_range_as_its_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Means of a Gaussian may be; matplotlib would log that it clips them."""
    images = np.array([-0.5, 0.0, 0.25, 1.0, 1.5, 7.0]).reshape(1, 1, 1, 2, 3)
    (axes,) = plotting.image_grid(images, title="one image").axes
    drawn = np.asarray(axes.images[0].get_array())
    np.testing.assert_array_equal(drawn, [[[0, 0, 0.25], [1, 1, 1]]])
    assert axes.images[0].get_clim() == (0, 1)
    assert caplog.text == ""


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)])
def test_reconstructions_stand_under_their_originals(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).uniform(size=(6, *shape)) / 2
    (axes,) = plotting.reconstructions(x, x + 0.5, columns=3).axes
    drawn = np.asarray(axes.images[0].get_array())
    assert drawn.shape == (16, 15, *shape[2:])
    for i in range(6):
        row, column = divmod(i, 3)
        cell = drawn[8 * row : 8 * row + 8, 5 * column : 5 * column + 5]
        np.testing.assert_array_equal(cell, np.concatenate([x[i], x[i] + 0.5]))


def test_fewer_reconstructions_than_columns_are_one_row() -> None:
    x = np.random.default_rng(0).uniform(size=(2, 4, 5))
    (axes,) = plotting.reconstructions(x, x, columns=10).axes
    drawn = np.asarray(axes.images[0].get_array())
    np.testing.assert_array_equal(drawn, np.tile(np.concatenate([x[0], x[1]], axis=1), (2, 1)))


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


def outline(axes: Axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Edges and densities of the histograms by their labels."""
    found = {}
    for patch in axes.patches:
        assert isinstance(patch, Polygon)
        # A step outline: up at each edge, along to the next, back to the base line.
        x, y = patch.get_xy()[:-1].T
        found[str(patch.get_label())] = (x[::2], y[1::2])
    return found


def test_marginals_are_histograms_of_data_and_model_on_one_grid() -> None:
    generator = np.random.default_rng(0)
    data, drawn = generator.normal(size=(200, 3)), generator.normal(1, 2, size=(500, 3))
    figure = plotting.marginals(data, drawn)
    assert len(figure.axes) == 3
    for i, axes in enumerate(figure.axes):
        assert axes.get_title() == f"column {i + 1}"
        edges = np.linspace(data[:, i].min(), data[:, i].max(), 31)
        shown = outline(axes)
        assert shown.keys() == {"test data", "model"}
        for label, values in (("test data", data), ("model", drawn)):
            expected, _ = np.histogram(values[:, i], bins=edges, density=True)
            np.testing.assert_allclose(shown[label][0], edges, rtol=1e-12)
            np.testing.assert_allclose(shown[label][1][:30], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("data_shape", "num", "shown"), [((20,), 16, 16), ((20,), 5, 5), ((1,), 16, 1), ((2, 3), 4, 4)]
)
def test_at_most_so_many_marginals_are_shown(
    data_shape: tuple[int, ...], num: int, shown: int
) -> None:
    data, drawn = np.random.default_rng(0).normal(size=(2, 9, *data_shape))
    assert len(plotting.marginals(data, drawn, num=num).axes) == shown


def test_curves_of_an_ensemble_have_bands() -> None:
    records = [
        {"examples": 10 * (i + 1), "elbo": 2.0 * i, "elbo_by_seed": [2.0 * i - 1, 2.0 * i + 1]}
        for i in range(3)
    ]
    figure = plotting.learning_curves(records, curves={"elbo": "test"})
    (band,) = figure.axes[0].collections
    corners = {(x, y) for path in band.get_paths() for x, y in np.asarray(path.vertices).tolist()}
    assert {(10.0 * (i + 1), 2.0 * i + side) for i in range(3) for side in (-1, 1)} <= corners
    alone: list[dict[str, Any]] = [{"examples": 1, "elbo": None}, {"examples": 2, "elbo": 3.0}]
    assert not plotting.learning_curves(alone, curves={"elbo": "test"}).axes[0].collections


def test_latents_are_drawn_in_falling_order() -> None:
    kl = np.array([[0.1, 3.0, 1.0], [2.0, 0.5, 4.0]])
    (axes,) = plotting.kl_per_dimension(kl, threshold=0.25).axes
    *models, threshold = axes.get_lines()
    drawn = [list(np.asarray(line.get_ydata())) for line in models]
    assert drawn == [[3.0, 1.0, 0.1], [4.0, 2.0, 0.5]]
    assert list(np.asarray(threshold.get_ydata())) == [0.25, 0.25]
    assert axes.get_yscale() == "log"


def test_every_effective_sample_size_is_in_the_histogram() -> None:
    ess = np.array([[1.0, 2.0, 1000.00001], [999.0, 0.99999, 30.0]])
    (axes,) = plotting.effective_samples(ess, num_samples=1000, least=5.0).axes
    heights = [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)]
    assert sum(heights) == 6
    assert (heights[0], heights[-1]) == (2, 2)
    (least,) = axes.get_lines()
    assert list(np.asarray(least.get_xdata())) == [5.0, 5.0]


def test_a_sandwich_keeps_the_bounds_of_an_example_together() -> None:
    lower, upper = np.array([-3.0, -9.0, -5.0]), np.array([-2.0, -9.5, -1.0])
    (axes,) = plotting.sandwich(lower, upper).axes
    drawn = {
        points.get_label(): np.asarray(points.get_offsets()).tolist()
        for points in axes.collections
        if points.get_label() in ("lower", "upper")
    }
    assert drawn == {
        "lower": [[1, -9.0], [2, -5.0], [3, -3.0]],
        "upper": [[1, -9.5], [2, -1.0], [3, -2.0]],
    }
