"""The leaves of a pytree by name."""

from collections.abc import Callable
from typing import Any

import jax


def named(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a pytree by the names on the way to them, in the tree's order.

    Args:
      tree: any pytree; the kinds of its nodes leave no trace in the names.
      is_leaf: says what else is a leaf, as `jax.tree.leaves` takes it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
