"""What must pass is tried on two Pythons, or says why it is not."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "run"


def run_with(tmp_path: Path, *pythons: str, venv: str | None = None) -> tuple[int, str, str]:
    """The script with these Pythons at hand and a `make` that says how it is called."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(SCRIPT, tmp_path / ".ci")
    commands = {
        **{f"bin/{name}": f'[ "$1" = -c ] || echo {name}' for name in pythons},
        "bin/make": 'echo make "$@"',
        "bin/python3.14": "exit 1",  # without ensurepip, say
    }
    if venv is not None:
        commands[".venv/bin/python"] = f"echo {venv}"
    for name, body in commands.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    (tmp_path / "bin" / "dirname").symlink_to(str(shutil.which("dirname")))
    found = subprocess.run(
        [str(shutil.which("bash")), str(tmp_path / ".ci" / "run")],
        env={"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    return found.returncode, found.stdout, found.stderr


def test_both_pythons_are_named_and_used(tmp_path: Path) -> None:
    code, out, err = run_with(tmp_path, "python3.11", "python3.12", "python3.13")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "python3.11: python3.11",
        "python3.13: python3.13",
        "make check VENV=.venv PYTHON=python3.11",
        "make test VENV=.venv-newest PYTHON=python3.13",
    ]


@pytest.mark.parametrize(
    ("pythons", "message"),
    [
        (["python3.11"], "error: no Python of 3.14 3.13 3.12 that can import venv and ensurepip\n"),
        (["python3.13"], "error: no Python of 3.11 that can import venv and ensurepip\n"),
    ],
)
def test_a_python_that_is_missing_is_an_error(
    pythons: list[str], message: str, tmp_path: Path
) -> None:
    assert run_with(tmp_path, *pythons) == (1, "", message)


def test_an_environment_of_another_python_is_an_error(tmp_path: Path) -> None:
    code, out, err = run_with(tmp_path, "python3.11", "python3.13", venv="python3.12")
    assert (code, err) == (1, "error: .venv is not of python3.11: delete it\n")
    assert "make" not in out
