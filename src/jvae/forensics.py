"""What went wrong in a step of training: which one it was, and its first tensor that went bad."""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend.core
import jax.extend.source_info_util
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct, traverse_util
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Shaped

from jvae import training
from jvae.estimators import Bound
from jvae.leaves import named
from jvae.models import Params
from jvae.training import TrainState


class Tensor(NamedTuple):
    """One tensor of a step, as far as a table can show it.

    Attributes:
      name: what it is.
      shape: its shape.
      minimum: the least of its finite entries, NaN where there is none.
      maximum: the greatest of them.
      num_nan: how many entries are NaN.
      num_inf: how many are infinite.
      first: the index of the first that is either, None where there is none.
      example: the example of the batch that this is in, None where that cannot be told.
      origin: the operation and line of code from which they came, "" where they were given.
    """

    name: str
    shape: tuple[int, ...]
    minimum: float
    maximum: float
    num_nan: int
    num_inf: int
    first: tuple[int, ...] | None
    example: int | None
    origin: str = ""

    @property
    def num_non_finite(self) -> int:
        """How many entries are NaN or infinite."""
        return self.num_nan + self.num_inf

    def __str__(self) -> str:
        """In one line, such as `log-scale of q(z|x): 3 of 2000 entries are inf, …`."""
        bad = [
            f"{count} {kind}"
            for count, kind in ((self.num_nan, "nan"), (self.num_inf, "inf"))
            if count
        ]
        if not bad:
            return f"{self.name}: finite, from {self.minimum:.4g} to {self.maximum:.4g}"
        size = int(np.prod(self.shape, dtype=int))
        if len(bad) == 1:
            count, kind = bad[0].split()
            what = f"{count} of {size} entries {'is' if count == '1' else 'are'} {kind}"
        else:
            what = f"of {size} entries {' and '.join(bad)}"
        where = f", first at example {self.example}"
        if self.example is None:
            where = f", first at {list(self.first)}" if self.first else ""
        return f"{self.name}: {what}{where}" + (f" ({self.origin})" if self.origin else "")


class Examination(NamedTuple):
    """What `examine` found.

    Attributes:
      tensors: of the step, in the order of evaluation.
      is_finite: whether the loss, the gradient and the new weights are finite, both looked at and
        compiled as in training, where sums may differ by their rounding.
    """

    tensors: list[Tensor]
    is_finite: bool

    @property
    def verdict(self) -> str | None:
        """The first tensor that went bad, in a line; None where the step is finite.

        In a step that is finite an infinity may well stand, such as what tanh is taken of.
        """
        if self.is_finite:
            return None
        bad = [tensor for tensor in self.tensors if tensor.num_non_finite]
        if bad:
            return str(bad[0])
        return "the step as compiled for training is not finite; looked at, every tensor of it is"


def first_bad_step(
    state: TrainState,
    batches: Iterable[Shaped[Array | np.ndarray, "..."]],
    bound: Bound,
    optimizer: optax.GradientTransformation,
    *,
    until: int,
    preprocess: training.Preprocess | None = None,
) -> tuple[TrainState, Array] | None:
    """Take the steps of an epoch again, one at a time, up to the first that is not finite.

    An epoch is a function of its state and data. So this finds after the fact what would slow
    every step to look for: the step whose gradient was not finite, though its bound was. A step
    that is skipped (`jvae.training.skip_non_finite`) does not count.

    Args:
      state: the last good state, `NonFiniteError.last_good_state`.
      batches: the epoch's batches from that state on, before `preprocess`.
      bound: as `make_step` had it.
      optimizer: as `make_step` had it.
      until: the step to end at, `NonFiniteError.step`: compiled apart, sums differ by their
        rounding, so that the number may not go bad again.
      preprocess: as `make_epoch` had it.

    Returns:
      The state at the start of the step found, or else of step `until`, and its preprocessed
      batch; None where the batches end before.
    """

    @jax.jit
    def run(state: TrainState, batch: Array) -> tuple[Array, TrainState, Bool[Array, ""]]:
        x = batch
        if preprocess is not None:
            x = preprocess(x, training.step_keys(state).preprocess)
        return x, *_attempt(state, x, bound, optimizer)

    for batch in batches:
        x, after, is_finite = run(state, jnp.asarray(batch))
        if not (is_finite or training.skips_non_finite(state)) or int(state.step) >= until:
            return state, x
        state = after
    return None


def examine(
    state: TrainState,
    x: Shaped[Array | np.ndarray, "..."],
    bound: Bound,
    optimizer: optax.GradientTransformation,
) -> Examination:
    """Take one step and look at its tensors.

    These are x, the weights, the outputs of the layers of Linen networks, the parameters of q(z|x),
    p(z) and p(x|z), their draws, log-densities and divergences as `bound` takes them, the bound of
    every example, the gradient, the optimizer's update and the new weights. A tensor that neither
    the bound nor its gradient needs is left out.

    Args:
      state: at the start of the step.
      x: float [*batch, *data_shape], after preprocessing.
      bound: a function `(params, x, key) -> [*batch] nats` that takes its distributions from
        `jvae.posterior`, `jvae.prior` and `jvae.likelihood`; of another one, what lies between the
        weights and the bound stays unseen.
      optimizer: any optax optimizer.
    """
    x = jnp.asarray(x)
    batch_shape = x.shape[: x.ndim - len(state.params.model.data_shape)]
    batch = batch_shape[0] if len(batch_shape) == 1 else None
    weights = named(state.params.weights)
    tensors = [
        _tensor("x", x, batch),
        *(_tensor(f"weight {name}", leaf) for name, leaf in weights.items()),
    ]

    def watched(params: Params, x: Array, key: Array) -> Float[Array, "..."]:
        params = dataclasses.replace(params, model=_watched_model(params.model))
        return _name("bound", bound(params, x, key))

    def step(params: Params, x: Array) -> tuple[Array, Params]:
        return jax.value_and_grad(training.loss(watched, state, x))(params)

    with jax.disable_jit():  # so that no name is inside of a compiled function
        program, results = jax.make_jaxpr(step, return_shape=True)(state.params, x)
    inputs = jax.tree.leaves((state.params, x))
    seen, outputs = _evaluate(program, inputs)
    for name, value, origin in seen:
        tensor = _tensor(name, value, batch, origin)
        if tensor not in tensors:  # a prior without weights is asked for more than once
            tensors.append(tensor)
    leaves, origins = zip(*outputs, strict=True)
    value, gradient = jax.tree.unflatten(jax.tree.structure(results), leaves)
    tensors.append(_tensor("loss", value, origin=origins[0]))
    gradients = [
        _tensor(f"gradient of {name}", leaf, origin=origin)
        for (name, leaf), origin in zip(named(gradient.weights).items(), origins[1:], strict=True)
    ]
    tensors += [gradients[i] for i in _order(program.jaxpr, program.jaxpr.outvars[1:])]
    updates = _updates(state, gradient, value, optimizer)
    after = optax.apply_updates(state.params, updates)
    for what, params in (("update of", updates), ("new weight", after)):
        tensors += [_tensor(f"{what} {name}", leaf) for name, leaf in named(params.weights).items()]
    _, is_finite = _attempt(state, x, bound, optimizer)
    ends = jax.tree.leaves((value, gradient, after))
    return Examination(tensors, bool(is_finite) and all(map(_is_finite, ends)))


@partial(jax.jit, static_argnums=3)
def _updates(
    state: TrainState, gradient: Params, value: Array, optimizer: optax.GradientTransformation
) -> Params:
    update = optax.with_extra_args_support(optimizer).update
    return update(gradient, state.opt_state, state.params, value=value)[0]


@partial(jax.jit, static_argnums=(2, 3))
def _attempt(
    state: TrainState, x: Array, bound: Bound, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Bool[Array, ""]]:
    """The state after a step, and whether loss, gradient and new weights are finite."""
    results = jax.value_and_grad(training.loss(bound, state, x))(state.params)
    after, _ = training.make_step(bound, optimizer)(state, x)
    leaves = jax.tree.leaves((results, after.params))
    return after, jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def _tensor(name: str, value: Any, batch: int | None = None, origin: str = "") -> Tensor:
    array = np.asarray(value)
    finite = np.isfinite(array)
    num_nan = int(np.isnan(array).sum())
    first = example = None
    if not finite.all():
        first = tuple(int(i) for i in np.argwhere(~finite)[0])
        # Mapped functions put the axis of their samples anywhere: by its size, or not at all.
        axes = [axis for axis, size in enumerate(array.shape) if size == batch]
        example = first[axes[0]] if len(axes) == 1 else None
    return Tensor(
        name=name,
        shape=array.shape,
        minimum=float(array[finite].min()) if finite.any() else float("nan"),
        maximum=float(array[finite].max()) if finite.any() else float("nan"),
        num_nan=num_nan,
        num_inf=int((~finite).sum()) - num_nan,
        first=first,
        example=example,
        origin="" if finite.all() else origin,
    )


# Names travel through grad and vmap as an operation of their own, which the evaluation looks for.
_MARK = "jvae: "
_ALWAYS = "jvae, whether or not the bound needs it: "


def _name(name: str, tree: Any, mark: str = _MARK) -> Any:
    """`tree`, each of its leaves under `name`."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, mark + name), tree)


def _mark(equation: Any) -> str | None:
    """Which mark an operation bears."""
    name = equation.params.get("name", "") if equation.primitive.name == "name" else ""
    return next((mark for mark in (_MARK, _ALWAYS) if name.startswith(mark)), None)


def _evaluate(
    program: jax.extend.core.ClosedJaxpr, inputs: list[Array]
) -> tuple[list[tuple[str, Array, str]], list[tuple[Array, str]]]:
    """Run a traced program and look at the result of each of its operations.

    Returns:
      The name, value and origin of each tensor named, and the value and origin of each output;
      the origin is the operation by which its first number that is not finite arose.
    """
    jaxpr, equations = program.jaxpr, _needed(program.jaxpr)
    names = [
        (equation.params["name"].removeprefix(mark), equation.invars[0])
        for equation in equations
        if (mark := _mark(equation))
    ]
    made = [
        v
        for equation in equations
        for v in equation.outvars
        if jnp.issubdtype(v.aval.dtype, jnp.inexact)
    ]
    results = [v for _, v in names] + jaxpr.outvars
    watched = jaxpr.replace(eqns=equations, outvars=[*results, *made])

    # LLVM would optimise for seconds what runs once.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(consts: list[Array], inputs: list[Array]) -> tuple[list[Array], list[Array]]:
        values = jax.core.eval_jaxpr(watched, consts, *inputs)
        flags = [jnp.isfinite(value).all() for value in values[len(results) :]]
        return values[: len(results)], flags

    values, flags = run(program.consts, inputs)
    is_finite = dict(zip(made, flags, strict=True))
    given = zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *inputs], strict=True)
    origins = {v: "" for v, value in given if not _is_finite(value)}
    for equation in equations:
        earlier = [origins[v] for v in equation.invars if _is_variable(v) and v in origins]
        line = jax.extend.source_info_util.summarize(equation.source_info)
        for v in equation.outvars:
            if not is_finite.get(v, True):
                origins[v] = (*earlier, f"{equation.primitive} at {line}")[0]
    ends = [origins.get(v, "") if _is_variable(v) else "" for v in results]
    seen = [(name, *rest) for (name, _), *rest in zip(names, values, ends, strict=False)]
    return seen, list(zip(values, ends, strict=True))[len(names) :]


def _needed(jaxpr: jax.extend.core.Jaxpr) -> list[Any]:
    """The operations on which the outputs depend, and the names of what they work on."""
    needed = {variable for variable in jaxpr.outvars if _is_variable(variable)}
    for equation in reversed(jaxpr.eqns):
        if _mark(equation) == _ALWAYS or not needed.isdisjoint(equation.outvars):
            needed.update(variable for variable in equation.invars if _is_variable(variable))
    return [
        equation
        for equation in jaxpr.eqns
        if not needed.isdisjoint([*equation.outvars, *filter(_is_variable, equation.invars)])
        and (_mark(equation) or not needed.isdisjoint(equation.outvars))
    ]


def _order(jaxpr: jax.extend.core.Jaxpr, variables: list[Any]) -> list[int]:
    """The places of `variables` in the order of their evaluation."""
    position = {v: i for i, equation in enumerate(jaxpr.eqns) for v in equation.outvars}
    at = [position.get(v, -1) if _is_variable(v) else -1 for v in variables]
    return sorted(range(len(at)), key=at.__getitem__)


def _is_variable(variable: Any) -> bool:
    return not isinstance(variable, jax.extend.core.Literal)


def _is_finite(value: Any) -> bool:
    return not jnp.issubdtype(value.dtype, jnp.inexact) or bool(jnp.isfinite(value).all())


def _watched_model(model: Any) -> Any:
    """The same model, whose tensors have names."""
    parts = {"encoder": "q(z|x)", "decoder": "p(x|z)", "prior": "p(z)"}
    watched = {name: _Network(getattr(model, name), name, parts[name]) for name in parts}
    return dataclasses.replace(model, **watched)


@dataclasses.dataclass(frozen=True)
class _Network:
    """A network whose layers and distribution have names."""

    network: Any
    name: str
    symbol: str

    def apply(self, weights: Any, *inputs: Any) -> Any:
        """The distribution of the network, with names."""
        if isinstance(self.network, nn.Module):
            distribution, state = self.network.apply(
                weights, *inputs, capture_intermediates=True, mutable=["intermediates"]
            )
            layers = traverse_util.flatten_dict(state["intermediates"], sep="/")
            for path, outputs in layers.items():
                if path != "__call__":  # that of the whole is the distribution
                    _name(f"output of {self.name}/{path.removesuffix('/__call__')}", outputs)
        else:
            distribution = self.network.apply(weights, *inputs)
        leaves, structure = jax.tree_util.tree_flatten_with_path(distribution)
        parameters = [
            _name(f"{_words(jax.tree_util.keystr(path, simple=True))} of {self.symbol}", leaf)
            for path, leaf in leaves
        ]
        distribution = jax.tree.unflatten(structure, parameters)
        if hasattr(distribution, "scale") and hasattr(distribution, "log_scale"):
            _name(f"scale of {self.symbol}", distribution.scale, _ALWAYS)
        return _Distribution(distribution, self.symbol)


@struct.dataclass
class _Distribution:
    """A distribution whose draws, log-densities and divergences have names."""

    distribution: Any
    symbol: str = struct.field(pytree_node=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.distribution, name)
        if not callable(value):
            is_array = isinstance(value, jax.Array)
            return _name(f"{_words(name)} of {self.symbol}", value) if is_array else value
        return self._watch(name, value)

    def _watch(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            others = [arg.symbol for arg in args if isinstance(arg, _Distribution)]
            args = tuple(a.distribution if isinstance(a, _Distribution) else a for a in args)
            result = method(*args, **kwargs)
            draw, log_density = f"draw from {self.symbol}", f"log {self.symbol}"
            if name == "sample_and_log_prob":
                value, log_prob = result
                return _name(draw, value), _name(log_density, log_prob)
            pair = " ‖ ".join([self.symbol, *others])
            names = {
                "sample": draw,
                "log_prob": log_density,
                "kl": f"KL({pair})",
                "kl_per_dim": f"KL({pair}) of each latent",
            }
            return _name(names.get(name, f"{_words(name)} of {self.symbol}"), result)

        return call


def _words(name: str) -> str:
    return name.replace("_", "-")
