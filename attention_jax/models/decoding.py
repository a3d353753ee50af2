"""Decoding: one token after the other, each from the logits of those before it.

Everything runs in one compiled loop over rows that know nothing of each other. Prompts may be of
different lengths: they are moved to the left of their rows first, so that padding on either side
gives the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attention_jax.masks.arguments import int_at_least
from attention_jax.models.decoder import Decoder
from attention_jax.models.encoder_decoder import EncoderDecoder, Memory
from attention_jax.models.layers import last
from attention_jax.positions.arguments import check_positions


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn: ``softmax(logits / temperature)`` over the likeliest.

    Attributes:
      temperature: 1 is the model's own distribution, less is sharper.
      top_k: only the ``top_k`` likeliest tokens; None: all.
      top_p: of these only the likeliest that together reach this probability; None: all.

    Source: Fan et al. 2018, "Hierarchical Neural Story Generation" (top-k); Holtzman et al. 2020,
    "The Curious Case of Neural Text Degeneration" (top-p).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature}: greedy is sampling=None"
            )
        if self.top_k is not None:
            int_at_least("top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    def draw(self, logits: Float[Array, "V"], key: jax.Array) -> Int[Array, ""]:
        """One token.

        >>> logits = jnp.log(jnp.array([0.1, 0.6, 0.3]))
        >>> int(Sampling(top_p=0.5).draw(logits, jax.random.key(0)))
        1
        """
        k = logits.shape[-1] if self.top_k is None else min(self.top_k, logits.shape[-1])
        if k == logits.shape[-1] and self.top_p is None:
            return jax.random.categorical(key, logits / self.temperature)
        likeliest, tokens = jax.lax.top_k(logits / self.temperature, k)
        if self.top_p is not None:
            probability = jax.nn.softmax(likeliest)
            before = jnp.cumsum(probability) - probability
            likeliest = jnp.where(before < self.top_p, likeliest, -jnp.inf)
        return tokens[jax.random.categorical(key, likeliest)]


class Generated(NamedTuple):
    """What was generated."""

    tokens: Any
    """int32 ``[B max_new_tokens]``, without the prompt; ``pad_token`` after the end."""
    count: Any
    """int32 ``[B]``, how many are real, the stop token included."""
    log_probability: Any
    """float32 ``[B]``, of them all under the model."""
    caches: Any
    """With all tokens but the last generated, to go on from."""


class _Settings(NamedTuple):
    """What the compiled loop depends on, beside arrays."""

    max_new_tokens: int
    sampling: Sampling | None
    stop: tuple[int, ...]
    pad_token: int


def generate(
    model: Decoder | EncoderDecoder,
    prompt: Any,
    *,
    max_new_tokens: int,
    real: Any = None,
    sampling: Sampling | None = None,
    key: Any = None,
    stop: int | Sequence[int] = (),
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
      real: bool ``[B T]``, False for padding, on either side; default: all are real.
      sampling: how tokens are drawn; None takes the likeliest.
      key: a key of ``jax.random``, or one for each row ``[B]``; for sampling.
      stop: tokens that end a row.
      pad_token: what stands after the end.
      source, source_real: for an ``EncoderDecoder``: integers ``[B S]`` and which are no padding.
      capacity: of the caches; default ``T + max_new_tokens - 1``, what there is room needed for.
      caches: of what came before the prompt; donated: what ``Generated`` has takes their place.

    Returns:
      ``Generated``.

    Raises:
      ValueError: prompts without a token, or for which there is no room; a key is missing.
      TypeError: prompts that are not integers; another model.

    >>> from attention_jax.models import DecoderConfig, Layers
    >>> config = DecoderConfig(10, Layers(features=8, num_layers=1, num_heads=2))
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> generate(model, np.array([[3, 1], [4, 4]]), max_new_tokens=3).tokens.shape
    (2, 3)
    """
    int_at_least("max_new_tokens", max_new_tokens, 1)
    prompt, count, memory, caches = prepare(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        real=real,
        source=source,
        source_real=source_real,
        capacity=capacity,
        caches=caches,
    )
    keys = None
    if sampling is not None:
        if key is None:
            raise ValueError("key must be given with sampling: a key of jax.random")
        rows = jnp.arange(prompt.shape[0])
        one = 0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1  # axes of one key
        own = jax.vmap(lambda i: jax.random.fold_in(key, i))
        keys = own(rows) if key.ndim == one else key
    settings = _Settings(max_new_tokens, sampling, as_stop(stop), pad_token)
    graph, state = nnx.split(model)
    return _run(graph, settings, state, prompt, count, memory, keys, caches)


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
    """The loop: choose a token from the logits, then the logits of what follows it."""
    model = nnx.merge(graph, state)
    model.eval()
    B, new = prompt.shape[0], settings.max_new_tokens

    def choose(logits: jax.Array, step: Any) -> jax.Array:
        if settings.sampling is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        at = jax.vmap(lambda k: jax.random.fold_in(k, step))(keys)
        return jax.vmap(settings.sampling.draw)(logits, at).astype(jnp.int32)

    def add(step: Any, logits: jax.Array, done: jax.Array, result: Generated) -> Any:
        token = choose(logits, step)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
        token = jnp.where(done, settings.pad_token, token)
        result = result._replace(
            tokens=result.tokens.at[:, step].set(token),
            count=result.count + jnp.where(done, 0, 1),
            log_probability=result.log_probability + jnp.where(done, 0, log_p),
        )
        return token, done | is_any(token, settings.stop), result

    def going(loop: Any) -> jax.Array:
        step, _, done, _ = loop
        return (step < new) & ~done.all()

    def go(loop: Any) -> Any:
        step, token, done, result = loop
        logits, caches = next_logits(model, token[:, None], ~done, memory, result.caches)
        token, done, result = add(step, logits, done, result._replace(caches=caches))
        return step + 1, token, done, result

    logits, caches = next_logits(model, prompt, count, memory, caches)
    empty = Generated(
        jnp.full((B, new), settings.pad_token, jnp.int32),
        jnp.zeros(B, jnp.int32),
        jnp.zeros(B, logits.dtype),
        caches,
    )
    token, done, result = add(0, logits, jnp.zeros(B, bool), empty)
    *_, result = jax.lax.while_loop(going, go, (jnp.int32(1), token, done, result))
    return result


def next_logits(
    model: Any, tokens: jax.Array, count: Any, memory: Memory | None, caches: Any
) -> tuple[jax.Array, Any]:
    """Logits ``[B V]`` after the first ``count`` of the tokens ``[B T]``, and the new caches."""
    count = jnp.asarray(count, jnp.int32)
    before = () if memory is None else (memory,)
    x, caches = model.hidden(tokens, *before, caches=caches, count=count)
    return model.logits(last(x, jnp.maximum(count, 1))), caches


def is_any(token: jax.Array, stop: tuple[int, ...]) -> jax.Array:
    """Whether a token is one of a few."""
    return jnp.isin(token, jnp.asarray(stop, jnp.int32)) if stop else jnp.zeros_like(token, bool)


def as_stop(stop: int | Sequence[int]) -> tuple[int, ...]:
    """The argument as a tuple."""
    return (stop,) if isinstance(stop, int) else tuple(int(x) for x in stop)


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
) -> tuple[jax.Array, jax.Array, Memory | None, Any]:
    """Prompts moved to the left, their lengths, the encoded source, and caches with room."""
    prompt, count = _left(prompt, real)
    memory = _memory(model, source, source_real)
    caches = _room(model, prompt, count, max_new_tokens, capacity, caches)
    return prompt, count, memory, caches


def _left(prompt: Any, real: Any) -> tuple[jax.Array, jax.Array]:
    """Prompts with padding after their tokens, and how many tokens each has."""
    prompt = check_positions(prompt, "prompt")
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise ValueError(f"prompt must have shape [B T], T at least 1, got {prompt.shape}")
    if real is None:
        count = jnp.full(prompt.shape[0], prompt.shape[1], jnp.int32)
        return jnp.asarray(prompt, jnp.int32), count
    if real.shape != prompt.shape or real.dtype != bool:
        raise ValueError(
            f"real must be bool of the prompt's shape {prompt.shape}, got {real.dtype}{real.shape}"
        )
    if not isinstance(real, jax.core.Tracer) and not np.asarray(real).any(axis=-1).all():
        raise ValueError("real must have a token in every row: a prompt of padding has none")
    order = jnp.argsort(~jnp.asarray(real), axis=-1, stable=True)
    moved = jnp.take_along_axis(jnp.asarray(prompt, jnp.int32), order, axis=-1)
    return moved, jnp.sum(real, axis=-1, dtype=jnp.int32)


def _memory(model: Any, source: Any, source_real: Any) -> Memory | None:
    if isinstance(model, EncoderDecoder):
        if source is None:
            raise ValueError("source must be given for an EncoderDecoder")
        return _encode(*nnx.split(model), check_positions(source, "source"), source_real)
    if not isinstance(model, Decoder):
        raise TypeError(f"model must be a Decoder or an EncoderDecoder, got {type(model).__name__}")
    if source is not None or source_real is not None:
        raise ValueError("source must be None for a Decoder, which has no encoder")
    return None


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph: Any, state: Any, source: Any, real: Any) -> Memory:
    model = nnx.merge(graph, state)
    model.eval()
    return model.encode(source, real=real)


def _room(
    model: Any,
    prompt: jax.Array,
    count: jax.Array,
    max_new_tokens: int,
    capacity: int | None,
    caches: Any,
) -> Any:
    """Caches, with room for the prompts and what follows them where that can be known."""
    if caches is None:
        known = not isinstance(count, jax.core.Tracer)
        longest = int(count.max(initial=1)) if known else prompt.shape[-1]
        longest += max_new_tokens - 1
        capacity = longest if capacity is None else capacity
        if longest > capacity:
            raise ValueError(
                f"capacity must be at least {longest}, the longest prompt and {max_new_tokens} "
                f"tokens more but one, got {capacity}"
            )
        return model.init_caches(prompt.shape[:1], capacity)
    if capacity is not None:
        raise ValueError("capacity must be None with caches, which have theirs")
    for cache in caches:
        if cache.length.shape != prompt.shape[:1]:
            raise ValueError(
                f"caches must be of {prompt.shape[0]} rows, as the prompt, got {cache.length.shape}"
            )
        after = cache.length + count + max_new_tokens - 1
        known = not isinstance(after, jax.core.Tracer)
        if known and not cache.rolling and (most := int(after.max(initial=0))) > cache.capacity:
            raise ValueError(
                f"caches have capacity {cache.capacity}, but a row could come to hold {most} "
                f"tokens: make larger ones"
            )
    return caches
