"""Auto-Encoding Variational Bayes as pure JAX functions."""

import importlib
import typing

from jvae import (
    binarisation,
    data,
    distributions,
    estimators,
    evaluation,
    learners,
    models,
    networks,
    priors,
    training,
)
from jvae.estimators import (
    beta_elbo,
    ciwae,
    cubo,
    dreg,
    elbo,
    free_bits_elbo,
    iwae,
    minibatch_elbo,
    miwae,
    piwae,
    renyi,
    rws,
    score_function,
    sgvb_a,
    sgvb_b,
    sleep_phi,
    stl,
    tvo,
    vimco,
    wake_phi,
    wake_theta,
)
from jvae.evaluation import log_likelihood
from jvae.models import (
    VAE,
    Params,
    init,
    likelihood,
    posterior,
    prior,
    reconstruct,
    sample,
)
from jvae.networks import Bernoulli, Gaussian

if typing.TYPE_CHECKING:
    from jvae import bundle as bundle
    from jvae import checkpoint as checkpoint
    from jvae import distributed as distributed
    from jvae import forensics as forensics
    from jvae import plotting as plotting

__version__ = "0.1.0"

# Imported when they are asked for: Orbax and matplotlib take a second.
_LATER = ("bundle", "checkpoint", "distributed", "forensics", "plotting")


def __getattr__(name: str) -> typing.Any:
    if name in _LATER:
        return importlib.import_module(f"jvae.{name}")
    raise AttributeError(f"module 'jvae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__all__ = [
    "VAE",
    "Bernoulli",
    "Gaussian",
    "Params",
    "beta_elbo",
    "binarisation",
    "ciwae",
    "cubo",
    "data",
    "distributions",
    "dreg",
    "elbo",
    "estimators",
    "evaluation",
    "free_bits_elbo",
    "init",
    "iwae",
    "learners",
    "likelihood",
    "log_likelihood",
    "minibatch_elbo",
    "miwae",
    "models",
    "networks",
    "piwae",
    "posterior",
    "prior",
    "priors",
    "reconstruct",
    "renyi",
    "rws",
    "sample",
    "score_function",
    "sgvb_a",
    "sgvb_b",
    "sleep_phi",
    "stl",
    "training",
    "tvo",
    "vimco",
    "wake_phi",
    "wake_theta",
]
