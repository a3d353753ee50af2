"""A training step, and decoding, of the same decoder with ours, Flax's attention, and torch.

Each contender is a function without arguments that runs to completion, as in ``contenders``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx

from attention_jax.models import Decoder, DecoderConfig, Layers, generate
from experiments.tasks import load
from experiments.training.steps import trainer


@dataclasses.dataclass(frozen=True)
class Size:
    """A decoder with learned positions and tied embeddings, like GPT-2, and a batch for it."""

    T: int
    """Sequence length."""
    B: int = 8
    features: int = 384
    num_layers: int = 6
    num_heads: int = 6
    vocabulary: int = 256

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers of {self.features}, {self.num_heads} heads, "
            f"{self.B} x {self.T} tokens"
        )

    @property
    def config(self) -> DecoderConfig:
        """As a configuration of our decoder."""
        layers = Layers(
            features=self.features,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            activation="gelu_tanh",
            fused=True,
        )
        return DecoderConfig(
            self.vocabulary, layers, positions="learned", max_length=self.T, tied=True
        )

    @property
    def tokens(self) -> np.ndarray:
        """A batch ``[B T+1]``: inputs and, shifted by one, targets."""
        rng = np.random.default_rng(0)
        return rng.integers(0, self.vocabulary, (self.B, self.T + 1), dtype=np.int32)


# --- Training.


def train_ours(size: Size) -> Callable[[], Any]:
    return _training(Decoder(size.config, rngs=nnx.Rngs(0)), size)


def train_flax(size: Size) -> Callable[[], Any]:
    """The same model with ``flax.nnx.MultiHeadAttention`` instead of our attention."""
    model = Decoder(size.config, rngs=nnx.Rngs(0))
    for block in model.stack.blocks:
        block.attention.sublayer = FlaxAttention(size)
    return _training(model, size)


class FlaxAttention(nnx.Module):
    """Flax's module with the signature of ours."""

    def __init__(self, size: Size) -> None:
        self.module = nnx.MultiHeadAttention(
            size.num_heads, size.features, decode=False, rngs=nnx.Rngs(0)
        )

    def __call__(self, x: Any, **options: Any) -> Any:
        T = x.shape[-2]
        return self.module(x, mask=jnp.tril(jnp.ones((1, 1, T, T), bool)))


def _training(model: Any, size: Size) -> Callable[[], Any]:
    optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.Param)
    tokens = jnp.asarray(size.tokens)

    def loss(model: Any, tokens: jax.Array) -> jax.Array:
        logits = model(tokens[:, :-1])
        losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(graph_state: Any, tokens: jax.Array) -> Any:
        model, optimizer = nnx.merge(graph, graph_state)
        value, gradients = nnx.value_and_grad(loss)(model, tokens)
        optimizer.update(model, gradients)
        return value, nnx.state((model, optimizer))

    graph, state = nnx.split((model, optimizer))
    held = [state]

    def run() -> Any:
        value, held[0] = step(held[0], tokens)
        return jax.block_until_ready((value, held[0]))[0]

    return run


def train_torch(size: Size) -> Callable[[], Any]:
    import torch

    torch.manual_seed(0)
    model = _torch_decoder(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.tensor(size.tokens, dtype=torch.long)

    def run() -> Any:
        optimizer.zero_grad(set_to_none=True)
        logits = model(tokens[:, :-1])
        value = torch.nn.functional.cross_entropy(
            logits.reshape(-1, size.vocabulary), tokens[:, 1:].reshape(-1)
        )
        value.backward()
        optimizer.step()
        return value.item()

    return run


def _torch_decoder(size: Size) -> Any:
    import torch
    from torch.nn import functional

    E, N = size.features, size.num_heads

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(E) for _ in range(2)])
            self.qkv, self.out = torch.nn.Linear(E, 3 * E), torch.nn.Linear(E, E)
            self.up, self.down = torch.nn.Linear(E, 4 * E), torch.nn.Linear(4 * E, E)

        def forward(self, x: Any) -> Any:
            B, T, _ = x.shape
            qkv = self.qkv(self.norms[0](x)).view(B, T, 3, N, E // N).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind()
            heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(heads.transpose(1, 2).reshape(B, T, E))
            hidden = functional.gelu(self.up(self.norms[1](x)), approximate="tanh")
            return x + self.down(hidden)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = torch.nn.Embedding(size.vocabulary, E)
            self.positions = torch.nn.Embedding(size.T, E)
            self.layers = torch.nn.ModuleList([Layer() for _ in range(size.num_layers)])
            self.norm = torch.nn.LayerNorm(E)

        def forward(self, tokens: Any) -> Any:
            x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
            for layer in self.layers:
                x = layer(x)
            return self.norm(x) @ self.tokens.weight.T

    return Model()


def training_step(name: str, **changes: Any) -> Callable[[], Any]:
    """A step of our training loop, on a task's ``cpu`` preset with some options changed."""
    task = load(name)
    config = dataclasses.replace(task.presets["cpu"], **changes)
    data = task.data(config)
    training = trainer(task.loss, config, task.init(config, data, nnx.Rngs(0)))
    batch = next(task.batches(config, data, 0, training.rows))
    state = training.put(training.initial)

    def run() -> Any:
        nonlocal state
        state, loss, *_ = training.update(state, batch, 0)
        return jax.block_until_ready(loss)

    return run


# --- Decoding.


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A GPT-2 that continues one prompt."""

    prompt: int = 64
    """Length of the prompt."""
    new: int = 128
    """Number of tokens to generate."""
    features: int = 768
    num_layers: int = 12
    num_heads: int = 12
    vocabulary: int = 50_257
    max_length: int = 1024

    def __str__(self) -> str:
        return (
            f"GPT-2 of {self.num_layers} layers of {self.features}, {self.prompt} tokens and "
            f"{self.new} more"
        )


def gpt2(decoding: Decoding) -> DecoderConfig:
    """Our configuration of it."""
    layers = Layers(
        features=decoding.features,
        num_layers=decoding.num_layers,
        num_heads=decoding.num_heads,
        activation="gelu_tanh",
        fused=True,
    )
    return DecoderConfig(
        decoding.vocabulary, layers, positions="learned", max_length=decoding.max_length
    )


def hugging_face_gpt2(decoding: Decoding) -> Any:
    """Hugging Face's model of it."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=decoding.vocabulary,
            n_embd=decoding.features,
            n_layer=decoding.num_layers,
            n_head=decoding.num_heads,
            n_positions=decoding.max_length,
        )
    ).eval()


def decode_ours(decoding: Decoding) -> Callable[[], Any]:
    """Greedy decoding with caches of exactly the length needed, as ``generate`` makes them."""
    model = Decoder(gpt2(decoding), rngs=nnx.Rngs(0))
    prompt = np.random.default_rng(0).integers(0, decoding.vocabulary, (1, decoding.prompt))
    return lambda: jax.block_until_ready(
        generate(model, prompt, max_new_tokens=decoding.new).tokens
    )


def decode_hugging_face(decoding: Decoding) -> Callable[[], Any]:
    """``generate`` of Hugging Face's GPT-2 of the same size, with its cache."""
    import torch

    model = hugging_face_gpt2(decoding)
    rng = np.random.default_rng(0)
    prompt = torch.tensor(rng.integers(0, decoding.vocabulary, (1, decoding.prompt)))
    options = {"do_sample": False, "use_cache": True, "pad_token_id": 0}

    def run() -> Any:
        with torch.no_grad():
            return model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=decoding.new,
                max_new_tokens=decoding.new,
                **options,
            )

    return run


def have_transformers() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def cache_sizes() -> list[tuple[str, str]]:
    """The size of Mistral 7B's caches for 32,768 tokens, with and without its savings."""
    base: dict[str, Any] = {"features": 4096, "num_layers": 32, "num_heads": 32, "hidden": 14_336}
    sizes = []
    for work, more in (
        ("all heads, all tokens", {}),
        ("8 key-value heads", {"num_kv_heads": 8}),
        ("8 key-value heads, rolling, window of 4096", {"num_kv_heads": 8, "windows": (4096,)}),
    ):
        layers = Layers(**base, **more, dtype=jnp.bfloat16)
        config = DecoderConfig(32_000, layers)

        def caches(config: DecoderConfig = config) -> Any:
            return Decoder(config, rngs=nnx.Rngs(0)).init_caches((1,), 32_768)

        leaves = jax.tree.leaves(jax.eval_shape(caches))
        size = sum(x.size * x.dtype.itemsize for x in leaves)
        sizes.append((f"caches of 32 layers, 32,768 tokens, {work}", f"{size / 2**20:,.0f} MiB"))
    return sizes
