"""Character-level language modeling of Shakespeare's plays.

::

    python -m experiments train shakespeare                        # a transformer decoder
    python -m experiments train shakespeare --model ngram          # counted in seconds
    python -m experiments train shakespeare --positions alibi --mask window --window 32
    python -m experiments sample runs/shakespeare/transformer-cpu-seed0 --text "ROMEO:"

Models: ``ngram`` (interpolated, Witten-Bell smoothing), ``gru``, ``gru_attention`` (causal
attention over the states of the GRU), ``transformer``. Tokens are bytes; the text is ASCII, so a
token is a character. Recurrent models are faster in larger batches of shorter sequences: the
records of ``gru`` and ``gru_attention`` use ``--batch-size 32 --context 128 --weight-decay 0.05
--steps 1400``.

Data: tiny_shakespeare, 1,115,394 characters from A. Karpathy's char-rnn (the repository is MIT, the
plays are in the public domain). The last tenth is the test split, as is usual, the twentieth before
it the validation split. The score is nats per character; each character counts once and is
predicted from at least half a context.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.mechanisms import NAMED
from attention_jax.models import Decoder, Sampling, generate
from experiments.datasets import text
from experiments.models.inference import record_weights
from experiments.tasks.common import check_attends, check_length
from experiments.tasks.shakespeare.config import PRESETS, SPACES, Config
from experiments.tasks.shakespeare.data import Data, batches, load
from experiments.tasks.shakespeare.models import Recurrent, transformer
from experiments.tasks.shakespeare.ngrams import NGrams
from experiments.training.losses import cross_entropy, logits
from experiments.training.task import (
    Array,
    AttentionView,
    Loss,
    Metrics,
    Model,
    Task,
    self_attention,
)


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Model:
    """A fresh model, or counted n-grams."""
    if config.model == "ngram":
        start, stop = data.splits["train"]
        return NGrams.count(data.bytes[start:stop], config.order)
    if config.model == "transformer":
        return transformer(config, rngs=rngs)
    return Recurrent(config, attend=config.model == "gru_attention", rngs=rngs)


def loss(config: Config, model: Model, batch: Any) -> Loss:
    """Cross-entropy of each character given the characters before it."""
    each = cross_entropy(model(batch[:, :-1]), batch[:, 1:], config.label_smoothing)
    return Loss(each.sum(), jnp.float32(each.size))


@nnx.jit
def _nats(model: Model, tokens: Array, targets: Array) -> jax.Array:
    return cross_entropy(model(tokens), targets)


def evaluate(config: Config, model: Model, data: Data, split: str) -> Metrics:
    """Nats and bits per character, over half-overlapping windows whose second half counts."""
    start, stop = data.splits[split]
    T, half, size = config.context, config.context // 2, 64
    firsts = np.arange(start, stop, half)  # the first character that counts in each window
    total = 0.0
    for batch in np.split(firsts, range(size, len(firsts), size)):
        rows = np.concatenate([batch, np.full(size - len(batch), start)])
        positions = rows[:, None] - half - 1 + np.arange(T + 1)
        windows = data.bytes[np.minimum(positions, len(data.bytes) - 1)]
        tokens, targets = windows[:, :-1], windows[:, 1:]
        if isinstance(model, nnx.Module):
            nats = np.asarray(_nats(model, tokens, targets), np.float64)
        else:
            nats = model.nats(tokens, targets)
        counted = positions[: len(batch), 1:][:, half:] < stop
        total += float((nats[: len(batch), half:] * counted).sum())
    per_character = total / (stop - start)
    return {"nats": per_character, "bits": per_character / np.log(2)}


def prompt_of(config: Config, given: str | None) -> np.ndarray:
    """The bytes of a user's text, by default a line break.

    Raises:
      ValueError: it is empty, or longer than the model reads.
    """
    if given is None:
        return np.frombuffer(b"\n", np.uint8).astype(np.int32)
    prompt = np.frombuffer(text.check(given).encode(), np.uint8).astype(np.int32)
    check_length(len(prompt), config.context, "bytes", "context")
    return prompt


def sample(config: Config, model: Model, data: Data, given: str | None, length: int = 500) -> str:
    """A continuation of a text."""
    prompt = prompt_of(config, given)
    key = jax.random.key(config.seed)
    # Beyond the context it was trained on, a transformer writes nonsense.
    cached = len(prompt) + length <= config.context and config.attention not in NAMED
    if isinstance(model, Decoder) and cached:
        generated = generate(
            model,
            prompt[None],
            max_new_tokens=length,
            sampling=Sampling(temperature=config.temperature),
            key=key,
        )
        tokens = np.asarray(generated.tokens)[0]
    else:
        tokens = _sample_uncached(config, model, prompt, length, key)
    return bytes([*prompt, *tokens]).decode(errors="replace")


def _sample_uncached(
    config: Config, model: Model, prompt: np.ndarray, length: int, key: jax.Array
) -> np.ndarray:
    """Samples each character from the last ``context`` characters."""
    tokens = prompt.tolist()
    for i in range(length):
        last = tokens[-config.context :]
        if isinstance(model, nnx.Module):
            after = logits(model, text.padded([last], config.context))[0, len(last) - 1]
        else:
            after = model.logits(np.array(last))
        drawn = jax.random.categorical(jax.random.fold_in(key, i), after / config.temperature)
        tokens.append(int(drawn))
    return np.array(tokens[len(prompt) :])


def look(config: Config, model: Model, data: Data, given: str | None) -> list[AttentionView]:
    """Attention weights on a text; default the first characters of the test split."""
    check_attends(config, "gru_attention", "transformer")
    start, _ = data.splits["test"]
    tokens = data.bytes[start : start + min(64, config.context)]
    tokens = tokens if given is None else prompt_of(config, given)
    _, weights = record_weights(model, tokens[None])
    return self_attention("decoder", [chr(x) for x in tokens], weights)


TASK = Task(
    name="shakespeare",
    presets=PRESETS,
    spaces=SPACES,
    data=load,
    init=init,
    batches=batches,
    loss=loss,
    evaluate=evaluate,
    metric="nats",
    larger=False,
    unit="tokens",
    untraced=("ngram",),
    sample=sample,
    look=look,
)
