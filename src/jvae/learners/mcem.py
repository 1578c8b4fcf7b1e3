"""Monte Carlo EM with HMC, the other learner that the paper compares its own with."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from jvae import training
from jvae.checks import check_between, check_count, check_key
from jvae.estimators.sampling import joint_log_densities
from jvae.evaluation import hmc
from jvae.learners.base import Learner
from jvae.models import Params, check_data, prior
from jvae.training import Preprocess

# How far the log of the step size goes for a minibatch whose acceptance is off by one.
_GAIN = 0.5


class Visit(NamedTuple):
    """Examples that know their places in the dataset, and so which chains are theirs.

    Attributes:
      x: float [*batch, *data_shape], or what `preprocess` makes that of.
      indices: [*batch], from 0 to num_examples - 1, each once.
    """

    x: Shaped[Array | np.ndarray, "..."]
    indices: Int[Array, "*batch"] | Int[np.ndarray, "*batch"]


class State(NamedTuple):
    """A `jvae.training.State` with a Markov chain for every example.

    Attributes:
      step: minibatches visited, int32 [].
      params: the model's `Params`, of which the encoder's stay as they were.
      opt_state: the optimizer's state, after `num_updates` updates a step.
      key: the run's key.
      chains: where each example's chain is, z [num_examples, latent] or a pytree of such arrays.
      log_step_size: log ε of the leapfrog steps, of all chains.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    key: PRNGKeyArray
    chains: Any
    log_step_size: Float[Array, ""]


class Info(NamedTuple):
    """What a step reports.

    Attributes:
      bound: the minibatch's mean log p(x, z) at its samples in nats per example, before the
        weights are updated. It bounds nothing: for z ~ p(z|x) its mean is log p(x) less the
        entropy of p(z|x).
      skipped: with the optimizer of `jvae.training.skip_non_finite`, whether the last update was
        left out; else None.
      acceptance: the mean probability with which the minibatch's proposals were accepted.
    """

    bound: Float[Array, "..."]
    skipped: Bool[Array, "..."] | None
    acceptance: Float[Array, "..."]


def visits(images: Shaped[Array | np.ndarray, "num ..."]) -> Visit:
    """A dataset as the data of an epoch: its images [num, *data_shape], each with its place."""
    return Visit(x=images, indices=np.arange(len(images), dtype=np.int32))


def on_images(preprocess: Preprocess) -> Preprocess:
    """`preprocess` of images, such as a binarisation, as one of visits for `make_epoch`."""
    return lambda visit, key: visit._replace(x=preprocess(visit.x, key))


def make_learner(
    optimizer: optax.GradientTransformation,
    *,
    num_examples: int,
    num_leapfrog: int = 10,
    num_updates: int = 5,
    target_acceptance: float = 0.9,
) -> Learner:
    """Fit the generative model to samples of its posterior, drawn by HMC.

        z ← HMC(z; p(z|x)),  then num_updates times  θ ← θ + update(∇θ log p(x, z))

    Kingma & Welling (2014), App. E. A step moves the chains of the minibatch's examples by one
    transition and updates the weights with where they are then. Chains begin as draws of the
    prior and are kept between visits. One step size is shared by all of them. It follows the
    acceptance for as long as the weights do change: log ε += (acceptance - target) / 2 after every
    minibatch, a Robbins & Monro (1951) iteration of constant gain. Dual averaging, whose gain
    falls to zero, would settle on a step size for posteriors that are wider than those to come.
    A step size that follows the chains leaves p(z|x) invariant only nearly, and a chain that is
    kept for an image sees another x where pixels are drawn anew.

    Args:
      optimizer: as `jvae.training.make_step` takes it. It sees no gradient of the encoder, which
        stays as it is; a schedule counts updates, `num_updates` a step.
      num_examples: of the dataset.
      num_leapfrog: leapfrog steps of a transition.
      num_updates: updates of the weights with the same samples.
      target_acceptance: what the acceptance of proposals is to be, between 0 and 1.

    Returns:
      A learner whose state is a `State`, whose step takes a `Visit` and reports an `Info`, and
      whose epoch takes `visits(images)`.

    Raises:
      TypeError: a count is no static int, `target_acceptance` no number or, at a call, x no
        `Visit` or its x not floating point.
      ValueError: a count is below 1, `target_acceptance` out of range or, at a call, x has a wrong
        trailing shape or not one index for each example.
    """
    num_examples = check_count("num_examples", num_examples)
    num_leapfrog = check_count("num_leapfrog", num_leapfrog)
    num_updates = check_count("num_updates", num_updates)
    check_between("target_acceptance", target_acceptance, 0.0, 1.0)
    update = optax.with_extra_args_support(optimizer).update

    def init(params: Params, key: PRNGKeyArray) -> State:
        check_key(key)
        run_key, chains_key = jax.random.split(key)
        chains = jax.vmap(prior(params).sample)(jax.random.split(chains_key, num_examples))
        start = training.init(params, optimizer, run_key)
        log_step_size = jnp.zeros((), hmc.dtype_of(chains))
        return State(*start, chains=chains, log_step_size=log_step_size)

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, visit: Visit) -> tuple[State, Info]:
        x, indices = _flat(state.params, visit)
        z, acceptance = _transition(state, x, indices, num_leapfrog)

        def loss(params: Params) -> Float[Array, ""]:
            log_px_z, log_pz = joint_log_densities(params, x, z)
            return -(log_px_z + log_pz).mean()

        def update_weights(carry: Any, _: None) -> tuple[Any, Float[Array, ""]]:
            params, opt_state, value = training.descend(loss, update, *carry)
            # An optimizer may decay weights that have no gradient.
            weights = {**params.weights, "encoder": state.params.weights["encoder"]}
            return (dataclasses.replace(params, weights=weights), opt_state), value

        (params, opt_state), losses = jax.lax.scan(
            update_weights, (state.params, state.opt_state), length=num_updates
        )
        state = State(
            step=state.step + 1,
            params=params,
            opt_state=training.as_one_step(state.opt_state, opt_state),
            key=state.key,
            chains=jax.tree.map(lambda chains, own: chains.at[indices].set(own), state.chains, z),
            log_step_size=state.log_step_size + _GAIN * (acceptance - target_acceptance),
        )
        skipped = training.last_skipped(state)
        return state, Info(bound=-losses[0], skipped=skipped, acceptance=acceptance)

    return Learner(init, step)


def _transition(
    state: State, x: Float[Array, "num ..."], indices: Int[Array, "num"], num_leapfrog: int
) -> tuple[Any, Float[Array, ""]]:
    """Where the examples' chains go, z [num, latent], and their mean acceptance."""
    step_size = jnp.exp(state.log_step_size)

    def move(x: Float[Array, "..."], z: Any, key: PRNGKeyArray) -> tuple[Any, Float[Array, ""]]:
        def log_joint(z: Any) -> tuple[Float[Array, ""], None]:
            log_px_z, log_pz = joint_log_densities(state.params, x, z)
            return log_px_z + log_pz, None

        z, _, acceptance = hmc.transition(log_joint, z, key, step_size, num_leapfrog)
        return z, acceptance

    z = jax.tree.map(lambda chains: chains[indices], state.chains)
    keys = jax.random.split(training.step_keys(state).bound, len(x))
    z, acceptance = jax.vmap(move)(x, z, keys)
    return z, acceptance.mean()


def _flat(params: Params, visit: Any) -> tuple[Float[Array, "num ..."], Int[Array, "num"]]:
    """The examples and their indices with one batch axis."""
    if not isinstance(visit, Visit):
        raise TypeError(
            f"a step of MCEM takes a Visit(x, indices), got {type(visit).__name__}: "
            "jvae.learners.mcem.visits(images) makes the data of an epoch"
        )
    x, indices = check_data(params, visit.x), jnp.asarray(visit.indices)
    data_shape = params.model.data_shape
    batch = x.shape[: x.ndim - len(data_shape)]
    if indices.shape != batch:
        raise ValueError(f"indices must have shape {batch}, one for each x, got {indices.shape}")
    return x.reshape(-1, *data_shape), indices.reshape(-1)
