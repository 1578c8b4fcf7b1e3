"""Steps that are not finite, left out: the run is then the one without their updates."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array
from runs import assert_same_state
from toy import KEY, data, toy_bound, toy_params

import jvae
from jvae import training
from jvae.training import StepInfo, TrainState

ADAM = training.make_optimizer("adam", 0.1, clip_norm=1.0, map_dataset_size=8)
SKIPPING = training.skip_non_finite(ADAM)


def bound(params: jvae.Params, x: Array, key: Array) -> Array:
    """The toy's, its draws those of the step; x of 100 or more has another fault each."""
    noise = jax.random.normal(key, ())
    w = params.weights["decoder"]["w"][0]
    zero = w - jax.lax.stop_gradient(w)
    fault = x[0, 0]
    return (
        toy_bound(params, x, key)
        + noise * w
        + jax.lax.switch(
            jnp.clip(fault // 100, 0, 3).astype(jnp.int32),
            [lambda z: 0 * z, lambda z: z * jnp.nan, jnp.sqrt, lambda z: z + jnp.inf],
            zero,
        )
    )


def faulty(*faults: int) -> np.ndarray:
    """Batches [steps, 2, 5], each with its fault: 0 for none."""
    x = np.array(data(2 * len(faults))).reshape(-1, 2, 5)
    for i, fault in enumerate(faults):
        x[i, 0, 0] = 100 * fault or x[i, 0, 0]
    return x


def run(state: TrainState, x: np.ndarray) -> tuple[TrainState, StepInfo]:
    """An epoch of batches as they are."""
    epoch = training.make_epoch(training.make_step(bound, SKIPPING), x.shape[1])
    order = np.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2])
    return epoch(state, x.reshape(-1, 5), order)


@pytest.mark.parametrize("fault", [1, 2, 3], ids=["both", "gradient", "bound"])
def test_a_step_skipped_leaves_all_but_its_number(fault: int) -> None:
    before, _ = run(training.init(toy_params(0.5), SKIPPING, KEY), faulty(0, 0))
    after, info = run(before, faulty(fault))
    assert info.skipped is not None
    assert info.skipped.tolist() == [True]
    assert math.isfinite(float(info.bound[0])) == (fault == 2)
    assert after.step == before.step + 1
    assert after.opt_state.total_notfinite == after.opt_state.notfinite_count == 1
    same = after._replace(
        step=before.step,
        opt_state=after.opt_state._replace(
            notfinite_count=before.opt_state.notfinite_count,
            total_notfinite=before.opt_state.total_notfinite,
            last_finite=before.opt_state.last_finite,
        ),
    )
    assert_same_state(same, before)


def test_a_run_with_a_step_skipped_is_the_run_in_which_it_changed_nothing() -> None:
    start = training.init(toy_params(0.5), SKIPPING, KEY)
    x = faulty(0, 0, 1, 0, 2, 3, 0)
    end, info = run(start, x)
    assert info.skipped is not None
    assert info.skipped.tolist() == [False, False, True, False, True, True, False]
    # The same without the guard: only the number of the step goes on where one is skipped.
    plain = training.make_epoch(training.make_step(bound, ADAM), 2)
    state = training.init(toy_params(0.5), ADAM, KEY)
    for i, batch in enumerate(x):
        if info.skipped[i]:
            state = state._replace(step=state.step + 1)
        else:
            state, _ = plain(state, batch, np.array([[0, 1]]))
    assert end.step == state.step == 7
    for a, b in ((end.params, state.params), (end.opt_state.inner_state, state.opt_state)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), a, b)
    assert end.opt_state.total_notfinite == 3


def test_where_nothing_is_skipped_the_optimizer_is_the_one_inside() -> None:
    end, info = run(training.init(toy_params(0.5), SKIPPING, KEY), faulty(0, 0, 0))
    assert info.skipped is not None
    assert not info.skipped.any()
    plain = training.make_epoch(training.make_step(bound, ADAM), 2)
    x = faulty(0, 0, 0).reshape(-1, 5)
    alone, info = plain(training.init(toy_params(0.5), ADAM, KEY), x, np.arange(6).reshape(3, 2))
    assert info.skipped is None
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        end.params,
        alone.params,
    )


def fit(faults: list[list[int]], max_skipped: int, *, counted: int = 1) -> TrainState:
    """A fit of one epoch a list, by an optimizer that counts a step so many times."""
    epochs = iter(faults)

    def epoch(state: TrainState, _: None) -> tuple[TrainState, StepInfo]:
        state, info = run(state, faulty(*next(epochs)))
        in_a_row = counted * state.opt_state.notfinite_count
        return state._replace(opt_state=state.opt_state._replace(notfinite_count=in_a_row)), info

    return training.fit(
        training.init(toy_params(0.5), SKIPPING, KEY),
        epoch,
        None,
        num_epochs=len(faults),
        max_skipped=max_skipped,
    )


@pytest.mark.parametrize("counted", [1, 5])
@pytest.mark.parametrize(
    ("faults", "max_skipped", "step"),
    [
        ([[1]], 1, 0),
        ([[0, 1, 2, 0]], 2, 2),
        ([[0, 1, 2, 0]], 3, None),
        # The row goes on from epoch to epoch.
        ([[0, 1], [2, 0]], 2, 2),
        ([[0, 1], [3, 1]], 3, 3),
        ([[0, 1], [0, 1], [0, 1]], 2, None),
        ([[1, 0, 1, 1, 0, 1]], 3, None),
    ],
)
def test_so_many_skipped_in_a_row_end_the_run(
    faults: list[list[int]], max_skipped: int, step: int | None, counted: int
) -> None:
    if step is None:
        assert fit(faults, max_skipped, counted=counted).step == sum(map(len, faults))
        return
    words = f"last {max_skipped} steps were skipped as not finite, up to step {step};"
    with pytest.raises(training.NonFiniteError, match=words) as error:
        fit(faults, max_skipped, counted=counted)
    assert error.value.step == step
    assert error.value.last_good_state.step == step // len(faults[0]) * len(faults[0])


def test_the_last_of_very_many_in_a_row_is_still_skipped() -> None:
    """Optax gives up after a number of them, which nothing reaches."""
    state = training.init(toy_params(0.5), SKIPPING, KEY)
    most = jnp.asarray(np.iinfo(np.int32).max, jnp.int32)
    state = state._replace(opt_state=state.opt_state._replace(notfinite_count=most))
    after, info = run(state, faulty(1))
    assert info.skipped is not None
    assert info.skipped.all()
    np.testing.assert_array_equal(after.params.weights["decoder"]["w"], [0.5, 0.5, 0.5])


@pytest.mark.parametrize(("max_skipped", "error"), [(0, ValueError), (1.5, TypeError)])
@pytest.mark.usefixtures("unchecked")
def test_a_limit_that_cannot_be_is_refused(max_skipped: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_skipped must be"):
        fit([[0]], max_skipped)


def test_a_step_gives_the_loss_to_optimizers_that_ask_for_it() -> None:
    seen = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(()), lambda g, s, p=None, *, value, **_: (g, value)
    )
    state, info = training.make_step(toy_bound, seen)(
        training.init(toy_params(0.5), seen, KEY), data(2)
    )
    assert state.opt_state == -info.bound
