"""One work and everyone who does it: the contestants of `jvae.experiments.benchmark`.

The work is an epoch of the MNIST model of Kingma & Welling (2014), App. C: an MLP
784-500-20-500-784 with tanh, a Bernoulli likelihood on logits, the analytic KL, L = 1,
minibatches of 100, Adam with step size 1e-3, float32. All start from the same weights.
"""

import dataclasses
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

import jvae
from jvae import binarisation, cores, distributed, training
from jvae.estimators import Bound

BATCH_SIZE = 100
LEARNING_RATE = 1e-3

# One epoch, blocked on: the mean training bound over its steps, None where nothing is trained.
Run = Callable[[], float | None]
Products = tuple[Array, ...]

_wait: Callable[[Any], Any] = jax.block_until_ready


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """What a contestant is given.

    Attributes:
      images: a whole number of minibatches.
      params: the weights to start from.
      seed: of the order of examples and of the noise.
    """

    images: UInt8[np.ndarray, "num 28 28"]
    params: jvae.Params
    seed: int

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return len(self.images) // BATCH_SIZE

    @property
    def layers(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Kernel and bias of the four affine maps: the encoder's two, then the decoder's two."""
        networks = [self.params.weights[part]["params"] for part in ("encoder", "decoder")]
        layers = [network[name] for network in networks for name in ("hidden_0", "output")]
        return [(np.asarray(layer["kernel"]), np.asarray(layer["bias"])) for layer in layers]

    @functools.cached_property
    def grey(self) -> Float[np.ndarray, "num 784"]:
        """The images as flat float32 rows, for those who preload them so."""
        return self.images.reshape(len(self.images), -1).astype(np.float32) / 255

    def orders(self) -> Iterator[Int[np.ndarray, "steps batch"]]:
        """A shuffled order of examples for each epoch, without end."""
        generator = np.random.default_rng(self.seed)
        while True:
            order = generator.permutation(len(self.images)).astype(np.int32)
            yield order.reshape(self.steps, BATCH_SIZE)

    def first(self, steps: int) -> "Work":
        """The same work, cut to at most `steps` steps an epoch."""
        return dataclasses.replace(self, images=self.images[: steps * BATCH_SIZE])


def load_work(dataset: str, data_dir: Path | None, *, steps: int, seed: int) -> Work:
    """The work on a dataset's training images, repeated to fill `steps` minibatches.

    Raises:
      DataError: as `jvae.data.load`.
    """
    images = jvae.data.load(dataset, data_dir).train
    return Work(
        images=np.resize(images, (steps * BATCH_SIZE, *images.shape[1:])),
        params=jvae.init(jvae.VAE.mlp(), jax.random.key(seed)),
        seed=seed,
    )


def ordered_products(operands: Products, weights: Products) -> Products:
    """The 11 products of a training step, each on the result of the one before it.

    This order is the floor of a step, since a step cannot have another: a layer waits for the
    one below it, backward for forward, and a layer's gradients for those of the layer above. Only
    a weight gradient and the input gradient beside it are free to run at once, here too.
    """
    (h,) = operands
    inputs, forward = [], []
    for weight in weights:
        inputs.append(h[:, : weight.shape[0]])  # z is as wide as half of its mean and scale
        h = inputs[-1] @ weight
        forward.append(h)
    backward = [inputs[-1].T @ h]
    for x, above, below in zip(inputs[-2::-1], weights[:0:-1], weights[-2::-1], strict=True):
        h = h @ above.T
        backward.append(h)
        h = jnp.tile(h, (1, below.shape[1] // h.shape[1]))  # of z to mean and scale
        backward.append(x.T @ h)
    return *forward, *backward


def unordered_products(operands: Products, weights: Products) -> Products:
    """The same 11 products, none of which waits for another: no training step can run so."""
    inputs, gradients = operands[:4], operands[4:]
    return (
        *(h @ weight for h, weight in zip(inputs, weights, strict=True)),
        *(h.T @ gradient for h, gradient in zip(inputs, gradients, strict=True)),
        *(g @ weight.T for g, weight in zip(gradients[1:], weights[1:], strict=True)),
    )


@functools.partial(jax.jit, static_argnames=("multiply", "steps"))
def floor_epoch(
    operands: Products,
    weights: Products,
    *,
    multiply: Callable[[Products, Products], Products],
    steps: int,
) -> tuple[Products, Products]:
    """`multiply` once a step, such that the compiler can neither drop a product nor hoist one.

    The weights are arguments, since XLA packs constants for its products ahead of time.
    """

    def body(carry: tuple[Products, Products], _: None) -> tuple[tuple[Products, Products], None]:
        operands, _products = carry
        products = multiply(operands, weights)
        hair = 1e-20 * sum(product[:1, :1] for product in products)
        # One entry, written in place: a pass over an operand would be no part of a floor.
        operands = tuple(
            jax.lax.dynamic_update_slice(operand, operand[:1, :1] + hair, (0, 0))
            for operand in operands
        )
        return (operands, products), None

    shapes = jax.eval_shape(multiply, operands, weights)
    nothing = tuple(jnp.zeros(shape.shape, shape.dtype) for shape in shapes)
    return jax.lax.scan(body, (operands, nothing), length=steps)[0]


def floor(work: Work, *, ordered: bool = True) -> Run:
    """The matrix products of the steps and nothing else: the least time an epoch can take."""
    weights = tuple(jnp.asarray(kernel) for kernel, _ in work.layers)
    sizes = [weight.shape[0] for weight in weights] + [weight.shape[1] for weight in weights]
    generator = np.random.default_rng(work.seed)
    operands = tuple(
        jnp.asarray(generator.normal(0, 0.1, (BATCH_SIZE, size)), jnp.float32) for size in sizes
    )
    multiply = ordered_products if ordered else unordered_products
    given = operands[:1] if ordered else operands

    def run() -> None:
        _wait(floor_epoch(given, weights, multiply=multiply, steps=work.steps))

    return run


def floor_of_members(work: Work, *, num: int) -> Run:
    """The products of `num` models, each on the device that it has in training."""
    layers = [jnp.asarray(kernel) for kernel, _ in work.layers]
    one = training.init(work.params, training.make_optimizer("sgd", 1.0), jax.random.key(0))
    operand = jnp.full((BATCH_SIZE, layers[0].shape[0]), 0.1)

    def train(state: training.TrainState, operand: Array) -> tuple[training.TrainState, Any]:
        # Something of each member's own, so that its products cannot be shared.
        own = 1 + 0 * jax.tree.leaves(state.params)[0].reshape(-1)[0]
        weights = tuple(own * layer for layer in layers)
        products = floor_epoch((operand,), weights, multiply=ordered_products, steps=work.steps)
        return state, training.StepInfo(bound=products[0][0][0, 0])

    epoch, state = training.over_members(train), _on_all_cores([one] * num)

    def run() -> None:
        _wait(epoch(state, operand))

    return run


def _on_all_cores(states: list[training.TrainState]) -> training.TrainState:
    state = training.ensemble(states)
    num = jax.device_count()
    shared = num > 1 and len(states) % num == 0
    return distributed.place_members(state, distributed.make_mesh()) if shared else state


def jvae_ensemble(work: Work, *, num: int) -> Run:
    """jvae, models with seeds of their own side by side."""
    works = [dataclasses.replace(work, seed=work.seed + i) for i in range(num)]
    states = [_start(one, jvae.elbo)[0] for one in works]
    _, step = _start(work, jvae.elbo)
    state, images = _on_all_cores(states), jnp.asarray(work.images)
    if len(state.key.sharding.device_set) > 1:
        images = distributed.replicate(images, distributed.make_mesh())
    return _epochs(state, training.make_epoch(step, BATCH_SIZE, binarisation.grey), images)


def _epochs(state: training.TrainState, epoch: training.Epoch, images: Array) -> Run:
    def run() -> float:
        nonlocal state
        state, info = _wait(epoch(state, images))
        return float(np.mean(info.bound))

    return run


# Importance samples an image, and rows of decoder input at once.
SAMPLES, ROWS = 5000, 1000


def likelihood_floor(work: Work) -> Run:
    """The decoder's two products for every importance sample and nothing else."""
    decoder = [jnp.asarray(kernel) for kernel, _ in work.layers[2:]]
    z = jnp.full((ROWS, decoder[0].shape[0]), 0.1)

    @jax.jit
    def products(z: Array, first: Array, second: Array) -> Array:
        def body(z: Array, _: None) -> tuple[Array, None]:
            outputs = (z @ first) @ second
            hair = 1e-20 * outputs[:1, :1]
            return jax.lax.dynamic_update_slice(z, z[:1, :1] + hair, (0, 0)), None

        return jax.lax.scan(body, z, length=work.steps * SAMPLES // ROWS)[0]

    def run() -> None:
        _wait(products(z, *decoder))

    return run


def jvae_likelihood(work: Work) -> Run:
    """The same work by `jvae.log_likelihood`, an image a step."""
    x = jnp.asarray(work.grey[: work.steps].reshape(-1, 28, 28))

    def run() -> float:
        log_px = jvae.log_likelihood(work.params, x, jax.random.key(work.seed), num_samples=SAMPLES)
        return float(_wait(log_px).mean())

    return run


def torch_likelihood(work: Work) -> Run:
    """The same in PyTorch eager, as many rows at once."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(cores.count())
    torch.manual_seed(work.seed)
    layers = [(torch.tensor(kernel), torch.tensor(bias)) for kernel, bias in work.layers]
    images = torch.from_numpy(work.grey[: work.steps])
    half_log_2pi = 0.5 * math.log(2 * math.pi)

    def network(parts: list[Any], inputs: Any) -> Any:
        (hidden, hidden_bias), (output, output_bias) = parts
        return torch.addmm(
            output_bias, torch.tanh(torch.addmm(hidden_bias, inputs, hidden)), output
        )

    def log_weights(x: Any) -> Any:
        loc, log_variance = network(layers[:2], x[None]).chunk(2, dim=1)
        for _ in range(SAMPLES // ROWS):
            eps = torch.randn(ROWS, loc.shape[1])
            z = loc + (0.5 * log_variance).exp() * eps
            cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(
                network(layers[2:], z), x.expand(ROWS, -1), reduction="none"
            )
            log_pz = (-0.5 * z.square() - half_log_2pi).sum(1)
            log_qz = (-0.5 * eps.square() - half_log_2pi - 0.5 * log_variance).sum(1)
            yield log_pz - log_qz - cross_entropy.sum(1)

    def run() -> float:
        with torch.inference_mode():
            log_px = [
                torch.logsumexp(torch.cat(list(log_weights(x))), 0) - math.log(SAMPLES)
                for x in images
            ]
            return float(torch.stack(log_px).mean())

    return run


def _start(work: Work, bound: Bound) -> tuple[training.TrainState, training.Step]:
    optimizer = training.make_optimizer("adam", LEARNING_RATE)
    state = training.init(work.params, optimizer, jax.random.key(work.seed))
    return state, training.make_step(bound, optimizer)


def jvae_epoch(
    work: Work,
    *,
    preprocess: training.Preprocess = binarisation.grey,
    bound: Bound = jvae.elbo,
) -> Run:
    """jvae, an epoch in one compiled call."""
    state, step = _start(work, bound)
    epoch = training.make_epoch(step, BATCH_SIZE, preprocess)
    return _epochs(state, epoch, jnp.asarray(work.images))


def first_step() -> None:
    """All of a new user's first step: data, weights, compilation and an epoch of one step."""
    jvae_epoch(load_work("mnist_5k", None, steps=1, seed=0))()


def jvae_step(work: Work) -> Run:
    """jvae, a compiled call a step."""
    state, step = _start(work, jvae.elbo)
    images = work.grey.reshape(work.images.shape)
    orders = work.orders()

    def run() -> float:
        nonlocal state
        infos = []
        for batch in next(orders):
            state, info = step(state, images[batch])
            infos.append(info)
        _wait(state)
        return float(np.mean([info.bound for info in infos]))

    return run


def numpyro_epoch(work: Work) -> Run:
    """NumPyro's SVI with its analytic KL and its Adam, an epoch in one compiled call."""
    numpyro = importlib.import_module("numpyro")
    infer = importlib.import_module("numpyro.infer")
    dist = numpyro.distributions
    layers = jax.tree.map(jnp.asarray, work.layers)

    def network(name: str, layers: Any, inputs: Array) -> Array:
        (hidden, hidden_bias), (output, output_bias) = numpyro.param(name, layers)
        return jnp.add(jnp.tanh(inputs @ hidden + hidden_bias) @ output, output_bias)

    def normal(loc: Array, scale: Array) -> Any:
        return dist.Normal(loc, scale, validate_args=False).to_event(1)

    def model(x: Array) -> None:
        with numpyro.plate("examples", len(x)):
            z = numpyro.sample("z", normal(jnp.zeros((len(x), 20)), jnp.ones(20)))
            logits = network("decoder", layers[2:], z)
            # Validated, a target between 0 and 1 has density zero.
            likelihood = dist.Bernoulli(logits=logits, validate_args=False)
            numpyro.sample("x", likelihood.to_event(1), obs=x)

    def guide(x: Array) -> None:
        loc, log_variance = jnp.split(network("encoder", layers[:2], x), 2, axis=-1)
        with numpyro.plate("examples", len(x)):
            numpyro.sample("z", normal(loc, jnp.exp(0.5 * log_variance)))

    svi = infer.SVI(model, guide, numpyro.optim.Adam(LEARNING_RATE), infer.TraceMeanField_ELBO())
    images = jnp.asarray(work.images).reshape(len(work.images), -1)
    state = svi.init(jax.random.key(work.seed), jnp.asarray(work.grey[:BATCH_SIZE]))
    orders = work.orders()

    @jax.jit
    def epoch(state: Any, images: Array, order: Array) -> Any:
        def body(state: Any, batch: Array) -> Any:
            return svi.update(state, images[batch].astype(jnp.float32) / 255)

        return jax.lax.scan(body, state, order)

    def run() -> float:
        nonlocal state
        state, losses = _wait(epoch(state, images, next(orders)))
        return -float(np.mean(losses)) / BATCH_SIZE

    return run


def torch_eager(work: Work) -> Run:
    """PyTorch eager, the data one tensor that minibatches are selected from."""
    torch = importlib.import_module("torch")
    images = torch.from_numpy(work.grey)
    orders = work.orders()
    return _torch(
        work, lambda: (images.index_select(0, batch) for batch in torch.from_numpy(next(orders)))
    )


def torch_dataloader(work: Work) -> Run:
    """PyTorch eager, fed by a DataLoader with its default collation."""
    torch = importlib.import_module("torch")
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(work.grey))
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True)
    return _torch(work, lambda: itertools.chain.from_iterable(loader))


def _torch(work: Work, minibatches: Callable[[], Iterable[Any]]) -> Run:
    torch = importlib.import_module("torch")
    torch.set_num_threads(cores.count())
    torch.manual_seed(work.seed)
    affine = [torch.nn.Linear(*kernel.shape) for kernel, _ in work.layers]
    for layer, (kernel, bias) in zip(affine, work.layers, strict=True):
        layer.load_state_dict({"weight": torch.tensor(kernel.T), "bias": torch.tensor(bias)})
    encoder = torch.nn.Sequential(affine[0], torch.nn.Tanh(), affine[1])
    decoder = torch.nn.Sequential(affine[2], torch.nn.Tanh(), affine[3])
    weights = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE, fused=True)
    cross_entropy = functools.partial(
        torch.nn.functional.binary_cross_entropy_with_logits, reduction="sum"
    )

    def mean_bound(x: Any) -> Any:
        loc, log_variance = encoder(x).chunk(2, dim=1)
        z = loc + (0.5 * log_variance).exp() * torch.randn_like(loc)
        kl = 0.5 * (log_variance.exp() + loc.square() - 1 - log_variance).sum()
        return -(cross_entropy(decoder(z), x) + kl) / len(x)

    def run() -> float:
        total = torch.zeros(())
        for x in minibatches():
            optimizer.zero_grad()
            bound = mean_bound(x)
            (-bound).backward()
            optimizer.step()
            total += bound.detach()
        return float(total) / work.steps

    return run


class Contestant(NamedTuple):
    """One row of the benchmark.

    Attributes:
      build: from the work to a run.
      needs: a package beyond jvae's own.
      bound_like: whose training bound it has to reach, None where nothing is trained.
      short: it runs fewer steps, beside another that does so too.
      members: models that share the steps.
    """

    build: Callable[[Work], Run]
    needs: str | None = None
    bound_like: str | None = "jvae-grey"
    short: bool = False
    members: int = 1


_TEN_SAMPLES = functools.partial(jvae.elbo, num_samples=10)

CONTESTANTS: dict[str, Contestant] = {
    "floor": Contestant(floor, bound_like=None),
    "floor-unordered": Contestant(functools.partial(floor, ordered=False), bound_like=None),
    "jvae-grey": Contestant(jvae_epoch),
    "jvae-dynamic": Contestant(functools.partial(jvae_epoch, preprocess=binarisation.bernoulli)),
    "jvae-step": Contestant(jvae_step),
    "jvae-L1": Contestant(jvae_epoch, bound_like="jvae-L1", short=True),
    "jvae-L10": Contestant(
        functools.partial(jvae_epoch, bound=_TEN_SAMPLES), bound_like="jvae-L1", short=True
    ),
    "floor-8-seeds": Contestant(
        functools.partial(floor_of_members, num=8), bound_like=None, members=8
    ),
    "jvae-8-seeds": Contestant(
        functools.partial(jvae_ensemble, num=8), bound_like="jvae-8-seeds", members=8
    ),
    "floor-likelihood": Contestant(likelihood_floor, bound_like=None, short=True),
    "jvae-likelihood": Contestant(jvae_likelihood, bound_like="jvae-likelihood", short=True),
    "torch-likelihood": Contestant(
        torch_likelihood, needs="torch", bound_like="jvae-likelihood", short=True
    ),
    "numpyro": Contestant(numpyro_epoch, needs="numpyro"),
    "torch-eager": Contestant(torch_eager, needs="torch"),
    "torch-dataloader": Contestant(torch_dataloader, needs="torch"),
}
