"""Trees of proposed tokens, as positions, a mask and paths, and the caches after one is accepted.

The root is the last token of the row. A node is a token that may follow its parent: it attends to
the row and its ancestors, and its position is that of the row's end plus its depth. A chain is the
tree with one child for each node.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attention_jax.cache import KVCache
from attention_jax.masks import Mask, mask_fn


@dataclasses.dataclass(frozen=True)
class Tree:
    """The shape of a tree, whose nodes ``0`` to ``M - 1`` are in the order of their depth.

    Attributes:
      branches: how many children each node at depth 0, 1, 2, ... has.

    >>> from attention_jax.models.draft_trees import Tree
    >>> tree = Tree((2, 1))  # 0: root; 1, 2: its children; 3: child of 1; 4: child of 2
    >>> tree.parents.tolist(), tree.depths.tolist()
    ([-1, 0, 0, 1, 2], [0, 1, 1, 2, 2])
    >>> tree.ancestors.astype(int).tolist()[4]
    [1, 0, 1, 0, 1]
    >>> tree.paths.tolist()
    [[-1, -1], [1, -1], [2, -1], [1, 3], [2, 4]]
    """

    branches: tuple[int, ...]

    @property
    def is_chain(self) -> bool:
        return set(self.branches) == {1}

    @property
    def depth(self) -> int:
        """The largest depth, the most proposed tokens that can be accepted."""
        return len(self.branches)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """``[depth + 2]``: the first node at each depth, and at last the number of nodes M."""
        return np.cumsum([0, 1, *np.cumprod(self.branches)])

    @functools.cached_property
    def parents(self) -> np.ndarray:
        """``[M]``: the parent of each node, -1 for the root."""
        parents = [np.array([-1])]
        for depth, children in enumerate(self.branches):
            parents.append(np.repeat(np.arange(*self.starts[depth : depth + 2]), children))
        return np.concatenate(parents)

    @functools.cached_property
    def depths(self) -> np.ndarray:
        """``[M]``: the depth of each node."""
        return np.repeat(np.arange(self.depth + 1), np.diff(self.starts))

    @functools.cached_property
    def ancestors(self) -> np.ndarray:
        """bool ``[M M]``: whether node ``j`` is on the path from the root to node ``i``."""
        on_path = np.eye(len(self.parents), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                on_path[node] |= on_path[parent]
        return on_path

    @functools.cached_property
    def paths(self) -> np.ndarray:
        """``[M depth]``: the nodes at depth 1, 2, ... on the path to each node, -1 below it."""
        paths = np.full((len(self.parents), self.depth), -1)
        for node, on_path in enumerate(self.ancestors):
            (nodes,) = np.nonzero(on_path)
            paths[node, : len(nodes) - 1] = nodes[1:]
        return paths

    def mask(self, root: Int[Array, " B"]) -> Mask:
        """Tokens before the root, and ancestors; node ``j`` of a row is at index ``root + j``."""
        ancestors = jnp.asarray(self.ancestors)
        last = len(self.parents) - 1

        def visible(b: Any, n: Any, q: Any, k: Any, root: Any, ancestors: Any) -> Any:
            i, j = (jnp.clip(x - root[b], 0, last) for x in (q, k))
            return (k < root[b]) | ancestors[i, j]

        return mask_fn(visible, root, ancestors)

    def longest_match(
        self, nodes: Int[Array, " M"], chosen: Int[Array, " M"]
    ) -> tuple[Int[Array, " path"], Int[Array, ""]]:
        """The longest path whose nodes are all what the model chooses after their parents.

        Args:
          nodes: the tokens of one row's tree.
          chosen: the model's token after each node.

        Returns:
          The path, a node at each depth, arbitrary after its end; and the depth of its end.
        """
        agrees = (nodes == chosen[self.parents]).at[0].set(True)
        on_path: Bool[Array, " M"] = jnp.all(agrees | ~self.ancestors, axis=1)
        at_depth = self.depths == np.arange(self.depth + 1)[:, None]
        return jnp.argmax(on_path & at_depth, axis=1), on_path.sum(dtype=jnp.int32) - 1


def keep_path(cache: KVCache, root: Any, path: Any, count: Any) -> KVCache:
    """A cache with the first ``count`` nodes of a path after the tokens before the root.

    Args:
      cache: with all nodes of the trees, node ``j`` at index ``root + j``.
      root: int ``[B]``, the index of the root of each row.
      path: int ``[B n]``, nodes, of which the first is the root.
      count: int ``[B]``.
    """
    at = (root[:, None] + path)[..., None, None]
    key, value = (jnp.take_along_axis(x, at, axis=1, mode="clip") for x in (cache.key, cache.value))
    return cache.rollback(root).append(key, value, count)
