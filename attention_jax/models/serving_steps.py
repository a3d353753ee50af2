"""The steps of continuous batching: pure functions of what the device holds; see ``serving``."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from flax import nnx

from attention_jax.cache import PagedCache
from attention_jax.cache.pages import Pages
from attention_jax.models import prompts
from attention_jax.models.sampling import Choice, with_numbers


class Structure:
    """A model without its arrays, as a static argument that is hashed once, not in every call."""

    def __init__(self, graph: nnx.GraphDef[Any]) -> None:
        self.graph, self._hash = graph, hash(graph)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self.graph == other.graph)


class State(NamedTuple):
    """What the device holds.

    Attributes:
      pages: of the rows, the same for all layers.
      pools: keys and values of each layer.
      logits: ``[R V]``, of the next token of each row.
    """

    pages: Pages
    pools: tuple[tuple[Any, Any], ...]
    logits: jax.Array


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def append(
    model: Structure, weights: Any, state: State, rows: Any, tokens: Any, count: Any
) -> State:
    """Appends tokens to some rows, which leaves the logits of their next ones.

    Args:
      rows: int32 ``[A]``; the number of rows stands for none.
      tokens: int32 ``[A T]``.
      count: int32 ``[A]``, how many of them are real.
    """
    pages = state.pages.rows(rows)
    caches: Any = tuple(PagedCache(*pool, pages) for pool in state.pools)
    whole = prompts.eval_model(model.graph, weights)
    logits, caches = prompts.next_logits(whole, tokens, count, None, caches)
    return State(
        state.pages.with_rows(rows, caches[0].pages),
        tuple((cache.key, cache.value) for cache in caches),
        state.logits.at[rows].set(logits, mode="drop"),
    )


class Draws(NamedTuple):
    """What the choice of a token in each row depends on, besides its logits.

    Attributes:
      rows: bool ``[R]``, the rows in which to choose one.
      numbers: ``[R n]``, in the dtype of the logits, of the processors.
      keys: uint32 ``[R w]``, the data of a key for each row; None for the likeliest token.
      step: int32 ``[R]``, how many tokens of the row were chosen before.
      tokens: int32 ``[R L]``, of the row so far, -1 elsewhere.
    """

    rows: Any
    numbers: Any
    keys: Any
    step: Any
    tokens: Any


@functools.partial(jax.jit, static_argnums=(0, 1))
def choose(choice: Choice, impl: Any, logits: Any, draws: Draws, others: Any) -> Any:
    """The next token of some rows, int32 ``[R]``; that of the other rows is from ``others``.

    Args:
      choice: without numbers, see ``sampling.split_numbers``.
      impl: of the keys.
    """

    def one(row: Any) -> Any:
        logits, draws, other = row

        def chosen() -> Any:
            key = None
            if draws.keys is not None:
                key = jax.random.fold_in(
                    jax.random.wrap_key_data(draws.keys, impl=impl), draws.step
                )
            return with_numbers(choice, draws.numbers)(draws.tokens, logits, key)

        return jax.lax.cond(draws.rows, chosen, lambda: other)

    return jax.lax.map(one, (logits, draws, others))  # row by row, to skip the other rows


@functools.partial(jax.jit, donate_argnums=0)
def share(pages: Pages, source: Any, target: Any, length: Any) -> Pages:
    """``Pages.share``; with a length of 0 the target is empty."""
    return pages.share(source, target, length)
