"""Strictness for every test, and the fixtures that several files share."""

import os
import signal
from collections.abc import Iterator

import jax
import jaxtyping
import pytest

# Compilation takes longer than the small programs of these tests run; new processes inherit this.
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 11):  # later ones know no other emitters, and not this flag
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
# For what is spread over devices; everything else runs on the first.
jax.config.update("jax_num_cpu_devices", 8)
# The silent (Z,) * (K, Z) broadcast is the classic bug of a VAE.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Before anything imports jvae: its annotations are then checked at every call.
jaxtyping.install_import_hook("jvae", "beartype.beartype")

from weights import random_params  # noqa: E402

import jvae  # noqa: E402

# Runs that several files share are made once; the second of these imports the first.
pytest_plugins = ["tiny_runs", "tiny_evaluations"]


@pytest.fixture(scope="session", autouse=True)
def _nothing_at_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Datasets and compiled programs are those that tests make, whatever the user has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    """A command sets its own handler of SIGTERM, and then its process ends."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Annotations unchecked, as users have them: the library's own refusals are then met."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def bernoulli_params() -> jvae.Params:
    """A small Bernoulli VAE of images (2, 3)."""
    model = jvae.VAE.mlp(data_shape=(2, 3), latent_dim=2, hidden=(4,))
    return random_params(model)
