"""Beam search: the likeliest continuations, as far as a few open ends at a time can find them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.masks.arguments import int_at_least
from attention_jax.models import decoding as single
from attention_jax.models.decoder import Decoder
from attention_jax.models.encoder_decoder import EncoderDecoder, Memory


class Beams(NamedTuple):
    """The continuations found, the best first."""

    tokens: Any
    """int32 ``[B beams max_new_tokens]``, without the prompt; ``pad_token`` after the end."""
    count: Any
    """int32 ``[B beams]``, how many are real, the stop token included; 0: none was found."""
    score: Any
    """float32 ``[B beams]``: log-probability ``/ count ** length_penalty``."""


class _Settings(NamedTuple):
    max_new_tokens: int
    beams: int
    length_penalty: float
    stop: tuple[int, ...]
    pad_token: int


class _Search(NamedTuple):
    """Of each of ``B`` rows, beams that are open and beams that have ended."""

    step: Any
    open: Any
    """Tokens ``[B beams new]``."""
    log_p: Any
    """``[B beams]``."""
    caches: Any
    """Of ``B * beams`` rows."""
    ended: Beams
    settled: Any
    """bool ``[B]``: no open beam can come to be better than those that have ended."""


def beam_search(
    model: Decoder | EncoderDecoder,
    prompt: Any,
    *,
    max_new_tokens: int,
    beams: int,
    length_penalty: float = 1.0,
    real: Any = None,
    stop: int | Sequence[int] = (),
    pad_token: int = 0,
    source: Any = None,
    source_real: Any = None,
    capacity: int | None = None,
) -> Beams:
    """The best continuations found with ``beams`` open ends, by ``log p / count ** penalty``.

    A row ends when its open beams cannot come to be better than those that have ended, or at
    ``max_new_tokens``, where open beams count as ended.

    Args:
      model, prompt, max_new_tokens, real, stop, pad_token, source, source_real, capacity: as for
        ``generate``.
      beams: how many continuations to keep.
      length_penalty: 0 compares log-probabilities, 1 their means over tokens, more the long ones.

    Returns:
      ``Beams``.

    >>> import numpy as np
    >>> from attention_jax.models import DecoderConfig, Layers
    >>> config = DecoderConfig(10, Layers(features=8, num_layers=1, num_heads=2))
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> beam_search(model, np.array([[3, 1]]), max_new_tokens=3, beams=2).tokens.shape
    (1, 2, 3)

    Source: Wu et al. 2016, "Google's Neural Machine Translation System", section 7, with the length
    penalty of Hugging Face's ``generate``.
    """
    int_at_least("max_new_tokens", max_new_tokens, 1)
    int_at_least("beams", beams, 1)
    if not length_penalty >= 0:
        raise ValueError(f"length_penalty must not be negative, got {length_penalty}")
    prompt, count, memory, caches = single.prepare(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        real=real,
        source=source,
        source_real=source_real,
        capacity=capacity,
        caches=None,
    )
    settings = _Settings(
        max_new_tokens, beams, float(length_penalty), single.as_stop(stop), pad_token
    )
    return _run(*nnx.split(model), settings, prompt, count, memory, caches)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _run(
    graph: Any,
    state: Any,
    settings: _Settings,
    prompt: jax.Array,
    count: jax.Array,
    memory: Memory | None,
    caches: Any,
) -> Beams:
    model = nnx.merge(graph, state)
    model.eval()
    B, K, new = prompt.shape[0], settings.beams, settings.max_new_tokens

    def repeated(x: Any) -> Any:
        return jax.tree.map(lambda a: jnp.repeat(a, K, axis=0), x)

    logits, caches = single.next_logits(model, prompt, count, memory, caches)
    memory = repeated(memory)
    V = logits.shape[-1]

    def normalised(log_p: jax.Array, length: Any) -> jax.Array:
        return log_p / jnp.asarray(length, log_p.dtype) ** settings.length_penalty

    def extend(search: _Search, logits: jax.Array) -> _Search:
        """Every open beam with every token: the best that end, and the best that do not."""
        log_p = search.log_p[..., None] + jax.nn.log_softmax(logits).reshape(B, K, V)
        # Of 2K candidates at least K do not end, where at most one token per beam can; else more.
        wide = min(K * V, K * (1 + max(1, len(settings.stop))))
        log_p, at = jax.lax.top_k(log_p.reshape(B, K * V), wide)
        beam, token = at // V, (at % V).astype(jnp.int32)
        tokens = jnp.take_along_axis(search.open, beam[..., None], axis=1)
        tokens = tokens.at[..., search.step].set(token)
        ends = single.is_any(token, settings.stop)
        length = search.step + 1
        score = jnp.where(ends, normalised(log_p, length), -jnp.inf)
        ended = _best(search.ended, Beams(tokens, jnp.full_like(token, length), score), K)
        log_p, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, log_p), K)
        rows = jnp.arange(B)[:, None] * K + jnp.take_along_axis(beam, kept, axis=1)
        return _Search(
            search.step + 1,
            jnp.take_along_axis(tokens, kept[..., None], axis=1),
            log_p,
            jax.tree.map(lambda x: x[rows.reshape(-1)], search.caches),
            ended,
            search.settled,
        )

    def settled(search: _Search) -> jax.Array:
        # A log-probability only falls, and the penalty divides it by at most new ** penalty.
        attainable = normalised(search.log_p.max(axis=1), new)
        return search.ended.score.min(axis=1) >= attainable

    def going(search: _Search) -> jax.Array:
        return (search.step < new) & ~search.settled.all()

    def go(search: _Search) -> _Search:
        token = jax.lax.dynamic_index_in_dim(
            search.open, search.step - 1, axis=2, keepdims=False
        ).reshape(B * K, 1)
        ones = jnp.ones(B * K, jnp.int32)
        logits, caches = single.next_logits(model, token, ones, memory, search.caches)
        after = extend(search._replace(caches=caches), logits)
        # A row that has settled stays as it is, whatever others still do.
        ended = jax.tree.map(
            lambda a, b: jnp.where(search.settled.reshape(B, *[1] * (a.ndim - 1)), a, b),
            search.ended,
            after.ended,
        )
        after = after._replace(ended=ended)
        return after._replace(settled=search.settled | settled(after))

    nothing = Beams(
        jnp.full((B, K, new), settings.pad_token, jnp.int32),
        jnp.zeros((B, K), jnp.int32),
        jnp.full((B, K), -jnp.inf, logits.dtype),
    )
    start = _Search(
        jnp.int32(0),
        nothing.tokens,
        # At first all beams are the same: the others must not count.
        jnp.broadcast_to(jnp.where(jnp.arange(K) == 0, 0.0, -jnp.inf), (B, K)).astype(logits.dtype),
        repeated(caches),
        nothing,
        jnp.zeros(B, bool),
    )
    search = extend(start, jnp.repeat(logits, K, axis=0))
    search = search._replace(settled=settled(search))
    search = jax.lax.while_loop(going, go, search)
    left = normalised(search.log_p, search.step)
    left = jnp.where(search.settled[:, None], -jnp.inf, left)
    lengths = jnp.full((B, K), search.step, jnp.int32)
    return _best(search.ended, Beams(search.open, lengths, left), K)


def _best(a: Beams, b: Beams, beams: int) -> Beams:
    """The best of both, in order; what has no score is nothing."""
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), a, b)
    score, at = jax.lax.top_k(both.score, beams)
    tokens = jnp.take_along_axis(both.tokens, at[..., None], axis=1)
    count = jnp.take_along_axis(both.count, at, axis=1)
    return Beams(tokens, jnp.where(score > -jnp.inf, count, 0), score)
