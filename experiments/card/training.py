"""Whole models in bfloat16: a training step of a 124M decoder, ours beside Flax, and generation.

The decoder is GPT-2's: 12 layers of 768, 12 heads, a vocabulary of 50,257, learned positions.
Parameters and optimizer are float32. Model FLOPs count ``6 * parameters`` a token, without the
tables of tokens and positions but with the output head, and attention's visible pairs.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx

from attention_jax.models import Decoder, DecoderConfig, Layers, generate
from experiments.card import timing
from experiments.card.environment import pace
from experiments.card.parts import Fields, Item, Setting
from experiments.card.speed import matrix_rate


@dataclasses.dataclass(frozen=True)
class Size:
    """A decoder and a batch."""

    B: int
    T: int
    features: int = 768
    num_layers: int = 12
    num_heads: int = 12
    vocabulary: int = 50_257

    def __str__(self) -> str:
        return f"{self.num_layers} layers of {self.features}, {self.B} x {self.T} tokens"

    def config(self, implementation: str | None = None) -> DecoderConfig:
        """As a configuration of our decoder."""
        layers = Layers(
            features=self.features,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            activation="gelu_tanh",
            fused=True,
            dtype=jnp.bfloat16,
            implementation=implementation,
        )
        return DecoderConfig(
            self.vocabulary, layers, positions="learned", max_length=self.T, tied=True
        )

    @property
    def flops(self) -> float:
        """Of a training step."""
        E, L, T = self.features, self.num_layers, self.T
        weights = 12 * L * E**2 + self.vocabulary * E
        pairs = (T + 1) / 2  # keys a token attends to, on average
        return self.B * T * (6.0 * weights + 12.0 * L * E * pairs)


def items(setting: Setting) -> Iterator[Item]:
    """Times ours and Flax's alternately, then generation."""
    rate = matrix_rate(setting.out)
    sizes = [Size(8, 1024), Size(1, 16_384)]
    if setting.dry:
        sizes = [Size(2, 32, features=16, num_layers=1, num_heads=2, vocabulary=64)]
    contenders = {"ours": ours, "flax.nnx, cudnn": with_flax}
    for size in sizes:
        for name, make in contenders.items():
            run = functools.partial(training_step, name, make, size, setting.dry, rate)
            yield Item(f"training step, {size}, {name}", run, limit=120.0)
    last = dataclasses.replace(sizes[0], B=1)
    for B in (1, 8):
        run = functools.partial(generation, dataclasses.replace(last, B=B), setting.dry)
        yield Item(f"generation, batch of {B}", run, limit=120.0)


def ours(size: Size, dry: bool) -> Decoder:
    """Our decoder; the implementation of attention is chosen."""
    return Decoder(size.config(), rngs=nnx.Rngs(0))


def with_flax(size: Size, dry: bool) -> Decoder:
    """The same with ``flax.nnx.MultiHeadAttention`` on cuDNN."""
    model = Decoder(size.config(), rngs=nnx.Rngs(0))
    for block in model.stack.blocks:
        block.attention.sublayer = FlaxAttention(size, "xla" if dry else "cudnn")
    return model


class FlaxAttention(nnx.Module):
    """Flax's module with the signature of ours."""

    def __init__(self, size: Size, implementation: Literal["xla", "cudnn"]) -> None:
        def attend(query: Any, key: Any, value: Any, **_: Any) -> Any:
            return jax.nn.dot_product_attention(
                query, key, value, is_causal=True, implementation=implementation
            )

        self.module = nnx.MultiHeadAttention(
            size.num_heads,
            size.features,
            decode=False,
            dtype=jnp.bfloat16,
            attention_fn=attend,
            rngs=nnx.Rngs(0),
        )

    def __call__(self, x: Any, **options: Any) -> Any:
        return self.module(x)


def training_step(
    name: str, make: Callable[..., Any], size: Size, dry: bool, rate: float | None
) -> Iterator[Fields]:
    """Tokens per second and model FLOP utilization of a step of AdamW."""
    model = make(size, dry)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, size.vocabulary, (size.B, size.T + 1), dtype=np.int32))

    def loss(model: Any, tokens: jax.Array) -> jax.Array:
        logits = model(tokens[:, :-1]).astype(jnp.float32)
        each: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return each.mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, tokens: jax.Array) -> Any:
        model, optimizer = nnx.merge(graph, state)
        value, gradients = nnx.value_and_grad(loss)(model, tokens)
        optimizer.update(model, gradients)
        return value, nnx.state((model, optimizer))

    graph, state = nnx.split((model, optimizer))
    start = time.perf_counter()
    compiled = step.lower(state, tokens).compile()
    first = time.perf_counter() - start
    held = [state]

    def run() -> Any:
        value, held[0] = compiled(held[0], tokens)
        return value

    timed = timing.queued(run, jax.block_until_ready, **({"least": 1.0} | pace(dry)))
    tflops = size.flops / timed.each / 1e12
    memory = compiled.memory_analysis()
    yield {
        "implementation": name,
        "work": f"training step, {size}",
        "tokens_per_s": size.B * size.T / timed.each,
        "tflops": tflops,
        "mfu": None if rate is None else tflops / rate,
        "first_s": first,
        "extra_mib": None if memory is None else memory.temp_size_in_bytes / 2**20,
        **timed.fields(),
    }


def generation(size: Size, dry: bool) -> Iterator[Fields]:
    """Tokens per second of greedy decoding with caches, prompt included."""
    prompt, new = (4, 4) if dry else (64, 256)
    model = ours(size, dry)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, size.vocabulary, (size.B, prompt), dtype=np.int32)

    def run() -> Any:
        return jax.block_until_ready(generate(model, tokens, max_new_tokens=new).tokens)

    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    seconds = []
    for _ in range(1 if dry else 3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    yield {
        "implementation": "ours",
        "work": f"generate, batch of {size.B}, {prompt} tokens and {new} more",
        "tokens_per_s": size.B * new / min(seconds),
        "ms_per_token": min(seconds) / new * 1e3,
        "first_s": first,
    }
