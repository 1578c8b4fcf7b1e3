"""Which devices a run gets, and what it refuses."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from runs import metrics

from jvae import checkpoint, cores, data, distributed
from jvae.experiments import devices, inputs, mnist, results, run_folder, train
from jvae.experiments.config import Config, ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"devices": 9, "batch_size": 90},
            r"--devices must be at most the 8 \(cpu\) here, got 9; JAX_NUM_CPU_DEVICES says how",
        ),
        ({"devices": 8}, "--batch-size must be a multiple of the 8 devices, got 100"),
        ({"devices": 2, "seeds": 3}, "--seeds must be a multiple of the 2 devices, got 3"),
    ],
)
def test_devices_that_cannot_be_had_or_share_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        devices.choose(Config(**settings))


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, None),
        ({"devices": 1}, None),
        ({"devices": 4}, 4),
        ({"seeds": 8}, 8),
        ({"seeds": 6}, 6),
        ({"seeds": 9}, 3),
        ({"seeds": 11}, None),
        ({"seeds": 8, "devices": 2}, 2),
    ],
)
def test_a_run_gets_what_can_share_its_work(settings: dict[str, Any], size: int | None) -> None:
    mesh = devices.choose(Config(**settings))
    assert (None if mesh is None else mesh.size) == size


@pytest.fixture
def cpu_devices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many devices the CPU is made, on a machine of four cores."""
    asked: list[int] = []

    def update(name: str, value: int) -> None:
        assert name == "jax_num_cpu_devices"
        asked.append(value)

    monkeypatch.setattr(cores, "count", lambda: 4)
    monkeypatch.setattr(jax.config, "update", update)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    return asked


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"devices": 8}, [8]),
        ({"seeds": 8}, [4]),
        ({"seeds": 9}, [3]),
        ({"seeds": 8, "devices": 2}, [2]),
    ],
)
def test_a_cpu_is_as_many_devices_as_asked_for(
    settings: dict[str, Any],
    expected: list[int],
    cpu_devices: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices.start(Config(**settings))
    assert cpu_devices == expected
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    devices.start(Config(**settings))
    assert cpu_devices == expected


def test_where_jax_is_at_work_its_devices_stay() -> None:
    before = jax.local_device_count()
    devices.start(Config(devices=before + 1))
    assert jax.local_device_count() == before


@pytest.mark.parametrize("error", [None, RuntimeError("timed out"), ValueError("no cluster")])
def test_processes_are_joined_or_the_settings_refused(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[Any] = []

    def initialize(*args: Any) -> None:
        joined.append(args)
        if error is not None:
            raise error

    monkeypatch.setattr(distributed, "initialize", initialize)
    several = Config(out=Path("run"), coordinator="host:1", num_processes=2, process_id=1)
    refused = pytest.raises(ConfigError, match=f"could not be joined: {error}")
    with contextlib.nullcontext() if error is None else refused:
        devices.start(several)
    assert joined == [("host:1", 2, 1)]


def in_another(change: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a second process that says the same, but for a change."""
    monkeypatch.setattr(distributed, "texts", lambda text: [text, change(text)])


@pytest.mark.parametrize("command", [train, mnist])
def test_processes_of_other_settings_do_not_train(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = {"data": "mnist_5k"} if command is train else {"dataset": "mnist_5k"}
    config = command.Config(out=tmp_path / "run", **which)
    in_another(lambda text: text.replace('"seed": 0', '"seed": 1'), monkeypatch)
    with pytest.raises(ConfigError, match=r"data: seed is 1 in process 1, 0 in process 0$"):
        command.run(config)
    in_another(lambda text: text.replace('_sha256": "', '_sha256": "0'), monkeypatch)
    with pytest.raises(ConfigError, match=r"dataset_sha256 is 0.* test_x_sha256 is 0"):
        command.run(config)
    assert not (tmp_path / "run").exists()


def test_what_processes_have_of_their_own_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "initialize", lambda *args: None)
    said: list[str] = []

    def texts(text: str) -> list[str]:
        said.append(text)
        return [text]

    monkeypatch.setattr(distributed, "texts", texts)
    for i in range(2):
        devices.start(Config(out=Path("r"), coordinator=f"h{i}:1", num_processes=2, process_id=i))
    assert said[0] == said[1]


@pytest.mark.parametrize("command", [train, mnist])
@pytest.mark.parametrize("where", ["load", "prepare"])
def test_the_others_are_told_of_data_that_cannot_be_read(
    where: str, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []

    def largest(number: int) -> int:
        told.append(number)
        return number

    def refuse(*args: Any, **how: Any) -> Any:
        raise data.DataError("not here")

    which = {"data": "mnist_5k"} if command is train else {"dataset": "mnist_5k"}
    monkeypatch.setattr(data if where == "load" else inputs, where, refuse)
    monkeypatch.setattr(distributed, "largest", largest)
    with pytest.raises(data.DataError, match="not here"):
        command.run(command.Config(out=tmp_path / "run", **which))
    assert told[-1] == 1
    assert not (tmp_path / "run").exists()


def test_a_run_on_eight_devices_is_that_on_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "_DRAWS_A_GROUP", 3 * 9)  # of 20 examples, and 3 draws of each
    table = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    np.save(tmp_path / "table.npy", table)
    for num in (1, 8):
        config = train.Config(
            data=f"{tmp_path}/table.npy",
            hidden=(4,),
            batch_size=16,
            epochs=1,
            nll_samples=3,
            devices=num,
            out=tmp_path / str(num),
        )
        train.run(config)
    for one, eight in zip(metrics(tmp_path / "1"), metrics(tmp_path / "8"), strict=True):
        np.testing.assert_allclose(list(eight.values()), list(one.values()), rtol=1e-5)
    weights = [checkpoint.load(tmp_path / run / "model.safetensors") for run in ("1", "8")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *weights)
    nlls = [run_folder.read_result(tmp_path / run)["test_nll"] for run in ("1", "8")]
    np.testing.assert_allclose(nlls[1], nlls[0], rtol=1e-5)
