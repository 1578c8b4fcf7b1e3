"""How far the results of a run can be trusted: errors by sampling alone, effective samples."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import linear_gaussian
import numpy as np
import pytest
from scipy import stats
from tiny_evaluations import train_on

from jvae import evaluation
from jvae.experiments import finished, run_folder
from jvae.experiments import results as run_results
from jvae.experiments.job import Keys

pytestmark = pytest.mark.usefixtures("quick_evaluations")


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
