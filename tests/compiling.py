"""A faster compilation, for programs that run once."""

from functools import partial

import jax

# LLVM optimises longer than the small programs of these tests run.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
