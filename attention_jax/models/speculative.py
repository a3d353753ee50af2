"""Speculative decoding: a small draft model proposes tokens, the model checks them in one call.

Proposals stay as long as the model agrees (``rejection`` has the formula for draws); the caches of
both models are rolled back to the first that does not. Each call of the model gives between one
token and ``ahead + 1``.

Sources: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; Chen et
al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling"; for trees, Miao et
al. 2024, "SpecInfer".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attention_jax.cache import Cache, KVCache
from attention_jax.core.axes import AnyArray, brief_fields, int_at_least, kind
from attention_jax.core.int8 import Quantized
from attention_jax.models import drafts, prompts
from attention_jax.models.decoder import Decoder
from attention_jax.models.draft_trees import Tree, keep_path
from attention_jax.models.drafts import Caches, Proposed
from attention_jax.models.generation import Settings, begin, row_keys
from attention_jax.models.rejection import verified_draws
from attention_jax.models.sampling import Choice, Processor, Sampling, as_choice


class Speculated(NamedTuple):
    """The result of ``speculate``: that of ``generate``, and how many proposals were accepted.

    Attributes:
      tokens, count, log_probability, caches: as those of ``Generated``.
      draft_caches: the draft's, with all tokens except the last one.
      proposed: int32 ``[B]``, how many tokens the draft proposed, in a row of a tree one for each
        depth.
      accepted: int32 ``[B]``, how many of them are in ``tokens``.
    """

    tokens: Int[Array, "B new"]
    count: Any  # int32 [B]; a narrower type would clash with tuple.count
    log_probability: Float[Array, " B"]
    caches: Caches
    draft_caches: Caches
    proposed: Int[Array, " B"]
    accepted: Int[Array, " B"]

    def __repr__(self) -> str:
        return brief_fields(self, self._fields)


class Verified(NamedTuple):
    """What the model makes of the proposals.

    Attributes:
      tokens: int32 ``[B path]``, the accepted proposals and the token that follows them; -1 if
        there is none to choose. Arbitrary after that.
      accepted: int32 ``[B]``, how many proposals are accepted.
      path: int ``[B path]``, the nodes after which these tokens come.
      logits: ``[B path V]``, after these nodes.
      caches: with all nodes.
    """

    tokens: Int[Array, "B path"]
    accepted: Int[Array, " B"]
    path: Int[Array, "B path"]
    logits: Float[Array, "B path V"]
    caches: Caches


class _Loop(NamedTuple):
    """The carry of the loop."""

    so_far: Int[Array, "B T+new"]  # prompts and generated tokens; -1 elsewhere
    done: Bool[Array, " B"]
    alone: Bool[Array, " B"]  # the last token is read without proposals
    result: Speculated


def speculate(
    model: Decoder,
    draft: Decoder,
    prompt: Any,
    *,
    max_new_tokens: int,
    ahead: int = 4,
    branches: int | Sequence[int] = 1,
    real: Any = None,
    sampling: Sampling | Choice | Processor | Sequence[Processor] | None = None,
    key: AnyArray | None = None,
    stop: Any = (),
    pad_token: int = 0,
    capacity: int | None = None,
    caches: Sequence[Cache] | None = None,
    draft_caches: Sequence[Cache] | None = None,
) -> Speculated:
    """The tokens that follow each prompt, as ``generate`` finds them, in fewer calls of the model.

    Greedily the tokens are those of ``generate(model, ...)``, unless two logits are equal up to
    rounding. Draws are others, from the same distribution. The better the draft predicts the model,
    the fewer calls there are; a wrong draft only costs time. Rows are independent: the result of a
    row depends on its prompt, the key and its index.

    Args:
      model: a ``Decoder``.
      draft: a smaller ``Decoder`` of the same vocabulary.
      prompt, max_new_tokens: as for ``generate``.
      ahead: how many tokens the draft proposes before the model checks them.
      branches: how many of the draft's likeliest tokens are proposed after each one, an int or one
        for each depth: ``(3, 2, 1, 1)`` proposes a tree of 3 + 6 + 6 + 6 tokens, and the longest
        path that is right stays. Only greedily, and for models that look at positions only by
        rotary or added vectors: without windows, ALiBi, relative biases and masks of their own.
      real: as for ``generate``.
      sampling, key: as for ``generate``; processors apply to both models.
      stop, pad_token: as for ``generate``.
      capacity: of the caches; default as for ``generate``.
      caches, draft_caches: of the tokens before the prompt, both or none. They are donated: use
        those of ``Speculated`` after. Rolling ones hold ``ahead - 1`` tokens more than the window.

    Returns:
      ``Speculated``.

    Raises:
      ValueError: as ``generate``; models of different vocabularies; other ``branches`` than 1 with
        draws, or not one for each depth.
      NotImplementedError: other ``branches`` than 1 with a model that depends on other positions.
      TypeError: as ``generate``; a model that is not a ``Decoder``.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import Decoder, DecoderConfig, generate, Layers, speculate
    >>> model, draft = (
    ...     Decoder(DecoderConfig(10, Layers(features=8, num_layers=n, num_heads=2)),
    ...             rngs=nnx.Rngs(0)) for n in (2, 1))
    >>> prompt = np.array([[3, 1], [4, 4]])
    >>> fast = speculate(model, draft, prompt, max_new_tokens=6, ahead=3)
    >>> (fast.tokens == generate(model, prompt, max_new_tokens=6).tokens).all().item()
    True
    """
    for name, x in (("model", model), ("draft", draft)):
        if not isinstance(x, Decoder):
            raise TypeError(f"{name} must be a Decoder, got {kind(x)}")
    if model.vocabulary != draft.vocabulary:
        raise ValueError(
            f"draft must have the vocabulary of the model, {model.vocabulary} tokens, got "
            f"{draft.vocabulary}"
        )
    if (caches is None) != (draft_caches is None):
        raise ValueError("caches and draft_caches must be given together, of the same tokens")
    max_new_tokens = int_at_least("max_new_tokens", max_new_tokens, 1)
    choice, tree = as_choice(sampling), _tree(ahead, branches)
    if not tree.is_chain:
        _check_tree(tree, choice, model=model, draft=draft)
        _check_plain(caches=caches, draft_caches=draft_caches)
    _check_rolling("caches", model, caches, ahead)
    _check_rolling("draft_caches", draft, draft_caches, ahead)
    prepare = functools.partial(
        prompts.prepare,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        real=real,
        source=None,
        source_real=None,
        capacity=capacity,
        rejected=tree.depth,
        beside=len(tree.parents) - 1 - tree.depth,
    )
    tokens, count, _, caches = prepare(model, caches=caches)
    _, _, _, draft_caches = prepare(draft, caches=draft_caches)
    keys = row_keys(choice, key, tokens.shape[0])
    stops = prompts.as_stop(stop, model.vocabulary)
    settings = Settings(max_new_tokens, choice, stops, prompts.as_pad(pad_token))
    (graph, state), (draft_graph, draft_state) = nnx.split(model), nnx.split(draft)
    return _run(
        (graph, draft_graph),
        settings,
        tree,
        (state, draft_state),
        tokens,
        count,
        keys,
        (tuple(caches), tuple(draft_caches)),
    )


def _tree(ahead: int, branches: int | Sequence[int]) -> Tree:
    ahead = int_at_least("ahead", ahead, 1)
    several = branches if isinstance(branches, tuple | list) else (branches,) * ahead
    each = tuple(int_at_least("branches", x, 1) for x in several)
    if len(each) != ahead:
        raise ValueError(f"branches must be one int or ahead = {ahead} of them, got {branches}")
    return Tree(each)


def _check_tree(tree: Tree, choice: Choice, **decoders: Decoder) -> None:
    if choice.draws:
        raise ValueError("branches must be 1 with draws: only greedy trees are exact")
    for name, decoder in decoders.items():
        layers = decoder.config.layers
        if max(tree.branches) > decoder.vocabulary:
            raise ValueError(
                f"branches must be at most {decoder.vocabulary}, the vocabulary, got "
                f"{max(tree.branches)}"
            )
        found = {
            "windows": set(layers.windows) != {None},
            "alibi": layers.alibi,
            "relative": layers.relative is not None,
            "mask": layers.mask is not None,
            "prefix_lm": layers.prefix_lm,
        }
        if any(found.values()):
            raise NotImplementedError(
                f"branches must be 1 for this {name}: in a tree, the distance of two tokens is not "
                f"that of their places, as {', '.join(x for x in found if found[x])} would take it"
            )


def _check_plain(**given: Any) -> None:
    """Checks that nodes of a tree can be moved within the caches."""
    for name, caches in given.items():
        for cache in caches or ():
            if not isinstance(cache, KVCache) or isinstance(cache.key, Quantized):
                raise NotImplementedError(
                    f"branches must be 1 with {name} that are paged or of 8-bit integers"
                )


def _check_rolling(name: str, model: Decoder, caches: Any, ahead: int) -> None:
    """Checks that proposals do not overwrite tokens that are still in the window."""
    for cache, window in zip(caches or (), model.config.layers.windows, strict=bool(caches)):
        if cache.rolling and window is not None and cache.capacity < window + ahead - 1:
            raise ValueError(
                f"{name} must hold {window + ahead - 1} tokens, the window of {window} and ahead - "
                f"1 = {ahead - 1}, got a rolling cache of capacity {cache.capacity}: create them "
                f"with init_caches(..., spare={ahead})"
            )


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames=("caches",))
def _run(
    graphs: tuple[nnx.GraphDef[Any], nnx.GraphDef[Any]],
    settings: Settings,
    tree: Tree,
    states: tuple[nnx.State[Any, Any], nnx.State[Any, Any]],
    prompt: jax.Array,
    count: jax.Array,
    keys: jax.Array | None,
    caches: tuple[Caches, Caches],
) -> Speculated:
    """The whole loop, compiled; arguments are pairs of the model's and the draft's."""
    decoders: Any = [prompts.eval_model(*both) for both in zip(graphs, states, strict=True)]
    model, draft = decoders
    first = begin(model, settings, prompt, count, None, keys, caches[0])
    _, draft_caches = draft.hidden(prompt, caches=caches[1], count=count)
    none = jnp.zeros_like(first.result.count)
    result = Speculated(*first.result, draft_caches, none, none)

    def unfinished(loop: _Loop) -> jax.Array:
        return ~loop.done.all()

    def round_(loop: _Loop) -> _Loop:
        return _round(model, draft, settings, tree, prompt.shape[1], keys, loop)

    done = first.done | (settings.max_new_tokens == 1)
    start = _Loop(first.so_far, done, jnp.zeros_like(done), result)
    result = jax.lax.while_loop(unfinished, round_, start).result
    # The draft may not have read the last token but one.
    length = result.caches[0].length
    token = drafts.last_tokens(result.tokens, length - first.result.caches[0].length, 1)
    unread = length - result.draft_caches[0].length
    _, draft_caches = draft.hidden(token, caches=result.draft_caches, count=unread)
    return result._replace(draft_caches=draft_caches)


def _round(
    model: Any,
    draft: Any,
    settings: Settings,
    tree: Tree,
    T: int,
    keys: jax.Array | None,
    loop: _Loop,
) -> _Loop:
    """The draft proposes, the model verifies, and both keep what is accepted."""
    result, root = loop.result, loop.result.caches[0].length
    left = settings.max_new_tokens - result.count
    at = None if keys is None else jax.vmap(jax.random.fold_in)(keys, result.count)
    of_draft = None if at is None else jax.vmap(lambda key: jax.random.fold_in(key, 0))(at)
    of_model = None if at is None else jax.vmap(lambda key: jax.random.fold_in(key, 1))(at)
    rows = drafts.Rows(
        last=drafts.last_tokens(result.tokens, result.count, 2),
        so_far=loop.so_far,
        end=T + result.count,
        root=root,
        most=jnp.where(loop.done, 0, jnp.where(loop.alone, 1, left)),
    )
    proposed = drafts.propose(draft, settings.choice, tree, rows, of_draft, result.draft_caches)
    verified = _verify(model, settings.choice, tree, rows, of_model, proposed, result.caches)
    loop, new = _append(settings, rows, verified, loop)

    def kept(caches: Any, depths: int) -> Caches:
        count = jnp.minimum(new, depths)
        if tree.is_chain:
            return tuple(cache.rollback(root + count) for cache in caches)
        path = verified.path[:, :depths]
        return tuple(keep_path(cache, root, path, count) for cache in caches)

    return loop._replace(
        result=loop.result._replace(
            caches=kept(verified.caches, tree.depth + 1),
            draft_caches=kept(proposed.caches, tree.depth),  # it has not read the deepest nodes
        )
    )


def _verify(
    model: Any,
    choice: Choice,
    tree: Tree,
    rows: drafts.Rows,
    keys: Any,
    proposed: Proposed,
    caches: Caches,
) -> Verified:
    """One call of the model for all nodes, and what it makes of them."""
    logits, caches = drafts.read_tree(model, tree, rows, proposed.nodes, caches)
    so_far = drafts.with_paths(tree, rows, proposed.nodes)
    if choice.draws:
        p = jax.vmap(jax.vmap(choice.probabilities))(so_far, logits)
        q: Any = proposed.q
        tokens, accepted = jax.vmap(verified_draws)(p, q, proposed.nodes[:, 1:], keys)
        path = jnp.broadcast_to(jnp.arange(tree.depth + 1), tokens.shape)
        return Verified(tokens, accepted, path, logits, caches)
    choose = jax.vmap(jax.vmap(choice, in_axes=(0, 0, None)), in_axes=(0, 0, None))
    chosen = choose(so_far, logits, None)
    path, accepted = jax.vmap(tree.longest_match)(proposed.nodes, chosen)
    tokens = jnp.take_along_axis(chosen, path, axis=1)
    logits = jnp.take_along_axis(logits, path[..., None], axis=1)
    return Verified(tokens, accepted, path, logits, caches)


def _append(
    settings: Settings, rows: drafts.Rows, verified: Verified, loop: _Loop
) -> tuple[_Loop, jax.Array]:
    """The loop with the accepted tokens and the one after them, and how many these are.

    A rejected proposal that the model reads as NaN may make logits before it NaN too. A row without
    a token to choose therefore ends only if its last token was read alone, in a round of its own.
    """
    token, result = verified.tokens, loop.result
    i = jnp.arange(token.shape[1])
    none = token < 0
    ends = none | prompts.is_any(token, settings.stop)
    within = i < jnp.minimum(verified.accepted + 1, rows.most)[:, None]
    within &= jnp.cumsum(ends, axis=1) <= ends.astype(jnp.int32)  # no token before it ends the row
    doubtful = within & none & ~loop.alone[:, None]
    real = within & ~doubtful
    new = real.sum(axis=1, dtype=jnp.int32)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(verified.logits), token[..., None], axis=-1)
    log_p = jnp.where(none, jnp.nan, log_p[..., 0])
    at = jnp.where(real, result.count[:, None] + i, settings.max_new_tokens)  # that is dropped
    put = jax.vmap(lambda x, at, token: x.at[at].set(token, mode="drop"))
    T = loop.so_far.shape[1] - settings.max_new_tokens
    count = result.count + (real & ~none).sum(axis=1, dtype=jnp.int32)
    result = result._replace(
        tokens=put(result.tokens, at, token),
        count=count,
        log_probability=result.log_probability + jnp.where(real, log_p, 0).sum(axis=1),
        proposed=result.proposed + jnp.minimum(token.shape[1] - 1, rows.most),
        accepted=result.accepted + jnp.minimum(verified.accepted, new),
    )
    done = loop.done | (real & ends).any(axis=1) | (count == settings.max_new_tokens)
    return _Loop(put(loop.so_far, T + at, token), done, doubtful.any(axis=1), result), new
