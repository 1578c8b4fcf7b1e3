"""Strictness for every test, and the fixtures that several files share."""

import jax
import jaxtyping
import pytest

# The silent (Z,) * (K, Z) broadcast is the classic bug of a VAE.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Before anything imports jvae: its annotations are then checked at every call.
jaxtyping.install_import_hook("jvae", "beartype.beartype")

from weights import random_params  # noqa: E402

import jvae  # noqa: E402


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Annotations unchecked, as users have them: the library's own refusals are then met."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def bernoulli_params() -> jvae.Params:
    """A small Bernoulli VAE of images (2, 3)."""
    model = jvae.VAE.mlp(data_shape=(2, 3), latent_dim=2, hidden=(4,))
    return random_params(model)
