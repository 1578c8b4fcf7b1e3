"""A validation part is held out of the training part, and is trained on by nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import pixels, run, save_npy, save_pngs

from jvae import data, training
from jvae.experiments import compare, mnist
from jvae.experiments.job import Job
from jvae.experiments.run_folder import RunFolderError


@pytest.mark.parametrize("streamed", [False, True])
def test_held_out_examples_are_not_trained_on(
    streamed: bool, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 images, of which 4 are the test part; of the others a quarter are validation images."""
    sizes: list[Any] = []
    images = pixels(6, 5)
    path = save_pngs(tmp_path / "mine", images)
    settings = {"binarisation": "none", "stream_above": 0.0 if streamed else 1.0}
    for fraction in (0.25, 0.0):
        run(path, tmp_path / "run", **settings, validation_fraction=fraction, map_prior=True)
    job, whole = jobs
    rest, test = data.hold_out(40, 0.1, 0)
    train, valid = (rest[part] for part in data.hold_out(36, 0.25, 1))
    assert not {*train} & {*valid, *test}
    assert job.streamed == streamed
    trained_on = np.stack([np.asarray(job.train[i]) for i in range(len(job.train))])
    np.testing.assert_array_equal(trained_on, images[train])
    assert job.valid is not None
    np.testing.assert_allclose(job.valid, images[valid] / 255, rtol=1e-6)
    np.testing.assert_allclose(job.test, images[test] / 255, rtol=1e-6)
    counts = [job.protocol[name] for name in ("num_train", "num_validation", "num_test")]
    assert counts == [27, 9, 4]
    part = "held out of the rest (fraction 0.25, split seed 0)"
    assert job.protocol["validation_part"] == part
    # Without it nothing is said of it, and the data is the same.
    added = {"num_validation", "validation_part", "weights"}
    assert job.protocol.keys() - whole.protocol.keys() == added
    changed = [n for n in whole.protocol if whole.protocol[n] != job.protocol[n]]
    assert changed == ["num_train"]
    of_both = {name: {"protocol": one.protocol} for name, one in (("a", job), ("b", whole))}
    message = r"num_validation is 9 and null.*; weights is \"of the best"
    with pytest.raises(RunFolderError, match=message):
        compare.check_comparable(of_both)
    # N of eq. 8, and of the steps in an epoch.
    make_optimizer = training.make_optimizer

    def watched(*args: Any, **how: Any) -> Any:
        sizes.append(how["map_dataset_size"])
        return make_optimizer(*args, **how)

    monkeypatch.setattr(training, "make_optimizer", watched)
    assert job.optimizer is not None
    assert sizes == [27]
    assert job.steps_per_epoch == 4


def test_a_named_dataset_gives_of_its_training_part(jobs: list[Job], tmp_path: Path) -> None:
    digits = data.load("mnist_5k")
    parts = data.hold_out_validation(digits, 0.1, 3)
    train, valid = data.hold_out(4000, 0.1, 4)
    assert parts.valid is not None
    assert digits.train_labels is not None
    for part, labels, indices in (
        (parts.train, parts.train_labels, train),
        (parts.valid, parts.valid_labels, valid),
    ):
        np.testing.assert_array_equal(part, digits.train[indices])
        assert labels is not None
        np.testing.assert_array_equal(labels, digits.train_labels[indices])
    assert len(parts.valid) == 400
    np.testing.assert_array_equal(parts.test, digits.test)
    assert parts.sha256 == digits.sha256
    assert parts.source == f"{digits.source}, 400 examples held out for validation (seed 4)"
    with pytest.raises(data.DataError, match="400 validation examples already"):
        data.hold_out_validation(parts, 0.1)
    settings: dict[str, Any] = {"validation_fraction": 0.1, "split_seed": 3, "out": tmp_path}
    mnist.run(mnist.Config(dataset="mnist_5k", **settings))
    np.testing.assert_array_equal(jobs[0].train, parts.train)


def test_of_a_stream_no_more_is_held_out_than_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.validation, "MAX_STREAMED_HELD_OUT", 3)
    path = save_pngs(tmp_path / "mine", pixels(6, 5))
    for stream_above, num in ((0, 3), (2**30, 18)):
        whole = data.load_path(path, stream_above=stream_above)
        parts = data.hold_out_validation(whole, 0.5)
        assert parts.valid is not None
        assert (len(parts.train), len(parts.valid)) == (36 - num, num)


def test_validation_images_have_a_draw_of_their_own(jobs: list[Job], tmp_path: Path) -> None:
    """Once, of the same images another than that of the test part; and the same in every run."""
    grey = pixels(6, 5)
    np.savez(tmp_path / "mine.npz", train=grey, valid=grey, test=grey)
    for seed in (0, 1):
        run(tmp_path / "mine.npz", tmp_path / "run", seed=seed)
    first, second = jobs
    assert first.valid is not None
    assert second.valid is not None
    np.testing.assert_array_equal(first.valid, second.valid)
    assert 0.3 < np.mean(np.asarray(first.valid) == np.asarray(first.test)) < 0.9
    assert set(np.unique(first.valid)) == {0, 1}


def test_columns_of_a_validation_part_are_those_of_the_training_part(
    jobs: list[Job], tmp_path: Path
) -> None:
    rows = np.random.default_rng(0).normal(5, 3, (40, 4)).astype(np.float32)
    run(save_npy(tmp_path / "mine", rows), tmp_path / "run", validation_fraction=0.2)
    rest, _ = data.hold_out(40, 0.1, 0)
    train, valid = (rows[rest[part]] for part in data.hold_out(36, 0.2, 1))
    assert jobs[0].valid is not None
    expected = (valid - train.mean(axis=0)) / train.std(axis=0)
    np.testing.assert_allclose(jobs[0].valid, expected, atol=1e-5)
