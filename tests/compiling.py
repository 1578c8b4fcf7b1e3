"""A faster compilation, for programs that run once."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import jax

# LLVM optimises longer than the small programs of these tests run.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@contextmanager
def compiled_quickly() -> Iterator[None]:
    """The same for all that is compiled meanwhile, jitted functions inside jitted ones too."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
