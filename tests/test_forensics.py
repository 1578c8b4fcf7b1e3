"""Injected faults, each named by its first tensor; the step of an epoch that was at fault."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array
from parts import CountingEncoder
from runs import assert_same_state
from weights import random_params

import jvae
from jvae import forensics, training
from jvae.training import TrainState

BATCH = 7
MODEL = jvae.VAE.mlp((2, 3), latent_dim=2, hidden=(4,), likelihood="gaussian")
KERNEL, BIAS = (f"encoder/params/output/{name}" for name in ("kernel", "bias"))
ADAM = training.make_optimizer("adam", 1e-3)


def make_state(
    model: jvae.VAE = MODEL, optimizer: optax.GradientTransformation = ADAM
) -> TrainState:
    return training.init(random_params(model), optimizer, jax.random.key(1))


def data() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(BATCH, 2, 3)).astype(np.float32)


def with_weight(state: TrainState, name: str, index: tuple[int, ...], value: float) -> TrainState:
    """The state with one entry of the weight `encoder/params/output/bias`, say, set."""

    def changed(path: Any, leaf: Array) -> Array:
        here = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf.at[index].set(value) if here == name else leaf

    weights = jax.tree_util.tree_map_with_path(changed, state.params.weights)
    return state._replace(params=dataclasses.replace(state.params, weights=weights))


def examined(
    state: TrainState,
    x: np.ndarray,
    bound: Any = jvae.elbo,
    optimizer: optax.GradientTransformation = ADAM,
) -> dict[str, forensics.Tensor]:
    found = forensics.examine(state, x, bound, optimizer)
    assert not found.is_finite
    tensors = {tensor.name: tensor for tensor in found.tensors}
    first = next(t for t in found.tensors if t.num_non_finite)
    assert found.verdict == str(first)
    return tensors | {"first": first}


def poisoned(index: tuple[int, ...], value: float) -> np.ndarray:
    x = data()
    x[index] = value
    return x


def sqrt_at_zero(params: jvae.Params, x: Array, key: Array) -> Array:
    """Finite, and its gradient in the encoder's bias is not: √0 is 0 with an infinite slope."""
    bias = params.weights["encoder"]["params"]["output"]["bias"]
    return jvae.elbo(params, x, key) + jnp.sqrt(bias[0] - jax.lax.stop_gradient(bias[0]))


def constant_inf(params: jvae.Params, x: Array, key: Array) -> Array:
    """Infinite with a finite gradient."""
    return jvae.elbo(params, x, key) + jnp.inf


STATE = make_state()
FAULTS: dict[str, tuple[TrainState, np.ndarray, Any, str]] = {
    "nan in the batch": (
        STATE,
        poisoned((5, 1, 2), math.nan),
        jvae.elbo,
        "x: 1 of 42 entries is nan, first at example 5",
    ),
    "inf and nan in the batch": (
        STATE,
        np.where(
            np.arange(BATCH)[:, None, None] == 3,
            np.array([math.inf, math.nan, 0], np.float32),
            data(),
        ),
        jvae.elbo,
        "x: of 42 entries 2 nan and 2 inf, first at example 3",
    ),
    "inf in a weight": (
        with_weight(STATE, KERNEL, (2, 1), math.inf),
        data(),
        jvae.elbo,
        f"weight {KERNEL}: 1 of 16 entries is inf, first at [2, 1]",
    ),
    "nan in a weight of the decoder": (
        with_weight(STATE, "decoder/params/hidden_0/bias", (3,), math.nan),
        data(),
        jvae.elbo,
        "weight decoder/params/hidden_0/bias: 1 of 4 entries is nan, first at [3]",
    ),
    # The first two outputs are means, the others log-variances: half of 400 is beyond exp.
    "a scale that overflows": (
        with_weight(STATE, BIAS, (2,), 400.0),
        data(),
        jvae.elbo,
        "scale of q(z|x): 7 of 14 entries are inf, first at example 0 (exp at ",
    ),
    # Float32 ends at 3.4e38.
    "a layer that overflows": (
        with_weight(
            make_state(jvae.VAE.mlp((2, 3), 2, (4,), "relu", "gaussian")),
            "encoder/params/hidden_0/kernel",
            (0, 1),
            3e38,
        ),
        np.where(np.arange(BATCH)[:, None, None] == 4, np.full((2, 3), 2, np.float32), 0.5).astype(
            np.float32
        ),
        jvae.elbo,
        "output of encoder/hidden_0: 1 of 28 entries is inf, first at example 4 (",
    ),
    "a mean whose square overflows": (
        with_weight(STATE, BIAS, (0,), 1e20),
        data(),
        jvae.elbo,
        "KL(q(z|x) ‖ p(z)): 7 of 7 entries are inf, first at example 0 (",
    ),
    "the same without a KL": (
        with_weight(STATE, BIAS, (0,), 1e20),
        data(),
        jvae.sgvb_a,
        "log p(z): 7 of 7 entries are inf, first at example 0 (",
    ),
    "the same in three samples": (
        with_weight(STATE, BIAS, (0,), 1e20),
        data(),
        partial(jvae.iwae, num_samples=3),
        "log p(z): 21 of 21 entries are inf, first at example 0 (",
    ),
    # The mean of p(x|z): its first six outputs.
    "a likelihood that overflows": (
        with_weight(STATE, "decoder/params/output/bias", (4,), 1e20),
        data(),
        jvae.elbo,
        "log p(x|z): 7 of 7 entries are inf, first at example 0 (",
    ),
    "a gradient alone": (
        STATE,
        data(),
        sqrt_at_zero,
        f"gradient of {BIAS}: 1 of 4 entries is inf, first at [0] (",
    ),
    "a bound with a finite gradient": (
        STATE,
        data(),
        constant_inf,
        "bound: 7 of 7 entries are inf, first at example 0 (add at ",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_first_tensor_that_went_bad_is_named(name: str) -> None:
    state, x, bound, verdict = FAULTS[name]
    first = str(examined(state, x, bound)["first"])
    # What follows is the line of code.
    says_where = verdict.endswith(("(", " at "))
    assert first.startswith(verdict) if says_where else first == verdict


def test_an_infinity_that_does_no_harm_is_shown_and_not_blamed() -> None:
    """Of the layer above, tanh is 1 with a slope of 0."""
    state = with_weight(STATE, "encoder/params/hidden_0/kernel", (0, 1), 3e38)
    found = forensics.examine(state, np.full_like(data(), 2.0), jvae.elbo, ADAM)
    assert found.is_finite
    assert found.verdict is None
    bad = {tensor.name: tensor.num_inf for tensor in found.tensors if tensor.num_non_finite}
    assert bad == {"output of encoder/hidden_0": BATCH}


def test_what_the_bound_does_not_need_is_not_blamed() -> None:
    """The ELBO with a closed-form KL draws log p(z) as well, and leaves it."""
    tensors = examined(with_weight(STATE, BIAS, (0,), 1e20), data())
    assert "log p(z)" not in tensors
    assert "log q(z|x)" not in tensors


def test_a_step_that_is_finite_has_no_verdict() -> None:
    found = forensics.examine(STATE, data(), jvae.elbo, ADAM)
    assert found.verdict is None
    assert found.is_finite
    tensors = {tensor.name: tensor for tensor in found.tensors}
    key = training.step_keys(STATE).bound
    q = jvae.posterior(STATE.params, data())
    z = q.sample(jax.random.split(key, 1)[0])
    bound = jvae.elbo(STATE.params, data(), key)
    expected = {
        "x": data(),
        f"weight {KERNEL}": STATE.params.weights["encoder"]["params"]["output"]["kernel"],
        "loc of q(z|x)": q.loc,
        "log-scale of q(z|x)": q.log_scale,
        "scale of q(z|x)": q.scale,
        "draw from q(z|x)": z[None],
        "loc of p(x|z)": jvae.likelihood(STATE.params, z).loc[None],
        "KL(q(z|x) ‖ p(z))": q.kl(jvae.prior(STATE.params)),
        "bound": bound,
        "loss": -bound.mean(),
    }
    gradient = jax.grad(lambda p: -jvae.elbo(p, data(), key).mean())(STATE.params)
    expected[f"gradient of {KERNEL}"] = gradient.weights["encoder"]["params"]["output"]["kernel"]
    # In the order of evaluation.
    assert [name for name in tensors if name in expected] == list(expected)
    for name, value in expected.items():
        assert tensors[name].shape == value.shape
        np.testing.assert_allclose(
            [tensors[name].minimum, tensors[name].maximum], [value.min(), value.max()], rtol=1e-4
        )
    after, _ = training.make_step(jvae.elbo, ADAM)(jax.tree.map(jnp.copy, STATE), data())
    kernel = after.params.weights["encoder"]["params"]["output"]["kernel"]
    assert tensors[f"new weight {KERNEL}"].maximum == pytest.approx(float(kernel.max()), rel=1e-5)


def test_networks_that_are_no_linen_modules_are_looked_into_as_well() -> None:
    model = dataclasses.replace(MODEL, encoder=CountingEncoder(MODEL.encoder))
    state = with_weight(make_state(model), BIAS, (2,), 400.0)
    tensors = examined(state, data())
    assert tensors["first"].name == "scale of q(z|x)"
    assert "output of encoder/output" not in tensors
    assert "output of decoder/output" in tensors


def test_an_update_that_overflows_is_named() -> None:
    optimizer = optax.sgd(3e38)
    first = examined(make_state(optimizer=optimizer), data(), optimizer=optimizer)["first"]
    assert first.name.startswith("update of ")
    assert first.num_inf
    assert not first.num_nan


# The step at fault.


@pytest.mark.parametrize(
    ("fault", "reported"),
    [
        # √0 has a gradient that is not finite: the step after it is the first whose bound is not.
        (jnp.sqrt, 4),
        (lambda zero: zero + jnp.nan, 3),
    ],
    ids=["gradient", "bound"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_step_at_fault_is_found_with_its_state_and_batch(
    fault: Callable[[Array], Array], reported: int, seed: int
) -> None:
    optimizer = optax.sgd(1.0)
    start = with_weight(make_state(optimizer=optimizer), "decoder/params/output/bias", (0,), 0.0)
    start = start._replace(key=jax.random.key(seed))

    def preprocess(x: Array, key: Array) -> Array:
        return x * jax.random.rademacher(key, x.shape, x.dtype)  # exact: ±1

    # where(…) gives 0 · ∞ in the branch not taken too: so the fault is compiled at its step only.
    def bound(params: jvae.Params, x: Array, key: Array) -> Array:
        bias = params.weights["decoder"]["params"]["output"]["bias"][0]
        is_time = jnp.round(jax.lax.stop_gradient(bias)) == 3
        zero = bias - jax.lax.stop_gradient(bias)
        extra = jax.lax.cond(is_time, fault, lambda zero: 0.0 * zero, zero)
        return jnp.zeros(len(x)) + bias + extra

    x = np.concatenate([data(), data() + 1])
    epoch = training.make_epoch(training.make_step(bound, optimizer), 2, preprocess)
    with pytest.raises(training.NonFiniteError) as error:
        training.fit(start, epoch, x, num_epochs=1)
    assert error.value.step == reported
    order = training.shuffled_batches(training.step_keys(start).shuffle, 14, 2)
    found = forensics.first_bad_step(
        error.value.last_good_state,
        iter(x[order]),
        bound,
        optimizer,
        until=reported,
        preprocess=preprocess,
    )
    assert found is not None
    state, batch = found
    expected, _ = epoch(start, x, order[:3])
    assert state.step == 3
    assert_same_state(state, expected)
    key = training.step_keys(state).preprocess
    np.testing.assert_array_equal(batch, preprocess(jnp.asarray(x[order[3]]), key))


def test_where_nothing_goes_bad_again_the_step_reported_is_kept() -> None:
    batches = np.stack([data()] * 3)
    for until in (0, 2):
        found = forensics.first_bad_step(STATE, batches, jvae.elbo, ADAM, until=until)
        assert found is not None
        assert found[0].step == until
    assert forensics.first_bad_step(STATE, batches, jvae.elbo, ADAM, until=3) is None


def test_a_gradient_that_its_optimizer_makes_finite_is_found_as_well() -> None:
    optimizer = optax.sign_sgd(0.1)
    state = make_state(optimizer=optimizer)
    found = forensics.first_bad_step(state, [data()] * 3, sqrt_at_zero, optimizer, until=2)
    assert found is not None
    assert found[0].step == 0


def test_gradients_are_in_the_order_of_their_evaluation() -> None:
    """Backward: a layer's stand before those of the layer below it."""
    names = [t.name for t in forensics.examine(STATE, data(), jvae.elbo, ADAM).tensors]
    layers = [name.split("/")[-2] for name in names if name.startswith("gradient of ")]
    networks = [name.split(" ")[-1].split("/")[0] for name in names if name.startswith("gradient")]
    assert layers == ["output", "output", "hidden_0", "hidden_0"] * 2
    assert networks == ["decoder"] * 4 + ["encoder"] * 4
