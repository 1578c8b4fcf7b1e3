"""Compiled programs, kept between runs: the second run of a model starts in a second."""

import contextlib
import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

import jax

# A program takes from a few kilobytes to a few megabytes.
_MOST_BYTES = 2**30


def enable() -> None:
    """Let JAX keep what it compiles in the user's cache folder.

    JAX's own settings come first: with JAX_COMPILATION_CACHE_DIR programs are kept there, with
    JAX_ENABLE_COMPILATION_CACHE=false nowhere.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    _forget_the_oldest(folder().parent, _MOST_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder()))
    # A run compiles some forty small programs besides its epoch, a second in all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def folder() -> Path:
    """The folder of programs compiled by this JAX for this processor.

    A home may be shared by machines, and a program of one may not run on another.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    machine = [platform.machine(), platform.processor(), *sorted(told), version("jaxlib")]
    name = hashlib.sha256("\n".join(machine).encode()).hexdigest()[:16]
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "jvae" / "compiled" / name


def _forget_the_oldest(folder: Path, most_bytes: int) -> None:
    """Delete what was read longest ago, of other JAXs too, until no more than so much stays.

    JAX's own limit is not for processes that may be killed: it locks the folder at every program,
    and one whose time of use is missing stops it from keeping any other.
    """
    with contextlib.suppress(OSError):  # of another process that does the same
        files = [(path.stat(), path) for path in folder.rglob("*") if path.is_file()]
        for stat, path in sorted(files, key=lambda file: file[0].st_atime, reverse=True):
            most_bytes -= stat.st_size
            if most_bytes < 0:
                path.unlink()
