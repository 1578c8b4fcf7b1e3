"""The settings that experiments share; each extends `Config` with its own."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jvae.binarisation import BINARISATIONS
from jvae.estimators import TABLE
from jvae.networks import ACTIVATIONS, FAMILIES, INITIALISERS, PRECISIONS
from jvae.training import OPTIMIZERS

# A VAE is trained by a bound that has a gradient for both of its networks.
BOUNDS = {name: row for name, row in TABLE.items() if row.trains == "both"}

if TYPE_CHECKING:  # a Literal of names that are computed is beyond a type checker
    LikelihoodName = str
    BinarisationName = str
    ActivationName = str
    InitialiserName = str
    PrecisionName = str
    BoundName = str
    OptimizerName = str
else:
    LikelihoodName = Literal[("auto", *FAMILIES)]
    BinarisationName = Literal[("auto", *BINARISATIONS)]
    ActivationName = Literal[tuple(ACTIVATIONS)]
    InitialiserName = Literal[tuple(INITIALISERS)]
    PrecisionName = Literal[tuple(PRECISIONS)]
    BoundName = Literal[tuple(BOUNDS)]
    OptimizerName = Literal[tuple(OPTIMIZERS)]


class ConfigError(Exception):
    """A setting that cannot be; the message names its flag."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the model and its training; the defaults are the paper's MNIST model."""

    data_dir: Path | None = None
    """Folder of all datasets; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    likelihood: LikelihoodName = "auto"
    """p(x|z). auto: bernoulli for grey or binary images, else gaussian."""
    binarisation: BinarisationName = "auto"
    """none: pixels / 255. given: numbers, or pixels of 0 and 1, as they are. dynamic: drawn at
    each visit. static: drawn once. threshold: 1 from 128 up. dequantised: (value + noise) / 256.
    auto: dynamic for grey pixels under bernoulli, dequantised under gaussian, else given."""
    validation_fraction: float = 0.0
    """Of the training part, how much is held out where the data has no validation part of its own
    (binarized_mnist, frey_face and celeb_a have one). Where there is one, results are not of the
    last weights but of those of the best validation ELBO, among the checkpoints of every
    CHECKPOINT_EVERY epochs and the last; of several seeds, of each its own. 0: none is held out."""
    split_seed: int = 0
    """Of the splits that hold out a part."""
    stream_above: float = 1.0
    """GiB: larger data, decoded, is given to the device batch by batch; folders of images and
    celeb_a then stay on the disk."""
    latent_dim: int = 20
    """Size of z; with 2, the run also draws the latent manifold."""
    hidden: tuple[int, ...] = (500,)
    """Hidden layers of the encoder; the decoder has them in reverse. No number: affine maps."""
    activation: ActivationName = "tanh"
    """Nonlinearity of the hidden layers."""
    initialiser: InitialiserName = "paper"
    """paper: all from N(0, variance 0.01). lecun: variance 1 / fan-in, zero biases."""
    precision: PrecisionName = "float32"
    """Of the layers' arithmetic; all else is float32. bfloat16 gains on TPUs and recent GPUs, and
    loses on CPUs."""
    bound: BoundName = "elbo"
    """To maximise. elbo: SGVB B. sgvb_a: all by Monte Carlo. iwae: importance-weighted. The others
    are in README's table, with the settings that they have by default."""
    num_samples: int = 1
    """Samples of z an example in the bound: the paper's L, or K of iwae and its kin."""
    batch_size: int = 100
    """Examples a step."""
    optimizer: OptimizerName = "adam"
    """The paper's is adagrad."""
    learning_rate: float = 1e-3
    """Step size; the paper's Adagrad takes 0.01, 0.02 or 0.1."""
    schedule: Literal["constant", "cosine"] = "constant"
    """constant, or cosine: from LEARNING_RATE to 0 over the run."""
    clip_norm: float | None = None
    """Clip the gradient's global norm to this."""
    map_prior: bool = False
    """Maximise the paper's MAP criterion: a prior N(0, I) on the decoder's weights."""
    epochs: int = 100
    """Passes over the training set."""
    nll_samples: int = 1000
    """Importance samples a test image for the final -log p(x); 0 leaves it out."""
    checkpoint_every: int = 5
    """Epochs between checkpoints. The latest two are kept, and with a validation part the best."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite: the run stops, or its update is left out."""
    max_skipped: int = 10
    """With --on-nonfinite skip, so many steps skipped in a row end the run."""
    seed: int = 0
    """Of the weights, the order of examples and all noise."""
    seeds: int = 1
    """Models to train side by side, with SEED, SEED + 1, …: numbers get errors over seeds. Where
    data is streamed all see the batches of SEED's order."""
    devices: int | Literal["auto"] = "auto"
    """Devices of this process to share a batch, or the models of several seeds. auto: one, or as
    many as the seeds can share; with several processes all."""
    distributed: bool = False
    """One run by several processes, which Slurm, Kubernetes, MPI or a TPU pod tells of each other;
    each is given the same command."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where no cluster tells it; with NUM_PROCESSES and PROCESS_ID."""
    num_processes: int | None = None
    """How many processes make the run, beside COORDINATOR."""
    process_id: int | None = None
    """Which of them this is, from 0, beside COORDINATOR."""
    out: Path | None = None
    """The run's folder; by default runs/DATASET-DATE-TIME."""
    resume: bool = False
    """Go on with the run in OUT."""
    tensorboard: bool = False
    """Write OUT/tensorboard too: numbers each epoch; figures and weights at checkpoints."""
    wandb: str | None = None
    """Log the same to this project of Weights & Biases."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
          ConfigError: names the flag, what was expected and what was given.
        """
        counts = ("latent_dim", "num_samples", "batch_size", "epochs", "checkpoint_every", "seeds")
        for name in (*counts, "max_skipped", *(() if self.devices == "auto" else ("devices",))):
            self._refuse_unless(getattr(self, name) >= 1, name, "at least 1")
        self._refuse_unless(all(size >= 1 for size in self.hidden), "hidden", "at least 1 each")
        self._refuse_unless(0 < self.learning_rate < math.inf, "learning_rate", "positive")
        self._refuse_unless(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "positive")
        self._refuse_unless(self.nll_samples >= 0, "nll_samples", "at least 0")
        self._refuse_unless(0 <= self.stream_above < math.inf, "stream_above", "at least 0")
        expected = "at least 0 and below 1"
        self._refuse_unless(0 <= self.validation_fraction < 1, "validation_fraction", expected)
        self._refuse_unless(self.split_seed >= 0, "split_seed", "at least 0")
        within = 0 <= self.seed <= 2**32 - self.seeds
        self._refuse_unless(within, "seed", f"between 0 and 2**32 - {self.seeds}")
        self._check_processes()
        needed = BOUNDS[self.bound].num_samples_needed
        expected = (
            f"at least {needed} with --bound {self.bound} (with fewer it is another bound, or none)"
        )
        self._refuse_unless(self.num_samples >= needed, "num_samples", expected)
        if self.resume and self.out is None:
            raise ConfigError("--resume needs --out, the folder of the run to go on with")

    def _check_processes(self) -> None:
        given = (self.coordinator, self.num_processes, self.process_id)
        if None in given and any(value is not None for value in given):
            raise ConfigError("--coordinator, --num-processes and --process-id go together")
        if self.num_processes is not None and self.process_id is not None:
            self._refuse_unless(self.num_processes >= 1, "num_processes", "at least 1")
            known = 0 <= self.process_id < self.num_processes
            self._refuse_unless(known, "process_id", f"from 0 to {self.num_processes - 1}")
        if not (self.distributed or self.coordinator):
            return
        if self.seeds > 1:
            raise ConfigError("--seeds above 1 is for one process: start a run for each seed")
        if self.out is None:
            raise ConfigError("a run of several processes needs --out, a folder that all can reach")

    @property
    def all_seeds(self) -> range:
        """The seed of each model."""
        return range(self.seed, self.seed + self.seeds)

    def _refuse_unless(self, valid: bool, name: str, expected: str) -> None:
        if not valid:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} must be {expected}, got {getattr(self, name)}")

    def check_examples(self, num_train: int) -> None:
        """Refuse a batch larger than the training set.

        Raises:
          ConfigError: names both.
        """
        expected = f"at most the {num_train} training examples"
        self._refuse_unless(self.batch_size <= num_train, "batch_size", expected)

    @property
    def train_metric(self) -> str:
        """The name of the training bound in `metrics.jsonl`: estimators of the ELBO share one."""
        return f"train_{BOUNDS[self.bound].value}"
