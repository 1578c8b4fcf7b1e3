"""A finished run is read with its settings and with its data exactly as it had them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_evaluations import DEFAULT, QUICK, call, order, train_on
from tiny_runs import NUM, pixels, save_npy, save_pngs
from weights import random_params

from jvae import binarisation, checkpoint, data
from jvae.experiments import config as common
from jvae.experiments import finished, inputs, loop, parts, run_folder
from jvae.experiments.job import Job

pytestmark = pytest.mark.usefixtures("quick_evaluations")


def save_untrained(job: Job, **how: object) -> dict[str, Any]:
    """What a run leaves for evaluation, without a step of training."""
    run_folder.create(job.folder, job.settings())
    params = random_params(job.model)
    checkpoint.save(job.folder / "model.safetensors", params)
    run_folder.write_json(job.folder / "result.json", {"protocol": job.protocol})
    return {}


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "run", save_untrained)


def table() -> np.ndarray:
    return np.random.default_rng(0).normal([0, 5], [1, 9], (NUM, 2)).astype(np.float32)


# Its file, the run's settings, and from training examples and a key to x.
KINDS: dict[str, tuple[Callable[[Path], Path], dict[str, Any], Callable[..., Any]]] = {
    "a stream of grey images": (
        lambda path: save_pngs(path, pixels(3, 2)),
        {"stream_above": 0.0},
        binarisation.bernoulli,
    ),
    "static": (
        lambda path: save_npy(path, pixels(3, 2)),
        {"binarisation": "static"},
        lambda x, key: binarisation.bernoulli(
            x, jax.random.split(binarisation.fixed_draw_key())[0]
        ),
    ),
    "colour": (
        lambda path: save_npy(path, pixels(3, 2, 3)),
        {},
        binarisation.dequantise,
    ),
    "table": (
        lambda path: save_npy(path, table()),
        {},
        lambda x, key: (x - x.mean(axis=0)[None]) / x.std(axis=0)[None],
    ),
    "bits": (
        lambda path: save_npy(path, (pixels(5) > 99).astype(np.float32)),
        {},
        lambda x, key: x,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("untrained")
def test_data_of_every_kind(kind: str, tmp_path: Path) -> None:
    write, changes, preprocess = KINDS[kind]
    path = write(tmp_path / "mine")
    folder = train_on(path, tmp_path / "run", **changes)
    if kind in ("a stream of grey images", "table"):
        assert list(call(folder, num_samples=5)["parts"]) == DEFAULT
    # Test examples are those of the run, training examples as the run makes them.
    found = finished.load(folder, finished.read(folder))
    sha256 = run_folder.read_settings(folder)["protocol"]["test_x_sha256"]
    assert data.content_sha256(np.asarray(found.inputs.test)) == sha256
    key = jax.random.key(4)
    whole = data.load_path(path)
    images = jnp.asarray(np.stack([whole.train[i] for i in range(36)]))
    if kind in ("static", "table"):  # which depend on all of them
        expected = preprocess(images, key)[order(36)[:4]]
    else:
        expected = preprocess(images[order(36)[:4]], key)
    np.testing.assert_allclose(
        parts.training_examples(found, 4, key), expected, atol=1e-5 if kind == "table" else 0
    )


@pytest.mark.usefixtures("untrained")
def test_data_that_was_moved_is_found_where_it_is_said_to_be(tmp_path: Path) -> None:
    path = save_npy(tmp_path / "mine", pixels(3, 2))
    folder = train_on(path, tmp_path / "run")
    path.rename(tmp_path / "moved.npy")
    with pytest.raises(data.DataError, match=r"does not exist .*--data or --data-dir"):
        call(folder, **QUICK)
    assert list(call(folder, **QUICK, data=str(tmp_path / "moved.npy"))["parts"]) == DEFAULT
    other = save_npy(tmp_path / "other", pixels(3, 2)[::-1])
    with pytest.raises(data.DataError, match=r"other\.npy.* is not the data of"):
        call(folder, **QUICK, data=str(other))


@pytest.mark.usefixtures("untrained")
def test_a_run_of_train_and_of_mnist_are_read_alike(trained: Path, tmp_path: Path) -> None:
    settings = finished.read(trained)
    assert settings.name == "mnist_5k"
    assert settings.split == {}
    path = save_npy(tmp_path / "mine", pixels(3, 2))
    folder = train_on(path, tmp_path / "run", test_fraction=0.25, split_seed=2)
    settings = finished.read(folder)
    assert settings.split == {"test_fraction": 0.25}
    assert settings.config.split_seed == 2
    dataset = inputs.load(str(path), common.Config(split_seed=2), test_fraction=0.25)
    assert settings.protocol["dataset_sha256"] == dataset.sha256
    assert len(finished.load(folder, settings).inputs.test) == 10
