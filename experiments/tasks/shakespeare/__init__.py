"""The next character of Shakespeare's plays.

::

    python -m experiments train shakespeare                        # a Transformer decoder
    python -m experiments train shakespeare --model ngram          # counted in seconds
    python -m experiments train shakespeare --positions alibi --mask window --window 32
    python -m experiments sample runs/shakespeare/transformer-cpu-seed0 --text "ROMEO:"

The ladder: ``ngram`` (Witten-Bell, interpolated), ``gru``, ``gru_attention`` (its states attend to
those before them), ``transformer``. Text is bytes, all of them ASCII: a token is a character. What
reads character by character is faster in wider and shorter batches: the records of ``gru`` and
``gru_attention`` are with ``--batch-size 32 --context 128 --weight-decay 0.05 --steps 1400``.

Data: tiny_shakespeare, 1,115,394 characters from A. Karpathy's char-rnn (the repository is MIT, the
plays are in the public domain). The last tenth is the test split, as is usual; the twentieth before
it validates. Scores are nats per character, each character once, after at least half a context.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax import masks
from attention_jax.mechanisms import NAMED
from attention_jax.models import Decoder, DecoderConfig, Sampling, generate
from attention_jax.nn import Embeddings, MultiHeadAttention, Residual, record_weights
from attention_jax.nn.linear import Linear
from experiments.datasets import text
from experiments.datasets.files import path
from experiments.models.recurrent import GRU
from experiments.tasks.shakespeare.ngrams import BYTES, NGrams
from experiments.training import text_config
from experiments.training.config import at_least_1, heads_divide
from experiments.training.losses import cross_entropy, logits
from experiments.training.task import AttentionView, Loss, Metrics, Task, self_attention
from experiments.training.text_config import TextConfig


@dataclasses.dataclass(frozen=True)
class Config(TextConfig):
    """The options of a model of characters."""

    model: Literal["ngram", "gru", "gru_attention", "transformer"] = "transformer"
    """The rung of the ladder."""
    positions: Literal["none", "sinusoidal", "learned", "rotary", "alibi", "relative"] = "rotary"
    """How a token knows where it is."""
    window: int = 64
    """Of the mask: tokens back, or in a block."""
    gru_width: int = 256
    """Of gru and gru_attention: numbers per state."""
    gru_depth: int = 2
    """Of gru and gru_attention: layers."""
    context: int = 128
    """Characters that a model is trained on at a time."""
    order: int = 5
    """Of ngram: characters, the predicted one included."""
    temperature: float = 0.8
    """Of samples; less is safer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "gru_width", "gru_depth")
        heads_divide(self, "gru_width")
        if self.context < 2 or self.context % 2:
            raise ValueError(f"context must be even and at least 2, got {self.context}")
        if not 1 <= self.order <= 7:
            raise ValueError(f"order must be in [1, 7], got {self.order}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")


PRESETS = {
    "cpu": Config(
        steps=3800,
        batch_size=4,
        learning_rate=3e-3,
        weight_decay=0.3,
        depth=4,
        context=256,
        dropout=0.0,
        evaluations=2,
        ema=0.99,
        minutes=10,
    ),
    "smoke": Config(
        steps=6,
        batch_size=4,
        width=16,
        heads=2,
        depth=1,
        context=16,
        evaluations=1,
        synthetic=True,
        gru_width=16,
        gru_depth=1,
    ),
    "accelerator": Config(
        steps=5000,
        batch_size=64,
        learning_rate=1e-3,
        width=384,
        heads=8,
        depth=6,
        gru_width=768,
        context=256,
        dropout=0.2,
        evaluations=20,
        ema=0.999,
        dtype="bfloat16",
    ),
}


class Data(NamedTuple):
    """The text as bytes, and where its splits begin and end."""

    bytes: np.ndarray
    splits: dict[str, tuple[int, int]]


def data(config: Config) -> Data:
    """Train, validation and test, in the order of the text."""
    if config.synthetic:
        written = b"".join(b"scene %d: enter %d\n" % (i, i % 7) for i in range(150))
    else:
        written = path("tiny_shakespeare/input.txt").read_bytes()
    n = len(written)
    first, second = n - n // 10 - n // 20, n - n // 10
    splits = {"train": (0, first), "validation": (first, second), "test": (second, n)}
    return Data(np.frombuffer(written, np.uint8).astype(np.int32), splits)


# --- Models.


class Recurrent(nnx.Module):
    """Embeddings, a GRU, with ``attend`` causal attention over its states, and the head."""

    def __init__(self, config: Config, *, attend: bool, rngs: nnx.Rngs) -> None:
        E = config.gru_width
        init = nnx.initializers.normal(E**-0.5)
        self.embed = Embeddings(BYTES, E, embedding_init=init, rngs=rngs)
        self.gru = GRU(E, E, config.gru_depth, dropout_rate=config.dropout, rngs=rngs)
        self.attention = nnx.data(None)
        if attend:
            heads = MultiHeadAttention(
                E,
                config.heads,
                mask=masks.causal(),
                **text_config.attention_options(config),
                rngs=rngs,
            )
            norm = functools.partial(nnx.LayerNorm, E, rngs=rngs)
            self.attention = Residual(heads, norm, dropout_rate=config.dropout, rngs=rngs)
        self.head = Linear(E, BYTES, rngs=rngs)

    def __call__(self, tokens: Any) -> jax.Array:
        """Logits ``[B T 256]`` of what follows each of ``[B T]``."""
        x = self.gru(self.embed(jnp.asarray(tokens)))
        return self.head(x if self.attention is None else self.attention(x))


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Any:
    """The rung."""
    if config.model == "ngram":
        start, stop = data.splits["train"]
        return NGrams.count(data.bytes[start:stop], config.order)
    if config.model != "transformer":
        return Recurrent(config, attend=config.model == "gru_attention", rngs=rngs)
    return Decoder(
        DecoderConfig(
            BYTES,
            text_config.layers(config, activation="gelu_tanh"),  # as GPT-2, and cheaper than erf
            positions=config.vectors,
            max_length=config.context if config.vectors == "learned" else None,
            embedding_scale=text_config.EMBEDDING_SCALE,
            tied=False,
            dropout_rate=config.dropout,
        ),
        rngs=rngs,
    )


# --- The task.


def batches(config: Config, data: Data, step: int) -> Iterator[np.ndarray]:
    """Pieces ``[B T+1]`` of the text, from anywhere."""
    start, stop = data.splits["train"]
    T = config.context
    while True:
        rng = np.random.default_rng([config.seed, step])
        at = rng.integers(start, stop - T, config.batch_size)
        yield data.bytes[at[:, None] + np.arange(T + 1)]
        step += 1


def loss(config: Config, model: Any, batch: Any) -> Loss:
    """Cross-entropy of each character after those before it."""
    each = cross_entropy(model(batch[:, :-1]), batch[:, 1:], config.label_smoothing)
    return Loss(each.sum(), jnp.float32(each.size))


@nnx.jit
def _nats(model: Any, tokens: Any, targets: Any) -> jax.Array:
    return cross_entropy(model(tokens), targets)


def evaluate(config: Config, model: Any, data: Data, split: str) -> Metrics:
    """Nats per character: windows that overlap by half, of which the second half counts."""
    start, stop = data.splits[split]
    T, half, size = config.context, config.context // 2, 64
    at = np.arange(start, stop, half)  # the first character that a window is asked for
    total = 0.0
    for some in np.split(at, range(size, len(at), size)):
        rows = np.concatenate([some, np.full(size - len(some), start)])
        places = rows[:, None] - half - 1 + np.arange(T + 1)
        pieces = data.bytes[np.minimum(places, len(data.bytes) - 1)]
        tokens, targets = pieces[:, :-1], pieces[:, 1:]
        if isinstance(model, nnx.Module):
            nats = np.asarray(_nats(model, tokens, targets), np.float64)
        else:
            nats = model.nats(tokens, targets)
        asked = places[: len(some), 1:][:, half:] < stop
        total += float((nats[: len(some), half:] * asked).sum())
    per_character = total / (stop - start)
    return {"nats": per_character, "bits": per_character / np.log(2)}


def prompt_of(config: Config, given: str | None) -> np.ndarray:
    """A text's bytes; without one, the end of a line.

    Raises:
      ValueError: it is empty, or longer than a model reads.
    """
    if given is None:
        return np.frombuffer(b"\n", np.uint8).astype(np.int32)
    prompt = np.frombuffer(text.check(given).encode(), np.uint8).astype(np.int32)
    if len(prompt) > config.context:
        raise ValueError(
            f"text has {len(prompt)} bytes, the model reads {config.context} (context): give less"
        )
    return prompt


def sample(config: Config, model: Any, data: Data, given: str | None, length: int = 500) -> str:
    """A continuation."""
    prompt = prompt_of(config, given)
    key = jax.random.key(config.seed)
    # Beyond the context that it was trained on a Transformer writes nonsense.
    cached = len(prompt) + length <= config.context and config.attention not in NAMED
    if isinstance(model, Decoder) and cached:
        found = generate(
            model,
            prompt[None],
            max_new_tokens=length,
            sampling=Sampling(temperature=config.temperature),
            key=key,
        )
        made = np.asarray(found.tokens)[0]
    else:
        made = _one_by_one(config, model, prompt, length, key)
    return bytes([*prompt, *made]).decode(errors="replace")


def _one_by_one(
    config: Config, model: Any, prompt: np.ndarray, length: int, key: jax.Array
) -> np.ndarray:
    """Each character from the last ``context`` before it."""
    written = prompt.tolist()
    for i in range(length):
        last = written[-config.context :]
        if isinstance(model, nnx.Module):
            after = logits(model, text.padded([last], config.context))[0, len(last) - 1]
        else:
            after = model.logits(np.array(last))
        drawn = jax.random.categorical(jax.random.fold_in(key, i), after / config.temperature)
        written.append(int(drawn))
    return np.array(written[len(prompt) :])


def look(config: Config, model: Any, data: Data, given: str | None) -> list[AttentionView]:
    """The decoder's attention over a text, or over the first characters of the test split."""
    if config.model not in ("transformer", "gru_attention"):
        raise ValueError(
            f"model {config.model} has no attention to look at: take gru_attention or transformer"
        )
    start, _ = data.splits["test"]
    tokens = data.bytes[start : start + min(64, config.context)]
    tokens = tokens if given is None else prompt_of(config, given)
    _, weights = record_weights(model, tokens[None])
    shown = [chr(x) for x in tokens]
    return self_attention("decoder", shown, weights)


TASK = Task(
    name="shakespeare",
    presets=PRESETS,
    data=data,
    init=init,
    batches=batches,
    loss=loss,
    evaluate=evaluate,
    metric="nats",
    larger=False,
    unit="tokens",
    sample=sample,
    look=look,
)
