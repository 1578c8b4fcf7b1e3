"""Runs that meet numbers that are not finite, through the command line."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import metrics, signalled_at

import jvae
from jvae import bundle, training
from jvae.experiments import (
    command_line,
    config,
    epochs,
    job,
    mnist,
    objective,
    replay,
    run_folder,
)
from jvae.experiments.interrupt import Interrupted

SMALL = mnist.Config(
    dataset="mnist_5k", hidden=(50,), latent_dim=5, epochs=2, checkpoint_every=1, nll_samples=0
)


def call(main: Callable[[], None], *flags: str) -> int:
    """The exit code of a command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *flags])
        try:
            main()
        except SystemExit as exit_:
            return int(exit_.code or 0)
        return 0


@pytest.mark.parametrize("stream_above", ["1", "0"], ids=["in memory", "streamed"])
def test_the_step_at_fault_is_kept_and_named(
    stream_above: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    flags = "--dataset mnist_5k --optimizer sgd --learning-rate 1e30 --hidden 50 --stream-above"
    assert call(mnist.main, *flags.split(), stream_above, "--out", str(folder)) == 1
    failed = capsys.readouterr().err
    step = json.loads((folder / "failure.json").read_text())["step"]
    # The scale is exp of numbers of the order of the learning rate.
    verdict = "scale of q(z|x): "
    assert f"step {step} went bad: {verdict}" in failed
    assert f"python -m jvae.experiments.replay {folder}/failure" in failed
    for main, words in ((replay.main, ()), (command_line.main, ("replay",))):
        assert call(main, *words, str(folder / "failure")) == 1
        out, err = capsys.readouterr()
        assert err.startswith(f"error: {verdict}")
        assert err.count("\n") == 1
        assert "KL(q(z|x) ‖ p(z))" in out
    # The weights are those of the step, with which the bound is not finite.
    kept = bundle.load(folder / "failure", lambda _: training.make_optimizer("sgd", 1e30))
    assert kept.state.step == step
    bound = jvae.elbo(kept.state.params, kept.x, training.step_keys(kept.state).bound).mean()
    assert not jnp.isfinite(bound)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(kept.state.params))
    # A resumed run that ends well leaves no failure.
    flags = flags.replace("1e30", "1e-4") + f" {stream_above} --epochs 1 --nll-samples 0 --resume"
    assert call(mnist.main, *flags.split(), "--out", str(folder)) == 0
    assert not (folder / "failure").exists()


def test_a_step_that_is_finite_does_not_reproduce(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = objective.make_optimizer(SMALL, 4000)
    params = jvae.init(jvae.VAE.mlp((4,), 2, (3,)), jax.random.key(0))
    state = training.init(params, optimizer, jax.random.key(1))
    settings = {**dataclasses.asdict(SMALL), "num_train": 4000}
    kept = run_folder.json_round_trip({k: v for k, v in settings.items() if k != "hidden"})
    bundle.save(tmp_path / "a", state, np.ones((3, 4), np.float32), kept)
    assert call(replay.main, str(tmp_path / "a")) == 0
    assert "does not reproduce" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "is of no run of this command: no 'num_train'"),
        ({"num_train": 50}, "--batch-size must be at most the 50 training examples"),
    ],
)
def test_what_is_no_bundle_of_a_run_is_one_line_and_exit_code_2(
    settings: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(replay.main, str(tmp_path)) == 2
    assert "is no bundle of a step: no step.json" in capsys.readouterr().err
    optimizer = training.make_optimizer("sgd", 0.1)
    params = jvae.init(jvae.VAE.mlp((4,), 2, ()), jax.random.key(0))
    state = training.init(params, optimizer, jax.random.key(1))
    if settings:
        settings = run_folder.json_round_trip(dataclasses.asdict(SMALL) | settings)
    bundle.save(tmp_path / "a", state, np.ones((3, 4), np.float32), settings)
    assert call(replay.main, str(tmp_path / "a")) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


# Bounds with faults.


def faulty(params: jvae.Params, x: Any, key: Any, *, num_samples: int) -> Any:
    """The ELBO, or NaN in about one step in five."""
    is_bad = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.2)
    return jnp.where(is_bad, jnp.nan, jvae.elbo(params, x, key, num_samples=num_samples))


def broken(params: jvae.Params, x: Any, key: Any, *, num_samples: int) -> Any:
    """NaN at every step."""
    return jnp.nan * jvae.elbo(params, x, key, num_samples=num_samples)


def bad_steps(seed: int, num: int) -> list[bool]:
    """Which of the steps of a run of `faulty` are bad."""
    keys = job.Keys(*jax.random.split(jax.random.key(seed), len(job.Keys._fields)))

    def is_bad(step: Any) -> Any:
        draw = jax.random.split(jax.random.fold_in(keys.train, step), 3)[0]
        return jax.random.bernoulli(jax.random.fold_in(draw, 1), 0.2)

    bad: list[bool] = jax.jit(jax.vmap(is_bad))(jnp.arange(num)).tolist()
    return bad


def skip_into(folder: Path, bound: Any = faulty, **changes: Any) -> dict[str, Any]:
    settings = {"on_nonfinite": "skip", "out": folder, **changes}
    with pytest.MonkeyPatch.context() as patch:
        row = dataclasses.replace(config.BOUNDS["elbo"], function=bound)
        patch.setitem(config.BOUNDS, "elbo", row)
        return mnist.run(dataclasses.replace(SMALL, **settings))


def test_steps_skipped_are_counted_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    result = skip_into(tmp_path / "whole")
    first, second = metrics(tmp_path / "whole")
    bad = bad_steps(0, 80)
    assert 0 < first["skipped_steps"] == sum(bad[:40])
    assert first["skipped_steps"] < second["skipped_steps"] == sum(bad) == result["skipped_steps"]
    assert second["test_elbo"] > first["test_elbo"]
    assert second["train_elbo"] > first["train_elbo"]
    skip_into(tmp_path / "resumed", epochs=1)
    skip_into(tmp_path / "resumed", resume=True, max_skipped=11)
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "whole")


def test_too_many_skipped_in_a_row_end_the_run_at_their_last(tmp_path: Path) -> None:
    with pytest.raises(training.NonFiniteError, match="last 4 steps were skipped") as error:
        skip_into(tmp_path / "run", broken, max_skipped=4)
    assert "step 3 went bad: bound: 100 of 100 entries are nan" in error.value.__notes__[-1]
    assert json.loads((tmp_path / "run" / "failure" / "step.json").read_text())["step"] == 3


def test_without_skipping_there_is_no_count(tmp_path: Path) -> None:
    result = skip_into(tmp_path / "run", jvae.elbo, on_nonfinite="stop", epochs=1)
    assert "skipped_steps" not in result
    assert "skipped_steps" not in metrics(tmp_path / "run")[0]


def test_the_step_at_fault_is_found_after_a_resume_within_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = 73
    assert bad_steps(seed, 9) == [False] * 8 + [True]
    monkeypatch.setattr(epochs, "STEPS_A_CALL", 3)

    def fail_into(folder: Path, **changes: Any) -> bundle.Bundle:
        with pytest.raises(training.NonFiniteError, match="bound was nan at step 8"):
            skip_into(folder, on_nonfinite="stop", seed=seed, **changes)
        return bundle.load(folder / "failure", lambda _: training.make_optimizer("adam", 1e-3))

    whole = fail_into(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(epochs, "stoppable", signalled_at(3))
        with pytest.raises(Interrupted, match="saved after step 6"):
            skip_into(tmp_path / "resumed", on_nonfinite="stop", seed=seed)
    resumed = fail_into(tmp_path / "resumed", resume=True)
    assert whole.state.step == 8
    np.testing.assert_array_equal(resumed.x, whole.x)
    # To rounding: the step at fault is looked for one step at a time, from where training began.
    for ours, theirs in zip(
        *map(jax.tree.leaves, (resumed.state.params, whole.state.params)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
