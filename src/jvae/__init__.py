"""Auto-Encoding Variational Bayes as pure JAX functions."""

from jvae import (
    binarisation,
    data,
    distributions,
    estimators,
    evaluation,
    models,
    networks,
    priors,
    training,
)
from jvae.estimators import (
    beta_elbo,
    elbo,
    free_bits_elbo,
    iwae,
    minibatch_elbo,
    sgvb_a,
    sgvb_b,
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

__version__ = "0.1.0"

__all__ = [
    "VAE",
    "Bernoulli",
    "Gaussian",
    "Params",
    "beta_elbo",
    "binarisation",
    "data",
    "distributions",
    "elbo",
    "estimators",
    "evaluation",
    "free_bits_elbo",
    "init",
    "iwae",
    "likelihood",
    "log_likelihood",
    "minibatch_elbo",
    "models",
    "networks",
    "posterior",
    "prior",
    "priors",
    "reconstruct",
    "sample",
    "sgvb_a",
    "sgvb_b",
    "training",
]
