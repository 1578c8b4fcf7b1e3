"""What a run proposes for its data, what may be asked of it, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import pixels, run, save_csv, save_npy, table

from jvae import binarisation, data
from jvae.experiments import inputs, train
from jvae.experiments.config import ConfigError

RNG = np.random.default_rng(1)
GREY = RNG.integers(0, 256, (9, 4, 3), np.uint8)
BLACK_AND_WHITE = (GREY // 128) * np.uint8(255)
COLOUR = RNG.integers(0, 256, (9, 4, 3, 3), np.uint8)
NUMBERS = RNG.normal(size=(9, 4)).astype(np.float32)
BITS = (NUMBERS > 0).astype(np.float32)


def dataset(examples: Any, name: str = "mine") -> data.Dataset:
    test = np.stack([examples[i] for i in range(4)])
    return data.Dataset(
        name=name, train=examples, test=test, source="memory", sha256="0", licence="ours"
    )


class Files(data.ImageFiles):
    """Images in files, without the files."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        super().__init__([Path(str(i)) for i in range(len(images))], images.shape[1:])

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self.images[index])


DATASETS = {
    "grey": dataset(GREY),
    "flat grey": dataset(GREY.reshape(9, 12)),
    "grey with its channel": dataset(GREY[..., None]),
    "black and white": dataset(BLACK_AND_WHITE),
    "colour": dataset(COLOUR),
    "frey_face": dataset(GREY, "frey_face"),
    "grey files": dataset(Files(GREY)),
    "black and white files": dataset(Files(BLACK_AND_WHITE)),
    "colour files": dataset(Files(COLOUR)),
    "numbers": dataset(NUMBERS),
    "bits": dataset(BITS),
}
BERNOULLI = ("none", "dynamic", "static", "threshold")
GAUSSIAN = ("none", "dequantised")
# Of each: what is proposed, and under each likelihood the default and all that can be asked for.
Fit = tuple[str, dict[str, tuple[str, ...]]]
INK: Fit = (
    "bernoulli",
    {"bernoulli": ("dynamic", *BERNOULLI), "gaussian": ("dequantised", *GAUSSIAN)},
)
LIGHT: Fit = ("gaussian", INK[1])
FITS: dict[str, Fit] = {
    "grey": INK,
    "flat grey": INK,
    "grey with its channel": INK,
    "grey files": INK,
    "black and white files": INK,  # nobody looks into them
    "black and white": (
        "bernoulli",
        {"bernoulli": ("given", "given"), "gaussian": ("dequantised", *GAUSSIAN)},
    ),
    "colour": LIGHT,
    "colour files": LIGHT,
    "frey_face": LIGHT,
    "numbers": ("gaussian", {"gaussian": ("given", "given")}),
    "bits": ("bernoulli", {"bernoulli": ("given", "given"), "gaussian": ("given", "given")}),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_what_fits_the_data(kind: str) -> None:
    proposed, fits = FITS[kind]
    for likelihood in ("auto", "bernoulli", "gaussian"):
        meant = proposed if likelihood == "auto" else likelihood
        for protocol in ("auto", *binarisation.BINARISATIONS):
            asked = train.Config(data="mine", likelihood=likelihood, binarisation=protocol)
            if meant not in fits:
                with pytest.raises(ConfigError, match=r"--likelihood bernoulli needs data of 0"):
                    inputs.fit_to(DATASETS[kind], asked)
                continue
            default, *fitting = fits[meant]
            if protocol == "auto":
                assert inputs.fit_to(DATASETS[kind], asked) == (meant, default)
            elif protocol in fitting:
                assert inputs.fit_to(DATASETS[kind], asked) == (meant, protocol)
            else:
                with pytest.raises(ConfigError) as error:
                    inputs.fit_to(DATASETS[kind], asked)
                assert str(error.value).startswith(
                    f"--binarisation must be {' or '.join(fitting)} for a {meant} likelihood of "
                    f"this data, got {protocol}; {DATASETS[kind].name}: "
                )


def test_another_likelihood_is_never_taken_for_a_known_one() -> None:
    asked = train.Config(data="mine")
    object.__setattr__(asked, "likelihood", "poisson")  # as if it had a family
    assert inputs.fit_to(DATASETS["numbers"], asked) == ("poisson", "given")
    prepared = inputs.prepare(DATASETS["numbers"], asked)
    np.testing.assert_array_equal(prepared.train, NUMBERS)
    assert (prepared.family, prepared.preprocess) == ("poisson", None)
    with pytest.raises(ConfigError, match="for a poisson likelihood of this data, got none"):
        inputs.fit_to(DATASETS["grey"], asked)


def test_every_kind_of_data_is_in_the_table() -> None:
    assert FITS.keys() == DATASETS.keys()


@pytest.mark.parametrize(
    ("write", "changes", "error", "message"),
    [
        (
            lambda path: save_csv(path, table()),
            {"likelihood": "bernoulli"},
            data.DataError,
            r"mine\.csv: row 1, column 1 \('c0'\) is .*: expected 0 or 1 under a bernoulli",
        ),
        (
            lambda path: save_csv(path, table()),
            {"binarisation": "dynamic"},
            ConfigError,
            "--binarisation must be given for a gaussian likelihood of this data, got dynamic",
        ),
        (
            lambda path: save_csv(path, table() * [1, 1, 0, 1]),
            {},
            data.DataError,
            r"mine\.csv: column 3 \('c2'\) is .*0\.0 in all 36 training rows",
        ),
        (
            lambda path: save_npy(path, pixels(6, 5)),
            {"batch_size": 37},
            ConfigError,
            "--batch-size must be at most the 36 training examples, got 37",
        ),
        (
            lambda path: save_npy(path, pixels(6, 5)),
            {"stream_above": 0.0, "binarisation": "static"},
            ConfigError,
            "--binarisation static draws the training images once, in memory: choose another, "
            "or a larger --stream-above",
        ),
        (lambda path: path, {}, data.DataError, "mine does not exist"),
        (lambda path: path.parent, {}, data.DataError, "no images"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_a_folder_is_made(
    write: Callable[[Path], Path],
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        run(write(tmp_path / "mine"), tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_training")
def test_columns_of_few_values_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At most half of the values are distinct: of twelve, six, and not seven."""
    columns = [np.arange(12) % 6, np.arange(12) % 7, np.arange(12), np.arange(12) % 2]
    np.savez(tmp_path / "mine.npz", train=np.stack(columns, axis=1), test=table()[:4])
    protocol = run(tmp_path / "mine.npz", tmp_path / "run")["protocol"]
    assert protocol["columns_of_few_values"] == [1, 4]
    assert (
        "WARNING: few values, often repeated, in columns [1, 4]: a Gaussian density can be driven "
        "without bound there, and its nats bound no probability.\n"
    ) in capsys.readouterr().out
    continuous = run(save_csv(tmp_path / "table", table()), tmp_path / "run")
    assert continuous["protocol"]["columns_of_few_values"] == []
    assert "WARNING" not in capsys.readouterr().out
