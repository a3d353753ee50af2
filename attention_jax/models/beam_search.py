"""Beam search for the most probable continuations."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.core.axes import brief_fields, int_at_least
from attention_jax.models import prompts
from attention_jax.models.decoder import Decoder
from attention_jax.models.encoder_decoder import EncoderDecoder, Memory


class Beams(NamedTuple):
    """The continuations found, best first.

    Attributes:
      tokens: int32 ``[B beams max_new_tokens]``, without the prompt; ``pad_token`` after the end,
        and -1 in a row whose logits are NaN.
      count: int32 ``[B beams]``, how many are real, the stop token included; 0 if none was found.
      score: float32 ``[B beams]``, log-probability ``/ count ** length_penalty``; ``-inf`` if none
        was found, NaN in a row whose logits are NaN.
    """

    tokens: Any
    count: Any
    score: Any

    def __repr__(self) -> str:
        return brief_fields(self, self._fields)


class _Settings(NamedTuple):
    """The static arguments of the compiled loop."""

    max_new_tokens: int
    beams: int
    length_penalty: float
    early_stopping: bool | str | None
    stop: tuple[int, ...]
    pad_token: int


class _Search(NamedTuple):
    """The carry of the loop: open and finished beams of each row."""

    step: Any
    open: Any
    """Tokens of the open beams, ``[B beams new]``."""
    log_p: Any
    """Log-probabilities of the open beams, ``[B beams]``."""
    caches: Any
    """Of the open beams, as ``B * beams`` rows."""
    finished: Beams
    settled: Any
    """bool ``[B]``: no open beam can become better than the finished ones."""


def beam_search(
    model: Decoder | EncoderDecoder,
    prompt: Any,
    *,
    max_new_tokens: int,
    beams: int,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] | None = None,
    real: Any = None,
    stop: Any = (),
    pad_token: int = 0,
    source: Any = None,
    source_real: Any = None,
    capacity: int | None = None,
) -> Beams:
    """The best continuations found with ``beams`` open beams, by ``log p / count ** penalty``.

    Each step extends the open beams by every token and takes the best ``2 * beams`` candidates
    (more, with several stop tokens) by log-probability. Those that end join the finished beams, of
    which the best ``beams`` by score are kept; the best ``beams`` of the others stay open. A row is
    done when it has ``beams`` finished beams and no open one can become better than the worst of
    them: log-probabilities only decrease, so ``log p / max_new_tokens ** penalty`` bounds the score
    of an open beam. At ``max_new_tokens``, open beams count as finished.

    The search of Hugging Face's ``generate``, selected by ``early_stopping``, differs in two rules,
    and so may find other continuations. A candidate that ends counts only if it is among the best
    ``beams`` of the step, so that short continuations are found less often, in particular with a
    ``length_penalty`` below 1. And a row is done when

    - ``False`` (its default): no open beam is better at its *present* length than the worst
      finished one, though with ``length_penalty > 0`` it might become better when longer;
    - ``True``: there are ``beams`` finished beams, or as with ``False``;
    - ``"never"``: as for None if the penalty is positive, else as with ``False``.

    Args:
      model, prompt, max_new_tokens, real, stop, pad_token, source, source_real, capacity: as for
        ``generate``.
      beams: number of continuations to keep.
      length_penalty: 0 compares log-probabilities, 1 their means over tokens; more favors longer
        continuations.
      early_stopping: None for the first search above; True, False or ``"never"`` for those of
        Hugging Face.

    Returns:
      ``Beams``.

    Raises:
      ValueError, TypeError: as ``generate``; a negative ``length_penalty``; an unknown
        ``early_stopping``.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import beam_search, Decoder, DecoderConfig, Layers
    >>> config = DecoderConfig(10, Layers(features=8, num_layers=1, num_heads=2))
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> beam_search(model, np.array([[3, 1]]), max_new_tokens=3, beams=2).tokens.shape
    (1, 2, 3)

    Source: Wu et al. 2016, "Google's Neural Machine Translation System", section 7, with the length
    penalty of Hugging Face's ``generate``.
    """
    max_new_tokens = int_at_least("max_new_tokens", max_new_tokens, 1)
    beams = int_at_least("beams", beams, 1)
    if not 0 <= length_penalty < float("inf"):
        raise ValueError(f"length_penalty must not be negative, got {length_penalty}")
    if isinstance(early_stopping, np.bool_):
        early_stopping = bool(early_stopping)
    if not (early_stopping is None or isinstance(early_stopping, bool | str)) or (
        isinstance(early_stopping, str) and early_stopping != "never"
    ):
        raise ValueError(
            f'early_stopping must be None, True, False or "never", got {early_stopping!r}'
        )
    prompt, count, memory, caches = prompts.prepare(
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
        max_new_tokens,
        beams,
        float(length_penalty),
        early_stopping,
        prompts.as_stop(stop, model.vocabulary),
        prompts.as_pad(pad_token),
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
    model = prompts.eval_model(graph, state)
    B, K, new = prompt.shape[0], settings.beams, settings.max_new_tokens

    def repeated(x: Any) -> Any:
        return jax.tree.map(lambda a: jnp.repeat(a, K, axis=0), x)

    hugging_face = settings.early_stopping is not None
    until_longest = settings.length_penalty > 0 and settings.early_stopping in (None, "never")
    logits, caches = prompts.next_logits(model, prompt, count, memory, caches)
    memory = repeated(memory)
    V = logits.shape[-1]

    def normalized(log_p: jax.Array, length: Any) -> jax.Array:
        return log_p / jnp.asarray(length, log_p.dtype) ** settings.length_penalty

    def extend(search: _Search, logits: jax.Array) -> _Search:
        """Extends every open beam by every token; keeps the best that end and that do not."""
        log_p = search.log_p[..., None] + jax.nn.log_softmax(logits).reshape(B, K, V)
        # With one stop token, at least K of the best 2K candidates do not end.
        wide = min(K * V, K * (1 + max(1, len(settings.stop))))
        log_p, at = jax.lax.top_k(log_p.reshape(B, K * V), wide)
        beam, token = at // V, (at % V).astype(jnp.int32)
        tokens = jnp.take_along_axis(search.open, beam[..., None], axis=1)
        tokens = tokens.at[..., search.step].set(token)
        ends = prompts.is_any(token, settings.stop)
        length = search.step + 1
        counted = ends
        if hugging_face:
            ends = ends | (length == new)
            counted = ends & (jnp.arange(wide) < K)
        score = jnp.where(counted, normalized(log_p, length), -jnp.inf)
        finished = _best(search.finished, Beams(tokens, jnp.full_like(token, length), score), K)
        log_p, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, log_p), K)
        rows = jnp.arange(B)[:, None] * K + jnp.take_along_axis(beam, kept, axis=1)
        return _Search(
            search.step + 1,
            jnp.take_along_axis(tokens, kept[..., None], axis=1),
            log_p,
            jax.tree.map(lambda x: x[rows.reshape(-1)], search.caches),
            finished,
            search.settled,
        )

    def settled(search: _Search) -> jax.Array:
        # Log-probabilities only decrease; the penalty divides them by at most new ** penalty.
        attainable = normalized(search.log_p.max(axis=1), new if until_longest else search.step)
        worst = search.finished.score.min(axis=1)
        done = worst >= attainable
        return done | (worst > -jnp.inf) if settings.early_stopping is True else done

    def unfinished(search: _Search) -> jax.Array:
        return (search.step < new) & ~search.settled.all()

    def step(search: _Search) -> _Search:
        token = jax.lax.dynamic_index_in_dim(
            search.open, search.step - 1, axis=2, keepdims=False
        ).reshape(B * K, 1)
        ones = jnp.ones(B * K, jnp.int32)
        logits, caches = prompts.next_logits(model, token, ones, memory, search.caches)
        after = extend(search._replace(caches=caches), logits)
        # Rows that have settled stay as they are while others continue.
        finished = jax.tree.map(
            lambda a, b: jnp.where(search.settled.reshape(B, *[1] * (a.ndim - 1)), a, b),
            search.finished,
            after.finished,
        )
        after = after._replace(finished=finished)
        return after._replace(settled=search.settled | settled(after))

    none = Beams(
        jnp.full((B, K, new), settings.pad_token, jnp.int32),
        jnp.zeros((B, K), jnp.int32),
        jnp.full((B, K), -jnp.inf, logits.dtype),
    )
    start = _Search(
        jnp.int32(0),
        none.tokens,
        # All beams start equal: only the first one counts.
        jnp.broadcast_to(jnp.where(jnp.arange(K) == 0, 0.0, -jnp.inf), (B, K)).astype(logits.dtype),
        repeated(caches),
        none,
        jnp.zeros(B, bool),
    )
    search = extend(start, jnp.repeat(logits, K, axis=0))
    search = search._replace(settled=settled(search))
    search = jax.lax.while_loop(unfinished, step, search)
    score = normalized(search.log_p, search.step)
    score = jnp.where(search.settled[:, None], -jnp.inf, score)
    lengths = jnp.full((B, K), search.step, jnp.int32)
    found = _best(search.finished, Beams(search.open, lengths, score), K)
    # NaN ranks first, so that it is still here if it ever occurred.
    invalid = jnp.isnan(found.score).any(axis=1, keepdims=True)
    return Beams(
        jnp.where(invalid[..., None], -1, found.tokens),
        jnp.where(invalid, 0, found.count),
        jnp.where(invalid, jnp.nan, found.score),
    )


def _best(a: Beams, b: Beams, beams: int) -> Beams:
    """The best beams of both, in order; those with score -inf are empty."""
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), a, b)
    score, at = jax.lax.top_k(both.score, beams)
    tokens = jnp.take_along_axis(both.tokens, at[..., None], axis=1)
    count = jnp.take_along_axis(both.count, at, axis=1)
    return Beams(tokens, jnp.where(score > -jnp.inf, count, 0), score)
