"""The inputs of generation: checked prompts, the encoded source, caches of sufficient capacity.

Token ids are checked here, before anything is traced. Under ``jit`` they are not known: an id that
is not in the vocabulary makes logits NaN, and no token is chosen from those.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.cache import PagedCache
from attention_jax.core.axes import as_int, check_positions, int_at_least, is_array, kind
from attention_jax.models.decoder import Decoder, check_capacity
from attention_jax.models.encoder_decoder import EncoderDecoder, Memory
from attention_jax.models.speech import SpeechTransformer
from attention_jax.models.tokens import last
from attention_jax.nn.padding import as_real, filled


def eval_model(graph: Any, state: Any) -> Any:
    """The model of a graph and its arrays, in evaluation mode."""
    model = nnx.merge(graph, state)
    model.eval()
    return model


def next_logits(
    model: Any, tokens: jax.Array, count: Any, memory: Memory | None, caches: Any
) -> tuple[jax.Array, Any]:
    """Logits ``[B V]`` after the first ``count`` of the tokens ``[B T]``, and the new caches."""
    count = jnp.asarray(count, jnp.int32)
    before = () if memory is None else (memory,)
    x, caches = model.hidden(tokens, *before, caches=caches, count=count)
    return model.logits(last(x, jnp.maximum(count, 1))), caches


def is_any(token: jax.Array, stop: tuple[int, ...]) -> jax.Array:
    """Whether each token is one of the stop tokens."""
    return jnp.isin(token, jnp.asarray(stop, jnp.int32)) if stop else jnp.zeros_like(token, bool)


def as_stop(stop: Any, vocabulary: int) -> tuple[int, ...]:
    """The argument ``stop`` as a tuple: one token, some, or None for none."""
    if stop is None:
        return ()
    several = stop.ndim > 0 if is_array(stop) else isinstance(stop, Collection)
    several = several and not isinstance(stop, str | bytes)
    tokens = tuple(_known_int("stop", x) for x in (stop if several else (stop,)))
    for x in tokens:
        if not 0 <= x < vocabulary:
            raise ValueError(
                f"stop must be tokens from 0 to {vocabulary - 1}, the vocabulary, or None, got {x}"
            )
    return tokens


def as_pad(pad_token: Any) -> int:
    """The argument ``pad_token`` as an int, which need not be in the vocabulary."""
    x = _known_int("pad_token", pad_token)
    if not -(2**31) <= x < 2**31:
        raise ValueError(f"pad_token must fit into int32, got {x}")
    return x


def as_row(name: str, tokens: Any, vocabulary: int) -> np.ndarray:
    """The tokens of one prompt, int32 ``[T]``; raises for none, or one not in the vocabulary."""
    row = np.asarray(tokens)
    if row.ndim != 1 or not row.size:
        raise ValueError(f"{name} must be a sequence of at least one token, got shape {row.shape}")
    check_positions(row, name)
    _check_vocabulary(name, row, vocabulary)
    return row.astype(np.int32)


def _check_vocabulary(name: str, tokens: Any, vocabulary: int) -> None:
    least, most = int(tokens.min()), int(tokens.max())
    if least < 0 or most >= vocabulary:
        raise ValueError(
            f"{name} must hold tokens from 0 to {vocabulary - 1}, the vocabulary, got {least} to "
            f"{most}"
        )


def _known_int(name: str, x: Any) -> int:
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"{name} must be known when the loop is compiled, got a traced value")
    if is_array(x) and x.ndim == 0:
        x = x.item()
    return as_int(name, x)


def prepare(
    model: Any,
    prompt: Any,
    *,
    max_new_tokens: int,
    real: Any,
    source: Any,
    source_real: Any,
    capacity: int | None,
    caches: Any,
    rejected: int = 0,
    beside: int = 0,
) -> tuple[jax.Array, jax.Array, Memory | None, Any]:
    """Prompts moved to the left, their lengths, the encoded source, and caches.

    Args:
      model, prompt, max_new_tokens, real, source, source_real, capacity, caches: of ``generate``.
      rejected: how many tokens one rollback removes.
      beside: how many tokens a cache holds for a time beside those of the row.
    """
    if not isinstance(model, Decoder | EncoderDecoder):
        raise TypeError(f"model must be a Decoder or an EncoderDecoder, got {kind(model)}")
    prompt, count = _moved_left(prompt, real, model.vocabulary)
    memory = _memory(model, prompt.shape[0], source, source_real)
    room = max_new_tokens, rejected, beside
    caches = _with_capacity(model, prompt, count, room, capacity, caches)
    return prompt, count, memory, caches


def _tokens(tokens: Any, real: Any, name: str, vocabulary: int) -> tuple[Any, Any]:
    """Tokens ``[B T]`` and ``real``; raises for tokens outside the vocabulary if they are known."""
    try:
        tokens = check_positions(tokens, name)
    except ValueError as error:  # NumPy raises it for rows of different lengths
        raise ValueError(
            f"{name} must have rows of one length: pad them, and mark padding with real"
        ) from error
    if tokens.ndim != 2:
        raise ValueError(f"{name} must have shape [B T], T at least 1, got {tokens.shape}")
    of = f"the {name}'s"
    argument = "real" if name == "prompt" else f"{name}_real"
    real = as_real(real, tokens.shape, name=argument, of=of)
    tokens = filled(tokens, real)
    if not isinstance(tokens, jax.core.Tracer) and tokens.size:
        _check_vocabulary(name, tokens, vocabulary)
    return jnp.asarray(tokens, jnp.int32), real


def _moved_left(prompt: Any, real: Any, vocabulary: int) -> tuple[jax.Array, jax.Array]:
    """Prompts with padding moved behind their tokens, and their lengths."""
    prompt, real = _tokens(prompt, real, "prompt", vocabulary)
    if not prompt.shape[1]:
        raise ValueError(f"prompt must have shape [B T], T at least 1, got {prompt.shape}")
    if real is None:
        return prompt, jnp.full(prompt.shape[0], prompt.shape[1], jnp.int32)
    if not isinstance(real, jax.core.Tracer) and not np.asarray(real).any(axis=-1).all():
        raise ValueError("real must be True somewhere in every row: a prompt cannot be all padding")
    if not isinstance(real, jax.core.Tracer) and _has_hole(np.asarray(real)):
        raise ValueError(
            "real must be True for one run of tokens in every row, with padding before or after "
            "it, got padding between tokens"
        )
    order = jnp.argsort(~jnp.asarray(real), axis=-1, stable=True)
    moved = jnp.take_along_axis(prompt, order, axis=-1)
    return moved, jnp.sum(real, axis=-1, dtype=jnp.int32)


def _has_hole(real: np.ndarray) -> bool:
    """Whether there is padding between the tokens of a row."""
    starts = np.diff(real.astype(np.int8), axis=-1, prepend=0) == 1
    return bool((starts.sum(axis=-1) > 1).any())


def _memory(model: Any, rows: int, source: Any, source_real: Any) -> Memory | None:
    if isinstance(model, EncoderDecoder):
        if source is None:
            raise ValueError("source must be given for an EncoderDecoder")
        if isinstance(model, SpeechTransformer):
            source, real = model.checked_source(source, source_real, name="source_real")
            if source.ndim != 3:
                raise ValueError(f"source must have shape [B S M], got {source.shape}")
        else:
            source, real = _tokens(source, source_real, "source", model.vocabulary)
        if source.shape[0] != rows:
            raise ValueError(f"source must have {rows} rows, as the prompt, got {source.shape}")
        return _encode(*nnx.split(model), source, real)
    if source is not None or source_real is not None:
        raise ValueError("source must be None for a Decoder, which has no encoder")
    return None


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph: Any, state: Any, source: Any, real: Any) -> Memory:
    return eval_model(graph, state).encode(source, real=real)


def _with_capacity(
    model: Any,
    prompt: jax.Array,
    count: jax.Array,
    room: tuple[int, int, int],
    capacity: int | None,
    caches: Any,
) -> Any:
    """Caches with capacity for prompts and new tokens; raises if it is known not to suffice.

    Args:
      model, prompt, count, capacity, caches: of ``prepare``.
      room: ``max_new_tokens``, ``rejected`` and ``beside`` of ``prepare``.
    """
    max_new_tokens, rejected, beside = room
    if caches is None:
        known = not isinstance(count, jax.core.Tracer)
        longest = int(count.max(initial=1)) if known else prompt.shape[-1]
        longest += max_new_tokens - 1
        capacity = longest if capacity is None else int_at_least("capacity", capacity, 1)
        if longest > capacity:
            raise ValueError(
                f"capacity must be at least {longest}, the longest prompt plus max_new_tokens - 1 "
                f"= {max_new_tokens - 1}, got {capacity}"
            )
        batch = prompt.shape[:1]
        if not beside:
            return model.init_caches(batch, capacity, spare=rejected)
        check_capacity(capacity, model.config)  # tokens beside the row have its positions
        return model.stack.init_caches(batch, capacity + beside, spare=rejected)
    if capacity is not None:
        raise ValueError("capacity must be None with caches, which have one")
    learned = model.config.positions == "learned"
    for cache in caches:
        if cache.length.shape != prompt.shape[:1]:
            raise ValueError(
                f"caches must be of {prompt.shape[0]} rows, as the prompt, got {cache.length.shape}"
            )
        after = cache.length + count + max_new_tokens - 1
        if isinstance(after, jax.core.Tracer):
            continue
        most = int(after.max(initial=0))
        if not cache.rolling and most + beside > cache.capacity:
            raise ValueError(
                f"caches have capacity {cache.capacity}, but a row could reach {most + beside} "
                f"tokens: create larger ones"
            )
        if isinstance(cache, PagedCache):
            pages = cache.pages
            needed = int(pages.needed(count + max_new_tokens - 1))
            if needed > (free := int(pages.free_pages)):
                raise ValueError(
                    f"the rows of these caches could need {needed} pages, but only {free} are "
                    f"free: create them with more pages"
                )
        if learned and most > model.config.max_length:
            raise ValueError(
                f"the model has {model.config.max_length} learned positions (max_length), but a "
                f"row of these caches could reach {most} tokens"
            )
    return caches
