import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jvae.experiments import compilation_cache

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


def test_what_was_read_longest_ago_goes_when_there_is_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compilation_cache, "_MOST_BYTES", 250)
    cache = tmp_path / "jvae" / "compiled"
    for age, name in enumerate(["new", "older", "ours/old", "ours/oldest"]):
        path = cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, ns=(10**18 - age, 10**18 + age))
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.enable()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert {path.name for path in files(cache)} == {"new", "older"}
