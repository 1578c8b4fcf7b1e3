import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import jax
from jvae.experiments import compilation_cache
compilation_cache.enable()
print(jax.jit(lambda x: 3 * x + 1)(2.0))
"""


def run(tmp_path: Path, **settings: str) -> None:
    home = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    found = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, **home, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "7.0\n"


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def programs(folder: Path) -> set[Path]:
    """The compiled programs; beside each lies the time of its last use."""
    return {path for path in files(folder) if path.name.endswith("-cache")}


def test_a_program_is_compiled_once(tmp_path: Path) -> None:
    run(tmp_path)
    first = programs(tmp_path / "cache" / "jvae")
    assert first
    times = {path: path.stat().st_mtime_ns for path in first}
    run(tmp_path)
    assert programs(tmp_path / "cache" / "jvae") == first
    assert {path: path.stat().st_mtime_ns for path in first} == times


@pytest.mark.parametrize(
    "settings",
    [{"JAX_ENABLE_COMPILATION_CACHE": "false"}, {"JAX_COMPILATION_CACHE_DIR": "{tmp_path}/mine"}],
    ids=str,
)
def test_settings_of_jax_come_first(tmp_path: Path, settings: dict[str, str]) -> None:
    run(tmp_path, **{name: value.format(tmp_path=tmp_path) for name, value in settings.items()})
    assert not files(tmp_path / "cache")
