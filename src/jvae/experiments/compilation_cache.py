"""Compiled programs, kept between runs: the second run of a model starts in a second."""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

import jax


def enable() -> None:
    """Let JAX keep what it compiles in the user's cache folder.

    JAX's own settings come first: with JAX_COMPILATION_CACHE_DIR programs are kept there, with
    JAX_ENABLE_COMPILATION_CACHE=false nowhere.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
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
