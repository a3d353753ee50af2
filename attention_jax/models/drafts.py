"""What a draft model proposes: a chain of tokens, drawn or the likeliest, or a tree of them."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention_jax.cache import Cache
from attention_jax.models import prompts
from attention_jax.models.draft_trees import Tree
from attention_jax.models.sampling import Chain, Choice

Caches: TypeAlias = tuple[Cache, ...]


class Rows(NamedTuple):
    """Where the rows of a batch stand before a round.

    Attributes:
      last: int32 ``[B 2]``, the last two tokens; the very last one is the root of the tree.
      so_far: int32 ``[B L]``, for processors: the tokens of the row, -1 elsewhere.
      end: int32 ``[B]``, the index in ``so_far`` of the next token.
      root: int32 ``[B]``, the index in the caches of the last token.
      most: int32 ``[B]``, how many tokens the round may add; 0 if the row has ended.
    """

    last: Int[Array, "B 2"]
    so_far: Int[Array, "B L"]
    end: Int[Array, " B"]
    root: Int[Array, " B"]
    most: Int[Array, " B"]


class Proposed(NamedTuple):
    """The proposals.

    Attributes:
      nodes: int32 ``[B M]``, the tokens of the tree; the root is the last token of the row.
      q: ``[B depth V]``, the distributions that a chain was drawn from; None if it is greedy.
      caches: the draft's, with all nodes but the deepest.
    """

    nodes: Int[Array, "B M"]
    q: Float[Array, "B depth V"] | None
    caches: Caches


def propose(
    draft: Any,
    choice: Choice,
    tree: Tree,
    rows: Rows,
    keys: jax.Array | None,
    caches: Caches,
) -> Proposed:
    """The draft's proposals after the last token of each row."""
    # If all proposals of the last round were accepted, the draft has not read the last of them.
    unread = jnp.where(rows.most > 0, rows.root + 1 - caches[0].length, 0)
    last = jnp.where(unread[:, None] == 1, rows.last[:, ::-1], rows.last)
    logits, caches = prompts.next_logits(draft, last, unread, None, caches)
    if tree.is_chain:
        return _chain(draft, choice, tree.depth, rows, keys, logits, caches)
    return _tree(draft, choice, tree, rows, logits, caches)


def _chain(
    draft: Any,
    choice: Choice,
    ahead: int,
    rows: Rows,
    keys: jax.Array | None,
    logits: jax.Array,
    caches: Caches,
) -> Proposed:
    """``ahead`` tokens, each chosen after the one before it."""

    def choose(i: Any, so_far: jax.Array, logits: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
        """Proposal ``i`` of each row, what it was drawn from, and the row with it."""
        if not choice.draws:
            token, q = jax.vmap(choice, in_axes=(0, 0, None))(so_far, logits, None), None
        else:
            at = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)
            q = jax.vmap(choice.probabilities)(so_far, logits)
            token = jax.vmap(jax.random.categorical)(at, jnp.log(q)).astype(jnp.int32)
            token = jnp.where(q.any(axis=-1), token, -1)
        return token, q, jax.vmap(_put)(so_far, rows.end + i, token[:, None])

    def step(carry: Any, i: jax.Array) -> tuple[Any, Any]:
        """Reads proposal ``i - 1`` and chooses proposal ``i``."""
        token, so_far, caches = carry
        read = jnp.maximum(token, 0)[:, None]  # after a missing proposal, others do not matter
        count = (i < rows.most).astype(jnp.int32)
        logits, caches = prompts.next_logits(draft, read, count, None, caches)
        token, q, so_far = choose(i, so_far, logits)
        return (token, so_far, caches), (token, q)

    token, q, so_far = choose(0, rows.so_far, logits)
    (_, _, caches), more = jax.lax.scan(step, (token, so_far, caches), jnp.arange(1, ahead))
    both = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), (token, q), more)
    tokens, q = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), both)
    return Proposed(jnp.concatenate([rows.last[:, 1:], tokens], axis=1), q, caches)


def _tree(
    draft: Any, choice: Choice, tree: Tree, rows: Rows, logits: jax.Array, caches: Caches
) -> Proposed:
    """After each node the draft's likeliest tokens, depth by depth."""
    B = logits.shape[0]
    nodes = jnp.full((B, len(tree.parents)), -1, jnp.int32).at[:, 0].set(rows.last[:, 1])
    processed = jax.vmap(jax.vmap(Chain(choice.processors)))
    logits = logits[:, None]
    for depth, branches in enumerate(tree.branches):
        level = slice(*tree.starts[depth : depth + 2])
        if depth:
            logits, caches = read_tree(draft, tree, rows, nodes, caches, level)
        so_far = with_paths(tree, rows, nodes)[:, level]
        _, best = jax.lax.top_k(processed(so_far, logits), branches)
        children = slice(*tree.starts[depth + 1 : depth + 3])
        nodes = nodes.at[:, children].set(best.reshape(B, -1))
    return Proposed(nodes, None, caches)


def read_tree(
    model: Any,
    tree: Tree,
    rows: Rows,
    nodes: jax.Array,
    caches: Caches,
    part: slice = slice(None),
) -> tuple[jax.Array, Caches]:
    """Logits ``[B m V]`` after the nodes, or a part of them, and the caches with them."""
    depths = jnp.asarray(tree.depths)[part]
    count = (depths < rows.most[:, None]).sum(axis=1, dtype=jnp.int32)
    options = {}
    if not tree.is_chain:
        options = {"mask": tree.mask(rows.root), "positions": rows.root[:, None] + depths}
    read = jnp.maximum(nodes[:, part], 0)
    x, caches = model.hidden(read, caches=caches, count=count, **options)
    return model.logits(x), caches


def with_paths(tree: Tree, rows: Rows, nodes: jax.Array) -> jax.Array:
    """int32 ``[B M L]``: the tokens of each row, and those on the path to each of its nodes."""
    paths = jnp.asarray(tree.paths)
    on_path = jnp.where(paths < 0, -1, nodes[:, paths])
    each_node = jax.vmap(_put, in_axes=(None, None, 0))
    return jax.vmap(each_node)(rows.so_far, rows.end, on_path)


def last_tokens(tokens: jax.Array, count: Any, number: int) -> jax.Array:
    """The last ``number`` of the first ``count`` tokens of each row ``[B new]``."""
    at = jnp.maximum(count[:, None] - number + jnp.arange(number), 0)
    return jnp.take_along_axis(tokens, at, axis=1)


def _put(row: jax.Array, at: Any, tokens: jax.Array) -> jax.Array:
    """A row with tokens from index ``at`` on, those beyond its end dropped."""
    return row.at[at + jnp.arange(tokens.shape[0])].set(tokens, mode="drop")
