"""`jvae compare` shows runs of `jvae train` side by side, if they are of one protocol."""

import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import pixels, run, save_pngs

from jvae import binarisation, data
from jvae.experiments import command_line, compare, run_folder
from jvae.experiments.run_folder import RunFolderError

# What makes results comparable.


@pytest.mark.usefixtures("no_training")
def test_the_test_data_of_a_run_is_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_pngs(tmp_path / "mine", pixels(6, 5))
    first = run(path, tmp_path / "run")
    dataset = data.load_path(path)
    key = jax.random.split(binarisation.fixed_draw_key())[1]
    x = np.asarray(binarisation.bernoulli(jnp.asarray(dataset.test), key))
    assert first["protocol"]["test_x_sha256"] == data.content_sha256(x)
    same = run(path, tmp_path / "run", seed=1, stream_above=0.0, hidden=(3,))
    compare.check_comparable({"a": first, "b": same})

    def differing(**others: dict[str, Any]) -> str:
        with pytest.raises(RunFolderError) as error:
            compare.check_comparable({"a": first, **others})
        return str(error.value)

    # Another split: the numbers of examples are the same, the examples are not.
    split = run(path, tmp_path / "run", split_seed=1)
    hashes = [
        f'{name} is "{first["protocol"][name]}" and "{split["protocol"][name]}"'
        for name in ("dataset_sha256", "test_x_sha256")
    ]
    assert differing(b=split) == f"a and b do not compare: {'; '.join(hashes)}"
    # Another draw of the same images.
    monkeypatch.setattr(binarisation, "fixed_draw_key", lambda: jax.random.key(5))
    drawn = run(path, tmp_path / "run")
    assert differing(b=same, c=drawn) == (
        f'a and c do not compare: test_x_sha256 is "{first["protocol"]["test_x_sha256"]}" and '
        f'"{drawn["protocol"]["test_x_sha256"]}"'
    )


# Results that were written.

PROTOCOL = {
    "dataset": "mnist_5k",
    "dataset_sha256": "aa",
    "binarisation": "dynamic",
    "likelihood": "bernoulli",
    "units": "nats per image",
}
RESULT: dict[str, Any] = {
    "test_elbo": -100.125,
    "test_elbo_stderr": 0.5,
    "test_nll": 95.25,
    "test_nll_stderr": 0.25,
    "test_nll_estimator": "importance sampling from q(z|x), K = 5",
    "stderr_over": "test examples",
    "epochs": 20,
    "seed": 3,
    "protocol": PROTOCOL,
}


def save_result(folder: Path, changes: dict[str, Any], protocol: dict[str, Any]) -> Path:
    folder.mkdir()
    result = RESULT | changes | {"protocol": PROTOCOL | protocol}
    kept = {name: value for name, value in result.items() if value is not None}
    run_folder.write_json(folder / "result.json", kept)
    return folder


def compare_runs(*folders: Path) -> None:
    compare.run(compare.Config(runs=folders))


def test_runs_of_one_protocol_share_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    # Another seed, length and name of the same bytes: still the same data.
    save_result(Path("a"), {}, {})
    save_result(Path("b"), {"seed": 4, "epochs": 7, "test_elbo": -99.0}, {"dataset": "mine"})
    compare_runs(Path("a"), Path("b"))
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert rows == [
        ["a", "20", "3", "-100.12 ± 0.50", "95.25 ± 0.25", "test examples"],
        ["b", "7", "4", "-99.00 ± 0.50", "95.25 ± 0.25", "test examples"],
    ]
    assert "nats per image" in "".join(lines)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_every_run_says_what_its_errors_are_over(
    order: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    save_result(Path("a"), {}, {})
    save_result(Path("b"), {"stderr_over": "seeds", "num_seeds": 3}, {})
    compare_runs(*map(Path, order))
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in ln.split("│")[1:-1]] for ln in out.splitlines() if "│" in ln]
    over = {"a": "test examples", "b": "seeds"}
    assert [(row[0], row[-1]) for row in rows] == [(name, over[name]) for name in order]


def test_what_a_result_warns_of_is_said_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_result(Path("a"), {"warnings": ["few [effective] samples"]}, {})
    save_result(Path("b"), {}, {})
    compare_runs(Path("a"), Path("b"))
    warned = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert warned == ["WARNING: a: few [effective] samples"]


def test_runs_without_a_likelihood_share_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without = {"test_nll": None, "test_nll_stderr": None, "test_nll_estimator": None}
    compare_runs(save_result(tmp_path / "a", without, {}), save_result(tmp_path / "b", without, {}))
    assert "-100.12 ± 0.50" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("changes", "protocol", "differing"),
    [
        ({}, {"binarisation": "static"}, 'binarisation is "dynamic" and "static"'),
        ({}, {"dataset_sha256": "bb"}, 'dataset_sha256 is "aa" and "bb"'),
        ({}, {"likelihood": "gaussian"}, 'likelihood is "bernoulli" and "gaussian"'),
        ({}, {"mean": [0.5]}, "mean is null and [0.5]"),
        (
            {"test_nll_estimator": "importance sampling from q(z|x), K = 50"},
            {},
            'test_nll_estimator is "importance sampling from q(z|x), K = 5" and '
            '"importance sampling from q(z|x), K = 50"',
        ),
        (
            {"test_nll_estimator": None, "test_nll": None},
            {"binarisation": "none"},
            'binarisation is "dynamic" and "none"; '
            'test_nll_estimator is "importance sampling from q(z|x), K = 5" and null',
        ),
    ],
)
def test_runs_of_different_protocols_are_refused_by_all_that_differs(
    changes: dict[str, Any],
    protocol: dict[str, Any],
    differing: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a, b = save_result(tmp_path / "a", {}, {}), save_result(tmp_path / "b", {}, {})
    c = save_result(tmp_path / "c", changes, protocol)
    with pytest.raises(RunFolderError) as error:
        compare_runs(a, b, c)
    assert str(error.value) == f"{a} and {c} do not compare: {differing}"
    assert capsys.readouterr().out == ""


def test_what_differs_at_length_is_cut(tmp_path: Path) -> None:
    a, b = (
        save_result(tmp_path / name, {}, {"mean": [value] * 100})
        for name, value in (("a", 0.125), ("b", 0.25))
    )
    with pytest.raises(RunFolderError, match=r"mean is \[0\.125, [^…]*… and \[0\.25, [^…]*…$"):
        compare_runs(a, b)


def test_runs_that_are_none_are_refused(whole: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(whole, unfinished)
    (unfinished / "result.json").unlink()
    with pytest.raises(RunFolderError, match=rf"{unfinished} holds no finished run"):
        compare_runs(whole, unfinished)
    with pytest.raises(RunFolderError, match=r"nowhere holds no finished run"):
        compare_runs(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match="give at least one run"):
        compare_runs()
    compare_runs(whole)


@pytest.mark.usefixtures("no_figures")
def test_the_command_trains_and_compares(
    grey: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--latent-dim 2 --hidden 8 --epochs 1 --batch-size 6 --nll-samples 5 --out"
    argv = ["jvae", "train", "--data", str(grey), *flags.split(), str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", argv)
    command_line.main()
    assert run_folder.read_result(tmp_path / "run")["epochs"] == 1
    monkeypatch.setattr(sys, "argv", ["jvae", "compare", str(tmp_path / "run"), str(whole)])
    command_line.main()
