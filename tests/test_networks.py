import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import linear_gaussian
import numpy as np
import pytest
from standard_errors import SIGMAS
from weights import random_params

import jvae
from jvae import networks

Function = Callable[[np.ndarray], np.ndarray]


def gelu(h: np.ndarray) -> np.ndarray:
    """JAX's default, the tanh approximation."""
    return 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def sigmoid(h: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-h))


ACTIVATIONS: dict[str, Function] = {
    "tanh": np.tanh,
    "relu": lambda h: np.maximum(h, 0),
    "leaky_relu": lambda h: np.where(h > 0, h, 0.01 * h),
    "elu": lambda h: np.where(h > 0, h, np.expm1(h)),
    "gelu": gelu,
    "silu": lambda h: h * sigmoid(h),
    "sigmoid": sigmoid,
    "softplus": lambda h: np.logaddexp(h, 0),
}


def outputs(weights: Any, inputs: np.ndarray, activation: Function) -> np.ndarray:
    """An MLP in float64 from its weights."""
    layers = jax.tree.map(lambda w: np.asarray(w, np.float64), weights["params"])
    h = inputs.astype(np.float64)
    for i in range(len(layers) - 1):
        h = activation(h @ layers[f"hidden_{i}"]["kernel"] + layers[f"hidden_{i}"]["bias"])
    return np.asarray(h @ layers["output"]["kernel"] + layers["output"]["bias"])


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_every_activation_is_in_the_table() -> None:
    assert ACTIVATIONS.keys() == networks.ACTIVATIONS.keys()


@pytest.mark.parametrize("hidden", [(), (7,), (7, 5, 6)])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_networks_are_those_of_appendix_c(batch: tuple[int, ...], hidden: tuple[int, ...]) -> None:
    model = jvae.VAE.mlp((2, 3), latent_dim=2, hidden=hidden)
    params = random_params(model)
    x, z = normal(*batch, 2, 3), normal(*batch, 2)
    q = jvae.posterior(params, jnp.asarray(x))
    assert q.loc.shape == q.scale.shape == (*batch, 2)
    loc, log_var = np.split(
        outputs(params.weights["encoder"], x.reshape(*batch, 6), np.tanh), 2, axis=-1
    )
    np.testing.assert_allclose(q.loc, loc, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(q.scale, np.exp(log_var / 2), rtol=1e-5)
    logits = outputs(params.weights["decoder"], z, np.tanh).reshape(*batch, 2, 3)
    np.testing.assert_allclose(
        jvae.likelihood(params, jnp.asarray(z)).mean, sigmoid(logits), rtol=1e-5
    )


def test_the_decoder_mirrors_the_encoder() -> None:
    params = random_params(jvae.VAE.mlp((4,), 2, hidden=(7, 5)))
    kernels = {
        name: [layer["kernel"].shape for layer in params.weights[name]["params"].values()]
        for name in ("encoder", "decoder")
    }
    assert kernels["encoder"] == [(4, 7), (7, 5), (5, 4)]
    assert kernels["decoder"] == [(2, 5), (5, 7), (7, 4)]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_name_and_by_function(name: str) -> None:
    x = 3 * normal(5, 3)
    by_name, by_function = (
        random_params(jvae.VAE.mlp((3,), 2, hidden=(8,), activation=activation))
        for activation in (name, networks.ACTIVATIONS[name])
    )
    expected = outputs(by_name.weights["encoder"], x, ACTIVATIONS[name])[:, :2]
    for params in (by_name, by_function):
        loc = jvae.posterior(params, jnp.asarray(x)).loc
        np.testing.assert_allclose(loc, expected, rtol=1e-4, atol=1e-5)


def test_no_hidden_layer_is_an_affine_map() -> None:
    params = linear_gaussian.make(3, 2, 0.5)
    exact = linear_gaussian.Exact.of(params)
    x, z = normal(5, 3), normal(5, 2)
    q, p = jvae.posterior(params, jnp.asarray(x)), jvae.likelihood(params, jnp.asarray(z))
    loc, scale = exact.q(x)
    np.testing.assert_allclose(q.loc, loc, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(q.scale, scale, rtol=1e-5)
    np.testing.assert_allclose(p.loc, z @ exact.W.T + exact.b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(p.scale, np.full((5, 3), 0.5), rtol=1e-6)


@pytest.mark.parametrize("sigmoid_mean", [False, True])
def test_gaussian_learns_mean_and_log_variance(sigmoid_mean: bool) -> None:
    family = jvae.Gaussian(sigmoid_mean=sigmoid_mean)
    model = jvae.VAE.mlp((2, 3), 2, hidden=(7,), likelihood=family)
    params = random_params(model)
    z = normal(4, 2)
    loc, log_var = np.split(outputs(params.weights["decoder"], z, np.tanh), 2, axis=-1)
    p = jvae.likelihood(params, jnp.asarray(z))
    expected = sigmoid(loc) if sigmoid_mean else loc
    np.testing.assert_allclose(p.mean, expected.reshape(4, 2, 3), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(p.scale, np.exp(log_var / 2).reshape(4, 2, 3), rtol=1e-4)


def test_likelihoods_by_name_are_the_families() -> None:
    assert jvae.VAE.mlp(likelihood="bernoulli") == jvae.VAE.mlp(likelihood=jvae.Bernoulli())
    assert jvae.VAE.mlp(likelihood="gaussian") == jvae.VAE.mlp(likelihood=jvae.Gaussian())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("scale", "error", "words"),
    [
        (0.0, ValueError, "positive and finite.*0.0"),
        (-1.0, ValueError, "positive and finite.*-1.0"),
        (math.inf, ValueError, "positive and finite.*inf"),
        (math.nan, ValueError, "positive and finite.*nan"),
        (1e-39, ValueError, "as float32.*1e-39"),
        (1e39, ValueError, "as float32.*1e\\+39"),
        (True, TypeError, "Python number.*True"),
        ("0.5", TypeError, "Python number.*'0.5'"),
        (jnp.array(0.5), TypeError, "Python number.*Array"),
    ],
)
def test_a_scale_that_is_none_is_refused(scale: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        jvae.Gaussian(scale=scale)


@pytest.mark.parametrize("initialiser", ["paper", "lecun"])
def test_initial_weights_have_the_stated_variance(initialiser: str) -> None:
    model = jvae.VAE.mlp((300,), 50, hidden=(200,), initialiser=initialiser)
    weights = jvae.init(model, jax.random.key(0)).weights
    for network in ("encoder", "decoder"):
        for layer in weights[network]["params"].values():
            kernel, bias = np.asarray(layer["kernel"]), np.asarray(layer["bias"])
            variance = 0.01 if initialiser == "paper" else 1 / len(kernel)
            # A mean's standard error is √(v / n), a Gaussian's variance's v √(2 / n); a truncated
            # Gaussian's is less.
            for weight in (kernel, bias) if initialiser == "paper" else (kernel,):
                assert abs(weight.mean()) < SIGMAS * math.sqrt(variance / weight.size)
                error = variance * math.sqrt(2 / weight.size)
                assert abs((weight**2).mean() - variance) < SIGMAS * error
            if initialiser == "lecun":
                assert not bias.any()


def test_encoder_and_decoder_are_drawn_apart() -> None:
    params = jvae.init(jvae.VAE.mlp((4,), 4, hidden=(4,)), jax.random.key(0))
    first, second = (params.weights[n]["params"]["hidden_0"] for n in ("encoder", "decoder"))
    assert (first["kernel"] != second["kernel"]).all()


# Mixed precision.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_examples_of_16_bits_have_distributions_and_bounds_of_32(dtype: Any) -> None:
    params = random_params(jvae.VAE.mlp(data_shape=(6,), latent_dim=3, hidden=(7,)))
    x = (normal(20, 6) > 0).astype(jnp.float32)  # 0 and 1 are exact in 16 bits
    for function in (jvae.posterior, lambda p, x: jvae.iwae(p, x, jax.random.key(0))):
        given, exact = (jax.tree.leaves(function(params, x_)) for x_ in (x.astype(dtype), x))
        for a, b in zip(given, exact, strict=True):
            assert a.dtype == jnp.float32
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_layers_of_16_bits_give_distributions_of_32() -> None:
    """A bfloat16 has 8 significant bits: inputs, weights and each layer's outputs are rounded."""
    full = jvae.VAE.mlp(data_shape=(6,), latent_dim=3, hidden=(7,), likelihood="gaussian")
    half = jvae.VAE.mlp(
        data_shape=(6,), latent_dim=3, hidden=(7,), likelihood="gaussian", precision="bfloat16"
    )
    params = random_params(full)
    mixed = dataclasses.replace(params, model=half)
    x = normal(20, 6)
    q, exact = jvae.posterior(mixed, x), jvae.posterior(params, x)
    assert q.loc.dtype == q.log_scale.dtype == jnp.float32
    # The output sums 7 products of size below 3, each of two factors rounded to 2⁻⁹.
    error = np.abs(q.loc - exact.loc).max()
    assert 2**-14 < error < 7 * 3 * 2 * 2**-9
    elbo, gradient = jax.value_and_grad(lambda p: jvae.elbo(p, x, jax.random.key(0)).mean())(mixed)
    assert {leaf.dtype for leaf in jax.tree.leaves((elbo, gradient))} == {jnp.dtype("float32")}
    products = jax.make_jaxpr(lambda p: jvae.posterior(p, x).loc)(mixed).pretty_print()
    assert "bf16" in products


def test_weights_start_the_same_in_any_precision() -> None:
    models = [jvae.VAE.mlp((6,), 3, (7,), precision=name) for name in networks.PRECISIONS]
    weights = [jvae.init(model, jax.random.key(0)).weights for model in models]
    jax.tree.map(np.testing.assert_array_equal, *weights)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown precision 'float16'"):
        jvae.VAE.mlp(precision="float16")
