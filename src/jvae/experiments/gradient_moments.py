"""Mean and variance of a bound's gradient over its draws, and the signal and noise in them.

Draws of the gradient are too many to keep: chunks of them are reduced inside one compiled call, and
the chunks merged on the host in float64.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PRNGKeyArray, Shaped

from jvae.checks import check_count
from jvae.estimators import Bound
from jvae.models import Params

# The weights of q(z|x), and those of p(x, z).
NETWORKS = ("phi", "theta")


class Moments(NamedTuple):
    """Of `num` draws of a vector.

    Attributes:
      num: of draws, n.
      mean: [num_weights] float64.
      square: [num_weights] float64, the sum of squared deviations from the mean.
    """

    num: int
    mean: Float[np.ndarray, "num_weights"]
    square: Float[np.ndarray, "num_weights"]


class Squared(NamedTuple):
    """An estimate of the square of something, and its standard error.

    It is unbiased, or nearly, where the thing itself could not be: so it may be negative.
    """

    square: float
    stderr: float

    @property
    def is_resolved(self) -> bool:
        """Whether it lies two standard errors above 0."""
        return self.square > 2 * self.stderr

    @property
    def root(self) -> float:
        """The thing itself, of one that is resolved."""
        return math.sqrt(self.square)

    @property
    def root_stderr(self) -> float:
        """To first order."""
        return self.stderr / (2 * self.root)


class Measures(NamedTuple):
    """Signal and noise of one network's gradient g.

    Attributes:
      snr: the root mean square over weights of |E gᵢ| / sd gᵢ.
      snr_of_length: ‖E g‖ / √tr Cov g, a ratio that no weight with little noise can rule.
      mean: ‖E g‖.
      bias: ‖E g - target‖, None without a target.
      noise: √tr Cov g.
      mean_of_snr: the mean over weights of |mean of gᵢ| / sd gᵢ as it comes, which is at least
        about √(2 / πn) for n draws of noise alone.
      num_weights: over which these are taken, those whose gradient is not 0 at every draw.
    """

    snr: Squared
    snr_of_length: Squared
    mean: Squared
    bias: Squared | None
    noise: float
    mean_of_snr: float
    num_weights: int


def gradient(
    bound: Bound, params: Params, x: Shaped[Array | np.ndarray, "..."], key: PRNGKeyArray
) -> dict[str, Float[Array, "num_weights"]]:
    """The gradient of the mean bound over the batch, a flat vector for each of `NETWORKS`.

    Args:
      bound: `(params, x, key) -> [*batch] nats`.
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
    """
    return flat_by_network(jax.grad(lambda p: bound(p, x, key).mean())(params))


def flat_by_network(params: Params) -> dict[str, Float[Array, "num_weights"]]:
    """Weights, or a gradient in their form, as a flat vector for each of `NETWORKS`."""
    phi = params.weights["encoder"]
    theta = {name: value for name, value in params.weights.items() if name != "encoder"}
    return {"phi": ravel_pytree(phi)[0], "theta": ravel_pytree(theta)[0]}


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the draws of both: Chan, Golub & LeVeque (1983), eq. 2.1."""
    num, shift = a.num + b.num, b.mean - a.mean
    mean = a.mean + shift * (b.num / num)
    return Moments(num, mean, a.square + b.square + shift**2 * (a.num * b.num / num))


def without(whole: Moments, part: Moments) -> Moments:
    """The moments of the draws of `whole` that are not of `part`: `merge` solved for one of two."""
    num = whole.num - part.num
    mean = whole.mean + (whole.mean - part.mean) * (part.num / num)
    between = (part.mean - mean) ** 2 * (part.num * num / whole.num)
    return Moments(num, mean, np.maximum(whole.square - part.square - between, 0))


def of_gradient(
    bound: Bound,
    params: Params,
    x: Shaped[Array | np.ndarray, "..."],
    key: PRNGKeyArray,
    *,
    num_draws: int,
    num_blocks: int,
    chunk: int,
    on_chunk: Callable[[int], object] = lambda draws: None,
) -> dict[str, list[Moments]]:
    """The moments of `gradient` over its key, with x and the weights as they are.

    Args:
      bound: `(params, x, key) -> [*batch] nats`.
      params: from `jvae.init`.
      x: float [*batch, *data_shape].
      key: a typed PRNG key.
      num_draws: of the gradient, all independent.
      num_blocks: how many equal parts of the draws to keep apart, for standard errors.
      chunk: gradients to hold at once, at most.
      on_chunk: told how many draws each chunk had.

    Returns:
      For each of `NETWORKS` the moments of every block.

    Raises:
      TypeError: a count is no int, or what `bound` raises.
      ValueError: `num_draws` is no multiple of `num_blocks`, or what `bound` raises.
    """
    size, rest = divmod(check_count("num_draws", num_draws), check_count("num_blocks", num_blocks))
    if rest or not size:
        raise ValueError(f"num_draws must be a multiple of {num_blocks} blocks, got {num_draws}")
    # A chunk of another size would be compiled a second time.
    chunk = max(c for c in range(1, min(chunk, size) + 1) if size % c == 0)

    @jax.jit
    def reduce(params: Params, x: Array, keys: Key[Array, "chunk"]) -> dict[str, list[Array]]:
        g = jax.vmap(lambda key: gradient(bound, params, x, key))(keys)
        means = {name: g[name].mean(axis=0) for name in NETWORKS}
        return {
            name: [means[name], jnp.square(g[name] - means[name][None]).sum(axis=0)]
            for name in NETWORKS
        }

    blocks: dict[str, list[Moments]] = {name: [] for name in NETWORKS}
    keys = jax.random.split(key, (num_blocks, size // chunk, chunk))
    for of_block in keys:
        merged: dict[str, Moments] = {}
        for of_chunk in of_block:
            reduced = reduce(params, jnp.asarray(x), of_chunk)
            for name, (mean, square) in reduced.items():
                new = Moments(chunk, np.asarray(mean, np.float64), np.asarray(square, np.float64))
                merged[name] = merge(merged[name], new) if name in merged else new
            on_chunk(chunk)
        for name, moments in merged.items():
            blocks[name].append(moments)
    return blocks


def measure(
    blocks: Sequence[Moments], target: Float[np.ndarray, "num_weights"] | None = None
) -> Measures | None:
    """Signal, noise and bias, with standard errors by the jackknife over blocks.

    A squared mean of n draws is too large by variance / n in expectation; that much is taken off.
    Where nothing but noise is left of a square, the jackknife's error is up to √2 too large.

    Args:
      blocks: of independent draws, at least two.
      target: what the mean of the gradient should be.

    Returns:
      None where the gradient was 0 at every draw: there is none for this network.
    """
    whole = blocks[0]
    for block in blocks[1:]:
        whole = merge(whole, block)
    moves = (whole.square > 0) | (whole.mean != 0)
    if not moves.any():
        return None
    noisy = whole.square > 0
    rest = [without(whole, block) for block in blocks]

    def jackknife(statistic: Callable[[Moments], float]) -> Squared:
        left_out = np.array([statistic(moments) for moments in rest])
        spread = ((left_out - left_out.mean()) ** 2).sum()
        stderr = math.sqrt((len(rest) - 1) / len(rest) * spread)
        return Squared(float(statistic(whole)), stderr)

    def snr(moments: Moments) -> float:
        variance = _variance(moments)[noisy]
        # A weight may have moved in the block left out alone.
        variance = np.where(variance > 0, variance, np.inf)
        return float((moments.mean[noisy] ** 2 / variance).mean() - 1 / moments.num)

    def mean_from(point: Float[np.ndarray, "num_weights"] | float) -> Callable[[Moments], float]:
        return lambda m: float(((m.mean - point) ** 2).sum() - _variance(m).sum() / m.num)

    variance = _variance(whole)
    return Measures(
        snr=jackknife(snr),
        snr_of_length=jackknife(lambda m: mean_from(0.0)(m) / float(_variance(m).sum())),
        mean=jackknife(mean_from(0.0)),
        bias=None if target is None else jackknife(mean_from(target)),
        noise=math.sqrt(variance.sum()),
        mean_of_snr=float((np.abs(whole.mean[noisy]) / np.sqrt(variance[noisy])).mean()),
        num_weights=int(moves.sum()),
    )


def _variance(moments: Moments) -> Float[np.ndarray, "num_weights"]:
    return moments.square / (moments.num - 1)


def to_json(measures: Measures) -> dict[str, object]:
    """Names, numbers and mappings alone."""
    return {
        name: value._asdict() if isinstance(value, Squared) else value
        for name, value in measures._asdict().items()
    }


def from_json(record: Mapping[str, object]) -> Measures:
    """What `to_json` made."""
    return Measures(**dict(_restored(record)))  # type: ignore[arg-type]


def _restored(record: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in record.items():
        yield name, Squared(**value) if isinstance(value, dict) else value
