import dataclasses
import math
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as numpyro_dist
import pytest
from jaxtyping import Array, PRNGKeyArray
from standard_errors import assert_mean_is
from weights import random_params

import jvae
from jvae import networks
from jvae.distributions import DiagonalGaussian
from jvae.priors import StandardNormal

KEY = jax.random.key(7)


def assert_trees_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def small(**changes: Any) -> jvae.VAE:
    return jvae.VAE.mlp(**{"data_shape": (2, 3), "latent_dim": 2, "hidden": (4,), **changes})


def images(*batch: int) -> Array:
    return jax.random.uniform(jax.random.key(1), (*batch, 2, 3))


@pytest.mark.parametrize("batch", [(), (4,), (2, 5), (0,)])
def test_shapes_follow_the_batch(bernoulli_params: jvae.Params, batch: tuple[int, ...]) -> None:
    x = images(*batch)
    q = jvae.posterior(bernoulli_params, x)
    assert q.loc.shape == q.scale.shape == (*batch, 2)
    assert jvae.likelihood(bernoulli_params, q.loc).mean.shape == (*batch, 2, 3)
    assert jvae.reconstruct(bernoulli_params, x, KEY).shape == (*batch, 2, 3)
    assert jvae.prior(bernoulli_params).sample(KEY).shape == (2,)
    assert jvae.sample(bernoulli_params, KEY, 6).shape == (6, 2, 3)


def test_a_batch_is_its_examples(bernoulli_params: jvae.Params) -> None:
    x = images(4)
    q = jvae.posterior(bernoulli_params, x)
    for i in range(4):
        alone = jvae.posterior(bernoulli_params, x[i])
        np.testing.assert_allclose(alone.loc, q.loc[i], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(alone.scale, q.scale[i], rtol=1e-5)


def test_the_default_is_the_papers_mnist_model() -> None:
    params = jax.eval_shape(lambda: jvae.init(jvae.VAE.mlp(), jax.random.key(0)))
    shapes = jax.tree.map(lambda leaf: leaf.shape, params.weights)
    assert shapes["encoder"]["params"] == {
        "hidden_0": {"kernel": (784, 500), "bias": (500,)},
        "output": {"kernel": (500, 40), "bias": (40,)},
    }
    assert shapes["decoder"]["params"] == {
        "hidden_0": {"kernel": (20, 500), "bias": (500,)},
        "output": {"kernel": (500, 784), "bias": (784,)},
    }


def test_the_prior_is_standard_normal(bernoulli_params: jvae.Params) -> None:
    p = jvae.prior(bernoulli_params)
    np.testing.assert_array_equal(p.loc, np.zeros(2))
    np.testing.assert_array_equal(p.scale, np.ones(2))


def test_samples_are_means_at_draws_of_the_prior(bernoulli_params: jvae.Params) -> None:
    params = bernoulli_params
    means = np.asarray(jax.jit(partial(jvae.sample, num=5000))(params, KEY), np.float64)
    z = np.random.default_rng(0).normal(size=(200_000, 2)).astype(np.float32)
    expected = np.asarray(jvae.likelihood(params, jnp.asarray(z)).mean, np.float64)
    # The oracle's own standard error is √40 times smaller than that of 5,000 draws.
    assert_mean_is(means, expected.mean(axis=0))
    assert_mean_is((means - means.mean(axis=0)) ** 2, expected.var(axis=0))
    assert len(np.unique(means[:, 0, 0])) > 4900


def test_reconstructions_are_means_at_a_draw_of_the_posterior(
    bernoulli_params: jvae.Params,
) -> None:
    x = images(4)
    z = jvae.posterior(bernoulli_params, x).sample(KEY)
    expected = jvae.likelihood(bernoulli_params, z).mean
    np.testing.assert_allclose(jvae.reconstruct(bernoulli_params, x, KEY), expected, rtol=1e-6)


def test_leaves_of_params_are_the_weights_alone(bernoulli_params: jvae.Params) -> None:
    leaves = jax.tree.leaves(bernoulli_params)
    assert_trees_equal(leaves, jax.tree.leaves(bernoulli_params.weights))
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in leaves)


def test_equal_models_share_one_compilation() -> None:
    traces = 0

    @jax.jit
    def loc(params: jvae.Params, x: Array) -> Array:
        nonlocal traces
        traces += 1
        return jvae.posterior(params, x).loc

    for seed in range(3):
        model = jvae.VAE.mlp(data_shape=[2, 3], latent_dim=2, hidden=[4], activation=jnp.tanh)
        loc(random_params(model, seed=seed), images())
    assert traces == 1
    loc(random_params(small(activation="relu")), images())
    assert traces == 2


@pytest.mark.parametrize(
    "change",
    [
        {"data_shape": (3, 2)},
        {"latent_dim": 3},
        {"hidden": (4, 4)},
        {"activation": "relu"},
        {"likelihood": "gaussian"},
        {"likelihood": jvae.Gaussian(scale=0.5)},
        {"initialiser": "lecun"},
    ],
)
def test_models_are_equal_when_their_descriptions_are(change: dict[str, Any]) -> None:
    assert small() == small()
    assert hash(small()) == hash(small())
    assert small() != small(**change)


def test_a_model_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        jvae.VAE.mlp().data_shape = (1,)  # type: ignore[misc]


def squared(h: Array) -> Array:
    """A named function of a module, as a model's activation must be."""
    return h**2


@pytest.mark.parametrize("activation", ["tanh", squared])
def test_params_survive_pickling(activation: str | networks.Activation) -> None:
    params = random_params(small(activation=activation))
    # Written by this test.
    again = pickle.loads(pickle.dumps(params))  # noqa: S301
    assert again.model == params.model
    assert hash(again.model) == hash(params.model)
    assert_trees_equal(again.weights, params.weights)


def test_an_ensemble_is_its_members() -> None:
    model, x = small(), images(5)
    keys = jax.random.split(jax.random.key(0), 3)
    init = partial(jvae.init, model)
    ensemble = jax.jit(jax.vmap(init))(keys)
    together = jax.jit(jax.vmap(jvae.reconstruct, in_axes=(0, None, 0)))(ensemble, x, keys)
    for i in range(3):
        params = jax.tree.map(lambda leaf, i=i: jnp.asarray(np.asarray(leaf)[i]), ensemble)
        alone = jax.jit(jvae.reconstruct)(params, x, keys[i])
        np.testing.assert_allclose(np.asarray(together)[i], alone, rtol=1e-5)
        # The compiler may round a batch of draws otherwise than one.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
            params,
            jax.jit(init)(keys[i]),
        )


FUNCTIONS: list[Callable[[jvae.Params, Array, PRNGKeyArray], Array]] = [
    lambda params, x, key: jvae.posterior(params, x).sample(key),
    lambda params, x, key: jvae.likelihood(params, x[..., 0, :2]).mean,
    lambda params, x, key: jvae.sample(params, key, 3),
    jvae.reconstruct,
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_is_one_of_its_arguments(
    bernoulli_params: jvae.Params, function: Callable[..., Array]
) -> None:
    given = bernoulli_params, images(4), KEY
    once = function(*given)
    np.testing.assert_array_equal(once, function(*given))
    np.testing.assert_allclose(jax.jit(function)(*given), once, rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda params: function(params, *given[1:]).sum()))(given[0])
    leaves = jax.tree.leaves(gradient)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert any(np.any(leaf) for leaf in leaves)


def test_the_same_key_gives_the_same_weights() -> None:
    first, again, other = (jvae.init(small(), jax.random.key(seed)) for seed in (0, 0, 1))
    assert_trees_equal(first, again)
    assert all((a != b).all() for a, b in zip(*map(jax.tree.leaves, (first, other)), strict=True))


# Custom parts: any hashable object with init and apply, any distribution with the methods.


@dataclasses.dataclass(frozen=True)
class NumPyro:
    """NumPyro's distributions as jvae's: the adapter that ARCHITECTURE promises in a line."""

    inner: Any

    def sample(self, key: PRNGKeyArray) -> Array:
        return self.inner.sample(key)

    def log_prob(self, value: Array) -> Array:
        return self.inner.log_prob(value)

    def sample_and_log_prob(self, key: PRNGKeyArray) -> tuple[Array, Array]:
        value = self.sample(key)
        return value, self.log_prob(value)


@dataclasses.dataclass(frozen=True)
class NumPyroNormal:
    """A family that gives NumPyro's Normal in place of jvae's."""

    family: networks.Gaussian

    @property
    def outputs_per_entry(self) -> int:
        return self.family.outputs_per_entry

    def __call__(self, outputs: tuple[Array, ...], event_ndim: int) -> NumPyro:
        p = self.family(outputs, event_ndim)
        return NumPyro(numpyro_dist.Normal(p.loc, p.scale).to_event(event_ndim))


def test_numpyros_distributions_plug_in() -> None:
    model = jvae.VAE.mlp(data_shape=(3,), latent_dim=2, hidden=(4,), likelihood="gaussian")
    swapped = dataclasses.replace(
        model,
        encoder=model.encoder.clone(family=NumPyroNormal(networks.Gaussian())),
        decoder=model.decoder.clone(family=NumPyroNormal(networks.Gaussian())),
    )
    params = random_params(model)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    with jax.numpy_rank_promotion("allow"):
        theirs = jax.jit(jvae.sgvb_a)(jvae.Params(params.weights, swapped), x, KEY)
    np.testing.assert_allclose(theirs, jax.jit(jvae.sgvb_a)(params, x, KEY), rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A distribution over {"a": …, "b": …}, two independent Gaussians."""

    a: DiagonalGaussian
    b: DiagonalGaussian

    def sample(self, key: PRNGKeyArray) -> dict[str, Array]:
        return self.sample_and_log_prob(key)[0]

    def log_prob(self, value: dict[str, Array]) -> Array:
        return self.a.log_prob(value["a"]) + self.b.log_prob(value["b"])

    def sample_and_log_prob(self, key: PRNGKeyArray) -> tuple[dict[str, Array], Array]:
        key_a, key_b = jax.random.split(key)
        a, log_a = self.a.sample_and_log_prob(key_a)
        b, log_b = self.b.sample_and_log_prob(key_b)
        return {"a": a, "b": b}, log_a + log_b


@dataclasses.dataclass(frozen=True)
class PairPrior:
    """No Linen, no weights."""

    def init(self, key: PRNGKeyArray) -> dict[str, Array]:
        return {}

    def apply(self, weights: dict[str, Array]) -> Pair:
        return Pair(*(DiagonalGaussian(jnp.zeros(n), jnp.zeros(n)) for n in (2, 3)))


class PairEncoder(nn.Module):
    """q(a, b|x) = q(a|x) q(b|x)."""

    @nn.compact
    def __call__(self, x: Array) -> Pair:
        a, b = (
            networks.MLP(1, (size,), networks.Gaussian(), hidden=(), name=name)(x)
            for name, size in (("a", 2), ("b", 3))
        )
        return Pair(a, b)


class PairDecoder(nn.Module):
    """p(x|a, b)."""

    @nn.compact
    def __call__(self, z: dict[str, Array]) -> DiagonalGaussian:
        inputs = jnp.concatenate([z["a"], z["b"]], axis=-1)
        p: DiagonalGaussian = networks.MLP(1, (4,), networks.Gaussian(scale=1.0), hidden=())(inputs)
        return p


def test_z_may_be_a_pytree() -> None:
    params = random_params(jvae.VAE((4,), PairEncoder(), PairDecoder(), PairPrior()))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)

    @jax.jit
    def log_weight(key: PRNGKeyArray) -> Array:
        z, log_q = jvae.posterior(params, x).sample_and_log_prob(key)
        assert {name: leaf.shape for name, leaf in z.items()} == {"a": (6, 2), "b": (6, 3)}
        log_pz = sum(-0.5 * (v**2 + math.log(2 * math.pi)).sum(-1) for v in z.values())
        return jvae.likelihood(params, z).log_prob(x) + log_pz - log_q

    keys = jax.random.split(KEY, 3)
    expected = np.mean([log_weight(key) for key in keys], axis=0)
    sgvb_a = jax.jit(partial(jvae.sgvb_a, num_samples=3))
    np.testing.assert_allclose(sgvb_a(params, x, KEY), expected, rtol=1e-5)
    log_likelihood = partial(jvae.log_likelihood, num_samples=3)
    assert jax.eval_shape(log_likelihood, params, x, KEY).shape == (6,)
    assert jax.eval_shape(partial(jvae.sample, num=3), params, KEY).shape == (3, 4)
    with pytest.raises(ValueError, match=r"z must have shape \[\*batch, \*\(3,\)\], got \(6, 2\)"):
        jvae.likelihood(params, {"a": jnp.zeros((6, 2)), "b": jnp.zeros((6, 2))})


# Refusals: the message names what was given and what was expected.


BAD_MODELS: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"latent_dim": 0}, ValueError, ["latent_dim", "at least 1", "0"]),
    ({"latent_dim": 2.0}, TypeError, ["latent_dim", "int", "float"]),
    ({"latent_dim": True}, TypeError, ["latent_dim", "int", "bool"]),
    ({"hidden": (4, 0)}, ValueError, ["hidden", "at least 1", "0"]),
    ({"hidden": (4.5,)}, TypeError, ["hidden", "int", "float"]),
    ({"data_shape": (-1, 3)}, ValueError, ["data_shape", "at least 1", "-1"]),
    ({"activation": "tahn"}, ValueError, ["activation", "'tahn'", "'tanh'"]),
    ({"activation": 3}, TypeError, ["activation", "name or a function", "3"]),
    ({"initialiser": "xavier"}, ValueError, ["initialiser", "'xavier'", "'paper'"]),
    ({"likelihood": "bernouli"}, ValueError, ["likelihood", "'bernouli'", "'bernoulli'"]),
    ({"likelihood": 0.5}, TypeError, ["likelihood", "0.5", "jvae.Gaussian"]),
    ({"likelihood": jvae.Gaussian}, TypeError, ["likelihood", "class", "jvae.Gaussian("]),
    ({"hidden": 500}, TypeError, ["hidden", "tuple", "500", "(500,)"]),
    ({"data_shape": 784}, TypeError, ["data_shape", "tuple", "784", "(784,)"]),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("change", "error", "words"), BAD_MODELS)
def test_bad_descriptions_are_refused(
    change: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as refusal:
        small(**change)
    assert all(word in str(refusal.value) for word in words), refusal.value


def inner_function() -> networks.Activation:
    def square(h: Array) -> Array:
        return h**2

    return square


def with_encoder(**changes: Any) -> jvae.VAE:
    model = small()
    return dataclasses.replace(model, encoder=model.encoder.clone(**changes))


NOT_STATIC: list[tuple[Callable[[], jvae.VAE], str]] = [
    (lambda: small(activation=lambda h: h), "model.encoder.activation is a lambda"),
    (lambda: small(activation=partial(jax.nn.elu, alpha=2.0)), "model.encoder.activation is a"),
    (lambda: small(activation=inner_function()), "model.encoder.activation is a"),
    (lambda: with_encoder(hidden=[4]), "model.encoder.hidden = list"),
    (lambda: with_encoder(initialiser={"paper": 1}), "model.encoder.initialiser = dict"),
    (lambda: with_encoder(event_shape=np.array([2])), "model.encoder.event_shape = ndarray"),
    (lambda: with_encoder(event_shape=jnp.array([2])), "model.encoder.event_shape = ArrayImpl"),
    (
        lambda: dataclasses.replace(small(), data_shape=[2, 3]),  # type: ignore[arg-type]
        "model.data_shape = list",
    ),
    (
        lambda: dataclasses.replace(small(), prior=StandardNormal([2])),  # type: ignore[arg-type]
        "model.prior.latent_dim = list",
    ),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("model", "words"), NOT_STATIC, ids=[words for _, words in NOT_STATIC])
def test_a_model_that_is_not_static_is_refused_by_its_field(
    model: Callable[[], jvae.VAE], words: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        jvae.init(model(), KEY)


BAD_X: list[tuple[Any, type[Exception], list[str]]] = [
    (jnp.zeros((5, 3, 2)), ValueError, ["x", "(2, 3)", "(5, 3, 2)"]),
    (jnp.zeros((5, 6)), ValueError, ["x", "(2, 3)", "(5, 6)"]),
    (jnp.zeros(3), ValueError, ["x", "(2, 3)", "(3,)"]),
    (jnp.zeros(()), ValueError, ["x", "(2, 3)", "()"]),
    (jnp.zeros((2, 3), jnp.uint8), TypeError, ["x", "floating point", "uint8", "255"]),
    (jnp.zeros((2, 3), jnp.int32), TypeError, ["x", "floating point", "int32"]),
    (jnp.zeros((2, 3), bool), TypeError, ["x", "floating point", "bool"]),
]
BAD_KEYS: list[tuple[Any, type[Exception], list[str]]] = [
    (jax.random.PRNGKey(0), TypeError, ["typed key", "jax.random.key", "uint32"]),
    (jax.random.split(jax.random.key(0), 3), ValueError, ["one key", "(3,)"]),
    (0, TypeError, ["typed key", "int"]),
    (None, TypeError, ["typed key", "NoneType"]),
]
GOOD_X = jnp.zeros((5, 2, 3))
BOUNDS: dict[str, Callable[..., Array]] = {
    **{name: row.bound for name, row in jvae.estimators.TABLE.items()},
    "minibatch_elbo": lambda *args: jvae.minibatch_elbo(*args, dataset_size=10),
    "log_likelihood": jvae.log_likelihood,
    "reconstruct": jvae.reconstruct,
}


def assert_refused(
    error: type[Exception], words: list[str], function: Callable[..., Any], *arguments: Any
) -> None:
    with pytest.raises(error) as refusal:
        function(*arguments)
    assert all(word in str(refusal.value) for word in words), refusal.value


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` at trace time, its arguments closed over."""
    return lambda *arguments: jax.eval_shape(lambda: function(*arguments))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", BOUNDS)
def test_bad_arguments_are_refused(bernoulli_params: jvae.Params, name: str) -> None:
    for function in (BOUNDS[name], traced(BOUNDS[name])):
        for x, error, words in BAD_X:
            assert_refused(error, words, function, bernoulli_params, x, KEY)
        for key, error, words in BAD_KEYS:
            assert_refused(error, words, function, bernoulli_params, GOOD_X, key)
        words = ["params", "jvae.Params", "jvae.init", "dict"]
        assert_refused(TypeError, words, function, {}, GOOD_X, KEY)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_the_other_functions_are_refused(bernoulli_params: jvae.Params) -> None:
    params = bernoulli_params
    for key, error, words in BAD_KEYS:
        assert_refused(error, words, jvae.init, small(), key)
        assert_refused(error, words, jvae.sample, params, key, 3)
    for x, error, words in BAD_X:
        assert_refused(error, words, jvae.posterior, params, x)
    assert_refused(ValueError, ["num", "at least 1", "0"], jvae.sample, params, KEY, 0)
    assert_refused(TypeError, ["num", "int", "float"], jvae.sample, params, KEY, 2.0)
    assert_refused(TypeError, ["num", "int", "bool"], jvae.sample, params, KEY, True)
    z = jnp.zeros((5, 3))
    assert_refused(ValueError, ["z", "(2,)", "(5, 3)"], jvae.likelihood, params, z)
    z = jnp.zeros((5, 2), int)
    assert_refused(TypeError, ["z", "floating point", "int32"], jvae.likelihood, params, z)
    for tree in ({"a": jnp.zeros(2)}, (jnp.zeros(2), jnp.zeros(2))):
        assert_refused(ValueError, ["z must be", "PyTreeDef"], jvae.likelihood, params, tree)
    assert_refused(TypeError, ["jvae.Params", "dict"], jvae.prior, {})
    assert_refused(TypeError, ["model", "jvae.VAE", "NoneType"], jvae.init, None, KEY)
    assert_refused(TypeError, ["jvae.Params", "dict"], jvae.likelihood, {}, jnp.zeros(2))


@pytest.mark.usefixtures("unchecked")
def test_numpy_arrays_are_as_good_as_jax_arrays(bernoulli_params: jvae.Params) -> None:
    x = images(4)
    from_numpy = jvae.elbo(bernoulli_params, np.asarray(x), KEY)
    np.testing.assert_array_equal(from_numpy, jvae.elbo(bernoulli_params, x, KEY))
