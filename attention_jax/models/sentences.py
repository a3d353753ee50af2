"""Sentence embeddings: one vector per text, near those of texts with a similar meaning."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from attention_jax.core.axes import accumulation_dtype, int_at_least
from attention_jax.models.encoder import Encoder, EncoderConfig
from attention_jax.models.heads import check_encoder, given_or_new
from attention_jax.models.pretrained.tokenizer import Tokenizer, pad
from attention_jax.nn.norms import unit

MULTIPLE = 16  # lengths of batches are rounded up to multiples, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class EmbedderConfig:
    """Configuration of an ``Embedder``.

    Attributes:
      encoder: of the texts, without a head; its ``pool`` makes one vector of a text.
      normalize: whether the vectors have length 1, so that their products are cosines.
      max_length: the most tokens of a text that are read; None for as many as the encoder reads.
    """

    encoder: EncoderConfig
    normalize: bool = True
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_encoder(self)
        if self.max_length is not None:
            int_at_least("max_length", self.max_length, 1)


class Embedder(nnx.Module):
    """One vector per text: ``x / |x|`` of the pooled ``x``.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import Embedder, EmbedderConfig, EncoderConfig, Layers
    >>> layers = Layers(features=8, num_layers=1, num_heads=2, order="post")
    >>> config = EmbedderConfig(EncoderConfig(vocabulary=10, layers=layers, pool="mean"))
    >>> x = Embedder(config, rngs=nnx.Rngs(0))(np.array([[3, 1, 4], [1, 5, 9]]))
    >>> x.shape, np.allclose((x * x).sum(-1), 1, atol=1e-5)
    ((2, 8), True)

    Source: Reimers and Gurevych 2019, "Sentence-BERT".
    """

    def __init__(
        self, config: EmbedderConfig, *, encoder: Encoder | None = None, rngs: nnx.Rngs
    ) -> None:
        """Creates the model.

        Args:
          config: of the model.
          encoder: one with the configuration ``config.encoder``, which becomes part of the model;
            default: a new one.
          rngs: for the new encoder.
        """
        self.config = config
        self.encoder = given_or_new(config.encoder, encoder, rngs)

    def __call__(self, tokens: Any, *, real: Any = None, **options: Any) -> jax.Array:
        """The vectors ``[*B E]``, in float32 or wider.

        Args:
          tokens: integers ``[*B T]``.
          real: bool ``[*B T]``, False for padding.
          **options: ``types``, ``mask`` and ``positions`` of ``Encoder.hidden``.
        """
        x = self.encoder.pooled(self.encoder.hidden(tokens, real=real, **options), real)
        return unit(x) if self.config.normalize else x.astype(accumulation_dtype(x.dtype))


def embed(
    model: Embedder, tokenizer: Tokenizer, texts: Sequence[str], *, batch_size: int = 32
) -> np.ndarray:
    """The vectors of texts, for search, clustering and comparison.

    Texts of similar length are computed together, since padding costs as much as text.

    Args:
      model: from ``pretrained.load_embedder``.
      tokenizer: of the same checkpoint, from ``pretrained.load_tokenizer``.
      texts: ``n`` strings.
      batch_size: how many are computed together.

    Returns:
      ``[n E]`` in the order of the texts.

    Raises:
      TypeError: a model that is not an ``Embedder``.
      ValueError: no texts; a tokenizer with another vocabulary.

    Warns:
      UserWarning: says how many texts were cut because they are longer than the model reads.

    Cosines of three sentences by a real model, all-MiniLM-L6-v2, if its package is installed:

    >>> from attention_jax.models import embed, pretrained
    >>> try:
    ...     folder = pretrained.minilm()
    ... except ModuleNotFoundError:
    ...     folder = None
    >>> def cosines(folder):
    ...     model = pretrained.load_embedder(folder)
    ...     tokenizer = pretrained.load_tokenizer(folder)
    ...     x = embed(model, tokenizer, [
    ...         "A man is eating food.", "Someone has lunch.", "The stock market fell."])
    ...     return (x @ x.T).astype(float).round(2).tolist()
    >>> folder is None or cosines(folder) == [
    ...     [ 1.00, 0.51, -0.04],
    ...     [ 0.51, 1.00,  0.02],
    ...     [-0.04, 0.02,  1.00]]
    True
    """
    if not isinstance(model, Embedder):
        raise TypeError(
            f"model must be an Embedder, from pretrained.load_embedder, got {type(model).__name__}"
        )
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"tokenizer must be a Tokenizer, from pretrained.load_tokenizer, got "
            f"{type(tokenizer).__name__}"
        )
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"texts must be a list of one or more strings, got {texts!r}")
    int_at_least("batch_size", batch_size, 1)
    config = model.config
    if tokenizer.vocabulary > config.encoder.vocabulary:
        raise ValueError(
            f"tokenizer must be that of the model, which knows {config.encoder.vocabulary} tokens, "
            f"got one of {tokenizer.vocabulary}"
        )
    limits = [config.max_length, tokenizer.max_length]
    if config.encoder.positions == "learned":
        limits.append(config.encoder.max_length)
    longest = min((x for x in limits if x is not None), default=None)
    rows = tokenizer(texts, max_length=longest).rows
    graph, state = nnx.split(model)
    order = np.argsort([-len(row.tokens) for row in rows], kind="stable")
    found: list[np.ndarray] = []
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        length = -(-len(rows[chosen[0]].tokens) // MULTIPLE) * MULTIPLE
        if longest is not None:
            length = min(length, longest)
        # The last batch is filled up with a text, so that it needs no program of its own.
        filled = np.resize(chosen, min(batch_size, len(rows)))
        batch = pad([rows[i] for i in filled], length)
        types = batch.types if config.encoder.types else None
        vectors = _run(graph, state, batch.tokens, batch.real, types)
        found.append(np.asarray(vectors)[: len(chosen)])
    return np.concatenate(found)[np.argsort(order)]


@functools.partial(jax.jit, static_argnums=0)
def _run(graph: Any, state: Any, tokens: Any, real: Any, types: Any) -> jax.Array:
    model: Embedder = nnx.merge(graph, state)
    return model(tokens, real=real, types=types)
