"""Where MNIST is missing the default experiment trains on the embedded digits, and says so."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import TINY, run

from jvae import data
from jvae.experiments import mnist, run_folder
from jvae.experiments.run_folder import RunFolderError

SMALL_MNIST: dict[str, Any] = TINY | {"epochs": 1, "batch_size": 1000, "nll_samples": 0}
NO_NETWORK = "no network: cannot reach storage.googleapis.com (ConnectionError)"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None) -> Path:
    """An empty data folder, and no network."""
    monkeypatch.setattr("jvae.data.raw_files._unreachable", lambda url: NO_NETWORK)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def run_mnist(folder: Path, **changes: Any) -> dict[str, Any]:
    return mnist.run(mnist.Config(out=folder, **(SMALL_MNIST | changes)))


def fake_mnist(num: int = 2000) -> data.Dataset:
    """What MNIST would be were it there."""
    digits = data.load("mnist_5k")
    train, test = digits.train[:num], digits.test
    digest = data.content_sha256(train, test)
    return dataclasses.replace(digits, name="mnist", train=train, source="tmp", sha256=digest)


def test_without_mnist_the_default_is_the_embedded_digits_and_says_so(
    offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    result = run_mnist(folder)
    shown = capsys.readouterr().out
    assert "WARNING: MNIST is neither on this machine nor within reach." in shown
    assert "Training on mnist_5k" in shown
    assert NO_NETWORK in shown
    assert result["protocol"]["dataset"] == "mnist_5k"
    assert result["protocol"]["num_train"] == 4000
    settings = run_folder.read_settings(folder)
    assert settings["dataset"] == "mnist_5k"
    for record in (settings, run_folder.read_result(folder)):
        assert record["fallback"].startswith("mnist_5k, not mnist: dataset 'mnist' needs train-")
        assert NO_NETWORK in record["fallback"]
    assert not offline.exists()


def test_a_run_that_was_asked_for_its_dataset_is_no_fallback(
    offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_mnist(tmp_path / "run", dataset="mnist_5k")
    assert "WARNING" not in capsys.readouterr().out
    for name in ("config.json", "result.json"):
        assert "fallback" not in json.loads((tmp_path / "run" / name).read_text())


def test_with_mnist_the_default_is_mnist(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, there_is = [], fake_mnist()

    def load(name: str, data_dir: Path | None = None) -> data.Dataset:
        asked.append((name, data_dir))
        return there_is

    folder, there = tmp_path / "run", tmp_path / "there"
    with monkeypatch.context() as patch:
        patch.setattr(data, "load", load)
        run_mnist(folder, data_dir=there)
        run_mnist(folder, data_dir=there, resume=True, epochs=2)
    assert asked == [("mnist", there)] * 2
    for record in (run_folder.read_settings(folder), run_folder.read_result(folder)):
        assert "fallback" not in record
        assert record["protocol"]["dataset"] == "mnist"
    # Nor does it fall back once it has begun.
    with pytest.raises(data.NoNetworkError, match="dataset 'mnist' needs"):
        run_mnist(folder, resume=True, epochs=3)


def test_a_fallen_back_run_stays_with_the_embedded_digits(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    run_mnist(folder)
    first = run_folder.read_settings(folder)
    with monkeypatch.context() as patch:
        load, appeared = data.load, fake_mnist()
        patch.setattr(
            data, "load", lambda name, *where: appeared if name == "mnist" else load(name)
        )
        result = run_mnist(folder, resume=True, epochs=2)
        assert run_mnist(tmp_path / "new")["protocol"]["dataset"] == "mnist"
    assert result["protocol"] == first["protocol"]
    assert result["fallback"] == first["fallback"]
    assert result["epochs"] == 2
    settings = run_folder.read_settings(folder)
    assert settings["fallback"] == first["fallback"]
    assert [later["fallback"] for later in settings["resumed_with"]] == [first["fallback"]]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist", "omniglot"])
def test_a_dataset_that_is_asked_for_is_never_replaced(
    name: Any, offline: Path, tmp_path: Path
) -> None:
    with pytest.raises(data.NoNetworkError, match=f"dataset '{name}' needs .*{offline}"):
        run_mnist(tmp_path / "run", dataset=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["mnist", "downloads/manual"])
def test_a_corrupt_file_is_not_papered_over(place: str, offline: Path, tmp_path: Path) -> None:
    file = offline / place / "train-images-idx3-ubyte.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"<html>404</html>")
    with pytest.raises(data.DataError, match=rf"{file} has SHA-256 .*replace it") as error:
        run_mnist(tmp_path / "run")
    assert not isinstance(error.value, data.NoNetworkError)
    assert [path.name for path in tmp_path.iterdir()] == ["datasets"]


def test_a_taken_folder_is_refused_before_anything_is_looked_for(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "load", lambda *args: pytest.fail("looked for"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("")
    with pytest.raises(RunFolderError, match="add --resume"):
        run_mnist(tmp_path / "run")
    with pytest.raises(RunFolderError, match="add --resume"):
        run("mnist_5k", tmp_path / "run")
