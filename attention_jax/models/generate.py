"""Decoding: one token after the other, each from the logits of those before it.

Everything runs in one compiled loop over rows that know nothing of each other, or step by step, for
what wants each token when it comes. Prompts may be of different lengths: they are moved to the left
of their rows first, so that padding on either side gives the same.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.core.axes import int_at_least, is_array
from attention_jax.models import prompts
from attention_jax.models.decoder import Decoder, first_tokens
from attention_jax.models.encoder_decoder import EncoderDecoder, Memory
from attention_jax.models.sampling import Choice, Processor, Sampling, as_choice


class Generated(NamedTuple):
    """What was generated."""

    tokens: Any
    """int32 ``[B max_new_tokens]``, without the prompt; ``pad_token`` after the end. -1 where there
    is none to choose: logits are NaN, or processors leave nothing. Such a row ends there."""
    count: Any
    """int32 ``[B]``, how many are real, the stop token included."""
    log_probability: Any
    """float32 ``[B]``, of them all under the model; NaN where a row ends for want of a token."""
    caches: Any
    """With all tokens but the last generated, to go on from."""


class _Settings(NamedTuple):
    """What the compiled loop depends on, beside arrays."""

    max_new_tokens: int
    choice: Choice
    stop: tuple[int, ...]
    pad_token: int


class _Loop(NamedTuple):
    """Where the loop is."""

    step: Any
    token: Any
    """The last of each row, ``[B]``."""
    so_far: Any
    """Prompts and what was generated, ``[B T + new]``; -1 where there is nothing."""
    done: Any
    """bool ``[B]``."""
    result: Generated


def generate(
    model: Decoder | EncoderDecoder,
    prompt: Any,
    *,
    max_new_tokens: int,
    real: Any = None,
    sampling: Sampling | Choice | Processor | Sequence[Processor] | None = None,
    key: Any = None,
    stop: Any = (),
    pad_token: int = 0,
    source: Any = None,
    source_real: Any = None,
    capacity: int | None = None,
    caches: Any = None,
) -> Generated:
    """The tokens that follow each prompt.

    A row's result depends on its own prompt, the key and its number in the batch, on no other row.

    Args:
      model: a ``Decoder``, or an ``EncoderDecoder``.
      prompt: integers ``[B T]``; for an ``EncoderDecoder`` the target so far, its start token say.
      max_new_tokens: how many tokens to generate at most.
      real: bool ``[B T]``, False for padding, on either side, where the prompt may hold any
        integers; default: all are real.
      sampling: how tokens are chosen. None: the likeliest. ``Sampling``, or processors of
        ``models.sampling`` as ``(temperature(0.7), top_p(0.9))``: drawn from what they leave.
        ``sampling.likeliest(...)``: the likeliest of what they leave. Processors see the prompt and
        what was generated, not what is in the caches.
      key: a key of ``jax.random``, or one for each row ``[B]``; for what is drawn.
      stop: the token that ends a row, several of them, or None.
      pad_token: what stands after the end; any int.
      source, source_real: for an ``EncoderDecoder``: integers ``[B S]`` and which are no padding.
      capacity: of the caches; default ``T + max_new_tokens - 1``, what there is room needed for.
      caches: of what came before the prompt; donated: what ``Generated`` has takes their place.

    Returns:
      ``Generated``.

    Raises:
      ValueError: prompts without a token, or for which there is no room; a token of the prompt, the
        source or ``stop`` that is not in the vocabulary; a key is missing. Where tokens are not
        known, under ``jit``, a row with one that is not in the vocabulary generates -1 and ends.
      TypeError: prompts that are not integers; another model.

    >>> import numpy as np
    >>> from attention_jax.models import DecoderConfig, Layers, sampling
    >>> config = DecoderConfig(10, Layers(features=8, num_layers=1, num_heads=2))
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> generate(model, np.array([[3, 1], [4, 4]]), max_new_tokens=3).tokens.shape
    (2, 3)
    >>> how = sampling.repetition_penalty(1.2), sampling.temperature(0.7), sampling.min_p(0.05)
    >>> generate(model, np.array([[3, 1]]), max_new_tokens=3, sampling=how,
    ...          key=jax.random.key(0)).tokens.shape
    (1, 3)
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "key": key}
    options |= {"stop": stop, "pad_token": pad_token, "real": real}
    options |= {"source": source, "source_real": source_real}
    fixed, start, caches = _ready(model, prompt, **options, capacity=capacity, caches=caches)
    return _run(*fixed, *start, caches)


def stream(
    model: Decoder | EncoderDecoder,
    prompt: Any,
    *,
    max_new_tokens: int,
    real: Any = None,
    sampling: Sampling | Choice | Processor | Sequence[Processor] | None = None,
    key: Any = None,
    stop: Any = (),
    pad_token: int = 0,
    source: Any = None,
    source_real: Any = None,
    capacity: int | None = None,
    caches: Any = None,
) -> Generator[jax.Array, None, Generated]:
    """The tokens that follow each prompt, one step at a time as they come.

    The steps are those of ``generate``, in a loop on the host. It ends when all rows have.

    Args:
      model, prompt, max_new_tokens, real, sampling, key, stop, pad_token, source, source_real,
        capacity, caches: as for ``generate``.

    Returns:
      An iterator over int32 ``[B]``, the columns of ``generate(...).tokens`` as long as there is a
      row that has not ended. As a generator it returns ``Generated``, for ``yield from``.

    Raises:
      ValueError, TypeError: as ``generate``, and before the first step; under ``jit``.

    >>> import numpy as np
    >>> from attention_jax.models import DecoderConfig, Layers
    >>> config = DecoderConfig(10, Layers(features=8, num_layers=1, num_heads=2))
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> prompt = np.array([[3, 1], [4, 4]])
    >>> steps = [step.tolist() for step in stream(model, prompt, max_new_tokens=3)]
    >>> steps == generate(model, prompt, max_new_tokens=3).tokens.T.tolist()
    True
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((prompt, real, caches))):
        raise TypeError("prompt must be known: stream loops on the host; under jit use generate")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "key": key}
    options |= {"stop": stop, "pad_token": pad_token, "real": real}
    options |= {"source": source, "source_real": source_real}
    return _steps(*_ready(model, prompt, **options, capacity=capacity, caches=caches))


def _ready(
    model: Any,
    prompt: Any,
    *,
    sampling: Any,
    key: Any,
    stop: Any,
    pad_token: int,
    max_new_tokens: int,
    **options: Any,
) -> tuple[Any, Any, Any]:
    """The checked arguments of both: graph, settings and state; what the loop reads; caches."""
    max_new_tokens = int_at_least("max_new_tokens", max_new_tokens, 1)
    choice = as_choice(sampling)
    prompt, count, memory, caches = prompts.prepare(
        model, prompt, max_new_tokens=max_new_tokens, **options
    )
    keys = _row_keys(key, prompt.shape[0]) if choice.draws else None
    stops = prompts.as_stop(stop, model.vocabulary)
    settings = _Settings(max_new_tokens, choice, stops, prompts.as_pad(pad_token))
    graph, state = nnx.split(model)
    return (graph, settings, state), (prompt, count, memory, keys), caches


def _row_keys(key: Any, rows: int) -> jax.Array:
    """A key for each row."""
    if key is None:
        raise ValueError("key must be given with sampling: a key of jax.random")
    typed = is_array(key) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and not (is_array(key) and key.dtype == jnp.uint32):
        raise TypeError(
            f"key must be a key of jax.random, or one for each row, got {type(key).__name__}"
        )
    one = 0 if typed else 1  # axes of one key
    if key.ndim == one:
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(rows))
    if key.ndim != one + 1 or key.shape[0] != rows:
        raise ValueError(
            f"key must be one key or one for each of {rows} rows, got shape {key.shape}"
        )
    return key


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames=("caches",))
def _run(
    graph: Any,
    settings: _Settings,
    state: Any,
    prompt: jax.Array,
    count: jax.Array,
    memory: Memory | None,
    keys: Any,
    caches: Any,
) -> Generated:
    """All steps."""
    model = _evaluated(graph, state)
    loop = _begin(model, settings, prompt, count, memory, keys, caches)

    def going(loop: _Loop) -> jax.Array:
        return (loop.step < settings.max_new_tokens) & ~loop.done.all()

    go = functools.partial(_go, model, settings, memory, keys)
    return jax.lax.while_loop(going, go, loop).result


def _steps(
    fixed: Any, start: tuple[Any, ...], caches: Any
) -> Generator[jax.Array, None, Generated]:
    """The same on the host."""
    graph, settings, state = fixed
    *_, memory, keys = start
    loop, caches = _first_step(graph, settings, state, *start, caches)
    yield loop.token
    for _ in range(settings.max_new_tokens - 1):
        if bool(loop.done.all()):
            break
        loop, caches = _next_step(graph, settings, state, memory, keys, loop, caches)
        yield loop.token
    return loop.result._replace(caches=caches)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames=("caches",))
def _first_step(
    graph: Any,
    settings: _Settings,
    state: Any,
    prompt: jax.Array,
    count: jax.Array,
    memory: Memory | None,
    keys: Any,
    caches: Any,
) -> tuple[_Loop, Any]:
    model = _evaluated(graph, state)
    return _apart(_begin(model, settings, prompt, count, memory, keys, caches))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames=("caches",))
def _next_step(
    graph: Any, settings: _Settings, state: Any, memory: Any, keys: Any, loop: _Loop, caches: Any
) -> tuple[_Loop, Any]:
    loop = loop._replace(result=loop.result._replace(caches=caches))
    return _apart(_go(_evaluated(graph, state), settings, memory, keys, loop))


def _apart(loop: _Loop) -> tuple[_Loop, Any]:
    """The caches apart, since these alone are donated: what was given out must live on."""
    return loop._replace(result=loop.result._replace(caches=None)), loop.result.caches


def _evaluated(graph: Any, state: Any) -> Any:
    model = nnx.merge(graph, state)
    model.eval()
    return model


def _begin(
    model: Any,
    settings: _Settings,
    prompt: jax.Array,
    count: jax.Array,
    memory: Memory | None,
    keys: Any,
    caches: Any,
) -> _Loop:
    """The prompt, and the first token."""
    B, new = prompt.shape[0], settings.max_new_tokens
    logits, caches = prompts.next_logits(model, prompt, count, memory, caches)
    result = Generated(
        jnp.full((B, new), settings.pad_token, jnp.int32),
        jnp.zeros(B, jnp.int32),
        jnp.zeros(B, logits.dtype),
        caches,
    )
    given = jnp.where(first_tokens(count, prompt.shape), prompt, -1)
    so_far = jnp.concatenate([given, jnp.full((B, new), -1, jnp.int32)], axis=1)
    start = _Loop(jnp.int32(0), jnp.zeros(B, jnp.int32), so_far, jnp.zeros(B, bool), result)
    return _add(settings, keys, start, logits)


def _go(model: Any, settings: _Settings, memory: Any, keys: Any, loop: _Loop) -> _Loop:
    """The logits of what follows the last token, and the next."""
    caches = loop.result.caches
    logits, caches = prompts.next_logits(model, loop.token[:, None], ~loop.done, memory, caches)
    return _add(settings, keys, loop._replace(result=loop.result._replace(caches=caches)), logits)


def _add(settings: _Settings, keys: Any, loop: _Loop, logits: jax.Array) -> _Loop:
    """One token more in every row that has not ended."""
    step, done, result = loop.step, loop.done, loop.result
    at = None if keys is None else jax.vmap(lambda k: jax.random.fold_in(k, step))(keys)
    token = jax.vmap(settings.choice)(loop.so_far, logits, at)
    none = token < 0
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    log_p = jnp.where(none, jnp.nan, log_p)
    place = loop.so_far.shape[1] - settings.max_new_tokens + step
    so_far = loop.so_far.at[:, place].set(jnp.where(done, -1, token))
    token = jnp.where(done, settings.pad_token, token)
    result = result._replace(
        tokens=result.tokens.at[:, step].set(token),
        count=result.count + jnp.where(done | none, 0, 1),
        log_probability=result.log_probability + jnp.where(done, 0, log_p),
    )
    done = done | none | prompts.is_any(token, settings.stop)
    return _Loop(step + 1, token, so_far, done, result)
