"""Likelihoods that can be trusted: estimates of log p(x) with their errors, and diagnostics."""

from jvae.evaluation.annealing import (
    Sandwich,
    ais,
    bdmc,
    linear_schedule,
    prior_start,
    sigmoid_schedule,
)
from jvae.evaluation.datasets import bound_by_example
from jvae.evaluation.diagnostics import (
    KLDecomposition,
    active_units,
    collapsed_dimensions,
    kl_decomposition,
    kl_per_dimension,
)
from jvae.evaluation.estimates import LogLikelihood, warn_if_unreliable
from jvae.evaluation.gaps import (
    InferenceGap,
    encoder_family,
    inference_gap,
    warn_if_negative,
)
from jvae.evaluation.gaussians import FullGaussian, full_covariance
from jvae.evaluation.importance import importance_sampling, log_likelihood
from jvae.evaluation.posterior_samples import app_d

__all__ = [
    "FullGaussian",
    "InferenceGap",
    "KLDecomposition",
    "LogLikelihood",
    "Sandwich",
    "active_units",
    "ais",
    "app_d",
    "bdmc",
    "bound_by_example",
    "collapsed_dimensions",
    "encoder_family",
    "full_covariance",
    "importance_sampling",
    "inference_gap",
    "kl_decomposition",
    "kl_per_dimension",
    "linear_schedule",
    "log_likelihood",
    "prior_start",
    "sigmoid_schedule",
    "warn_if_negative",
    "warn_if_unreliable",
]
