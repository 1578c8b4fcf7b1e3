"""The study of estimators measures what it says: moments, slopes, limits, records, figures."""

import dataclasses
import functools
import json
import math
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import linear_gaussian
import numpy as np
import pytest
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from standard_errors import SIGMAS

import jvae
from jvae import checkpoint
from jvae.checkpoint import CheckpointError
from jvae.estimators import TABLE
from jvae.experiments import (
    estimator_figures,
    estimators,
    gaussian_targets,
    gradient_moments,
    slopes,
)
from jvae.experiments.config import ConfigError
from jvae.experiments.estimators import Config
from jvae.experiments.gradient_moments import NETWORKS, Moments, Squared, measure
from jvae.experiments.interrupt import Interrupted
from jvae.experiments.run_folder import RunFolderError

KEY = jax.random.key(3)


def moments(draws: np.ndarray) -> Moments:
    mean = draws.mean(axis=0)
    return Moments(len(draws), mean, ((draws - mean) ** 2).sum(axis=0))


def blocks(draws: np.ndarray, num: int) -> list[Moments]:
    return [moments(block) for block in np.split(draws, num)]


# Moments.


@pytest.mark.parametrize("parts", [(1, 9), (5, 5), (7, 1)])
def test_merged_moments_are_those_of_all_draws(parts: tuple[int, int]) -> None:
    draws = np.random.default_rng(0).normal(3, 2, size=(sum(parts), 4))
    a, b = moments(draws[: parts[0]]), moments(draws[parts[0] :])
    whole = gradient_moments.merge(a, b)
    for found, expected in ((whole, moments(draws)), (gradient_moments.without(whole, b), a)):
        assert found.num == expected.num
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
        np.testing.assert_allclose(found.square, expected.square, rtol=1e-10, atol=1e-12)


def linear_bound(params: jvae.Params, x: Array, key: Array) -> Array:
    """Its gradient for a weight is x's mean times a draw of N(1, 2²) for φ, of N(3, 1) for θ."""
    phi_key, theta_key = jax.random.split(key)
    total = jnp.zeros(())
    for name, own, mean, scale in (
        ("encoder", phi_key, 1.0, 2.0),
        ("decoder", theta_key, 3.0, 1.0),
    ):
        leaves = jax.tree.leaves(params.weights[name])
        for leaf, leaf_key in zip(leaves, jax.random.split(own, len(leaves)), strict=True):
            total += (leaf * (mean + scale * jax.random.normal(leaf_key, leaf.shape))).sum()
    return total * x.mean(axis=-1)


@pytest.mark.parametrize("chunk", [1, 30, 1000])
def test_moments_of_a_gradient_of_known_distribution(chunk: int) -> None:
    params = linear_gaussian.make(3, 2, 1.0)
    x = jnp.asarray([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]])
    told: list[int] = []
    found = gradient_moments.of_gradient(
        linear_bound,
        params,
        x,
        KEY,
        num_draws=2000,
        num_blocks=10,
        chunk=chunk,
        on_chunk=told.append,
    )
    assert sum(told) == 2000
    assert max(told) == {1: 1, 30: 25, 1000: 200}[chunk]
    for network, mean, scale, num in (("phi", 2.0, 4.0, 16), ("theta", 6.0, 2.0, 9)):
        assert [block.num for block in found[network]] == [200] * 10
        whole = functools.reduce(gradient_moments.merge, found[network])
        assert whole.mean.shape == (num,)
        errors = np.abs(whole.mean - mean)
        np.testing.assert_array_less(errors, SIGMAS * scale / math.sqrt(2000))
        # The variance of a Gaussian's sample variance is 2 σ⁴ / (n - 1).
        variance = whole.square / 1999
        error = SIGMAS * scale**2 * math.sqrt(2 / 1999)
        np.testing.assert_allclose(variance, scale**2, atol=error)


def test_chunks_do_not_change_the_draws() -> None:
    params, x = linear_gaussian.make(3, 2, 1.0), jnp.ones((2, 3))
    both = [
        gradient_moments.of_gradient(
            linear_bound, params, x, KEY, num_draws=40, num_blocks=2, chunk=chunk
        )
        for chunk in (4, 20)
    ]
    for network in NETWORKS:
        for a, b in zip(both[0][network], both[1][network], strict=True):
            np.testing.assert_allclose(a.mean, b.mean, rtol=1e-5)
            np.testing.assert_allclose(a.square, b.square, rtol=1e-4)


@pytest.mark.parametrize(
    ("num_draws", "num_blocks"), [(10, 3), (2, 4)], ids=["no multiple", "fewer than blocks"]
)
def test_draws_are_a_multiple_of_the_blocks(num_draws: int, num_blocks: int) -> None:
    params, x = linear_gaussian.make(3, 2, 1.0), jnp.ones((2, 3))
    with pytest.raises(ValueError, match=f"multiple of {num_blocks} blocks, got {num_draws}"):
        gradient_moments.of_gradient(
            linear_bound, params, x, KEY, num_draws=num_draws, num_blocks=num_blocks, chunk=1
        )


# Measures.


def test_measures_of_known_draws_are_right_and_their_errors_too() -> None:
    """Over many repetitions: squares without bias, standard errors as large as the scatter."""
    generator = np.random.default_rng(1)
    mean, scale = np.array([0.0, 0.1, -2.0, 0.3]), np.array([1.0, 2.0, 4.0, 0.5])
    target = np.array([0.0, 0.2, -2.0, 0.3])
    found = [
        measure(blocks(generator.normal(mean, scale, size=(400, 4)), 20), target)
        for _ in range(400)
    ]
    variance = (scale**2).sum()
    expected = {
        "snr": ((mean / scale) ** 2).mean(),
        "snr_of_length": (mean**2).sum() / variance,
        "mean": (mean**2).sum(),
        "bias": 0.01,
    }
    for name, value in expected.items():
        squares = np.array([getattr(m, name).square for m in found])
        stderrs = np.array([getattr(m, name).stderr for m in found])
        scatter = squares.std(ddof=1)
        # A ratio with a variance in the denominator is too large by 2 / n of itself.
        assert abs(squares.mean() - value) < SIGMAS * scatter / math.sqrt(400) + 0.005 * value
        # The jackknife's is too large by up to √2 where noise rules, and never too small.
        assert 0.8 * scatter < np.sqrt((stderrs**2).mean()) < 1.2 * math.sqrt(2) * scatter
    noise = np.mean([m.noise for m in found if m])
    assert noise == pytest.approx(math.sqrt(variance), rel=0.01)


def test_without_a_signal_the_raw_mean_has_a_floor_and_the_square_has_none() -> None:
    draws = np.random.default_rng(2).normal(size=(100, 20_000))
    found = measure(blocks(draws, 10))
    assert found is not None
    assert found.bias is None
    assert found.mean_of_snr == pytest.approx(math.sqrt(2 / (math.pi * 100)), rel=0.03)
    assert abs(found.snr.square) < SIGMAS * 1.1 * math.sqrt(2 / 20_000) / 100
    assert not Squared(found.mean.square, abs(found.mean.square)).is_resolved


def test_weights_that_never_move_do_not_count() -> None:
    draws = np.random.default_rng(3).normal(1.0, 1.0, size=(40, 3))
    padded = np.concatenate([draws, np.zeros((40, 5))], axis=1)
    alone, among_zeros = measure(blocks(draws, 4)), measure(blocks(padded, 4))
    assert alone == among_zeros
    assert alone is not None
    assert alone.num_weights == 3
    assert measure(blocks(np.zeros((40, 5)), 4)) is None


def test_measures_survive_json() -> None:
    found = measure(blocks(np.random.default_rng(4).normal(size=(40, 3)), 4), np.zeros(3))
    assert found is not None
    text = json.dumps(gradient_moments.to_json(found))
    assert gradient_moments.from_json(json.loads(text)) == found


def test_a_root_and_its_error() -> None:
    squared = Squared(4.0, 0.4)
    assert squared.root == 2.0
    assert squared.root_stderr == pytest.approx(0.1)
    assert squared.is_resolved
    assert not Squared(4.0, 2.1).is_resolved


# Slopes.


@pytest.mark.parametrize("slope", [-0.5, 0.5, 2.0])
def test_a_power_law_is_found_exactly(slope: float) -> None:
    x = [1.0, 4.0, 16.0, 64.0]
    y = [3 * value**slope for value in x]
    found = slopes.log_log(x, y, [0.1 * value for value in y])
    assert found is not None
    assert found.value == pytest.approx(slope, abs=1e-12)
    log_x = np.log(x)
    assert found.stderr == pytest.approx(0.1 / math.sqrt(((log_x - log_x.mean()) ** 2).sum()))


def test_points_count_by_their_errors() -> None:
    found = slopes.log_log([1.0, 2.0, 4.0], [1.0, 2.0, 100.0], [1e-6, 1e-6, 1e3])
    assert found is not None
    assert found.value == pytest.approx(1.0, abs=1e-6)


def test_the_error_of_a_slope_is_its_scatter() -> None:
    generator = np.random.default_rng(5)
    x = np.array([1.0, 4.0, 16.0, 64.0, 256.0])
    errors = np.array([0.01, 0.02, 0.05, 0.02, 0.01])
    found = [
        slopes.log_log(
            x.tolist(),
            (y := np.exp(0.5 * np.log(x) + errors * generator.normal(size=5))).tolist(),
            (y * errors).tolist(),
        )
        for _ in range(1000)
    ]
    values = np.array([slope.value for slope in found if slope])
    stderr = values.std(ddof=1)
    assert abs(values.mean() - 0.5) < SIGMAS * stderr / math.sqrt(1000)
    # At least, for an error grows with χ² and never shrinks.
    reported = np.array([slope.stderr for slope in found if slope])
    assert reported.min() == pytest.approx(stderr, rel=0.15)


def test_a_line_that_does_not_fit_has_a_larger_error() -> None:
    x, y = [1.0, math.e, math.e**2], [1.0, math.e, 1.0]
    found = slopes.log_log(x, y, [0.01 * value for value in y])
    assert found is not None
    # Residuals -1/3, 2/3, -1/3 with one degree of freedom: χ² = 2/3 / 0.01².
    assert found.value == pytest.approx(0.0, abs=1e-12)
    assert found.stderr == pytest.approx(math.sqrt(2 / 3) / math.sqrt(2))


@pytest.mark.parametrize("x", [[], [4.0], [4.0, 4.0]])
def test_no_slope_through_one_point(x: list[float]) -> None:
    assert slopes.log_log(x, [1.0] * len(x), [0.1] * len(x)) is None


# The linear-Gaussian model and the limits of gradients on it.


@pytest.fixture(scope="module")
def small() -> tuple[jvae.Params, Array]:
    """A model whose q is wide enough for χ² to be finite, and examples."""
    params = linear_gaussian.with_posterior(
        linear_gaussian.make(3, 2, 1.0), shift=0.2, inflation=1.3
    )
    return params, jnp.asarray(np.random.default_rng(6).normal(size=(4, 3)), jnp.float32)


def gradient_in_float64(
    function: Callable[..., Array], params: jvae.Params, x: Array
) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        wide, wide_x = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (params, x)
        )
        found = jax.grad(lambda p: function(p, wide_x).mean())(wide)
        return {n: np.asarray(g) for n, g in gradient_moments.flat_by_network(found).items()}


def test_the_limit_of_the_elbo_is_its_closed_form(small: tuple[jvae.Params, Array]) -> None:
    expected = gradient_in_float64(linear_gaussian.elbo, *small)
    found = gaussian_targets.limit_of_gradient("elbo", TABLE["elbo"], *small)
    assert found is not None
    for network in NETWORKS:
        np.testing.assert_allclose(found[network], expected[network], rtol=1e-9, atol=1e-12)


def test_the_limit_of_iwae_is_log_px(small: tuple[jvae.Params, Array]) -> None:
    """By finite differences of the oracle, which is NumPy's; φ has no influence on it."""
    params, x = small
    found = gaussian_targets.limit_of_gradient("iwae", TABLE["iwae"], params, x)
    assert found is not None
    np.testing.assert_allclose(found["phi"], 0, atol=1e-12)
    exact = linear_gaussian.Exact.of(params)
    wide = np.asarray(x, np.float64)
    step = 1e-5
    expected = []
    for i in range(len(exact.b)):
        unit = step * np.eye(len(exact.b))[i]
        high, low = (
            dataclasses.replace(exact, b=exact.b + sign * unit).log_px(wide).mean()
            for sign in (1, -1)
        )
        expected.append((high - low) / (2 * step))
    # The decoder's bias comes first.
    np.testing.assert_allclose(found["theta"][: len(expected)], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["sleep_phi", *sorted(gaussian_targets.LIMITS.keys() - {"elbo", "iwae"})]
)
def test_gradients_tend_to_their_limits(name: str, small: tuple[jvae.Params, Array]) -> None:
    """The bias that many samples leave is O(1 / K), far below what a wrong limit would give."""
    params, x = small
    row = TABLE[name]
    num_samples = 200
    limit = gaussian_targets.limit_of_gradient(name, row, params, x)
    assert limit is not None
    found = gradient_moments.of_gradient(
        functools.partial(row.bound, num_samples=num_samples),
        params,
        x,
        KEY,
        num_draws=400,
        num_blocks=10,
        chunk=40,
    )
    for network in NETWORKS:
        measures = measure(found[network], limit[network])
        if measures is None:
            np.testing.assert_allclose(limit[network], 0, atol=1e-12)
            continue
        assert measures.bias is not None
        allowed = SIGMAS * measures.bias.stderr + 10 / num_samples**2
        assert measures.bias.square < allowed
        length = float((limit[network] ** 2).sum())
        assert length == 0 or allowed < 0.1 * length


def test_the_limit_of_sleep_where_the_variance_of_q_depends_on_x() -> None:
    params, x = linear_gaussian.make(3, 2, 1.0), jnp.zeros((4, 3))
    exact = linear_gaussian.Exact.of(params)
    params = linear_gaussian.with_encoder(params, exact.A, exact.a, 0.2 * exact.B, exact.c)
    limit = gaussian_targets.limit_of_gradient("sleep_phi", TABLE["sleep_phi"], params, x)
    assert limit is not None
    bound = functools.partial(jvae.sleep_phi, num_samples=100)
    found = gradient_moments.of_gradient(
        bound, params, x, KEY, num_draws=1000, num_blocks=10, chunk=100
    )
    whole = functools.reduce(gradient_moments.merge, found["phi"])
    stderr = np.sqrt(whole.square / 999 / 1000)
    np.testing.assert_array_less(np.abs(whole.mean - limit["phi"]), SIGMAS * stderr)


def test_a_row_without_a_limit_has_none(small: tuple[jvae.Params, Array]) -> None:
    assert gaussian_targets.limit_of_gradient("new", TABLE["elbo"], *small) is None


def test_the_exact_model_is_a_little_off_its_optimum() -> None:
    params, x = gaussian_targets.near_the_optimum(KEY)
    assert x.shape == (1024, 20)
    exact = linear_gaussian.Exact.of(params)
    b = np.asarray(x, np.float64).mean(axis=0)
    eye, zeros = np.eye(20), np.zeros((20, 20))
    offsets = np.concatenate(
        [
            (found - best).ravel()
            for found, best in (
                (exact.W, eye),
                (exact.b, b),
                (exact.A, eye / 2),
                (exact.a, -b / 2),
                (exact.B, zeros),
                (exact.c, np.full(20, math.log(2 / 3))),
            )
        ]
    )
    assert offsets.std() == pytest.approx(0.01, rel=SIGMAS / math.sqrt(2 * offsets.size))
    assert abs(offsets.mean()) < SIGMAS * 0.01 / math.sqrt(offsets.size)
    covariance = np.cov(np.asarray(x), rowvar=False)
    np.testing.assert_allclose(np.diag(covariance), 2, atol=SIGMAS * 2 * math.sqrt(2 / 1023))


# The study.


TIMES = {"seconds": 0.5, "relative_time": 2.0, "relative_time_range": [1.0, 3.0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two points of every row of the table on the exact model; neither timed nor with its limit."""
    out = tmp_path_factory.mktemp("study") / "out"
    zeros = {"phi": np.zeros(840), "theta": np.zeros(420)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimators, "_times", lambda *arguments: dict.fromkeys(TABLE, TIMES))
        patch.setattr(gaussian_targets, "limit_of_gradient", lambda *arguments: zeros)
        estimators.run(Config(num_samples=(2, 3), draws=20, batch_size=2, out=out))
    return out


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_every_row_of_the_table_is_recorded(folder: Path) -> None:
    header, *points, end = read(folder / "exact.jsonl")
    assert header["kind"] == "study"
    assert header["draws"] == 20
    assert header["command"]
    assert "commit" in header
    assert end["kind"] == "end"
    assert end["wall_seconds"] > 0
    assert [(p["estimator"], p["num_samples"]) for p in points] == [
        (name, k) for k in (2, 3) for name in TABLE
    ]
    for point in points:
        trains = TABLE[point["estimator"]].trains
        for network in NETWORKS:
            if trains in ("both", "none", network):
                assert gradient_moments.from_json(point[network]).bias is not None
            else:
                assert point[network] is None
        outer = 5 if point["estimator"] in ("miwae", "piwae") else 1
        assert point["draws_of_z"] == outer * point["num_samples"]
        assert {name: point[name] for name in TIMES} == TIMES


def test_a_row_has_a_slope_in_theory_where_it_has_a_gradient(folder: Path) -> None:
    study = estimator_figures.read(folder / "exact.jsonl")
    for name, slope in estimator_figures.THEORY.items():
        for network in NETWORKS:
            measured = study.points[name][-1].measures[network]
            assert (getattr(slope, network) is None) == (measured is None)


FIGURES = {f"exact-{name}.png" for name in ("all", "bias", "cost", "snr")}


def test_figures_and_table_are_drawn_from_the_records_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {path.name for path in folder.glob("*.png")} == FIGURES
    (tmp_path / "exact.jsonl").write_bytes((folder / "exact.jsonl").read_bytes())
    monkeypatch.setattr(estimators, "SUBJECTS", {})  # nothing can be computed
    estimators.run(Config(out=tmp_path, redraw=True))
    assert {path.name for path in tmp_path.glob("*.png")} == FIGURES
    assert (tmp_path / "exact.md").read_text() == (folder / "exact.md").read_text()
    lines = (tmp_path / "exact.md").read_text().splitlines()
    assert [line.split("`")[1] for line in lines if "`" in line] == list(TABLE)


def synthetic(slope_of: Mapping[str, float]) -> estimator_figures.Study:
    """A study whose SNR is a power of K."""

    def measures(k: int, slope: float) -> gradient_moments.Measures:
        snr = Squared(k ** (2 * slope), 0.01 * k ** (2 * slope))
        return gradient_moments.Measures(snr, snr, snr, None, 1.0, 1.0, 3)

    points = {
        name: [
            estimator_figures.Point(k, {"phi": measures(k, slope), "theta": None}, k / 4)
            for k in (4, 16, 64, 256)
        ]
        for name, slope in slope_of.items()
    }
    return estimator_figures.Study({"model": "mnist", "batch_size": 8, "draws": 1000}, points)


def test_the_table_has_the_slopes_of_the_records() -> None:
    study = synthetic({"iwae": -0.5, "dreg": 0.5})
    _, _, iwae, dreg = estimator_figures.table(study).splitlines()
    assert "| −0.5 | −0.500 ± 0.003 | −0.500 ± 0.003 | 0.06250 ± 0.00031 |" in iwae
    assert "| +0.5 | +0.500 ± 0.003 | +0.500 ± 0.003 | 16.000 ± 0.080 |" in dreg
    assert iwae.endswith("|  |  |  |  | 64.0 |")


def drawn(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """The points of the curves with error bars, by label."""
    return {
        str(container.get_label()): [
            (float(x), float(y)) for x, y in np.asarray(container.lines[0].get_xydata())
        ]
        for container in axes.containers
        if isinstance(container, ErrorbarContainer)
    }


def test_the_comparison_shows_the_records() -> None:
    phi, theta = estimator_figures.comparison(synthetic({"iwae": -0.5, "dreg": 0.5})).axes
    assert drawn(phi) == {
        "IWAE": [(4, 0.5), (16, 0.25), (64, 0.125), (256, 0.0625)],
        "DReG": [(4, 2.0), (16, 4.0), (64, 8.0), (256, 16.0)],
    }
    assert drawn(theta) == {}
    assert phi.get_xscale() == phi.get_yscale() == "log"


def test_what_is_not_resolved_is_not_drawn_nor_fitted() -> None:
    study = synthetic({"iwae": -0.5})
    *others, last = study.points["iwae"]
    phi = last.measures["phi"]
    assert phi is not None
    unclear = phi._replace(snr=Squared(phi.snr.square, phi.snr.square))
    points = [*others, last._replace(measures={"phi": unclear, "theta": None})]
    axes = estimator_figures.comparison(study._replace(points={"iwae": points})).axes[0]
    assert drawn(axes)["IWAE"] == [(4, 0.5), (16, 0.25), (64, 0.125)]
    found = estimator_figures.fitted_slope(points, "phi", lambda m: m.snr)
    assert found is not None
    assert found.value == pytest.approx(-0.5)
    assert estimator_figures.fitted_slope(points[-2:], "phi", lambda m: m.snr) is None


def test_a_last_line_cut_short_does_not_count(folder: Path, tmp_path: Path) -> None:
    text = (folder / "exact.jsonl").read_text("utf-8")
    (tmp_path / "exact.jsonl").write_text(text[: text.rindex("iwae")], "utf-8")
    whole = estimator_figures.read(folder / "exact.jsonl")
    cut = estimator_figures.read(tmp_path / "exact.jsonl")
    for name, points in cut.points.items():
        assert points == whole.points[name][: len(points)]
    assert sum(map(len, cut.points.values())) < sum(map(len, whole.points.values()))


def test_records_of_ctrl_c_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = estimators._measures

    def interrupting(*arguments: Any) -> dict[str, Any]:
        if arguments[2] == "stl with K = 1":
            signal.raise_signal(signal.SIGINT)
        return measured(*arguments)

    monkeypatch.setattr(estimators, "_measures", interrupting)
    config = Config(
        estimators=("elbo", "stl"), num_samples=(1,), draws=20, batch_size=1, rounds=1, out=tmp_path
    )
    with pytest.raises(
        Interrupted, match=r"1 measurements are in .*exact\.jsonl; --redraw"
    ) as info:
        estimators.run(config)
    assert info.value.exit_code == 130
    assert [record["kind"] for record in read(tmp_path / "exact.jsonl")] == ["study", "point"]
    estimators.run(dataclasses.replace(config, redraw=True))
    assert (tmp_path / "exact-snr.png").exists() is False  # ELBO alone is no comparison
    assert (tmp_path / "exact-all.png").exists()
    with pytest.raises(ConfigError, match=r"exact\.jsonl exists: choose another --out"):
        estimators.run(config)


def test_an_estimator_draws_the_same_whichever_others_take_part(
    folder: Path, tmp_path: Path
) -> None:
    config = Config(
        estimators=("dreg",), num_samples=(3,), draws=20, batch_size=2, rounds=1, out=tmp_path
    )
    estimators.run(config)
    (alone,) = [r for r in read(tmp_path / "exact.jsonl") if r["kind"] == "point"]
    (among_all,) = [
        r
        for r in read(folder / "exact.jsonl")
        if r.get("estimator") == "dreg" and r["num_samples"] == 3
    ]
    assert alone["phi"] == among_all["phi"]
    low, high = alone["relative_time_range"]
    assert 0 < low <= alone["relative_time"] <= high
    assert alone["seconds"] > 0


def test_a_trained_model_is_studied(tmp_path: Path) -> None:
    model = jvae.VAE.mlp((28, 28), latent_dim=2, hidden=(3,))
    checkpoint.save(tmp_path / "model.safetensors", jvae.init(model, KEY))
    out = tmp_path / "out"
    estimators.run(
        Config(
            model="mnist",
            trained=tmp_path,
            estimators=("iwae",),
            num_samples=(1, 2),
            draws=20,
            batch_size=2,
            rounds=1,
            out=out,
        )
    )
    header, point, _ = read(out / "mnist.jsonl")
    assert header["subject"] == str(tmp_path / "model.safetensors")
    assert header["test_elbo"] < 0
    assert point["num_samples"] == 2
    assert point["phi"]["bias"] is None
    # Pixels that are 0 in both images move no weight of the encoder.
    assert point["phi"]["num_weights"] < 784 * 3


def test_a_model_of_other_data_is_refused(tmp_path: Path) -> None:
    params = jvae.init(jvae.VAE.mlp((5,), latent_dim=2, hidden=(3,)), KEY)
    checkpoint.save(tmp_path / "model.safetensors", params)
    with pytest.raises(CheckpointError, match=r"a model of \(5,\), expected \(28, 28\)"):
        estimators.run(Config(model="mnist", trained=tmp_path, out=tmp_path / "out"))


def test_a_gradient_that_is_not_finite_ends_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: Config, key: Array) -> Any:
        params, x, description = estimators._exact(config, key)
        return params, x.at[0, 0].set(jnp.nan), description

    monkeypatch.setattr(estimators, "SUBJECTS", {"exact": broken})
    config = Config(
        estimators=("elbo",), num_samples=(1,), draws=20, batch_size=2, rounds=1, out=tmp_path
    )
    with pytest.raises(FloatingPointError, match="gradient of elbo with K = 1 is not finite"):
        estimators.run(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimators": ("adam",)}, r"--estimators must be among .* got \['adam'\]"),
        ({"estimators": ()}, "--estimators must be among"),
        ({"num_samples": (0, 4)}, r"--num-samples must be at least 1 each, got \(0, 4\)"),
        ({"num_samples": ()}, "--num-samples must be at least 1 each"),
        ({"draws": 25}, "--draws must be a multiple of 10, at least 20, got 25"),
        ({"draws": 10}, "--draws must be a multiple of 10, at least 20, got 10"),
        ({"batch_size": 0}, "--batch-size must be from 1 to 1024, got 0"),
        ({"model": "mnist", "batch_size": 1001}, "--batch-size must be from 1 to 1000, got 1001"),
        ({"rounds": 0}, "--rounds must be at least 1, got 0"),
        ({"seed": -1}, "--seed must be from 0"),
        ({"trained": Path("run")}, "--trained needs --model mnist"),
        ({"redraw": True}, "--redraw needs --out"),
        ({"estimators": ("vimco",), "num_samples": (1,)}, "--num-samples must be at least 2"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**settings)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, "", r"holds no records: no \.jsonl file"),
        ("exact.jsonl", "", "holds no records of a study"),
        ("exact.jsonl", "[1]\n", "holds no records of a study"),
        ("metrics.jsonl", '{"step": 1}\n', "holds no records of a study"),
        ("exact.jsonl", '{"kind": "study"}\n', "holds no measurement"),
    ],
)
def test_a_folder_without_records_is_refused(
    tmp_path: Path, name: str | None, content: str, message: str
) -> None:
    if name is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RunFolderError, match=message):
        estimators.run(Config(out=tmp_path, redraw=True))
