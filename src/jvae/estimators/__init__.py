"""Bounds on log p(x): functions `(params, x, key, *, num_samples=…) -> nats per example`.

Nothing is reduced over the batch, and all but `cubo` are better the higher. `table.TABLE` says of
each what it bounds, what its gradient estimates and where it is from.
"""

from jvae.estimators.importance import ciwae, iwae, miwae, piwae
from jvae.estimators.pathwise import dreg, stl
from jvae.estimators.powers import cubo, renyi, tvo
from jvae.estimators.sampling import (
    Bound,
    LogDensities,
    log_mean_exp,
    log_power_mean,
    with_gradient_of,
)
from jvae.estimators.scores import score_function, vimco
from jvae.estimators.sgvb import beta_elbo, elbo, free_bits_elbo, minibatch_elbo, sgvb_a, sgvb_b
from jvae.estimators.table import TABLE, Row
from jvae.estimators.wake_sleep import rws, sleep_phi, wake_phi, wake_theta

__all__ = [
    "TABLE",
    "Bound",
    "LogDensities",
    "Row",
    "beta_elbo",
    "ciwae",
    "cubo",
    "dreg",
    "elbo",
    "free_bits_elbo",
    "iwae",
    "log_mean_exp",
    "log_power_mean",
    "minibatch_elbo",
    "miwae",
    "piwae",
    "renyi",
    "rws",
    "score_function",
    "sgvb_a",
    "sgvb_b",
    "sleep_phi",
    "stl",
    "tvo",
    "vimco",
    "wake_phi",
    "wake_theta",
    "with_gradient_of",
]
