"""Generation: one token after the other, each chosen from the logits after the previous ones.

``generate`` runs one compiled loop, ``stream`` one compiled step per token. Rows are independent.
Prompts may be of different lengths: they are first moved to the left of their rows, so that padding
on either side gives the same result.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attention_jax.cache import Cache
from attention_jax.core.axes import AnyArray, brief_fields, int_at_least, is_array, kind
from attention_jax.models import prompts
from attention_jax.models.decoder import Decoder, first_tokens
from attention_jax.models.encoder_decoder import EncoderDecoder, Memory
from attention_jax.models.sampling import Choice, Processor, Sampling, as_choice

Caches: TypeAlias = tuple[Cache, ...]


class Generated(NamedTuple):
    """The result of ``generate``.

    Attributes:
      tokens: int32 ``[B max_new_tokens]``, without the prompt; ``pad_token`` after the end. -1 if
        no token can be chosen, since logits are NaN or processors leave none; the row ends there.
      count: int32 ``[B]``, how many are real, the stop token included.
      log_probability: float32 ``[B]``, of all of them under the model; NaN if a row ends in -1.
      caches: with all tokens except the last one, to resume from.
    """

    tokens: Int[Array, "B new"]
    count: Any  # int32 [B]; a narrower type would clash with tuple.count
    log_probability: Float[Array, " B"]
    caches: Caches

    def __repr__(self) -> str:
        return brief_fields(self, self._fields)


class Settings(NamedTuple):
    """The static arguments of the compiled loop."""

    max_new_tokens: int
    choice: Choice
    stop: tuple[int, ...]
    pad_token: int


class _Loop(NamedTuple):
    """The carry of the loop."""

    step: Int[Array, ""]
    token: Int[Array, " B"]  # the last one of each row
    so_far: Int[Array, "B T+new"]  # prompts and generated tokens; -1 elsewhere
    done: Bool[Array, " B"]
    result: Generated


def generate(
    model: Decoder | EncoderDecoder,
    prompt: Any,
    *,
    max_new_tokens: int,
    real: Any = None,
    sampling: Sampling | Choice | Processor | Sequence[Processor] | None = None,
    key: AnyArray | None = None,
    stop: Any = (),
    pad_token: int = 0,
    source: Any = None,
    source_real: Any = None,
    capacity: int | None = None,
    caches: Sequence[Cache] | None = None,
) -> Generated:
    """The tokens that follow each prompt.

    The result of a row depends on its prompt, the key and its index, not on other rows.

    Args:
      model: a ``Decoder``, or an ``EncoderDecoder``.
      prompt: integers ``[B T]``; for an ``EncoderDecoder`` the start of the target.
      max_new_tokens: largest number of tokens to generate.
      real: bool ``[B T]``, False for padding, on either side, where the prompt may hold any
        integers; default: all are real. Padding between tokens is refused; under ``jit``, where it
        is not known, the tokens around it are joined.
      sampling: how tokens are chosen. None: greedily. ``Sampling``, or processors of
        ``models.sampling`` such as ``(temperature(0.7), top_p(0.9))``: drawn from the processed
        logits. ``sampling.likeliest(...)``: greedily from the processed logits. Processors get the
        tokens of the prompt and the generated ones, not those in the caches.
      key: a key of ``jax.random``, or one for each row ``[B]``; required for drawing, and refused
        otherwise.
      stop: the token that ends a row, several of them, or None.
      pad_token: fills a row after its end; any int.
      source, source_real: for an ``EncoderDecoder``: integers ``[B S]``, and bool ``[B S]``, False
        for padding. The source of a ``SpeechTransformer`` is a spectrogram ``[B S M]``.
      capacity: of the caches; default ``T + max_new_tokens - 1``, the least that suffices.
      caches: of the tokens before the prompt. They are donated: use those of ``Generated`` after.

    Returns:
      ``Generated``.

    Raises:
      ValueError: empty prompts, or too little capacity for them; a token of the prompt, the source
        or ``stop`` that is not in the vocabulary; a missing key, or one that is not
        used. Under ``jit``, where tokens are not known, a row with a token outside the vocabulary
        generates -1 and ends.
      TypeError: prompts that are not integers; another model.

    >>> import jax
    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import Decoder, DecoderConfig, generate, Layers, sampling
    >>> config = DecoderConfig(10, Layers(features=8, num_layers=1, num_heads=2))
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> generate(model, np.array([[3, 1], [4, 4]]), max_new_tokens=3).tokens.shape
    (2, 3)
    >>> processors = sampling.repetition_penalty(1.2), sampling.min_p(0.05)
    >>> generate(model, np.array([[3, 1]]), max_new_tokens=3, sampling=processors,
    ...          key=jax.random.key(0)).tokens.shape
    (1, 3)
    """
    fixed, start, caches = _prepare(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        real=real,
        sampling=sampling,
        key=key,
        stop=stop,
        pad_token=pad_token,
        source=source,
        source_real=source_real,
        capacity=capacity,
        caches=caches,
    )
    return _run(*fixed, *start, caches)


def stream(
    model: Decoder | EncoderDecoder, prompt: Any, *, max_new_tokens: int, **options: Any
) -> Generator[jax.Array, None, Generated]:
    """The tokens that follow each prompt, yielded step by step.

    The same steps as ``generate``, in a loop on the host that ends when all rows have ended.

    Args:
      model, prompt, max_new_tokens: as for ``generate``.
      **options: the other arguments of ``generate``.

    Returns:
      A generator of int32 ``[B]``, the columns of ``generate(...).tokens`` until all rows have
      ended. It returns ``Generated``, for ``yield from``.

    Raises:
      ValueError, TypeError: as ``generate``, before the first step; under ``jit``.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import Decoder, DecoderConfig, generate, Layers, stream
    >>> config = DecoderConfig(10, Layers(features=8, num_layers=1, num_heads=2))
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> prompt = np.array([[3, 1], [4, 4]])
    >>> steps = [step.tolist() for step in stream(model, prompt, max_new_tokens=3)]
    >>> steps == generate(model, prompt, max_new_tokens=3).tokens.T.tolist()
    True
    """
    arrays = (prompt, options.get("real"), options.get("caches"))
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arrays)):
        raise TypeError("prompt must be known: stream loops on the host; under jit use generate")
    return _steps(*_prepare(model, prompt, max_new_tokens=max_new_tokens, **options))


def _prepare(
    model: Decoder | EncoderDecoder,
    prompt: Any,
    *,
    max_new_tokens: int,
    sampling: Any = None,
    key: AnyArray | None = None,
    stop: Any = (),
    pad_token: int = 0,
    real: Any = None,
    source: Any = None,
    source_real: Any = None,
    capacity: int | None = None,
    caches: Sequence[Cache] | None = None,
) -> tuple[
    tuple[nnx.GraphDef[Any], Settings, nnx.State[Any, Any]],
    tuple[jax.Array, jax.Array, Memory | None, jax.Array | None],
    Caches,
]:
    """Checks the arguments of ``generate``; returns those of ``_run``.

    They come in three groups: graph, settings and state; what the loop reads; caches.
    """
    max_new_tokens = int_at_least("max_new_tokens", max_new_tokens, 1)
    choice = as_choice(sampling)
    prompt, count, memory, caches = prompts.prepare(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        real=real,
        source=source,
        source_real=source_real,
        capacity=capacity,
        caches=caches,
    )
    keys = row_keys(choice, key, prompt.shape[0])
    stops = prompts.as_stop(stop, model.vocabulary)
    settings = Settings(max_new_tokens, choice, stops, prompts.as_pad(pad_token))
    graph, state = nnx.split(model)
    return (graph, settings, state), (prompt, count, memory, keys), tuple(caches)


def row_keys(choice: Choice, key: Any, rows: int) -> jax.Array | None:
    """A key for each row, None for a choice that does not draw."""
    if not choice.draws:
        if key is None:
            return None
        raise ValueError(
            "key must be None without a draw: for random tokens pass sampling too, such as "
            "sampling=Sampling(temperature=0.8)"
        )
    if key is None:
        raise ValueError("key must be given with sampling: a key of jax.random")
    typed = is_array(key) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and not (is_array(key) and key.dtype == jnp.uint32):
        raise TypeError(f"key must be a key of jax.random, or one for each row, got {kind(key)}")
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
    graph: nnx.GraphDef[Any],
    settings: Settings,
    state: nnx.State[Any, Any],
    prompt: jax.Array,
    count: jax.Array,
    memory: Memory | None,
    keys: jax.Array | None,
    caches: Caches,
) -> Generated:
    """The whole loop, compiled."""
    model = prompts.eval_model(graph, state)
    loop = begin(model, settings, prompt, count, memory, keys, caches)

    def unfinished(loop: _Loop) -> jax.Array:
        return (loop.step < settings.max_new_tokens) & ~loop.done.all()

    step = functools.partial(_step, model, settings, memory, keys)
    return jax.lax.while_loop(unfinished, step, loop).result


def _steps(
    fixed: tuple[nnx.GraphDef[Any], Settings, nnx.State[Any, Any]],
    start: tuple[jax.Array, jax.Array, Memory | None, jax.Array | None],
    caches: Caches,
) -> Generator[jax.Array, None, Generated]:
    """The loop on the host, with compiled steps."""
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
    graph: nnx.GraphDef[Any],
    settings: Settings,
    state: nnx.State[Any, Any],
    prompt: jax.Array,
    count: jax.Array,
    memory: Memory | None,
    keys: jax.Array | None,
    caches: Caches,
) -> tuple[_Loop, Caches]:
    model = prompts.eval_model(graph, state)
    return _split_caches(begin(model, settings, prompt, count, memory, keys, caches))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames=("caches",))
def _next_step(
    graph: nnx.GraphDef[Any],
    settings: Settings,
    state: nnx.State[Any, Any],
    memory: Memory | None,
    keys: jax.Array | None,
    loop: _Loop,
    caches: Caches,
) -> tuple[_Loop, Caches]:
    loop = loop._replace(result=loop.result._replace(caches=caches))
    return _split_caches(_step(prompts.eval_model(graph, state), settings, memory, keys, loop))


def _split_caches(loop: _Loop) -> tuple[_Loop, Caches]:
    """Loop and caches, of which only the caches are donated: yielded tokens must stay valid."""
    return loop._replace(result=loop.result._replace(caches=())), loop.result.caches


def begin(
    model: Decoder | EncoderDecoder,
    settings: Settings,
    prompt: jax.Array,
    count: jax.Array,
    memory: Memory | None,
    keys: jax.Array | None,
    caches: Caches,
) -> _Loop:
    """Reads the prompt and chooses the first token."""
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
    return _choose(settings, keys, start, logits)


def _step(
    model: Decoder | EncoderDecoder,
    settings: Settings,
    memory: Memory | None,
    keys: jax.Array | None,
    loop: _Loop,
) -> _Loop:
    """One step: the logits after the last token, and the choice of the next one."""
    caches = loop.result.caches
    logits, caches = prompts.next_logits(model, loop.token[:, None], ~loop.done, memory, caches)
    return _choose(
        settings, keys, loop._replace(result=loop.result._replace(caches=caches)), logits
    )


def _choose(
    settings: Settings, keys: jax.Array | None, loop: _Loop, logits: Float[Array, "B V"]
) -> _Loop:
    """Chooses a token in every row that has not ended."""
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
