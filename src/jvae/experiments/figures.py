"""The figures of a run."""

from collections.abc import Callable

import jax
from jaxtyping import Array
from matplotlib.figure import Figure

import jvae
from jvae import plotting
from jvae.experiments import run_folder
from jvae.experiments.job import Job


def draw(job: Job, params: jvae.Params) -> None:
    """Write the figures of a finished run into its folder.

    Args:
      job: what was run.
      params: of the model; of an ensemble, the first one's.
    """
    folder = job.folder / "figures"
    folder.mkdir(exist_ok=True)
    figures = curves(job) | of_model(job, params)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)


def curves(job: Job) -> dict[str, Figure]:
    """The learning curves so far."""
    shown = {
        job.config.train_metric: f"train {job.config.bound}, mean over the epoch",
        **{f"{part}_elbo": f"{part} elbo, after the epoch" for part in job.held_out},
    }
    records = run_folder.read_metrics(job.folder)
    unit = job.protocol["units"]
    return {"curves": plotting.learning_curves(records, curves=shown, unit=unit)}


def of_model(job: Job, params: jvae.Params) -> dict[str, Figure]:
    """What the model draws: images, or the marginals of data that is none."""
    if job.shown is None:
        return _marginals(job, params)
    return _images(job, params, job.shown)


def _images(job: Job, params: jvae.Params, shown: Callable[[Array], Array]) -> dict[str, Figure]:
    sample_key, reconstruct_key = jax.random.split(job.keys[0].figures)
    shape = job.model.data_shape
    # As one program each: of forty operations most of the time would be their compilation.
    means = jax.jit(jvae.sample, static_argnums=2)(params, sample_key, 100)
    x = job.test[:50]
    reconstructed = jax.jit(jvae.reconstruct)(params, x, reconstruct_key)
    cmap = "gray_r" if job.config.likelihood == "bernoulli" else "gray"  # ink, or light
    figures = {
        "samples": plotting.image_grid(
            shown(means).reshape(10, 10, *shape),
            title="Means of p(x|z), z from the prior",
            cmap=cmap,
        ),
        "reconstructions": plotting.reconstructions(shown(x), shown(reconstructed), cmap=cmap),
    }
    if job.config.latent_dim == 2:
        z = plotting.latent_grid(20).reshape(400, 2)
        means = jvae.likelihood(params, z).mean
        figures["manifold"] = plotting.image_grid(
            shown(means).reshape(20, 20, *shape),
            title="Means of p(x|z), z at equal steps of prior probability",
            cmap=cmap,
        )
    return figures


def _marginals(job: Job, params: jvae.Params) -> dict[str, Figure]:
    z_key, x_key = jax.random.split(job.keys[0].figures)
    prior = jvae.prior(params)
    z = jax.vmap(prior.sample)(jax.random.split(z_key, len(job.test)))
    drawn = jvae.likelihood(params, z).sample(x_key)
    return {"marginals": plotting.marginals(job.test, drawn)}
