"""A summarizer whose encoder is pretrained: its tokens, and the copier."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from flax import nnx

from attention_jax.models import EncoderDecoderConfig
from attention_jax.models.pretrained import Tokenizer
from experiments.datasets.text import END, START, UNKNOWN
from experiments.models import finetuning
from experiments.tasks.summarise.config import Config
from experiments.tasks.summarise.copier import Copier
from experiments.training import text_config

UNUSED = "[unused"  # tokens of BERT's vocabulary that no text has


def tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of the checkpoint, where ``START`` and ``END`` are tokens that no text has.

    Raises:
      ValueError: they are other tokens.
    """
    found = finetuning.tokenizer(config)
    ours = found.strings([UNKNOWN, START, END])
    if not all(token.startswith(UNUSED) for token in ours):
        raise ValueError(
            f"checkpoint must have unused tokens at {UNKNOWN}, {START} and {END}, as those of "
            f"BERT, to start and end summaries, got {', '.join(ours)}"
        )
    return found


def tokens(tokenizer: Tokenizer, texts: Sequence[list[str]]) -> list[list[int]]:
    """Texts, given as words, as tokens without special ones."""
    rows = tokenizer(texts).rows
    return [row.tokens[row.text == 0].tolist() for row in rows]


def copier(config: Config, rngs: nnx.Rngs) -> Copier:
    """A copier with a pretrained encoder, and a fresh decoder that shares its embeddings.

    The decoder has the width of the encoder, and the depth and heads of the options. Since the
    vocabulary has a token for every part of a word, nothing can only be copied.
    """
    encoder = finetuning.encoder(config)
    own = encoder.config
    decoder = text_config.layers(
        dataclasses.replace(config, width=own.layers.features),
        hidden=config.hidden * own.layers.features,
    )
    shape = EncoderDecoderConfig(
        own.vocabulary,
        own.layers,
        decoder,
        positions=own.positions,
        max_length=own.max_length,
        embedding_scale=own.embedding_scale,
        dropout_rate=config.dropout,
    )
    model = Copier(shape, others=0, rngs=rngs)
    model.embed, model.encoder = encoder.embed, encoder.stack
    model.train()
    return model
