"""The parts of an evaluation: their numbers are the library's, their results have errors."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, PRNGKeyArray
from PIL import Image
from tiny_evaluations import (
    ALL,
    ANNEALING,
    FULL,
    MODEL_SEED,
    QUICK,
    SEED,
    call,
    copy,
    numbers,
    order,
    results,
    rows,
)

import jvae
from jvae import binarisation, checkpoint, data, evaluation
from jvae.experiments import finished, parts, run_folder

pytestmark = pytest.mark.usefixtures("quick_evaluations")

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
