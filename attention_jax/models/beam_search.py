"""Beam search: the likeliest continuations, as far as a few open ends at a time can find them."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.core.axes import int_at_least
from attention_jax.models import prompts
from attention_jax.models.decoder import Decoder
from attention_jax.models.encoder_decoder import EncoderDecoder, Memory


class Beams(NamedTuple):
    """The continuations found, the best first."""

    tokens: Any
    """int32 ``[B beams max_new_tokens]``, without the prompt; ``pad_token`` after the end, and -1
    in a row whose logits are NaN."""
    count: Any
    """int32 ``[B beams]``, how many are real, the stop token included; 0: none was found."""
    score: Any
    """float32 ``[B beams]``: log-probability ``/ count ** length_penalty``; ``-inf`` where none was
    found, NaN in a row whose logits are."""


class _Settings(NamedTuple):
    max_new_tokens: int
    beams: int
    length_penalty: float
    early_stopping: bool | str | None
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
    early_stopping: bool | Literal["never"] | None = None,
    real: Any = None,
    stop: Any = (),
    pad_token: int = 0,
    source: Any = None,
    source_real: Any = None,
    capacity: int | None = None,
) -> Beams:
    """The best continuations found with ``beams`` open ends, by ``log p / count ** penalty``.

    Each step extends the open beams by every token and looks at the best ``2 * beams`` (more, with
    several stop tokens) by log-probability. Of these, the ones that end join what was found, where
    the best ``beams`` by score stay; the best ``beams`` that do not end are open. A row is done
    when ``beams`` are found and no open one can come to be better than the worst of them, since a
    log-probability only falls: ``log p / max_new_tokens ** penalty`` is the most that it can reach.
    At ``max_new_tokens`` open beams count as ended.

    The search of Hugging Face's ``generate``, which ``early_stopping`` asks for, differs in two
    rules, and so in what it finds. A continuation that ends counts only where it is among the best
    ``beams`` of the step, so that short ones are found less often: most where ``length_penalty`` is
    less than 1. And a row is done when

    - ``False`` (its default): no open beam is better with its *present* length than the worst that
      is found, though with ``length_penalty > 0`` a longer one might come to be;
    - ``True``: ``beams`` are found, or as with ``False``;
    - ``"never"``: as here, where the penalty is positive; else as with ``False``, the same there.

    Args:
      model, prompt, max_new_tokens, real, stop, pad_token, source, source_real, capacity: as for
        ``generate``.
      beams: how many continuations to keep.
      length_penalty: 0 compares log-probabilities, 1 their means over tokens, more the long ones.
      early_stopping: None is the first search above; True, False and ``"never"`` are those of
        Hugging Face.

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
    model = nnx.merge(graph, state)
    model.eval()
    B, K, new = prompt.shape[0], settings.beams, settings.max_new_tokens

    def repeated(x: Any) -> Any:
        return jax.tree.map(lambda a: jnp.repeat(a, K, axis=0), x)

    theirs = settings.early_stopping is not None
    longest = settings.length_penalty > 0 and settings.early_stopping in (None, "never")
    logits, caches = prompts.next_logits(model, prompt, count, memory, caches)
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
        ends = prompts.is_any(token, settings.stop)
        length = search.step + 1
        counts = ends
        if theirs:
            ends = ends | (length == new)
            counts = ends & (jnp.arange(wide) < K)
        score = jnp.where(counts, normalised(log_p, length), -jnp.inf)
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
        attainable = normalised(search.log_p.max(axis=1), new if longest else search.step)
        worst = search.ended.score.min(axis=1)
        done = worst >= attainable
        return done | (worst > -jnp.inf) if settings.early_stopping is True else done

    def going(search: _Search) -> jax.Array:
        return (search.step < new) & ~search.settled.all()

    def go(search: _Search) -> _Search:
        token = jax.lax.dynamic_index_in_dim(
            search.open, search.step - 1, axis=2, keepdims=False
        ).reshape(B * K, 1)
        ones = jnp.ones(B * K, jnp.int32)
        logits, caches = prompts.next_logits(model, token, ones, memory, search.caches)
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
    found = _best(search.ended, Beams(search.open, lengths, left), K)
    # What is not a number ranks first, so that it is seen here if it ever came up.
    lost = jnp.isnan(found.score).any(axis=1, keepdims=True)
    return Beams(
        jnp.where(lost[..., None], -1, found.tokens),
        jnp.where(lost, 0, found.count),
        jnp.where(lost, jnp.nan, found.score),
    )


def _best(a: Beams, b: Beams, beams: int) -> Beams:
    """The best of both, in order; what has no score is nothing."""
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), a, b)
    score, at = jax.lax.top_k(both.score, beams)
    tokens = jnp.take_along_axis(both.tokens, at[..., None], axis=1)
    count = jnp.take_along_axis(both.count, at, axis=1)
    return Beams(tokens, jnp.where(score > -jnp.inf, count, 0), score)
