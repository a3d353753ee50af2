"""Generation for one request, for eight, and for 32 of mixed lengths, beside transformers.

Requests of mixed lengths come all at once. Ours run in a continuous batch; the peers, our own
``generate`` among them, take them in padded batches of eight, each of which goes on until its
longest request ends. Weights are random: the speed does not depend on them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.models import Batch, Decoder, DecoderConfig, Layers, Request, generate
from attention_jax.positions import Rotary
from experiments.bench.contenders import in_turns
from experiments.bench.models import Decoding, gpt2, have_transformers, hugging_face_gpt2
from experiments.bench.tables import Measurement

ROWS = 8  # of a padded batch

GPT2 = gpt2(Decoding())
QWEN2 = DecoderConfig(
    151_936,
    Layers(
        features=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        hidden=4864,
        activation="silu",
        gated=True,
        norm="rms",
        norm_epsilon=1e-6,
        rotary=Rotary(1e6),
        bias=("query", "key", "value"),
        feed_forward_bias=False,
    ),
)
MODELS = {"GPT-2 (124M)": GPT2, "Qwen2's shape (0.5B)": QWEN2}


@dataclasses.dataclass(frozen=True)
class Work:
    """Prompts, and how many tokens to generate for each."""

    prompts: Sequence[np.ndarray]
    new: Sequence[int]

    @property
    def total(self) -> int:
        """The number of tokens that are asked for."""
        return sum(self.new)

    def padded(self, rows: int) -> list[tuple[np.ndarray, np.ndarray, int]]:
        """Batches in the order of requests: tokens, which are real, and how many to generate."""
        batches = []
        for i in range(0, len(self.prompts), rows):
            some = self.prompts[i : i + rows]
            width = max(map(len, some))
            tokens = np.stack([np.pad(x, (width - len(x), 0)) for x in some])
            real = np.stack([np.arange(width) >= width - len(x) for x in some])
            batches.append((tokens, real, max(self.new[i : i + rows])))
        return batches


def same(number: int, prompt: int, new: int, vocabulary: int) -> Work:
    """Requests of one length."""
    rng = np.random.default_rng(0)
    return Work(list(rng.integers(0, vocabulary, (number, prompt))), [new] * number)


def mixed(number: int, vocabulary: int) -> Work:
    """Requests of mixed lengths: most prompts have 18 to 100 tokens, most answers 16 to 98."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(43), 0.85, number), 4, 200).astype(int)
    new = np.clip(rng.lognormal(np.log(40), 0.9, number), 4, 256).astype(int)
    return Work([rng.integers(0, vocabulary, n) for n in lengths], new.tolist())


# --- Contenders: functions without arguments that run to completion.


def continuous(model: Decoder, work: Work, rows: int = 32) -> Callable[[], Any]:
    """Ours, in a running batch."""
    longest = max(len(p) + n - 1 for p, n in zip(work.prompts, work.new, strict=True))

    def run() -> Any:
        batch = Batch(model, rows=rows, capacity=longest, page_size=32)
        for prompt, new in zip(work.prompts, work.new, strict=True):
            batch.submit(Request(prompt, new))
        events = []
        while batch.waiting or batch.running:
            events += batch.step()
        return events

    return run


def in_padded_batches(model: Decoder, work: Work, rows: int = ROWS) -> Callable[[], Any]:
    """Our ``generate``, one padded batch after the other."""
    batches = work.padded(rows)

    def run() -> Any:
        return [
            jax.block_until_ready(generate(model, tokens, real=real, max_new_tokens=new).tokens)
            for tokens, real, new in batches
        ]

    return run


def transformers(config: DecoderConfig, work: Work, rows: int = ROWS) -> Callable[[], Any]:
    """``generate`` of transformers, one padded batch after the other."""
    import torch

    model = hugging_face(config)
    batches = [
        (torch.tensor(tokens), torch.tensor(real, dtype=torch.long), new)
        for tokens, real, new in work.padded(rows)
    ]

    def run() -> Any:
        with torch.no_grad():
            return [
                model.generate(
                    tokens,
                    attention_mask=real,
                    min_new_tokens=new,
                    max_new_tokens=new,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=0,
                )
                for tokens, real, new in batches
            ]

    return run


def hugging_face(config: DecoderConfig) -> Any:
    """The model of transformers with this configuration."""
    if config is GPT2:
        return hugging_face_gpt2(Decoding())
    import transformers

    transformers.logging.set_verbosity_error()
    layers = config.layers
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=config.vocabulary,
            hidden_size=layers.features,
            intermediate_size=layers.hidden,
            num_hidden_layers=layers.num_layers,
            num_attention_heads=layers.num_heads,
            num_key_value_heads=layers.num_kv_heads,
            tie_word_embeddings=True,
        )
    ).eval()


# --- Measurements.


def measurements(repeats: int, names: Sequence[str] = tuple(MODELS)) -> list[Measurement]:
    """Tokens per second, time to the first token, and the size of caches, for each model."""
    return [row for name in names for row in _of_model(name, MODELS[name], repeats)]


def _of_model(name: str, config: DecoderConfig, repeats: int) -> list[Measurement]:
    model = Decoder(config, rngs=nnx.Rngs(0))
    rows = []
    for number, new, target in ((1, 64, 1.5), (8, 64, 1.0), (1, 1, 1.0)):
        work = same(number, 64 if new > 1 else 256, new, config.vocabulary)
        contenders = {"ours": in_padded_batches(model, work)}
        if have_transformers():
            contenders["transformers"] = transformers(config, work)
        seconds = in_turns(contenders, repeats)
        what, note = f"batch {number}, 64 tokens and 64 more", _speed(work, seconds["ours"])
        if new == 1:
            what, note = "the first token after 256", ""
        rows.append(
            Measurement(
                "serve", f"serve, {name}, {what}", seconds, 0.0, {"transformers": target}, note
            )
        )
    return [*rows, _mixed(name, model), cache_bytes(name, config)]


def _mixed(name: str, model: Decoder) -> Measurement:
    """One run after another that compiles: a run takes long, and contains hundreds of steps."""
    work = mixed(32, model.config.vocabulary)
    contenders = {"ours": continuous(model, work), "padded": in_padded_batches(model, work)}
    if have_transformers():
        contenders["transformers"] = transformers(model.config, work)
    seconds = {}
    for contender, run in contenders.items():
        if contender != "transformers":
            run()
        start = time.perf_counter()
        run()
        seconds[contender] = time.perf_counter() - start
    padded = seconds.pop("padded")
    note = f"{_speed(work, seconds['ours'])}, {padded / seconds['ours']:.2f}x our padded batches"
    return Measurement(
        "serve",
        f"serve, {name}, 32 requests of mixed lengths",
        seconds,
        0.0,
        {"transformers": 2.0},
        note,
    )


def _speed(work: Work, seconds: float) -> str:
    return f"{work.total / seconds:,.0f} tokens/s"


def cache_bytes(name: str, config: DecoderConfig) -> Measurement:
    """Bytes of keys and values per token."""

    def size(**options: Any) -> int:
        def caches() -> Any:
            return Decoder(config, rngs=nnx.Rngs(0)).init_caches((1,), 1, **options)

        found: Any = jax.eval_shape(caches)
        arrays = jax.tree.leaves([(cache.key, cache.value) for cache in found])
        return sum(x.size * x.dtype.itemsize for x in arrays)

    kinds = {"float32": {}, "bfloat16": {"dtype": jnp.bfloat16}, "int8": {"quantize": "int8"}}
    note = ", ".join(f"{size(**options):,} in {kind}" for kind, options in kinds.items())
    return Measurement("serve", f"cache of {name}, bytes a token", {}, 0.0, {}, note)
