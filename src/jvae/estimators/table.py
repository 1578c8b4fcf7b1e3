"""The table of bounds, which commands, documents, benchmarks and tests read.

A new bound is one function and one row.
"""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from jvae.estimators.importance import ciwae, iwae, miwae, piwae
from jvae.estimators.pathwise import dreg, stl
from jvae.estimators.powers import cubo, renyi, tvo
from jvae.estimators.sampling import Bound
from jvae.estimators.scores import score_function, vimco
from jvae.estimators.sgvb import beta_elbo, elbo, free_bits_elbo, sgvb_a
from jvae.estimators.wake_sleep import rws, sleep_phi, wake_phi, wake_theta


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of a bound.

    Attributes:
      function: `(params, x, key, *, num_samples=…) -> [*batch] nats`.
      summary: what it is, in a few words.
      value: the name of what it returns an estimate of; bounds that differ in how they draw or
        differentiate it share one.
      bounds: what the value's expectation is to log p(x), with the default settings; an estimate
        of an upper bound may be one only for many samples.
      gradient: what its gradient estimates, and how well.
      trains: the weights that ascending it is meant to train; a bound of both θ and φ is one to
        train a VAE by.
      source: paper, and equation or section.
      settings: keyword arguments that the function has no default for.
      num_samples_needed: with fewer it is another bound, or none.
    """

    function: Bound
    summary: str
    value: str
    bounds: Literal["lower", "upper as K → ∞", "neither"]
    gradient: str
    trains: Literal["both", "theta", "phi", "none"]
    source: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_samples_needed: int = 1

    @property
    def bound(self) -> Bound:
        """The function with its settings, as training takes it."""
        return functools.partial(self.function, **self.settings) if self.settings else self.function


TABLE: Mapping[str, Row] = MappingProxyType(
    {
        "elbo": Row(
            function=elbo,
            summary="SGVB B: the ELBO with its KL in closed form",
            value="elbo",
            bounds="lower",
            gradient="unbiased, reparameterised",
            trains="both",
            source="Kingma & Welling (2014), eq. 7",
        ),
        "sgvb_a": Row(
            function=sgvb_a,
            summary="SGVB A: the ELBO all by Monte Carlo",
            value="elbo",
            bounds="lower",
            gradient="unbiased, reparameterised",
            trains="both",
            source="Kingma & Welling (2014), eq. 6",
        ),
        "stl": Row(
            function=stl,
            summary="SGVB A by path derivatives",
            value="elbo",
            bounds="lower",
            gradient="unbiased, path derivative: φ's is zero at q = p(z|x)",
            trains="both",
            source="Roeder, Wu & Duvenaud (2017), Section 3",
        ),
        "score_function": Row(
            function=score_function,
            summary="SGVB A by the score function",
            value="elbo",
            bounds="lower",
            gradient="unbiased, score function with or without a baseline",
            trains="both",
            source="Paisley, Blei & Jordan (2012); Kingma & Welling (2014), Section 2.2",
        ),
        "beta_elbo": Row(
            function=beta_elbo,
            summary="the ELBO with its KL weighted by β",
            value="beta_elbo",
            bounds="lower",
            gradient="unbiased, reparameterised",
            trains="both",
            source="Higgins et al. (2017), eq. 4",
            settings={"beta": 4.0},
        ),
        "free_bits_elbo": Row(
            function=free_bits_elbo,
            summary="the ELBO with λ nats of every latent's KL free",
            value="free_bits_elbo",
            bounds="lower",
            gradient="unbiased, reparameterised",
            trains="both",
            source="Kingma et al. (2016), eq. 15",
            settings={"free_nats": 0.25},
        ),
        "iwae": Row(
            function=iwae,
            summary="the importance-weighted bound",
            value="iwae",
            bounds="lower",
            gradient="unbiased, reparameterised",
            trains="both",
            source="Burda, Grosse & Salakhutdinov (2016), eq. 8",
            num_samples_needed=2,
        ),
        "dreg": Row(
            function=dreg,
            summary="IWAE, doubly reparameterised",
            value="iwae",
            bounds="lower",
            gradient="unbiased; φ's doubly reparameterised",
            trains="both",
            source="Tucker et al. (2019)",
            num_samples_needed=2,
        ),
        "vimco": Row(
            function=vimco,
            summary="IWAE by the score function, baselines of the other draws",
            value="iwae",
            bounds="lower",
            gradient="unbiased, score function",
            trains="both",
            source="Mnih & Rezende (2016)",
            num_samples_needed=2,
        ),
        "miwae": Row(
            function=miwae,
            summary="the mean of M importance-weighted bounds",
            value="miwae",
            bounds="lower",
            gradient="unbiased, reparameterised",
            trains="both",
            source="Rainforth et al. (2018)",
            num_samples_needed=2,
        ),
        "ciwae": Row(
            function=ciwae,
            summary="β ELBO + (1 - β) IWAE",
            value="ciwae",
            bounds="lower",
            gradient="unbiased, reparameterised",
            trains="both",
            source="Rainforth et al. (2018)",
            num_samples_needed=2,
        ),
        "piwae": Row(
            function=piwae,
            summary="IWAE of M K draws for θ, MIWAE for φ",
            value="piwae",
            bounds="lower",
            gradient="unbiased: of IWAE for θ, of MIWAE for φ",
            trains="both",
            source="Rainforth et al. (2018)",
        ),
        "renyi": Row(
            function=renyi,
            summary="the variational Rényi bound of order α",
            value="renyi",
            bounds="lower",
            gradient="unbiased for its K-sample value, reparameterised",
            trains="both",
            source="Li & Turner (2016)",
            num_samples_needed=2,
        ),
        "tvo": Row(
            function=tvo,
            summary="the thermodynamic variational objective",
            value="tvo",
            bounds="lower",
            gradient="covariance: unbiased for θ, consistent for φ",
            trains="both",
            source="Masrani, Le & Wood (2019)",
            num_samples_needed=2,
        ),
        "rws": Row(
            function=rws,
            summary="reweighted wake-sleep, both wake phases",
            value="iwae",
            bounds="lower",
            gradient="unbiased of IWAE for θ; consistent of -KL(p(z|x) ‖ q(z|x)) for φ",
            trains="both",
            source="Bornschein & Bengio (2015)",
            num_samples_needed=2,
        ),
        "wake_theta": Row(
            function=wake_theta,
            summary="wake phase of reweighted wake-sleep, θ",
            value="iwae",
            bounds="lower",
            gradient="unbiased of IWAE for θ; none for φ",
            trains="theta",
            source="Bornschein & Bengio (2015)",
        ),
        "wake_phi": Row(
            function=wake_phi,
            summary="wake phase of reweighted wake-sleep, φ",
            value="wake_phi",
            bounds="neither",
            gradient="consistent of -KL(p(z|x) ‖ q(z|x)) for φ; none for θ",
            trains="phi",
            source="Bornschein & Bengio (2015)",
            num_samples_needed=2,
        ),
        "sleep_phi": Row(
            function=sleep_phi,
            summary="sleep phase: log q(z|x) of dreams (x, z) ~ p",
            value="sleep_phi",
            bounds="neither",
            gradient="unbiased of -E_p(x) KL(p(z|x) ‖ q(z|x)) for φ; none for θ",
            trains="phi",
            source="Hinton et al. (1995); Bornschein & Bengio (2015)",
        ),
        "cubo": Row(
            function=cubo,
            summary="the χ upper bound, estimated low; to be made small",
            value="cubo",
            bounds="upper as K → ∞",
            gradient="unbiased for its K-sample value, reparameterised",
            trains="none",
            source="Dieng et al. (2017)",
            num_samples_needed=2,
        ),
    }
)
