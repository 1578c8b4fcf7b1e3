"""What is to be run: settings, model, data and protocol of a training run."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

import jvae
from jvae import distributed, training
from jvae.experiments import devices, objective, run_folder
from jvae.experiments.config import Config


class Keys(NamedTuple):
    """The keys of a model and its training, each of one use; all come from one seed."""

    init: PRNGKeyArray
    train: PRNGKeyArray
    elbo: PRNGKeyArray
    nll: PRNGKeyArray
    figures: PRNGKeyArray


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What is to be run.

    Attributes:
      config: the settings.
      model: the model.
      train: [num_train, *data_shape], what `preprocess` takes: an array, which goes to the
        device, or other examples, which are streamed.
      test: float [num_test, *data_shape].
      preprocess: from a batch of `train` and a key to x, or None.
      protocol: what makes two results comparable, for `config.json` and `result.json`.
      folder: the run's folder.
      remarks: what else these two files are to say.
      log_volume: where x is data divided by scales, the sum of their logs: -log p(data) is
        -log p(x) plus it. None where x is the data.
      shown: from x to images in [0, 1]; None where x is no image.
      valid: float [num_valid, *data_shape], by which the best weights are chosen; None where the
        result is of the last ones.
    """

    config: Config
    model: jvae.VAE
    train: Any
    test: Float[Array, "num_test ..."]
    preprocess: training.Preprocess | None
    protocol: dict[str, Any]
    folder: Path
    remarks: dict[str, Any] = dataclasses.field(default_factory=dict)
    log_volume: float | None = None
    shown: Callable[[Array], Array] | None = None
    valid: Float[Array, "num_valid ..."] | None = None

    @property
    def keys(self) -> list[Keys]:
        """The keys of each model: a member of an ensemble has those of a run with its seed."""
        return [
            Keys(*jax.random.split(jax.random.key(seed), len(Keys._fields)))
            for seed in self.config.all_seeds
        ]

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """The devices of the run; None for a single one.

        Raises:
          ConfigError: there are fewer than asked for, or they cannot share the work equally.
        """
        return devices.choose(self.config)

    @property
    def held_out(self) -> dict[str, Float[Array, "..."]]:
        """The parts that are evaluated and not trained on: "test", perhaps "validation"."""
        return {"test": self.test} | ({} if self.valid is None else {"validation": self.valid})

    @functools.cached_property
    def held_out_on_devices(self) -> dict[str, Float[Array, "..."]]:
        """`held_out`, shared out over the run's devices; cut what comes of it to its lengths."""
        if self.mesh is None:
            return self.held_out
        return {part: distributed.split_examples(x, self.mesh) for part, x in self.held_out.items()}

    @property
    def streamed(self) -> bool:
        """Whether training data goes to the device batch by batch."""
        return not isinstance(self.train, jax.Array)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in a pass over the training set."""
        return training.steps_per_epoch(len(self.train), self.config.batch_size)

    @property
    def learning_rate(self) -> optax.ScalarOrSchedule:
        """The learning rate, or a function from the step to it."""
        return objective.make_learning_rate(self.config, len(self.train))

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer that the settings describe."""
        return objective.make_optimizer(self.config, len(self.train))

    def init(self) -> training.TrainState:
        """The state before the first step, of one model or of an ensemble."""
        optimizer = self.optimizer
        states = [
            training.init(jvae.init(self.model, keys.init), optimizer, keys.train)
            for keys in self.keys
        ]
        return states[0] if self.config.seeds == 1 else training.ensemble(states)

    def on_devices(self, state: training.TrainState) -> training.TrainState:
        """A state where training has it, on the run's devices."""
        if self.mesh is None:
            return state
        if self.config.seeds == 1:
            return distributed.replicate(state, self.mesh)
        return distributed.place_members(state, self.mesh)

    def settings(self) -> dict[str, Any]:
        """The content of `config.json`."""
        config = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self.config).items()
        }
        made_with = run_folder.provenance()
        made_with["hardware"] = made_with.pop("devices")  # beside the setting of that name
        return config | {"protocol": self.protocol} | self.remarks | made_with
