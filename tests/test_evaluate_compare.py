"""What `jvae compare` shows of runs that `jvae evaluate` evaluated."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_evaluations import ALL, FULL, SEED, call, copy, results, rows, train_on

from jvae.experiments import compare, run_folder

pytestmark = pytest.mark.usefixtures("quick_evaluations")


@pytest.fixture(scope="module")
def single(ensemble: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single model of the ensemble's data."""
    return train_on(ensemble.parent / "mine.npy", tmp_path_factory.mktemp("single") / "run")


@pytest.fixture
def two(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return copy(evaluated, Path("a")), copy(evaluated, Path("b"))


def test_compare_shows_evaluations_of_one_protocol(
    two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    # Other noise of the evaluation compares.
    call(two[1], **(FULL | {"seed": SEED + 1}))
    capsys.readouterr()
    compare.run(compare.Config(runs=two))
    out = capsys.readouterr().out
    found = {(cells[0], cells[1].split(" (")[0]): cells[2:] for cells in rows(out)[2:]}
    for part in ALL:
        a, b = (results(folder, part) for folder in two)
        for name in (name for name in a if f"{name}_stderr" in a):
            assert found[part, name] == [
                f"{of_run[name]:.3f} ± {of_run[f'{name}_stderr']:.3f}" for of_run in (a, b)
            ]
    nll = [results(folder, "importance_sampling")["nll"] for folder in two]
    assert nll[0] != nll[1]
    assert "left out" not in out


@pytest.mark.parametrize(
    ("changes", "part", "reason"),
    [
        ({"num_samples": 2}, "importance_sampling", "num_samples is 12 and 2"),
        ({"repeats": 1}, "importance_sampling", "repeats is 3 and 1"),
        ({"num_temperatures": 2}, "ais", "num_temperatures is 3 and 2"),
        ({"schedule": "sigmoid"}, "bdmc", 'schedule is "linear" and "sigmoid"'),
        ({"num_examples": 9}, "latents", "num_examples is 30 and 9"),
        (
            {"log_px": {"estimator": "importance sampling", "seed": 8}},
            "inference_gap",
            'log_px is {"estimator": "annealed importance sampling"',
        ),
    ],
)
def test_compare_mixes_no_protocols(
    changes: dict[str, Any],
    part: str,
    reason: str,
    two: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = json.loads((two[1] / "evaluation.json").read_text())
    content["parts"][part]["settings"] |= changes
    run_folder.write_json(two[1] / "evaluation.json", content)
    compare.run(compare.Config(runs=two))
    out = capsys.readouterr().out
    assert f"{part} is left out: a and b do not compare: {reason}" in out
    shown = {cells[0] for cells in rows(out)}
    assert {"a", "b"} <= shown  # the runs' own results
    assert part not in shown
    assert "app_d" in shown


@pytest.mark.parametrize("order", ["ensemble first", "single first"])
def test_compare_says_what_every_column_s_errors_are_over(
    order: str,
    ensemble: Path,
    single: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    folders = {single: "examples", ensemble: "seeds"}
    for folder in folders:
        call(folder, num_samples=4, seed=SEED)
    runs = tuple(folders) if order == "single first" else tuple(folders)[::-1]
    capsys.readouterr()
    compare.run(compare.Config(runs=runs))
    out = capsys.readouterr().out
    (header,) = (
        line for line in out.splitlines() if "┃" in line and "± s.e. over examples" in line
    )
    cells = [cell.strip() for cell in header.split("┃")[3:-1]]
    assert cells == [f"± s.e. over {folders[folder]}" for folder in runs]
    shown = {(row[0], row[1]): dict(zip(runs, row[2:], strict=True)) for row in rows(out)[2:]}
    # One model has no error of a number that is no mean over examples.
    for name, digits in (("kl", ".3f"), ("active_units", "")):
        (alone, together) = (results(folder, "latents") for folder in folders)
        assert shown["latents", name] == {
            single: f"{alone[name]:{digits}}",
            ensemble: f"{together[name]:.3f} ± {together[f'{name}_stderr']:.3f}",
        }


def test_compare_shows_what_all_runs_have(
    two: tuple[Path, Path], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(trained, Path("c"))
    compare.run(compare.Config(runs=(*two, Path("c"))))
    out = capsys.readouterr().out
    assert "ais is left out: c has no evaluation of it with its present weights\n" in out
    assert {cells[0] for cells in rows(out)} == {"a", "b", "c"}
