"""How far results can be trusted: errors by sampling alone and over repeats, effective samples."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import linear_gaussian
import numpy as np
import pytest
from scipy import stats
from tiny_evaluations import FULL, call, numbers, results, train_on

import jvae
from jvae import evaluation
from jvae.experiments import finished, run_folder
from jvae.experiments import results as run_results
from jvae.experiments.job import Keys

pytestmark = pytest.mark.usefixtures("quick_evaluations")


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


# Of four draws none are five effective ones, of seven some.
@pytest.mark.parametrize(
    ("seeds", "num_samples", "examples_a_group"), [(1, 4, 1000), (2, 7, 1000), (2, 7, 2), (1, 4, 1)]
)
def test_a_result_says_how_far_to_trust_its_log_px(
    seeds: int,
    num_samples: int,
    examples_a_group: int,
    ensemble: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_results, "_DRAWS_A_GROUP", num_samples * examples_a_group)
    data = ensemble.parent / "mine.npy"
    settings: dict[str, Any] = {"seeds": seeds, "seed": 5, "nll_samples": num_samples}
    sizes: list[int] = []
    estimate = evaluation.importance_sampling

    def watched(params: jvae.Params, x: jax.Array, *args: Any, **how: Any) -> Any:
        sizes.append(len(x))
        return estimate(params, x, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "importance_sampling", watched)
        folder = train_on(data, tmp_path / "run", latent_dim=4, **settings)
    size = min(4, examples_a_group)
    assert sizes == [size] * (4 // size * seeds)
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
