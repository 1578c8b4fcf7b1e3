"""Maximise a bound: a state, a compiled step, a compiled epoch, one loop over epochs."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from jvae.adam import adam
from jvae.checks import check_count, check_key
from jvae.estimators import Bound
from jvae.models import Params


@runtime_checkable
class State(Protocol):
    """All that a learner carries from step to step; saving it is enough to resume.

    A `NamedTuple` with the fields of `TrainState`, and any others of its learner. The state of an
    ensemble, which `ensemble` makes, has a first axis of members in all but `step`.
    """

    @property
    def step(self) -> Int[Array, ""]:
        """Steps done."""

    @property
    def params(self) -> Params:
        """The model's weights."""

    @property
    def opt_state(self) -> optax.OptState:
        """The optimizer's state."""

    @property
    def key(self) -> PRNGKeyArray:
        """The run's key, which never changes."""

    def _replace(self, *args: Any, **kwargs: Any) -> Any: ...


StateT = TypeVar("StateT", bound=State)


class TrainState(NamedTuple):
    """The `State` of a learner that needs no more.

    Attributes:
      step: steps done, int32 [].
      params: the model's `Params`, or what else the bound is a function of.
      opt_state: the optimizer's state.
      key: the run's key, which never changes: `step_keys` folds the step into it.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: optax.OptState
    key: PRNGKeyArray


class StepInfo(NamedTuple):
    """What a step reports, to which a learner may add.

    Attributes:
      bound: the minibatch's mean bound in nats per example, before the update.
      skipped: with the optimizer of `skip_non_finite`, whether the update was left out; else None.
    """

    bound: Float[Array, "..."]
    skipped: Bool[Array, "..."] | None = None


class StepKeys(NamedTuple):
    """The keys of one step, each used once."""

    bound: PRNGKeyArray
    preprocess: PRNGKeyArray
    shuffle: PRNGKeyArray


Step = Callable[[Any, Any], tuple[Any, Any]]
Epoch = Callable[..., tuple[Any, Any]]
Preprocess = Callable[[Any, PRNGKeyArray], Any]


class NonFiniteError(FloatingPointError):
    """Training met a bound or weights that are not finite.

    Attributes:
      step: the first step whose bound was not finite, or the last step of the epoch where only
        the weights or the optimizer's state were not, or the last of too many skipped in a row.
        `jvae.forensics.first_bad_step` finds the step that was at fault.
      bound: that step's bound, in nats per example.
      last_good_state: the state before the epoch of that step, whose weights are finite.
      member: which model of an ensemble it was, from 0.
    """

    def __init__(
        self,
        step: int,
        bound: float,
        last_good_state: Any,
        *,
        member: int = 0,
        skipped: int = 0,
    ):
        what = "weights were not finite after" if math.isfinite(bound) else f"bound was {bound} at"
        if skipped:
            what = f"last {skipped} steps were skipped as not finite, up to"
        good = int(last_good_state.step)
        super().__init__(f"the {what} step {step}; the last good state is that of step {good}")
        self.step = step
        self.bound = bound
        self.last_good_state = last_good_state
        self.member = member


def init(params: Any, optimizer: optax.GradientTransformation, key: PRNGKeyArray) -> TrainState:
    """The state before the first step.

    The weights are copied, so that `params` stays valid when a step is given the state's memory.

    Args:
      params: from `jvae.init`, or what else the bound is a function of.
      optimizer: any optax optimizer.
      key: a typed PRNG key, the source of all of the run's randomness.

    Raises:
      TypeError: `key` is no typed key.
    """
    check_key(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(jnp.copy, params),
        # Some optimizers keep the weights they are given: those too must be copies.
        opt_state=jax.tree.map(jnp.copy, optimizer.init(params)),
        key=jax.random.clone(key),
    )


def ensemble(states: Sequence[StateT]) -> StateT:
    """One state of many models that are trained side by side.

    `make_epoch` and `make_streamed_epoch` train it as they train a single one, and each member
    goes the way that it would go alone, to rounding.

    Args:
      states: of one model and one optimizer, all at the same step.

    Raises:
      ValueError: no states, or states at different steps.
    """
    steps = sorted({int(state.step) for state in states})
    if len(steps) != 1:
        raise ValueError(f"an ensemble needs states at one step, got {len(states)} at {steps}")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return stacked._replace(step=states[0].step)


def members(state: StateT) -> list[StateT]:
    """The states of an ensemble's members; of a single model, the state itself alone."""
    if not state.key.ndim:
        return [state]
    # Indexing what lies on several devices is a program over all of them, and many of those at
    # once can wait for each other for ever.
    if not isinstance(state.key, jax.core.Tracer) and len(state.key.sharding.device_set) > 1:
        first = min(state.key.sharding.device_set, key=operator.attrgetter("id"))
        state = jax.device_put(state, first)
    own = state._replace(step=None)
    return [
        jax.tree.map(operator.itemgetter(i), own)._replace(step=state.step)
        for i in range(len(state.key))
    ]


def over_members(train: Callable[..., tuple[Any, Any]]) -> Epoch:
    """From training one model to training an ensemble, in one compiled call.

    Args:
      train: `(state, shared, *own) -> (state, info)` of one model.

    Returns:
      The same of an ensemble, whose members share `shared` and each have a row of `own`; info
      is stacked over members. It is a `vmap`; on CPU, where the weights of one model fit into a
      cache and those of many do not, members take turns. An ensemble that lies on several
      devices (`jvae.distributed.place_members`) is trained there, each device with its own part.
    """

    def together(state: StateT, shared: Any, *own: Any) -> tuple[StateT, Any]:
        def one(member: Any) -> tuple[StateT, Any]:
            alone, own = member
            return train(alone._replace(step=state.step), shared, *own)

        after, info = jax.lax.platform_dependent(
            (state._replace(step=None), own), cpu=partial(jax.lax.map, one), default=jax.vmap(one)
        )
        return after._replace(step=after.step[0]), info

    @functools.cache
    def compiled(mesh: jax.sharding.Mesh | None) -> Epoch:
        if mesh is None:
            return jax.jit(together)
        everywhere, split = PartitionSpec(), PartitionSpec(mesh.axis_names)

        def on_devices(state: Any, shared: Any, *own: Any) -> tuple[Any, Any]:
            states = state._replace(**dict.fromkeys(state._fields, split) | {"step": everywhere})
            run = jax.shard_map(
                together,
                mesh=mesh,
                in_specs=(states, everywhere, *(split for _ in own)),
                out_specs=(states, split),
                check_vma=False,  # it cannot see that the count of steps is the same everywhere
            )
            return run(state, shared, *own)

        return jax.jit(on_devices)

    def train_members(state: StateT, shared: Any, *own: Any) -> tuple[StateT, Any]:
        sharding = None if isinstance(state.key, jax.core.Tracer) else state.key.sharding
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        return compiled(mesh)(state, shared, *own)

    return train_members


def step_keys(state: State) -> StepKeys:
    """The keys of the step that `state` is about to take: a resumed run draws the same."""
    return StepKeys(*jax.random.split(jax.random.fold_in(state.key, state.step), 3))


def make_step(
    bound: Bound,
    optimizer: optax.GradientTransformation,
    *,
    scheduled: Mapping[str, optax.Schedule] = MappingProxyType({}),
) -> Step:
    """A jitted step of Algorithm 1 in Kingma & Welling (2014): it ascends the mean bound.

    The gradient is that of eq. 8 divided by the dataset's size N, which no step size need know.

    Args:
      bound: a function `(params, x, key) -> [*batch] nats`, higher is better.
      optimizer: an optax optimizer that needs no more than the gradient, the state, the weights
        and the loss as `value`; `make_optimizer` builds the usual ones.
      scheduled: keyword arguments of the bound that are functions of the step, such as optax
        schedules. KL annealing (Bowman et al., 2016; Sønderby et al., 2016) is `jvae.beta_elbo`
        with `scheduled={"beta": optax.linear_schedule(0.0, 1.0, steps)}`.

    Returns:
      `step(state, x) -> (state, StepInfo)`, x float [*batch, *data_shape]. The state given is
      donated: use the one returned.
    """
    update = optax.with_extra_args_support(optimizer).update

    @partial(jax.jit, donate_argnums=0)
    def step(
        state: TrainState, x: Shaped[Array | np.ndarray, "..."]
    ) -> tuple[TrainState, StepInfo]:
        settings = {name: schedule(state.step) for name, schedule in scheduled.items()}
        negative = loss(partial(bound, **settings), state, x)
        params, opt_state, value = descend(negative, update, state.params, state.opt_state)
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, StepInfo(bound=-value, skipped=last_skipped(state))

    return step


def descend(
    loss: Callable[[Any], Float[Array, ""]],
    update: Callable[..., tuple[Any, optax.OptState]],
    params: Any,
    opt_state: optax.OptState,
) -> tuple[Any, optax.OptState, Float[Array, ""]]:
    """One update of the weights.

    Args:
      loss: a function of the weights.
      update: of an optimizer that `optax.with_extra_args_support` has passed.
      params: the weights.
      opt_state: the optimizer's state.

    Returns:
      The weights and the state after the update, and the loss before it.
    """
    value, gradient = jax.value_and_grad(loss)(params)
    updates, opt_state = update(gradient, opt_state, params, value=value)
    return optax.apply_updates(params, updates), opt_state, value


def loss(
    bound: Bound, state: State, x: Shaped[Array | np.ndarray, "..."]
) -> Callable[[Any], Float[Array, ""]]:
    """What the step from `state` descends: minus the mean bound, as a function of the weights.

    Args:
      bound: as `make_step` takes it.
      state: its weights do not matter.
      x: float [*batch, *data_shape].
    """

    def value(params: Any) -> Float[Array, ""]:
        return -bound(params, x, step_keys(state).bound).mean()

    return value


def make_epoch(step: Step, batch_size: int, preprocess: Preprocess | None = None) -> Epoch:
    """One pass over a dataset in one compiled call: a `lax.scan` of `step` over shuffled batches.

    Args:
      step: `(state, x) -> (state, info)`, as `make_step` makes.
      batch_size: examples a step. When it does not divide the dataset, the examples left over
        are others each epoch.
      preprocess: `(images, key) -> x`, run inside the compiled call on one batch of the data,
        such as a binarisation; None when the data is x already.

    Returns:
      `epoch(state, data, order=None) -> (state, info)`, data [num, *data_shape] in any dtype
      that `preprocess` takes, or a pytree of arrays [num, ...], whose batches are pytrees like
      it; info stacked over steps [steps] or, of an ensemble, [steps, members]. The state given
      stays valid, so that a caller can go back to it. `order` [steps, batch_size] are the indices
      of each step's examples, shared by the members of an ensemble, or
      [members, steps, batch_size]; by default `shuffled_batches` draws them from the state's key
      and step, for each member its own. That is work for the host: under `jit` and `vmap` `order`
      must be given.

    Raises:
      TypeError: `batch_size` is no int.
      ValueError: `batch_size` is below 1 or, at a call, larger than the data, or arrays of the
        data differ in length.
    """
    batch_size = check_count("batch_size", batch_size)

    @jax.jit
    def run(state: StateT, data: Any, indices: Int[Array, "steps batch"]) -> tuple[StateT, Any]:
        # XLA on CPU gathers one long axis faster.
        rows = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], -1), data)

        def body(state: StateT, batch: Int[Array, "batch"]) -> tuple[StateT, Any]:
            x = jax.tree.map(
                lambda rows, leaf: rows[batch].reshape(batch_size, *leaf.shape[1:]), rows, data
            )
            if preprocess is not None:
                x = preprocess(x, step_keys(state).preprocess)
            return step(state, x)

        return jax.lax.scan(body, state, indices)

    run_members, run_steps = over_members(run), make_streamed_epoch(step, preprocess)
    by_step: bool | None = None

    def epoch(
        state: StateT,
        data: Any,
        order: Int[Array | np.ndarray, "*members steps batch"] | None = None,
    ) -> tuple[StateT, Any]:
        nonlocal by_step
        data = jax.tree.map(jnp.asarray, data)
        num = _num_examples(data)
        if by_step is None:
            by_step = _convolves_on_cpu(run, state, data, batch_size)
        if not state.key.ndim:
            order = _order(state, num, batch_size) if order is None else order
            if by_step:
                return run_steps(state, lambda _: (_rows(data, batch) for batch in order))
            return run(state, data, order)
        if order is None:
            keys = TrainState(state.step, params=None, opt_state=None, key=state.key)
            own: list[Any] = [_order(one, num, batch_size) for one in members(keys)]
        else:
            own = list(order) if order.ndim == 3 else [order] * len(state.key)
        if by_step:
            each = zip(members(state), own, strict=True)
            after, info = zip(*(epoch(one, data, batches) for one, batches in each), strict=True)
            return ensemble(after), jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *info)
        state, infos = run_members(state, data, jnp.stack(own))
        return state, jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), infos)

    return epoch


def _num_examples(data: Any) -> int:
    """How many examples there are in a pytree of arrays [num, ...]."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(data)]
    if () in shapes or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"data must be arrays [num, ...] of one length, got shapes {shapes}")
    return int(shapes[0][0])


def _rows(data: Any, batch: Int[Array, "batch"] | Int[np.ndarray, "batch"]) -> Any:
    return jax.tree.map(lambda leaf: leaf[batch], data)


def _convolves_on_cpu(run: Any, state: State, data: Any, batch_size: int) -> bool | None:
    """Whether an epoch in one compiled call would be slow; None where the call is itself traced.

    XLA on CPU takes 20 times as long for the gradient of a convolution's kernel inside a loop.
    """
    leaves = jax.tree.leaves(data)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, data))):
        return None
    if {device.platform for leaf in leaves for device in leaf.devices()} != {"cpu"}:
        return False
    steps = steps_per_epoch(_num_examples(data), batch_size)
    order = jax.ShapeDtypeStruct((steps, batch_size), np.int32)
    one = jax.eval_shape(lambda state: members(state)[0], state)  # of an ensemble no copy is made
    return _convolves(run.trace(one, data, order).jaxpr.jaxpr)


def _convolves(jaxpr: jax.extend.core.Jaxpr) -> bool:
    return any(equation.primitive.name == "conv_general_dilated" for equation in jaxpr.eqns) or any(
        map(_convolves, jax.extend.core.subjaxprs(jaxpr))
    )


def _order(state: State, num: int, batch_size: int) -> Int[np.ndarray, "steps batch"]:
    return shuffled_batches(step_keys(state).shuffle, num, batch_size)


def make_streamed_epoch(step: Step, preprocess: Preprocess | None = None) -> Epoch:
    """One pass over data that is larger than memory: a compiled call a batch.

    Args:
      step: `(state, x) -> (state, info)`, as `make_step` makes.
      preprocess: as `make_epoch` takes it.

    Returns:
      `epoch(state, batches) -> (state, info)`, info stacked over steps. `batches(step)` gives the
      batches from that step to the end of its epoch, such as a partial `jvae.data.batches`; a
      batch is an array or a pytree of them, and the members of an ensemble share it. The state
      given stays valid. Without a batch: ValueError.
    """

    def single(state: StateT, batch: Any) -> tuple[StateT, Any]:
        x = jax.tree.map(jnp.asarray, batch)
        if preprocess is not None:
            x = preprocess(x, step_keys(state).preprocess)
        return step(state, x)

    run_single, run_members = jax.jit(single, donate_argnums=0), over_members(single)

    def run(state: StateT, batch: Any) -> tuple[StateT, Any]:
        return (run_members if state.key.ndim else run_single)(state, batch)

    def epoch(state: StateT, batches: Callable[[int], Iterable[Any]]) -> tuple[StateT, Any]:
        state = jax.tree.map(jnp.copy, state)
        infos: list[Any] = []
        for batch in batches(int(state.step)):
            state, info = run(state, batch)
            infos.append(info)
            # The host may run ahead of the device by one batch, not by an epoch of them.
            jax.block_until_ready(infos[-2:-1])
        if not infos:
            raise ValueError(f"batches({state.step}) gave no batch")
        return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos)

    return epoch


def steps_per_epoch(num: int, batch_size: int) -> int:
    """Whole batches in `num` examples.

    Raises:
      TypeError: `batch_size` is no int.
      ValueError: it is below 1 or above `num`.
    """
    if check_count("batch_size", batch_size) > num:
        raise ValueError(f"batch_size must be at most the {num} examples given, got {batch_size}")
    return num // batch_size


def shuffled_batches(
    key: PRNGKeyArray, num: int, batch_size: int
) -> Int[np.ndarray, "steps batch"]:
    """The indices [num // batch_size, batch_size] of a shuffled pass over `num` examples.

    Drawn by NumPy on the host, seeded by `key`: a sort on the device costs 2 % of an epoch.

    Raises:
      ValueError: fewer examples than one batch.
    """
    steps = steps_per_epoch(num, batch_size)
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    order = generator.permutation(num)[: steps * batch_size]
    return order.reshape(steps, batch_size).astype(np.int32)


def fit(
    state: StateT,
    epoch: Epoch,
    data: Any,
    *,
    num_epochs: int,
    on_epoch: Callable[[StateT, Any], bool | None] | None = None,
    max_skipped: int = 10,
) -> StateT:
    """Run epochs, and stop rather than go on with numbers that are not finite.

    Args:
      state: from `init`, or one saved.
      epoch: `(state, data) -> (state, info)`, as `make_epoch` makes.
      data: what `epoch` takes.
      num_epochs: how many to run.
      on_epoch: called after each epoch with the state and the info of its steps as NumPy
        arrays; returning True ends the run.
      max_skipped: with the optimizer of `skip_non_finite`, so many steps skipped in a row end
        the run.

    Returns:
      The state after the last epoch.

    Raises:
      NonFiniteError: a step's bound or the weights after an epoch are not finite, or
        `max_skipped` steps in a row were skipped; it holds the last good state.
      TypeError: `max_skipped` is no int.
      ValueError: `max_skipped` is below 1.
    """
    max_skipped = check_count("max_skipped", max_skipped)
    in_a_row = np.zeros(max(1, state.key.size), np.int32)
    if skips_non_finite(state):
        in_a_row += np.asarray(state.opt_state.notfinite_count)
    for _ in range(num_epochs):
        before = state
        state, info = epoch(before, data)
        info = jax.tree.map(np.asarray, info)
        bounds = info.bound.reshape(len(info.bound), -1)
        if info.skipped is None:
            bad, skipped = ~np.isfinite(bounds), 0
        else:
            rows = skipped_in_a_row(in_a_row, info.skipped.reshape(bounds.shape))
            in_a_row = rows[-1]
            bad, skipped = rows >= max_skipped, max_skipped
        for i, member in np.argwhere(bad):
            step, bound = int(before.step) + int(i), float(bounds[i, member])
            raise NonFiniteError(step, bound, before, member=int(member), skipped=skipped)
        for member in np.flatnonzero(~np.asarray(_healthy(state))):
            step, bound = int(state.step) - 1, float(bounds[-1, member])
            raise NonFiniteError(step, bound, before, member=int(member))
        if on_epoch is not None and on_epoch(state, info):
            break
    return state


def skipped_in_a_row(
    before: Int[np.ndarray, "members"], skipped: Bool[np.ndarray, "steps members"]
) -> Int[np.ndarray, "steps members"]:
    """After each step how many in a row were skipped, `before` of them before the first."""
    step = np.arange(1, len(skipped) + 1)[:, None]
    last_taken = np.maximum.accumulate(np.where(skipped, -before[None], step), axis=0)
    return step - last_taken


@jax.jit
def _healthy(state: State) -> Bool[Array, "members"]:
    """No infinite weight and no NaN at all; an optimizer's state may well hold an infinity."""

    def all_of_a_member(good: Array) -> Array:
        return good.reshape(len(state.key) if state.key.ndim else 1, -1).all(axis=1)

    finite = [all_of_a_member(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state.params)]
    no_nan = [all_of_a_member(~jnp.isnan(leaf)) for leaf in jax.tree.leaves(state.opt_state)]
    return jnp.stack([*finite, *no_nan]).all(axis=0)


def _adagrad(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Adagrad of Duchi et al. (2011): its sum of squares starts at 0, unlike optax's default.

    Optax adds eps under the root: 1e-16 there is 1e-8 beside the root, too small to damp.
    """
    return optax.adagrad(learning_rate, initial_accumulator_value=0.0, eps=1e-16)


OPTIMIZERS: dict[str, Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]] = {
    "adam": adam,
    "adagrad": _adagrad,
    "sgd": optax.sgd,
}


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    clip_norm: float | None = None,
    map_dataset_size: int | None = None,
) -> optax.GradientTransformation:
    """An optimizer by name, for the negative mean bound.

    Args:
      name: a name in `OPTIMIZERS`.
      learning_rate: a number or an optax schedule of the step.
      clip_norm: clip the global norm of the gradient to this, None for no clipping.
      map_dataset_size: N, to maximise Σᵢ bound(xᵢ) + log N(θ; 0, I) over a dataset of N
        examples, the MAP criterion of Kingma & Welling (2014), Section 5; None for no prior.

    Raises:
      ValueError: an unknown name, or a `clip_norm` or size that is not positive.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}: expected one of {sorted(OPTIMIZERS)}")
    chain = []
    if map_dataset_size is not None:
        chain.append(map_prior(map_dataset_size))
    if clip_norm is not None:
        if not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm}")
        chain.append(optax.clip_by_global_norm(clip_norm))
    return optax.chain(*chain, OPTIMIZERS[name](learning_rate))


def skip_non_finite(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Leave out the update of a step whose loss or gradient is not finite.

    Weights and the optimizer's state stay as they were; the step counts, so that the next one
    draws anew. `fit` ends a run when too many in a row are skipped. Put it around all else: what
    stands outside of it, such as a clip or a decay, would act in a skipped step.

    Args:
      optimizer: any optax optimizer.

    Returns:
      An optimizer whose update takes the loss as `value`; its state is optax's
      `ApplyIfFiniteState`, which counts the steps skipped.
    """
    # Optax gives up after so many and lets the update through: here `fit` ends the run before.
    guarded = optax.apply_if_finite(optimizer, np.iinfo(np.int32).max)

    def update(
        updates: Any, state: Any, params: Any = None, *, value: Float[Array, "..."], **extra: Any
    ) -> tuple[Any, Any]:
        # Optax looks at the gradient alone, which may be finite where the loss is not.
        checked = jax.tree.map(lambda g: jnp.where(jnp.isfinite(value), g, jnp.nan), updates)
        return guarded.update(checked, state, params, value=value, **extra)

    return optax.GradientTransformationExtraArgs(guarded.init, update)


def skips_non_finite(state: State) -> bool:
    """Whether `state` is of an optimizer that `skip_non_finite` made."""
    return isinstance(state.opt_state, optax.ApplyIfFiniteState)


def last_skipped(state: State) -> Bool[Array, "..."] | None:
    """Whether the last update was left out, if the optimizer is of `skip_non_finite`; else None."""
    return ~state.opt_state.last_finite if skips_non_finite(state) else None


def num_skipped(state: State) -> Int[Array, "..."]:
    """How many steps were skipped so far, of an ensemble by each member."""
    counts = skips_non_finite(state)
    return state.opt_state.total_notfinite if counts else jnp.zeros(state.key.shape, jnp.int32)


def as_one_step(before: optax.OptState, after: optax.OptState) -> optax.OptState:
    """The optimizer's state after the several updates of a step, which it counts as one.

    The step is skipped where its last update is.

    Args:
      before: the state before the first of the updates.
      after: the state after the last.
    """
    if not isinstance(after, optax.ApplyIfFiniteState):
        return after
    return after._replace(
        notfinite_count=jnp.where(after.last_finite, 0, before.notfinite_count + 1),
        total_notfinite=before.total_notfinite + ~after.last_finite,
    )


def map_prior(dataset_size: int) -> optax.GradientTransformation:
    """Add the gradient of -log N(θ; 0, I) / N on the generative weights θ: decoder and prior.

    Eq. 8 sums the bound over N examples beside one log p(θ); the mean bound that `make_step`
    ascends is that sum over N, so the prior's share is θ / N. Put it before the optimizer.

    Raises:
      TypeError: `dataset_size` is no int or, at its `init`, the weights are no `Params`.
      ValueError: `dataset_size` is below 1.
    """

    def generative(params: Any) -> Params:
        if not isinstance(params, Params):
            raise TypeError(
                f"the MAP prior is one on jvae.Params, got {type(params).__name__}: a learner of "
                "q(θ) has p(θ) in its bound"
            )
        mask = {name: name != "encoder" for name in params.weights}
        return dataclasses.replace(params, weights=mask)

    return optax.add_decayed_weights(1 / check_count("dataset_size", dataset_size), generative)
