"""What can be evaluated of the models of a finished run, each a part of `evaluation.json`."""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.figure import Figure

import jvae
from jvae import evaluation, plotting
from jvae.experiments import results
from jvae.experiments.finished import FinishedRun
from jvae.experiments.results import MIN_ESS

# Examples that share a key, and that are done before progress shows and a signal is heard.
GROUP = 50
COLLAPSED_BELOW = 0.01
_NUM_LEAPFROG = 10
APP_D_SAMPLES = 50
_ASCENT_STEPS = 1000
_ELBO_SAMPLES = 1000
_SCHEDULES = {"linear": evaluation.linear_schedule, "sigmoid": evaluation.sigmoid_schedule}
_STARTS = {"prior": evaluation.prior_start, "posterior": jvae.posterior}
# I(x; z) of N examples this near to log N says little but that N is too small.
_NATS_BELOW_LOG_NUM = 0.5
# Keys of evaluation are in a domain of their own, which no key of training meets.
_DOMAIN = 20150901

# What tables call a result, where its name alone would be taken for more than it is.
LABELS = {
    "mutual_information": "mutual_information (the population's: at least)",
    "mutual_information_at_most": "log N, the most that mutual_information can be",
    "marginal_kl": "marginal_kl (the population's: at most)",
}

# Numbers of a part by name, each [models, ...].
Arrays: TypeAlias = Mapping[str, np.ndarray]
Advance: TypeAlias = Callable[[int], object]


class Keys(NamedTuple):
    """The key of each part; a model folds its run's seed into it."""

    importance_sampling: PRNGKeyArray
    latents: PRNGKeyArray
    train_draw: PRNGKeyArray
    train_importance_sampling: PRNGKeyArray
    train_elbo: PRNGKeyArray
    test_elbo: PRNGKeyArray
    ais: PRNGKeyArray
    bdmc: PRNGKeyArray
    app_d: PRNGKeyArray
    inference_gap: PRNGKeyArray

    @classmethod
    def of(cls, seed: int) -> "Keys":
        """All keys, from the seed of an evaluation."""
        key = jax.random.fold_in(jax.random.key(seed), _DOMAIN)
        return cls(*jax.random.split(key, len(cls._fields)))


class Annealing(NamedTuple):
    """How chains go from the start to p(z|x)."""

    num_temperatures: int
    num_chains: int
    schedule: str
    start: str

    @property
    def settings(self) -> dict[str, Any]:
        """As `evaluation.json` has them."""
        return {**self._asdict(), "num_leapfrog": _NUM_LEAPFROG}

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `ais` and `bdmc`."""
        names = {"schedule": _SCHEDULES[self.schedule], "start": _STARTS[self.start]}
        return self.settings | names


class Part(NamedTuple):
    """One part.

    Attributes:
      name: its name.
      settings: all that its numbers depend on, beside data and weights.
      amount: how far `compute` advances for a model.
      compute: from the index of a model, and what to tell of progress, to its arrays.
      summarise: from the arrays of all models to results with their errors.
      figure: the name of its figure, or None.
      draw: from the same arrays to it.
    """

    name: str
    settings: dict[str, Any]
    amount: int
    compute: Callable[[int, Advance], Arrays]
    summarise: Callable[[Arrays], dict[str, Any]]
    figure: str | None = None
    draw: Callable[[Arrays], Figure] | None = None


def importance_sampling(run: FinishedRun, seed: int, *, num_samples: int, repeats: int) -> Part:
    """-log p(x) of the whole test set, `repeats` times with keys that differ."""
    x = run.inputs.test

    def compute(member: int, advance: Advance) -> Arrays:
        key = _key(run, member, Keys.of(seed).importance_sampling)
        estimate = functools.partial(
            evaluation.importance_sampling, run.params[member], num_samples=num_samples
        )
        by_repeat = [in_groups(estimate, x, k, advance) for k in jax.random.split(key, repeats)]
        result = jax.tree.map(lambda *leaves: np.stack(leaves), *by_repeat)
        worst = result._replace(ess=result.ess.min(axis=0))
        evaluation.warn_if_unreliable(worst, min_ess=MIN_ESS)
        return _likelihood_arrays(result)

    def summarise(arrays: Arrays) -> dict[str, Any]:
        by_repeat = -arrays["log_px"].mean(axis=2)
        spread = {}
        if repeats > 1:
            variance = by_repeat.var(axis=1, ddof=1).mean()
            spread = {
                "nll_by_repeat": _of_models(by_repeat),
                "nll_sd_over_repeats": math.sqrt(variance),
                "nll_stderr_over_repeats": math.sqrt(variance / by_repeat.size),
            }
        nll = results.summary("nll", list(-arrays["log_px"].mean(axis=1)))
        return {**nll, **spread, **_trust(arrays)}

    def draw(arrays: Arrays) -> Figure:
        return plotting.effective_samples(arrays["ess"], num_samples=num_samples, least=MIN_ESS)

    settings = {
        "estimator": "importance sampling from q(z|x)",
        "num_samples": num_samples,
        "repeats": repeats,
        **_common(seed, "the whole test set", len(x)),
    }
    return Part("importance_sampling", settings, repeats * len(x), compute, summarise, "ess", draw)


def latents(run: FinishedRun, seed: int, *, num: int) -> Part:
    """What the latents are used for over the test set; I(x; z) over `num` images of it."""
    x = run.inputs.test

    def compute(member: int, advance: Advance) -> Arrays:
        params = run.params[member]
        kl = np.asarray(evaluation.kl_per_dimension(params, x), np.float64)
        collapsed = evaluation.collapsed_dimensions(params, x, threshold=COLLAPSED_BELOW)
        if collapsed.any():
            which = ", ".join(str(i) for i in np.flatnonzero(collapsed))
            warnings.warn(
                f"posterior collapse of {collapsed.sum()} of {kl.size} latents, whose mean KL is "
                f"below {COLLAPSED_BELOW:g} nats: {which} (counted from 0)",
                stacklevel=1,
            )
        key = _key(run, member, Keys.of(seed).latents)
        parts = evaluation.kl_decomposition(params, x[chosen(len(x), num)], key)
        informed = float(parts.mutual_information.mean())
        if informed > math.log(num) - _NATS_BELOW_LOG_NUM:
            warnings.warn(
                f"I(x; z) is {informed:.3f} nats of the log N = {math.log(num):.3f} that {num} "
                "examples can show: of the population it may be far larger, and KL(q(z) ‖ p(z)) "
                "smaller; take more examples (--mutual-information)",
                stacklevel=1,
            )
        advance(1)
        return {
            "active": np.asarray(evaluation.active_units(params, x)),
            "kl_per_dimension": kl,
            "collapsed": np.asarray(collapsed),
            "mutual_information": np.asarray(parts.mutual_information, np.float64),
            "marginal_kl": np.asarray(parts.marginal_kl, np.float64),
        }

    def summarise(arrays: Arrays) -> dict[str, Any]:
        kl = arrays["kl_per_dimension"]
        return {
            **_of_members("active_units", arrays["active"].sum(axis=1)),
            **_of_members("kl", kl.sum(axis=1)),
            "kl_per_dimension": _of_models(kl),
            "collapsed_dimensions": _of_models(
                [np.flatnonzero(of_one).tolist() for of_one in arrays["collapsed"]]
            ),
            **results.summary("mutual_information", list(arrays["mutual_information"])),
            "mutual_information_at_most": math.log(num),
            **results.summary("marginal_kl", list(arrays["marginal_kl"])),
        }

    def draw(arrays: Arrays) -> Figure:
        return plotting.kl_per_dimension(arrays["kl_per_dimension"], threshold=COLLAPSED_BELOW)

    settings = {
        "estimator": "closed-form KL over the whole test set; I(x; z) and KL(q(z) ‖ p(z)) with one "
        "draw of z an example and q(z) the mixture over the examples",
        "active_above": 0.01,
        "collapsed_below": COLLAPSED_BELOW,
        **_common(seed, _CHOSEN, num),
    }
    return Part("latents", settings, 1, compute, summarise, "kl_per_dimension", draw)


def train_gap(
    run: FinishedRun, seed: int, test_log_px: np.ndarray, *, num_samples: int, repeats: int
) -> Part:
    """How much worse the test set is than as many training examples, under one protocol.

    Args:
      run: the run.
      seed: of the evaluation.
      test_log_px: [models, repeats, num_test] by `importance_sampling`.
      num_samples: K of both.
      repeats: of the test set's.
    """
    x = run.inputs.test
    num = min(len(x), len(run.inputs.train))

    def compute(member: int, advance: Advance) -> Arrays:
        keys, params = Keys.of(seed), run.params[member]
        train = training_examples(run, num, keys.train_draw)
        estimate = functools.partial(
            evaluation.importance_sampling, params, num_samples=num_samples
        )
        key = _key(run, member, keys.train_importance_sampling)
        result = in_groups(estimate, train, key, advance)
        evaluation.warn_if_unreliable(result, min_ess=MIN_ESS)

        def elbos(x: Array, key: PRNGKeyArray) -> np.ndarray:
            key = _key(run, member, key)
            values = evaluation.bound_by_example(params, x, key, bound=jvae.elbo)
            return np.asarray(values, np.float64)

        return {
            "train_log_px": result.estimate,
            "train_elbo": elbos(train, keys.train_elbo),
            "test_elbo": elbos(x, keys.test_elbo),
        }

    def summarise(arrays: Arrays) -> dict[str, Any]:
        train_nll, test_nll = -arrays["train_log_px"], -test_log_px.mean(axis=1)
        return {
            **results.summary("train_nll", list(train_nll)),
            **_difference("nll_gap", test_nll, train_nll),
            **results.summary("train_elbo", list(arrays["train_elbo"])),
            **results.summary("test_elbo", list(arrays["test_elbo"])),
            **_difference("elbo_gap", arrays["train_elbo"], arrays["test_elbo"]),
        }

    settings = {
        "estimator": "test less train of -log p(x) by importance sampling from q(z|x), train less "
        "test of SGVB B with one sample of z an example",
        "num_samples": num_samples,
        "test_repeats": repeats,
        **_common(seed, f"{_CHOSEN} of the training part, drawn once", num),
    }
    return Part("train_gap", settings, num, compute, summarise)


def ais(run: FinishedRun, seed: int, *, num: int, annealing: Annealing) -> Part:
    """-log p(x) of `num` test images by annealed importance sampling."""

    def estimate(params: jvae.Params, x: Array, key: PRNGKeyArray) -> evaluation.LogLikelihood:
        return evaluation.ais(params, x, key, **annealing.arguments)

    settings = {"estimator": "annealed importance sampling", **annealing.settings}
    return _likelihood_part(run, "ais", seed, num, estimate, settings)


def ais_paired(annealed: np.ndarray, sampled: np.ndarray, sources: Mapping[str, Any]) -> Part:
    """How far AIS is above importance sampling on the same test images.

    Args:
      annealed: [models, num] log p(x) by AIS.
      sampled: [models, num] log p(x) of the same images by importance sampling.
      sources: the settings of both.
    """
    num = annealed.shape[1]

    def compute(member: int, advance: Advance) -> Arrays:
        advance(num)
        return {"annealed": annealed[member], "sampled": sampled[member]}

    def summarise(arrays: Arrays) -> dict[str, Any]:
        above = arrays["annealed"] - arrays["sampled"]
        return {
            **results.summary("log_px_above_importance_sampling", list(above)),
            **results.summary("nll_by_ais", list(-arrays["annealed"])),
            **results.summary("nll_by_importance_sampling", list(-arrays["sampled"])),
        }

    settings = {
        "estimator": "log p(x) by AIS less that by importance sampling, image by image",
        "examples": _CHOSEN,
        "num_examples": num,
        **sources,
    }
    return Part("ais_paired", settings, num, compute, summarise)


def app_d(run: FinishedRun, seed: int, *, num: int) -> Part:
    """-log p(x) of `num` test images by the estimator of the paper's App. D."""

    def estimate(params: jvae.Params, x: Array, key: PRNGKeyArray) -> evaluation.LogLikelihood:
        return evaluation.app_d(params, x, key, num_samples=APP_D_SAMPLES)

    settings = {
        "estimator": "Kingma & Welling (2014), App. D: p(x) is too high in expectation, were the "
        "samples exact",
        "num_samples": APP_D_SAMPLES,
    }
    return _likelihood_part(run, "app_d", seed, num, estimate, settings)


def _likelihood_part(
    run: FinishedRun,
    name: Literal["ais", "app_d"],
    seed: int,
    num: int,
    estimate: Callable[[jvae.Params, Array, PRNGKeyArray], evaluation.LogLikelihood],
    settings: dict[str, Any],
) -> Part:
    x = run.inputs.test

    def compute(member: int, advance: Advance) -> Arrays:
        key = _key(run, member, getattr(Keys.of(seed), name))
        of_model = functools.partial(estimate, run.params[member])
        result = in_groups(of_model, x[chosen(len(x), num)], key, advance)
        evaluation.warn_if_unreliable(result, min_ess=MIN_ESS, estimator=name)
        return _likelihood_arrays(result)

    def summarise(arrays: Arrays) -> dict[str, Any]:
        return {**results.summary("nll", list(-arrays["log_px"])), **_trust(arrays)}

    return Part(name, {**settings, **_common(seed, _CHOSEN, num)}, num, compute, summarise)


def bdmc(run: FinishedRun, seed: int, *, num: int, annealing: Annealing) -> Part:
    """Log p(x) of `num` examples of the model itself, bounded from both sides."""

    def compute(member: int, advance: Advance) -> Arrays:
        def bounds(indices: np.ndarray, key: PRNGKeyArray) -> evaluation.Sandwich:
            params = run.params[member]
            return evaluation.bdmc(params, key, num_examples=len(indices), **annealing.arguments)

        key = _key(run, member, Keys.of(seed).bdmc)
        found = in_groups(bounds, np.arange(num), key, advance)
        return {"lower": found.lower, "upper": found.upper}

    def summarise(arrays: Arrays) -> dict[str, Any]:
        lower, upper = arrays["lower"], arrays["upper"]
        return {
            **results.summary("log_px_lower", list(lower)),
            **results.summary("log_px_upper", list(upper)),
            **results.summary("gap", list(upper - lower)),
        }

    def draw(arrays: Arrays) -> Figure:
        return plotting.sandwich(arrays["lower"].ravel(), arrays["upper"].ravel())

    settings = {
        "estimator": "bidirectional Monte Carlo",
        **annealing.settings,
        **_common(seed, "simulated by the model", num),
    }
    return Part("bdmc", settings, num, compute, summarise, "sandwich", draw)


class Source(NamedTuple):
    """Where the log p(x) of an inference gap is from.

    Attributes:
      estimator: the function that it is from.
      settings: of that part.
      log_px: [models, num] nats.
      ess: [models, num], its effective sample sizes.
    """

    estimator: Literal["importance_sampling", "ais"]
    settings: Mapping[str, Any]
    log_px: np.ndarray
    ess: np.ndarray


def inference_gap(run: FinishedRun, seed: int, source: Source, *, num: int) -> Part:
    """Log p(x) - ELBO of `num` test images: what the family of q leaves, and what the encoder.

    Args:
      run: the run.
      seed: of the evaluation.
      source: the best estimate of log p(x) there is.
      num: how many images.
    """
    x = run.inputs.test
    families = {"diagonal": evaluation.encoder_family, "full": evaluation.full_covariance}

    def compute(member: int, advance: Advance) -> Arrays:
        key = _key(run, member, Keys.of(seed).inference_gap)
        log_px, ess = source.log_px[member], source.ess[member]
        of_source: Any = (log_px, np.full(num, np.inf), ess)  # its errors are not asked for
        evaluation.warn_if_unreliable(
            evaluation.LogLikelihood(*of_source), min_ess=MIN_ESS, estimator=source.estimator
        )
        examples = (x[chosen(len(x), num)], jnp.asarray(log_px, jnp.float32))
        gaps: dict[str, evaluation.InferenceGap] = {}
        for name, family in families.items():

            def split(
                pair: tuple[Array, Array], key: PRNGKeyArray, family: Any = family
            ) -> evaluation.InferenceGap:
                image, estimate = pair
                return evaluation.inference_gap(
                    run.params[member],
                    image,
                    key,
                    estimate,
                    family=family,
                    num_steps=_ASCENT_STEPS,
                    num_samples=_ELBO_SAMPLES,
                )

            # The same key: what differs between the families is then no noise of the draws.
            gaps[name] = in_groups(split, examples, key, advance)
            evaluation.warn_if_negative(gaps[name], family=f"the {name} Gaussians")
        diagonal, full = gaps["diagonal"], gaps["full"]
        return {
            "approximation_diagonal": diagonal.approximation,
            # Within the encoder's own family alone it is what amortisation costs.
            "amortisation_diagonal": diagonal.amortisation,
            "approximation_full": full.approximation,
            "gain_of_covariance": diagonal.approximation - full.approximation,
            "total": diagonal.approximation + diagonal.amortisation,
            "log_px_ess": ess,
        }

    def summarise(arrays: Arrays) -> dict[str, Any]:
        gaps = {name: array for name, array in arrays.items() if name != "log_px_ess"}
        summaries = [results.summary(name, list(array)) for name, array in gaps.items()]
        found = {name: value for summary in summaries for name, value in summary.items()}
        return found | results.effective_samples("log_px_", arrays["log_px_ess"])

    settings = {
        "estimator": "Cremer, Li & Duvenaud (2018), q diagonal and of full covariance",
        "num_steps": _ASCENT_STEPS,
        "num_samples": _ELBO_SAMPLES,
        "log_px": dict(source.settings),
        **_common(seed, _CHOSEN, num),
    }
    return Part("inference_gap", settings, len(families) * num, compute, summarise)


_CHOSEN = "the first of a fixed random order"


def chosen(num: int, how_many: int) -> np.ndarray:
    """Indices of the first examples of a fixed random order of `num`, the same for ever.

    Fewer examples are among more, so that estimates of different parts meet on the same ones.
    """
    return np.argsort(np.random.PCG64(0).random_raw(num), kind="stable")[:how_many]


def training_examples(run: FinishedRun, num: int, key: PRNGKeyArray) -> Float[Array, "num ..."]:
    """As the run trains on them, drawn once."""
    train, preprocess = run.inputs.train, run.inputs.preprocess
    indices = chosen(len(train), num)
    if isinstance(train, jax.Array):
        examples = train[indices]
    else:  # read from the disk one at a time
        examples = jnp.asarray(np.stack([np.asarray(train[int(i)]) for i in indices]))
    return examples if preprocess is None else preprocess(examples, key)


def in_groups(
    function: Callable[[Any, PRNGKeyArray], Any], x: Any, key: PRNGKeyArray, advance: Advance
) -> Any:
    """`function(x, key)` of `GROUP` examples after `GROUP` examples, each group with a key.

    Args:
      function: from examples and a key to a pytree of arrays [num, ...].
      x: a pytree of arrays [num, ...].
      key: split into one a group.
      advance: told how many examples were done.

    Returns:
      The pytree over all examples, as float64 of NumPy.
    """
    num = len(jax.tree.leaves(x)[0])
    done = []
    for start, group_key in zip(
        range(0, num, GROUP), jax.random.split(key, math.ceil(num / GROUP)), strict=True
    ):
        group = jax.tree.map(lambda leaf, i=start: leaf[i : i + GROUP], x)
        result = function(group, group_key)
        done.append(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), result))
        advance(min(GROUP, num - start))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *done)


def _key(run: FinishedRun, member: int, key: PRNGKeyArray) -> PRNGKeyArray:
    """Models of a run draw noise of their own, so that errors over seeds hold it."""
    return jax.random.fold_in(key, run.seeds[member])


def _common(seed: int, examples: str, num: int) -> dict[str, Any]:
    return {"examples": examples, "num_examples": num, "examples_a_key": GROUP, "seed": seed}


def _of_models(values: Any) -> Any:
    """As JSON: of one model its value, of more a list."""
    listed = values.tolist() if isinstance(values, np.ndarray) else list(values)
    return listed[0] if len(listed) == 1 else listed


def _of_members(name: str, values: np.ndarray) -> dict[str, Any]:
    """One number a model, [models]: of one model it, of more their mean with its error."""
    if len(values) > 1:
        return results.summary(name, list(values[:, None]))
    return {name: values.tolist()[0]}


def _likelihood_arrays(result: Any) -> Arrays:
    """What is kept of a `LogLikelihood` in NumPy; one weight alone tells of no standard error."""
    kept = {"log_px": result.estimate, "ess": result.ess}
    return kept if np.isinf(result.stderr).all() else kept | {"stderr": result.stderr}


def _trust(arrays: Arrays) -> dict[str, Any]:
    """The error of a mean log p(x) by sampling alone, and the effective sample sizes."""
    by_sampling = results.sampling_error("nll", arrays["stderr"]) if "stderr" in arrays else {}
    return {**by_sampling, **results.effective_samples("", arrays["ess"])}


def _difference(name: str, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """The difference of two sets of examples, each [models, num], as `results.summary` has it."""
    by_model = a.mean(axis=1) - b.mean(axis=1)
    if len(by_model) > 1:
        return _of_members(name, by_model)
    squared = sum(part[0].var(ddof=1) / part.shape[1] for part in (a, b))
    return {name: float(by_model[0]), f"{name}_stderr": math.sqrt(squared)}
