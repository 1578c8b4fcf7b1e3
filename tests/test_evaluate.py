"""`jvae evaluate` on runs that were trained here, and what `jvae compare` shows of it."""

import dataclasses
import functools
import json
import math
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import linear_gaussian
import numpy as np
import pytest
from jaxtyping import Array, PRNGKeyArray
from PIL import Image
from scipy import stats
from weights import random_params

import jvae
from jvae import binarisation, checkpoint, data, evaluation
from jvae.experiments import (
    assessment,
    command_line,
    compare,
    evaluate,
    figures,
    finished,
    inputs,
    loop,
    mnist,
    parts,
    run_folder,
    train,
)
from jvae.experiments import config as common
from jvae.experiments import results as run_results
from jvae.experiments.interrupt import Interrupted
from jvae.experiments.job import Job, Keys
from jvae.experiments.run_folder import RunFolderError

SEED, MODEL_SEED = 7, 3
# Few of everything: every call is compared with the library's own.
ANNEALING: dict[str, Any] = {
    "num_temperatures": 3,
    "num_chains": 5,
    "num_leapfrog": 10,
    "schedule": "linear",
    "start": "posterior",
}
FULL: dict[str, Any] = {
    "num_samples": 12,
    "repeats": 3,
    "ais": 4,
    "bdmc": 3,
    "num_temperatures": 3,
    "num_chains": 5,
    "schedule": "linear",
    "start": "posterior",
    "app_d": 2,
    "inference_gap": 3,
    "mutual_information": 30,
    "seed": SEED,
}
QUICK: dict[str, Any] = {"num_samples": 2, "mutual_information": 3}
DEFAULT = ["importance_sampling", "latents", "train_gap"]
ALL = [*DEFAULT, "ais", "ais_paired", "bdmc", "app_d", "inference_gap"]


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """LLVM optimises longer than these runs take, and figures of training are not looked at."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda job, params: None)
        patch.setattr(parts, "_ASCENT_STEPS", 5)
        patch.setattr(parts, "_ELBO_SAMPLES", 16)
        patch.setattr(evaluation, "app_d", functools.partial(evaluation.app_d, num_transitions=3))
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    small: dict[str, Any] = {"hidden": (8,), "latent_dim": 2, "epochs": 1, "nll_samples": 0}
    mnist.run(mnist.Config(dataset="mnist_5k", seed=MODEL_SEED, out=folder, **small))
    return folder


@pytest.fixture(scope="module")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy(trained, tmp_path_factory.mktemp("evaluated") / "run")
    call(folder, **FULL)
    return folder


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def call(folder: Path, **settings: Any) -> dict[str, Any]:
    return assessment.run(assessment.Config(run=folder, **settings))


def results(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return content["parts"][name]["results"]


def numbers(folder: Path, name: str) -> dict[str, np.ndarray]:
    content = json.loads((folder / "evaluation.json").read_text())
    with np.load(folder / content["parts"][name]["arrays"]) as file:
        return dict(file)


def written(folder: Path) -> list[str]:
    return list(json.loads((folder / "evaluation.json").read_text())["parts"])


# What the library says when called directly.


def test_images() -> Array:
    digits = data.load("mnist_5k")
    key = binarisation.fixed_draw_key()
    return binarisation.prepare("dynamic", digits.train[:1], digits.test, key).test


test_images.__test__ = False  # type: ignore[attr-defined]


def key_of(part: str, model_seed: int = MODEL_SEED) -> PRNGKeyArray:
    return jax.random.fold_in(getattr(parts.Keys.of(SEED), part), model_seed)


def by_groups(
    function: Callable[[Any, PRNGKeyArray], Any], x: Any, key: PRNGKeyArray
) -> list[np.ndarray]:
    """Fifty examples a key: for each array that the function returns, all examples."""
    keys = jax.random.split(key, -(-len(x) // 50))
    groups = [function(x[50 * i : 50 * i + 50], k) for i, k in enumerate(keys)]
    return [np.concatenate(leaves) for leaves in zip(*groups, strict=True)]


def order(num: int) -> np.ndarray:
    return np.argsort(np.random.PCG64(0).random_raw(num), kind="stable")


def of_importance_sampling(params: jvae.Params, x: Array, folder: Path) -> dict[str, Any]:
    def estimate(x: Array, key: PRNGKeyArray) -> evaluation.LogLikelihood:
        return evaluation.importance_sampling(params, x, key, num_samples=12)

    keys = jax.random.split(key_of("importance_sampling"), 3)
    found = [by_groups(estimate, x, key) for key in keys]
    return {
        "log_px": np.stack([log_px for log_px, _, _ in found]),
        "stderr": np.stack([stderr for _, stderr, _ in found]),
        "ess": np.stack([ess for _, _, ess in found]),
    }


def of_latents(params: jvae.Params, x: Array, folder: Path) -> dict[str, Any]:
    split = evaluation.kl_decomposition(params, x[order(1000)[:30]], key_of("latents"))
    return {
        "active": evaluation.active_units(params, x),
        "kl_per_dimension": evaluation.kl_per_dimension(params, x),
        "collapsed": evaluation.collapsed_dimensions(params, x),
        **split._asdict(),
    }


def of_train_gap(params: jvae.Params, x: Array, folder: Path) -> dict[str, Any]:
    images = jnp.asarray(data.load("mnist_5k").train)[order(4000)[:1000]]
    train = binarisation.bernoulli(images, parts.Keys.of(SEED).train_draw)

    def estimate(x: Array, key: PRNGKeyArray) -> evaluation.LogLikelihood:
        return evaluation.importance_sampling(params, x, key, num_samples=12)

    def elbos(x: Array, part: str) -> Array:
        return evaluation.bound_by_example(params, x, key_of(part), bound=jvae.elbo)

    key = key_of("train_importance_sampling")
    return {
        "train_log_px": by_groups(estimate, train, key)[0],
        "train_elbo": elbos(train, "train_elbo"),
        "test_elbo": elbos(x, "test_elbo"),
    }


SCHEDULED = ANNEALING | {"schedule": evaluation.linear_schedule, "start": jvae.posterior}


def of_ais(params: jvae.Params, x: Array, folder: Path) -> dict[str, Any]:
    def estimate(x: Array, key: PRNGKeyArray) -> evaluation.LogLikelihood:
        return evaluation.ais(params, x, key, **SCHEDULED)

    log_px, stderr, ess = by_groups(estimate, x[order(1000)[:4]], key_of("ais"))
    return {"log_px": log_px, "stderr": stderr, "ess": ess}


def of_ais_paired(params: jvae.Params, x: Array, folder: Path) -> dict[str, Any]:
    sampled = numbers(folder, "importance_sampling")["log_px"][0].mean(axis=0)
    return {"annealed": numbers(folder, "ais")["log_px"][0], "sampled": sampled[order(1000)[:4]]}


def of_bdmc(params: jvae.Params, x: Array, folder: Path) -> dict[str, Any]:
    key = jax.random.split(key_of("bdmc"), 1)[0]
    return evaluation.bdmc(params, key, num_examples=3, **SCHEDULED)._asdict()


def of_app_d(params: jvae.Params, x: Array, folder: Path) -> dict[str, Any]:
    def estimate(x: Array, key: PRNGKeyArray) -> evaluation.LogLikelihood:
        return evaluation.app_d(params, x, key, num_samples=50)

    log_px, stderr, ess = by_groups(estimate, x[order(1000)[:2]], key_of("app_d"))
    return {"log_px": log_px, "stderr": stderr, "ess": ess}


def of_inference_gap(params: jvae.Params, x: Array, folder: Path) -> dict[str, Any]:
    """With AIS of the same images as log p(x), which is higher than twelve samples give."""
    of_ais = numbers(folder, "ais")
    annealed = of_ais["log_px"][0, :3]
    sampled = numbers(folder, "importance_sampling")["log_px"][0].mean(axis=0)[order(1000)[:3]]
    assert annealed.mean() > sampled.mean()
    key = jax.random.split(key_of("inference_gap"), 1)[0]
    gaps = {
        name: evaluation.inference_gap(
            params,
            x[order(1000)[:3]],
            key,
            jnp.asarray(annealed, jnp.float32),
            family=family,
            num_steps=5,
            num_samples=16,
        )
        for name, family in (
            ("diagonal", evaluation.encoder_family),
            ("full", evaluation.full_covariance),
        )
    }
    (left, amortisation), (left_by_full, _) = gaps["diagonal"], gaps["full"]
    return {
        "approximation_diagonal": left,
        "amortisation_diagonal": amortisation,
        "approximation_full": left_by_full,
        "gain_of_covariance": left - left_by_full,
        "total": left + amortisation,
        "log_px_ess": of_ais["ess"][0, :3],
    }


DIRECTLY: dict[str, Callable[[jvae.Params, Array, Path], dict[str, Any]]] = {
    "importance_sampling": of_importance_sampling,
    "latents": of_latents,
    "train_gap": of_train_gap,
    "ais": of_ais,
    "ais_paired": of_ais_paired,
    "bdmc": of_bdmc,
    "app_d": of_app_d,
    "inference_gap": of_inference_gap,
}


@pytest.mark.parametrize("part", ALL)
def test_the_numbers_are_those_of_the_library(part: str, evaluated: Path) -> None:
    params = checkpoint.load(evaluated / "model.safetensors")
    expected = DIRECTLY[part](params, test_images(), evaluated)
    found = numbers(evaluated, part)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == (1, *array.shape)
        # Sums and differences of numbers of some hundred nats, in float32 here.
        exactly = name not in ("total", "gain_of_covariance")
        np.testing.assert_allclose(
            found[name][0], np.asarray(array), rtol=0, atol=0 if exactly else 1e-3
        )


def test_all_draws_have_keys_of_their_own() -> None:
    keys = [parts.Keys.of(0), parts.Keys.of(1)]
    training = jax.random.split(jax.random.key(0), 10)
    data_of = [jax.random.key_data(key) for one in keys for key in one]
    data_of += [jax.random.key_data(key) for key in training]
    assert len({key.tobytes() for key in map(np.asarray, data_of)}) == len(data_of)


# From numbers to results.


def mean_of(values: np.ndarray) -> tuple[float, float]:
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


EXPECTED: dict[str, Callable[[dict[str, np.ndarray], np.ndarray], dict[str, Any]]] = {
    "importance_sampling": lambda a, _: {"nll": mean_of(-a["log_px"][0].mean(axis=0))},
    "latents": lambda a, _: {
        "mutual_information": mean_of(a["mutual_information"][0]),
        "marginal_kl": mean_of(a["marginal_kl"][0]),
    },
    "train_gap": lambda a, nll: {
        "train_nll": mean_of(-a["train_log_px"][0]),
        "train_elbo": mean_of(a["train_elbo"][0]),
        "test_elbo": mean_of(a["test_elbo"][0]),
        "nll_gap": (
            nll.mean() + a["train_log_px"].mean(),
            math.hypot(mean_of(nll)[1], mean_of(a["train_log_px"][0])[1]),
        ),
        "elbo_gap": (
            a["train_elbo"].mean() - a["test_elbo"].mean(),
            math.hypot(mean_of(a["train_elbo"][0])[1], mean_of(a["test_elbo"][0])[1]),
        ),
    },
    "ais": lambda a, _: {"nll": mean_of(-a["log_px"][0])},
    "ais_paired": lambda a, _: {
        "log_px_above_importance_sampling": mean_of((a["annealed"] - a["sampled"])[0]),
        "nll_by_ais": mean_of(-a["annealed"][0]),
        "nll_by_importance_sampling": mean_of(-a["sampled"][0]),
    },
    "bdmc": lambda a, _: {
        "log_px_lower": mean_of(a["lower"][0]),
        "log_px_upper": mean_of(a["upper"][0]),
        "gap": mean_of((a["upper"] - a["lower"])[0]),
    },
    "app_d": lambda a, _: {"nll": mean_of(-a["log_px"][0])},
    "inference_gap": lambda a, _: {
        name: mean_of(array[0]) for name, array in a.items() if name != "log_px_ess"
    },
}


@pytest.mark.parametrize("part", ALL)
def test_results_have_their_errors_over_examples(part: str, evaluated: Path) -> None:
    nll = -numbers(evaluated, "importance_sampling")["log_px"][0].mean(axis=0)
    expected = EXPECTED[part](numbers(evaluated, part), nll)
    found = results(evaluated, part)
    assert {name for name in found if f"{name}_stderr" in found} == expected.keys()
    for name, (mean, error) in expected.items():
        assert found[name] == pytest.approx(mean, rel=1e-9, abs=1e-9)
        assert found[f"{name}_stderr"] == pytest.approx(error, rel=1e-9)


def test_repeats_show_the_spread_of_the_estimator(evaluated: Path, trained: Path) -> None:
    found = results(evaluated, "importance_sampling")
    by_repeat = -numbers(evaluated, "importance_sampling")["log_px"][0].mean(axis=1)
    assert len(set(by_repeat)) == 3
    assert found["nll_by_repeat"] == pytest.approx(by_repeat.tolist())
    assert found["nll_sd_over_repeats"] == pytest.approx(by_repeat.std(ddof=1))
    assert found["nll_stderr_over_repeats"] == pytest.approx(by_repeat.std(ddof=1) / math.sqrt(3))


@pytest.mark.parametrize("part", ["importance_sampling", "ais", "app_d"])
def test_the_error_by_sampling_alone_needs_no_repeats(part: str, evaluated: Path) -> None:
    stderr = numbers(evaluated, part)["stderr"]
    assert np.isfinite(stderr).all()
    expected = math.sqrt((stderr**2).sum()) / stderr.size
    assert results(evaluated, part)["nll_sampling_error"] == pytest.approx(expected)


def test_the_error_by_sampling_alone_is_that_over_repeats() -> None:
    """Of an overdispersed q, whose weights are bounded; 300 repeats of a mean over 4 examples."""
    params = linear_gaussian.make(4, 2, 1.0)
    params = linear_gaussian.with_posterior(params, shift=0.3, inflation=2.0)
    x = np.random.default_rng(5).normal(size=(4, 4)).astype(np.float32)
    copies = jnp.asarray(np.broadcast_to(x, (300, 4, 4)))
    found = evaluation.importance_sampling(params, copies, jax.random.key(1), num_samples=500)
    means = np.asarray(found.estimate, np.float64).mean(axis=1)
    of_each = [run_results.sampling_error("nll", stderr) for stderr in found.stderr]
    own = np.mean([error["nll_sampling_error"] ** 2 for error in of_each])
    low, high = stats.chi2(299).interval(1 - 6e-7)
    assert low < 299 * means.var(ddof=1) / own < high


def test_one_sample_tells_of_no_error() -> None:
    assert run_results.sampling_error("nll", [math.inf, math.inf]) == {}
    assert run_results.sampling_error("nll", [3.0, 4.0]) == {"nll_sampling_error": 2.5}


def test_effective_sample_sizes_are_told(
    evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results(evaluated, "importance_sampling")
    ess = numbers(evaluated, "importance_sampling")["ess"]
    assert found["ess_median"] == np.median(ess)
    assert found["ess_share_below_5"] == np.mean(ess < 5)
    assert 0 < found["ess_share_below_5"] < 1
    assert found["ess_percentiles"] == {
        str(p): pytest.approx(np.percentile(ess, p)) for p in (0, 1, 5, 10)
    }
    # The worst of an example's repeats counts.
    worst = ess[0].min(axis=0)
    assert (worst < 5).sum() > (ess[0, 0] < 5).sum()
    (line,) = json.loads((evaluated / "evaluation.json").read_text())["parts"][
        "importance_sampling"
    ]["warnings"]
    assert line.startswith(
        f"the estimates of log p(x) of {(worst < 5).sum()} of 1000 examples rest on fewer than 5 "
        f"effective samples (the least {worst.min():.3g})"
    )
    # What was warned of is said again when the part is kept.
    call(evaluated, **FULL)
    out = capsys.readouterr().out.replace("\n", "")
    assert f"WARNING: importance_sampling: {line}" in out


def test_what_latents_are_used_for(evaluated: Path) -> None:
    found, arrays = results(evaluated, "latents"), numbers(evaluated, "latents")
    assert found["active_units"] == arrays["active"].sum()
    assert found["kl_per_dimension"] == arrays["kl_per_dimension"][0].tolist()
    assert found["kl"] == pytest.approx(arrays["kl_per_dimension"].sum())
    assert found["collapsed_dimensions"] == np.flatnonzero(arrays["collapsed"][0]).tolist()
    assert found["mutual_information_at_most"] == math.log(30)


# Nats below log N, and whether so little is warned of.
@pytest.mark.parametrize(("below", "warned"), [(0.01, True), (0.49, True), (0.51, False)])
def test_mutual_information_that_the_examples_limit_warns(
    below: float, warned: bool, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parted = evaluation.KLDecomposition(jnp.full(30, math.log(30) - below), jnp.zeros(30))
    monkeypatch.setattr(evaluation, "kl_decomposition", lambda params, x, key: parted)
    part = parts.latents(finished.load(trained, finished.read(trained)), SEED, num=30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        part.compute(0, lambda num: None)
    said = [str(warning.message) for warning in caught if "I(x; z)" in str(warning.message)]
    start = f"I(x; z) is {math.log(30) - below:.3f} nats of the log N = 3.401 that 30 examples can"
    assert [text.startswith(start) for text in said] == [True] * warned


def test_tables_name_what_is_only_a_bound(
    evaluated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    call(evaluated, **FULL)
    quantities = {row[1] for row in rows(capsys.readouterr().out)}
    assert quantities >= {
        "mutual_information (the population's: at least)",
        "log N, the most that mutual_information can be",
        "marginal_kl (the population's: at most)",
        "log_px_above_importance_sampling",
        "nll_sampling_error",
        "nll_stderr_over_repeats",
    }
    assert not quantities & {"mutual_information", "marginal_kl", "mutual_information_at_most"}


def test_an_inference_gap_carries_what_its_log_px_rests_on(evaluated: Path) -> None:
    found, arrays = results(evaluated, "inference_gap"), numbers(evaluated, "inference_gap")
    assert found["log_px_ess_median"] == np.median(arrays["log_px_ess"])
    assert found["log_px_ess_share_below_5"] == 1  # of five chains
    content = json.loads((evaluated / "evaluation.json").read_text())
    assert content["parts"]["inference_gap"]["warnings"][0].startswith(
        "the estimates of log p(x) of 3 of 3 examples rest on fewer than 5 effective samples"
    )
    assert "take more temperatures, or more chains" in content["parts"]["ais"]["warnings"][0]
    # Beside the best q of another family it would be no amortisation gap.
    assert "amortisation_full" not in found
    parted = found["approximation_full"] + found["gain_of_covariance"]
    assert parted + found["amortisation_diagonal"] == pytest.approx(found["total"])


def test_an_inference_gap_below_zero_is_warned_of(trained: Path) -> None:
    run = finished.load(trained, finished.read(trained))
    too_low = np.full((1, 3), -1000.0)
    source = parts.Source("importance_sampling", {}, too_low, np.full((1, 3), 9.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts.inference_gap(run, SEED, source, num=3).compute(0, lambda num: None)
    said = [str(warning.message) for warning in caught]
    for family in ("diagonal", "full"):
        start = f"the mean approximation gap of the {family} Gaussians is -"
        assert sum(text.startswith(start) and "log_px is too low" in text for text in said) == 1


def test_collapsed_latents_are_named(trained: Path, tmp_path: Path) -> None:
    """A posterior that is N(0, 1) in the second latent, whatever x."""
    folder = copy(trained, tmp_path / "run")
    params = checkpoint.load(folder / "model.safetensors")
    encoder = dict(params.weights["encoder"]["params"])
    output = {name: jnp.asarray(leaf) for name, leaf in encoder["output"].items()}
    # Means and log-variances of two latents.
    columns = np.array([1, 3])
    output = {
        "kernel": output["kernel"].at[:, columns].set(0.0),
        "bias": output["bias"].at[columns].set(0.0).at[0].set(3.0),
    }
    weights = {**params.weights, "encoder": {"params": {**encoder, "output": output}}}
    checkpoint.save(folder / "model.safetensors", jvae.Params(weights, params.model))
    part = call(folder, **QUICK)["parts"]["latents"]
    assert part["results"]["collapsed_dimensions"] == [1]
    assert part["results"]["kl_per_dimension"][1] == 0
    assert part["warnings"][0] == (
        "posterior collapse of 1 of 2 latents, whose mean KL is below 0.01 nats: 1 (counted from 0)"
    )


def test_the_protocol_of_every_part_is_on_record(evaluated: Path) -> None:
    content = json.loads((evaluated / "evaluation.json").read_text())
    assert list(content["parts"]) == ALL
    assert content["protocol"] == run_folder.read_result(evaluated)["protocol"]
    assert content["stderr_over"] == "examples"
    assert content["seeds"] == [MODEL_SEED]
    settings = {name: part["settings"] for name, part in content["parts"].items()}
    first = "the first of a fixed random order"
    said: dict[str, dict[str, Any]] = {
        "importance_sampling": {"num_samples": 12, "repeats": 3, "num_examples": 1000},
        "latents": {"num_examples": 30, "examples": first},
        "train_gap": {"num_samples": 12, "test_repeats": 3, "num_examples": 1000},
        "ais": {**ANNEALING, "num_examples": 4, "examples": first},
        "ais_paired": {"num_examples": 4, "examples": first},
        "bdmc": {**ANNEALING, "num_examples": 3},
        "app_d": {"num_samples": 50, "num_examples": 2},
        "inference_gap": {"num_steps": 5, "num_samples": 16, "num_examples": 3},
    }
    for name, expected in said.items():
        # What is made of other parts' numbers draws none of its own.
        common_ = {} if name == "ais_paired" else {"seed": SEED, "examples_a_key": 50}
        assert settings[name].items() >= (expected | common_).items()
        assert settings[name]["estimator"]
        assert content["parts"][name].keys() >= {"command", "commit", "versions", "seconds"}
    assert settings["inference_gap"]["log_px"] == settings["ais"]
    for name in ("ais", "importance_sampling"):
        assert settings["ais_paired"][name] == settings[name]


def test_figures_are_drawn(evaluated: Path) -> None:
    for name in ("kl_per_dimension", "ess", "sandwich"):
        with Image.open(evaluated / "figures" / f"{name}.png") as image:
            low, high = np.asarray(image.convert("L")).min(), np.asarray(image.convert("L")).max()
        assert low < high


def test_examples_of_few_are_among_those_of_many() -> None:
    few, many = parts.chosen(1000, 30), parts.chosen(1000, 1000)
    np.testing.assert_array_equal(few, many[:30])
    np.testing.assert_array_equal(np.sort(many), np.arange(1000))
    assert (few[:5] != np.arange(5)).any()


def test_groups_have_a_key_each_and_the_last_may_be_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parts, "GROUP", 3)
    done: list[int] = []
    draws = parts.in_groups(
        lambda x, key: x + jax.random.normal(key, x.shape),
        jnp.zeros(7),
        jax.random.key(1),
        done.append,
    )
    assert done == [3, 3, 1]
    sizes = zip(jax.random.split(jax.random.key(1), 3), done, strict=True)
    expected = np.concatenate([jax.random.normal(key, (n,)) for key, n in sizes])
    np.testing.assert_array_equal(draws, expected)


# A call after another.


def test_the_same_command_goes_on_after_ctrl_c(
    trained: Path, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(trained, tmp_path / "run")

    def interrupted(*args: Any, **how: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "ais", interrupted)
        with pytest.raises(Interrupted, match=r"what was done is in .*evaluation\.json") as stopped:
            call(folder, **FULL)
    assert stopped.value.exit_code == 130
    assert written(folder) == DEFAULT

    def again(*args: Any, **how: Any) -> None:
        pytest.fail("this was done")

    monkeypatch.setattr(evaluation, "importance_sampling", again)
    monkeypatch.setattr(evaluation, "kl_decomposition", again)
    call(folder, **FULL)
    assert written(folder) == ALL
    for name in ALL:
        assert results(folder, name) == results(evaluated, name)


def test_other_settings_take_the_place_of_a_part_and_leave_the_others(
    evaluated: Path, tmp_path: Path
) -> None:
    folder = copy(evaluated, tmp_path / "run")
    call(folder, num_samples=2, mutual_information=30, seed=SEED)
    settings = {
        name: part["settings"]
        for name, part in json.loads((folder / "evaluation.json").read_text())["parts"].items()
    }
    assert settings.keys() == set(ALL)
    assert settings["importance_sampling"]["num_samples"] == 2
    assert settings["train_gap"]["num_samples"] == 2
    for name in ("latents", "ais", "ais_paired", "bdmc", "app_d", "inference_gap"):
        assert results(folder, name) == results(evaluated, name)
    assert len(list((folder / "evaluation").iterdir())) == len(ALL)
    assert numbers(folder, "importance_sampling")["log_px"].shape == (1, 1, 1000)
    assert "nll_sd_over_repeats" not in results(folder, "importance_sampling")


def test_parts_of_other_weights_are_dropped(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(evaluated, tmp_path / "run")
    params = checkpoint.load(folder / "model.safetensors")
    weights = jax.tree.map(lambda leaf: leaf * 0.9, params.weights)
    checkpoint.save(folder / "model.safetensors", jvae.Params(weights, params.model))
    compare.run(compare.Config(runs=(folder,)))
    assert "importance_sampling" not in capsys.readouterr().out
    call(folder, **QUICK)
    assert "The run's weights have changed: earlier parts are dropped." in capsys.readouterr().out
    assert written(folder) == DEFAULT
    assert len(list((folder / "evaluation").iterdir())) == len(DEFAULT)
    assert not (folder / "figures" / "sandwich.png").exists()


def test_a_number_that_is_not_finite_ends_it_and_leaves_what_was_done(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(trained, tmp_path / "run")

    def diverged(*args: Any, **how: Any) -> evaluation.LogLikelihood:
        return evaluation.LogLikelihood(jnp.array([1.0, jnp.nan]), jnp.ones(2), jnp.ones(2))

    monkeypatch.setattr(evaluation, "app_d", diverged)
    with pytest.raises(FloatingPointError, match="app_d: log_px is not finite in 1 places"):
        call(folder, **QUICK, app_d=2)
    assert written(folder) == DEFAULT


def test_one_process_at_a_time(trained: Path) -> None:
    with run_folder.lock(trained), pytest.raises(RunFolderError, match="another process"):
        call(trained, **QUICK)


# Every kind of data, and several models.

NUM = 40


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (NUM, *shape), np.uint8)


def save_pngs(path: Path, images: np.ndarray) -> Path:
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:02}.png")
    return path


def save_npy(path: Path, array: np.ndarray) -> Path:
    np.save(path.with_suffix(".npy"), array)
    return path.with_suffix(".npy")


def train_on(path: Path, folder: Path, **changes: Any) -> Path:
    tiny: dict[str, Any] = {"latent_dim": 2, "hidden": (8,), "batch_size": 6, "epochs": 1}
    tiny["nll_samples"] = 0
    train.run(train.Config(data=str(path), out=folder, **(tiny | changes)))
    return folder


def save_untrained(job: Job, **how: object) -> dict[str, Any]:
    """What a run leaves for evaluation, without a step of training."""
    run_folder.create(job.folder, job.settings())
    params = random_params(job.model)
    checkpoint.save(job.folder / "model.safetensors", params)
    run_folder.write_json(job.folder / "result.json", {"protocol": job.protocol})
    return {}


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "run", save_untrained)


def table() -> np.ndarray:
    return np.random.default_rng(0).normal([0, 5], [1, 9], (NUM, 2)).astype(np.float32)


# Its file, the run's settings, and from training examples and a key to x.
KINDS: dict[str, tuple[Callable[[Path], Path], dict[str, Any], Callable[..., Any]]] = {
    "a stream of grey images": (
        lambda path: save_pngs(path, pixels(3, 2)),
        {"stream_above": 0.0},
        binarisation.bernoulli,
    ),
    "static": (
        lambda path: save_npy(path, pixels(3, 2)),
        {"binarisation": "static"},
        lambda x, key: binarisation.bernoulli(
            x, jax.random.split(binarisation.fixed_draw_key())[0]
        ),
    ),
    "colour": (
        lambda path: save_npy(path, pixels(3, 2, 3)),
        {},
        binarisation.dequantise,
    ),
    "table": (
        lambda path: save_npy(path, table()),
        {},
        lambda x, key: (x - x.mean(axis=0)[None]) / x.std(axis=0)[None],
    ),
    "bits": (
        lambda path: save_npy(path, (pixels(5) > 99).astype(np.float32)),
        {},
        lambda x, key: x,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("untrained")
def test_data_of_every_kind(kind: str, tmp_path: Path) -> None:
    write, changes, preprocess = KINDS[kind]
    path = write(tmp_path / "mine")
    folder = train_on(path, tmp_path / "run", **changes)
    if kind in ("a stream of grey images", "table"):
        assert list(call(folder, num_samples=5)["parts"]) == DEFAULT
    # Test examples are those of the run, training examples as the run makes them.
    found = finished.load(folder, finished.read(folder))
    sha256 = run_folder.read_settings(folder)["protocol"]["test_x_sha256"]
    assert data.content_sha256(np.asarray(found.inputs.test)) == sha256
    key = jax.random.key(4)
    whole = data.load_path(path)
    images = jnp.asarray(np.stack([whole.train[i] for i in range(36)]))
    if kind in ("static", "table"):  # which depend on all of them
        expected = preprocess(images, key)[order(36)[:4]]
    else:
        expected = preprocess(images[order(36)[:4]], key)
    np.testing.assert_allclose(
        parts.training_examples(found, 4, key), expected, atol=1e-5 if kind == "table" else 0
    )


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("ensemble")
    path = save_npy(tmp_path / "mine", pixels(3, 2))
    return train_on(path, tmp_path / "run", seeds=3, seed=5)


@pytest.fixture(scope="module")
def single(ensemble: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single model of the ensemble's data."""
    return train_on(ensemble.parent / "mine.npy", tmp_path_factory.mktemp("single") / "run")


# Of four draws none are five effective ones, of seven some.
@pytest.mark.parametrize(("seeds", "num_samples"), [(1, 4), (2, 7)])
def test_a_result_says_how_far_to_trust_its_log_px(
    seeds: int,
    num_samples: int,
    ensemble: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = ensemble.parent / "mine.npy"
    settings: dict[str, Any] = {"seeds": seeds, "seed": 5, "nll_samples": num_samples}
    folder = train_on(data, tmp_path / "run", latent_dim=4, **settings)
    found = finished.load(folder, finished.read(folder))
    log_px = []
    for seed, params in zip(found.seeds, found.params, strict=True):
        keys = Keys(*jax.random.split(jax.random.key(seed), 5))
        log_px.append(
            evaluation.importance_sampling(
                params, found.inputs.test, keys.nll, num_samples=num_samples
            )
        )
    ess = np.stack([of_one.ess for of_one in log_px])
    stderr = np.stack([of_one.stderr for of_one in log_px]).astype(np.float64)
    result = run_folder.read_result(folder)
    by_seed = [-float(of_one.estimate.mean()) for of_one in log_px]
    assert result["test_nll"] == pytest.approx(np.mean(by_seed), rel=1e-5)
    assert result["test_nll_sampling_error"] == pytest.approx(
        math.sqrt((stderr**2).sum()) / stderr.size, rel=1e-4
    )
    assert result["test_nll_ess_median"] == pytest.approx(np.median(ess), rel=1e-4)
    assert result["test_nll_ess_share_below_5"] == (ess < 5).mean() > 0
    assert (ess < 5).all() == (num_samples < 5)
    assert result["test_nll_ess_percentiles"]["5"] == pytest.approx(np.percentile(ess, 5), rel=1e-4)
    of_seed = ["seed 5: ", "seed 6: "] if seeds > 1 else [""]
    assert [line.split(" examples rest")[0] for line in result["warnings"]] == [
        f"{start}the estimates of log p(x) of {(of_one < 5).sum()} of 4"
        for start, of_one in zip(of_seed, ess, strict=True)
        if (of_one < 5).any()
    ]
    out = capsys.readouterr().out.replace("\n", "")
    assert f"Effective samples of {num_samples}: median {np.median(ess):.3g}, below 5 for" in out
    for line in result["warnings"]:
        assert f"WARNING: {line}" in out


def test_an_ensemble_has_errors_over_its_models(ensemble: Path) -> None:
    content = call(ensemble, num_samples=4, seed=SEED)
    assert content["stderr_over"] == "seeds"
    assert content["seeds"] == [5, 6, 7]
    log_px = numbers(ensemble, "importance_sampling")["log_px"]
    assert log_px.shape == (3, 1, 4)
    x = finished.load(ensemble, finished.read(ensemble)).inputs.test
    for i, seed in enumerate((5, 6, 7)):
        params = checkpoint.load(ensemble / "models" / f"seed_{seed}.safetensors")
        # One repeat of one group.
        key = jax.random.split(jax.random.split(key_of("importance_sampling", seed), 1)[0], 1)[0]
        expected = evaluation.importance_sampling(params, x, key, num_samples=4).estimate
        np.testing.assert_array_equal(log_px[i, 0], expected)
    by_seed = -log_px.mean(axis=(1, 2))
    found = results(ensemble, "importance_sampling")
    assert found["nll_by_seed"] == pytest.approx(by_seed.tolist())
    assert found["nll"] == pytest.approx(by_seed.mean())
    assert found["nll_stderr"] == pytest.approx(mean_of(by_seed)[1])
    train_nll = -numbers(ensemble, "train_gap")["train_log_px"].mean(axis=1)
    gap = results(ensemble, "train_gap")
    assert gap["nll_gap_by_seed"] == pytest.approx((by_seed - train_nll).tolist())
    assert gap["nll_gap_stderr"] == pytest.approx(mean_of(by_seed - train_nll)[1])
    of_latents, arrays = results(ensemble, "latents"), numbers(ensemble, "latents")
    assert len(of_latents["kl_per_dimension"]) == 3
    by_model = {"kl": arrays["kl_per_dimension"], "active_units": arrays["active"]}
    for name, array in by_model.items():
        of_each = array.sum(axis=1)
        assert of_latents[f"{name}_by_seed"] == pytest.approx(of_each.tolist())
        assert of_latents[name] == pytest.approx(of_each.mean())
        assert of_latents[f"{name}_stderr"] == pytest.approx(mean_of(of_each)[1])
    stderr = numbers(ensemble, "importance_sampling")["stderr"]
    assert found["nll_sampling_error"] == pytest.approx(math.sqrt((stderr**2).sum()) / 12)
    warned = content["parts"]["importance_sampling"]["warnings"]
    assert [line.split(":")[0] for line in warned] == ["seed 5", "seed 6", "seed 7"]


# What is refused.


def spoil_data(folder: Path) -> None:
    settings = run_folder.read_settings(folder)
    settings["protocol"]["dataset_sha256"] = "aa"
    run_folder.write_json(folder / "config.json", settings)


def spoil_draw(folder: Path) -> None:
    settings = run_folder.read_settings(folder)
    settings["protocol"]["test_x_sha256"] = "aa"
    run_folder.write_json(folder / "config.json", settings)


def lose_data(folder: Path) -> None:
    settings = run_folder.read_settings(folder)
    run_folder.write_json(folder / "config.json", {**settings, "dataset": "gone/mine.npy"})


def lose_settings(folder: Path) -> None:
    settings = run_folder.read_settings(folder)
    del settings["likelihood"]
    run_folder.write_json(folder / "config.json", settings)


def many_latents(folder: Path) -> None:
    settings = run_folder.read_settings(folder)
    run_folder.write_json(folder / "config.json", settings | {"latent_dim": 50})


def unchanged(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (shutil.rmtree, "", "error: run holds no run: it has no config.json"),
        (
            lambda run: (run / "result.json").unlink(),
            "",
            "error: run holds no finished run: no result.json",
        ),
        (
            lambda run: (run / "model.safetensors").unlink(),
            "",
            "error: run/model.safetensors does not exist",
        ),
        (
            lambda run: (run / "model.safetensors").write_bytes(b"half"),
            "",
            "error: run/model.safetensors: not a whole file of weights",
        ),
        (
            lambda run: (run / "evaluation.json").write_text("{}"),
            "",
            "error: run/evaluation.json holds no evaluation: delete it",
        ),
        (lose_settings, "", "error: run/config.json is of no run: no 'likelihood'"),
        (lose_data, "", "error: gone/mine.npy does not exist (the data of run; if it was moved:"),
        (spoil_data, "", "error: embedded in jvae is not the data of run: dataset_sha256 is"),
        (spoil_draw, "", "error: embedded in jvae is not the data of run: test_x_sha256 is"),
        (unchanged, "--ais 1001", "error: --ais must be at most the 1000 test examples, got 1001"),
        (unchanged, "--app-d 1001", "error: --app-d must be at most the 1000 test examples"),
        (unchanged, "--inference-gap 1001", "error: --inference-gap must be at most the 1000"),
        (unchanged, "--mutual-information 1001", "error: --mutual-information must be at most"),
        (many_latents, "--app-d 2", "error: --app-d must be 0 for a model of 50 latents or more"),
        (unchanged, "--ais 1", "error: --ais must be 0 or at least 2, to have an error, got 1"),
        (unchanged, "--bdmc -1", "error: --bdmc must be 0 or at least 2"),
        (unchanged, "--mutual-information 1", "error: --mutual-information must be at least 2"),
        (unchanged, "--num-samples 0", "error: --num-samples must be at least 1, got 0"),
        (unchanged, "--repeats 0", "error: --repeats must be at least 1, got 0"),
        (unchanged, "--num-temperatures 0", "error: --num-temperatures must be at least 1"),
        (unchanged, "--num-chains 0", "error: --num-chains must be at least 1"),
        (unchanged, "--seed -1", "error: --seed must be between 0 and 2**32 - 1, got -1"),
        (unchanged, "--start nowhere", "--start"),
        (unchanged, "--paint", "--paint"),
    ],
)
@pytest.mark.parametrize("main", [command_line.main, evaluate.main], ids=["jvae", "python -m"])
def test_what_cannot_be_is_one_message_and_exit_code_2(
    main: Callable[[], None],
    spoil: Callable[[Path], object],
    flags: str,
    message: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(trained, "run")
    spoil(Path("run"))
    words = ["jvae", "evaluate"] if main is command_line.main else ["evaluate"]
    monkeypatch.setattr(sys, "argv", [*words, "run", *shlex.split(flags)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    if message.startswith("error:"):
        assert err.startswith(message)
        assert err.count("\n") == 1
    assert not (Path("run") / "evaluation").exists()


@pytest.mark.usefixtures("untrained")
def test_data_that_was_moved_is_found_where_it_is_said_to_be(tmp_path: Path) -> None:
    path = save_npy(tmp_path / "mine", pixels(3, 2))
    folder = train_on(path, tmp_path / "run")
    path.rename(tmp_path / "moved.npy")
    with pytest.raises(data.DataError, match=r"does not exist .*--data or --data-dir"):
        call(folder, **QUICK)
    assert list(call(folder, **QUICK, data=str(tmp_path / "moved.npy"))["parts"]) == DEFAULT
    other = save_npy(tmp_path / "other", pixels(3, 2)[::-1])
    with pytest.raises(data.DataError, match=r"other\.npy.* is not the data of"):
        call(folder, **QUICK, data=str(other))


@pytest.mark.parametrize("main", [command_line.main, evaluate.main], ids=["jvae", "python -m"])
def test_help(
    main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["jvae", "evaluate"] if main is command_line.main else ["evaluate"]
    monkeypatch.setattr(sys, "argv", [*words, "--help"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    flags = [field.name for field in dataclasses.fields(assessment.Config) if field.name != "run"]
    assert [f for f in flags if f"--{f.replace('_', '-')}" not in shown] == []
    assert "after Ctrl-C the same command goes on" in shown


# Two runs.


def rows(shown: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in shown.splitlines()
        if "│" in line
    ]


@pytest.fixture
def two(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return copy(evaluated, Path("a")), copy(evaluated, Path("b"))


def test_compare_shows_evaluations_of_one_protocol(
    two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    # Other noise of the evaluation compares.
    call(two[1], **(FULL | {"seed": SEED + 1}))
    capsys.readouterr()
    compare.run(compare.Config(runs=two))
    out = capsys.readouterr().out
    found = {(cells[0], cells[1].split(" (")[0]): cells[2:] for cells in rows(out)[2:]}
    for part in ALL:
        a, b = (results(folder, part) for folder in two)
        for name in (name for name in a if f"{name}_stderr" in a):
            assert found[part, name] == [
                f"{of_run[name]:.3f} ± {of_run[f'{name}_stderr']:.3f}" for of_run in (a, b)
            ]
    nll = [results(folder, "importance_sampling")["nll"] for folder in two]
    assert nll[0] != nll[1]
    assert "left out" not in out


@pytest.mark.parametrize(
    ("changes", "part", "reason"),
    [
        ({"num_samples": 2}, "importance_sampling", "num_samples is 12 and 2"),
        ({"repeats": 1}, "importance_sampling", "repeats is 3 and 1"),
        ({"num_temperatures": 2}, "ais", "num_temperatures is 3 and 2"),
        ({"schedule": "sigmoid"}, "bdmc", 'schedule is "linear" and "sigmoid"'),
        ({"num_examples": 9}, "latents", "num_examples is 30 and 9"),
        (
            {"log_px": {"estimator": "importance sampling", "seed": 8}},
            "inference_gap",
            'log_px is {"estimator": "annealed importance sampling"',
        ),
    ],
)
def test_compare_mixes_no_protocols(
    changes: dict[str, Any],
    part: str,
    reason: str,
    two: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = json.loads((two[1] / "evaluation.json").read_text())
    content["parts"][part]["settings"] |= changes
    run_folder.write_json(two[1] / "evaluation.json", content)
    compare.run(compare.Config(runs=two))
    out = capsys.readouterr().out
    assert f"{part} is left out: a and b do not compare: {reason}" in out
    shown = {cells[0] for cells in rows(out)}
    assert {"a", "b"} <= shown  # the runs' own results
    assert part not in shown
    assert "app_d" in shown


@pytest.mark.parametrize("order", ["ensemble first", "single first"])
def test_compare_says_what_every_column_s_errors_are_over(
    order: str,
    ensemble: Path,
    single: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    folders = {single: "examples", ensemble: "seeds"}
    for folder in folders:
        call(folder, num_samples=4, seed=SEED)
    runs = tuple(folders) if order == "single first" else tuple(folders)[::-1]
    capsys.readouterr()
    compare.run(compare.Config(runs=runs))
    out = capsys.readouterr().out
    (header,) = (
        line for line in out.splitlines() if "┃" in line and "± s.e. over examples" in line
    )
    cells = [cell.strip() for cell in header.split("┃")[3:-1]]
    assert cells == [f"± s.e. over {folders[folder]}" for folder in runs]
    shown = {(row[0], row[1]): dict(zip(runs, row[2:], strict=True)) for row in rows(out)[2:]}
    # One model has no error of a number that is no mean over examples.
    for name, digits in (("kl", ".3f"), ("active_units", "")):
        (alone, together) = (results(folder, "latents") for folder in folders)
        assert shown["latents", name] == {
            single: f"{alone[name]:{digits}}",
            ensemble: f"{together[name]:.3f} ± {together[f'{name}_stderr']:.3f}",
        }


def test_compare_shows_what_all_runs_have(
    two: tuple[Path, Path], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(trained, Path("c"))
    compare.run(compare.Config(runs=(*two, Path("c"))))
    out = capsys.readouterr().out
    assert "ais is left out: c has no evaluation of it with its present weights\n" in out
    assert {cells[0] for cells in rows(out)} == {"a", "b", "c"}


@pytest.mark.usefixtures("untrained")
def test_a_run_of_train_and_of_mnist_are_read_alike(trained: Path, tmp_path: Path) -> None:
    settings = finished.read(trained)
    assert settings.name == "mnist_5k"
    assert settings.split == {}
    path = save_npy(tmp_path / "mine", pixels(3, 2))
    folder = train_on(path, tmp_path / "run", test_fraction=0.25, split_seed=2)
    settings = finished.read(folder)
    assert settings.split == {"test_fraction": 0.25, "split_seed": 2}
    dataset = inputs.load(str(path), common.Config(), test_fraction=0.25, split_seed=2)
    assert settings.protocol["dataset_sha256"] == dataset.sha256
    assert len(finished.load(folder, settings).inputs.test) == 10
