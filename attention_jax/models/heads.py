"""Heads over an encoder: classes of a text, tags of its tokens, a span of it.

``Classifier``, ``Tagger`` and ``Reader`` are what Hugging Face calls ``ForSequenceClassification``,
``ForTokenClassification`` and ``ForQuestionAnswering``; ``pretrained.load`` and ``save`` read and
write them. ``classifier``, ``tagger`` and ``reader`` put a fresh head on an encoder that is already
trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from attention_jax.core.axes import accumulation_dtype
from attention_jax.core.dropout import check_rate
from attention_jax.models.encoder import POOLS, Encoder, EncoderConfig
from attention_jax.nn.linear import linear
from attention_jax.nn.rngs import check_rngs


def check_encoder(config: Any) -> None:
    """Checks the ``encoder`` of a head's configuration.

    Raises:
      TypeError: not an ``EncoderConfig``.
      ValueError: it has a head of its own.
    """
    if not isinstance(config.encoder, EncoderConfig):
        raise TypeError(f"encoder must be an EncoderConfig, got {type(config.encoder).__name__}")
    if config.encoder.head is not None:
        raise ValueError(f"encoder must have no head of its own, got head={config.encoder.head!r}")


def _check_labels(labels: Any) -> None:
    if not isinstance(labels, tuple) or not all(isinstance(x, str) for x in labels):
        raise TypeError(f"labels must be a list or tuple of strings, got {labels!r}")
    if not labels or len(set(labels)) < len(labels):
        raise ValueError(f"labels must not be empty, and no name may occur twice, got {labels}")


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Configuration of a ``Classifier``.

    Attributes:
      encoder: of the text, without a head; its ``pool`` and ``pooler`` make one vector of it.
      labels: names of the classes, in the order of their logits.
      dropout_rate: of the pooled vector.
    """

    encoder: EncoderConfig
    labels: tuple[str, ...]
    dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        check_encoder(self)
        _check_labels(self.labels)
        check_rate(self.dropout_rate)


@dataclasses.dataclass(frozen=True)
class TaggerConfig:
    """Configuration of a ``Tagger``.

    Attributes:
      encoder: of the text, without a head; it needs a ``pooler`` only if that is applied to each
        token.
      labels: names of the tags, in the order of their logits.
      dropout_rate: of the vectors of the tokens, before the head.
    """

    encoder: EncoderConfig
    labels: tuple[str, ...]
    dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        check_encoder(self)
        _check_labels(self.labels)
        check_rate(self.dropout_rate)


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
    """Configuration of a ``Reader``.

    Attributes:
      encoder: of question and passage, without a head; it needs a ``pooler`` only if that is
        applied to each token.
      dropout_rate: of the vectors of the tokens, before the head.
    """

    encoder: EncoderConfig
    dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        check_encoder(self)
        check_rate(self.dropout_rate)


class SpanLogits(NamedTuple):
    """Logits of the first and of the last token of a span.

    Padding and the question have logits too: mask them before a softmax over the passage.
    """

    start: jax.Array
    """``[*B T]``, in float32 or wider."""
    end: jax.Array
    """``[*B T]``, likewise; the last token belongs to the span."""


class Classifier(nnx.Module):
    """Logits of classes for each text: ``encoder.pooled(x) W + b``.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import Classifier, ClassifierConfig, EncoderConfig, Layers
    >>> layers = Layers(features=8, num_layers=1, num_heads=2, order="post")
    >>> encoder = EncoderConfig(vocabulary=10, layers=layers, max_length=4, pool="mean")
    >>> model = Classifier(ClassifierConfig(encoder, ("no", "yes", "maybe")), rngs=nnx.Rngs(0))
    >>> model(np.array([[3, 1, 4, 0]]), real=np.array([[True, True, True, False]])).shape
    (1, 3)

    Source: Devlin et al. 2019, "BERT", section 4.1.
    """

    def __init__(
        self, config: ClassifierConfig, *, encoder: Encoder | None = None, rngs: nnx.Rngs
    ) -> None:
        """Creates the head, and the encoder unless one is given.

        Args:
          config: of the model.
          encoder: one with the configuration ``config.encoder``, which becomes part of the model.
          rngs: for parameters and dropout.
        """
        self.config = config
        self.encoder = given_or_new(config.encoder, encoder, rngs)
        self.dropout = _dropout(config.dropout_rate, rngs)
        self.classify = _logits(config.encoder, len(config.labels), rngs)

    def __call__(self, tokens: Any, *, real: Any = None, **options: Any) -> jax.Array:
        """The logits ``[*B C]``, in float32 or wider.

        Args:
          tokens: integers ``[*B T]``.
          real: bool ``[*B T]``, False for padding.
          **options: ``types``, ``mask`` and ``positions`` of ``Encoder.hidden``.
        """
        x = self.encoder.hidden(tokens, real=real, **options)
        x = self.encoder.pooled(x, real, dropout=self.dropout)
        return _wide(self.classify(self.dropout(x)))


class Tagger(nnx.Module):
    """Logits of tags for each token: ``x W + b``.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import EncoderConfig, Layers, Tagger, TaggerConfig
    >>> layers = Layers(features=8, num_layers=1, num_heads=2, order="post")
    >>> encoder = EncoderConfig(vocabulary=10, layers=layers, max_length=4)
    >>> model = Tagger(TaggerConfig(encoder, ("O", "B", "I")), rngs=nnx.Rngs(0))
    >>> model(np.array([[3, 1, 4, 0]]), real=np.array([[True, True, True, False]])).shape
    (1, 4, 3)

    Source: Devlin et al. 2019, "BERT", section 5.3.
    """

    def __init__(
        self, config: TaggerConfig, *, encoder: Encoder | None = None, rngs: nnx.Rngs
    ) -> None:
        """Creates the head, and the encoder unless one is given.

        Args:
          config: of the model.
          encoder: one with the configuration ``config.encoder``, which becomes part of the model.
          rngs: for parameters and dropout.
        """
        self.config = config
        self.encoder = given_or_new(config.encoder, encoder, rngs)
        self.dropout = _dropout(config.dropout_rate, rngs)
        self.classify = _logits(config.encoder, len(config.labels), rngs)

    def __call__(self, tokens: Any, *, real: Any = None, **options: Any) -> jax.Array:
        """The logits ``[*B T C]``, in float32 or wider.

        Args:
          tokens: integers ``[*B T]``.
          real: bool ``[*B T]``, False for padding.
          **options: ``types``, ``mask`` and ``positions`` of ``Encoder.hidden``.
        """
        x = self.encoder.hidden(tokens, real=real, **options)
        return _wide(self.classify(self.dropout(_per_token(self.encoder, x))))


class Reader(nnx.Module):
    """Logits of where a span starts and ends, such as the answer to a question in a passage.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import EncoderConfig, Layers, Reader, ReaderConfig
    >>> layers = Layers(features=8, num_layers=1, num_heads=2, order="post")
    >>> encoder = EncoderConfig(vocabulary=10, layers=layers, max_length=4, types=2)
    >>> model = Reader(ReaderConfig(encoder), rngs=nnx.Rngs(0))
    >>> logits = model(np.array([[3, 1, 4, 1]]), types=np.array([[0, 0, 1, 1]]))
    >>> logits.start.shape, logits.end.shape
    ((1, 4), (1, 4))

    Source: Devlin et al. 2019, "BERT", section 4.2.
    """

    def __init__(
        self, config: ReaderConfig, *, encoder: Encoder | None = None, rngs: nnx.Rngs
    ) -> None:
        """Creates the head, and the encoder unless one is given.

        Args:
          config: of the model.
          encoder: one with the configuration ``config.encoder``, which becomes part of the model.
          rngs: for parameters and dropout.
        """
        self.config = config
        self.encoder = given_or_new(config.encoder, encoder, rngs)
        self.dropout = _dropout(config.dropout_rate, rngs)
        self.spans = _logits(config.encoder, 2, rngs)

    def __call__(self, tokens: Any, *, real: Any = None, **options: Any) -> SpanLogits:
        """The logits of both ends of the span.

        Args:
          tokens: integers ``[*B T]``.
          real: bool ``[*B T]``, False for padding.
          **options: ``types``, ``mask`` and ``positions`` of ``Encoder.hidden``.
        """
        x = self.encoder.hidden(tokens, real=real, **options)
        y = _wide(self.spans(self.dropout(_per_token(self.encoder, x))))
        return SpanLogits(y[..., 0], y[..., 1])


def classifier(
    encoder: Encoder,
    labels: Sequence[str],
    *,
    pool: str = "first",
    pooler: bool | None = None,
    dropout_rate: float | None = None,
    rngs: nnx.Rngs,
) -> Classifier:
    """Puts a fresh head of classes on an encoder.

    Args:
      encoder: a trained one, from ``pretrained.load`` for example. It is not changed.
      labels: names of the classes.
      pool: ``"first"``, the vector of the first token, or ``"mean"``, of all tokens. Only
        ModernBERT, with ``pooler=True``, can be saved as a checkpoint with ``"mean"``.
      pooler: whether the pooled vector goes through the encoder's pooler, a fresh one if it has
        none; a checkpoint needs it. Default: with ``"first"`` only, as in BERT.
      dropout_rate: of the pooled vector; default: that of the encoder.
      rngs: for the head and dropout.

    Returns:
      A model with a copy of the encoder, in evaluation mode; ``model.train()`` enables dropout.

    Raises:
      TypeError: not an ``Encoder``.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import Encoder, EncoderConfig, Layers, classifier
    >>> layers = Layers(features=8, num_layers=1, num_heads=2)
    >>> encoder = Encoder(EncoderConfig(vocabulary=10, layers=layers), rngs=nnx.Rngs(0))
    >>> model = classifier(encoder, ["ham", "spam"], pool="mean", rngs=nnx.Rngs(1))
    >>> model(np.array([[3, 1, 4]])).shape
    (1, 2)
    """
    pooler = pool == "first" if pooler is None else pooler
    copy = _headless(encoder, rngs, pool=pool, pooler=pooler)
    rate = copy.config.dropout_rate if dropout_rate is None else dropout_rate
    config = ClassifierConfig(copy.config, _names(labels), rate)
    return _evaluating(Classifier(config, encoder=copy, rngs=rngs))


def tagger(
    encoder: Encoder,
    labels: Sequence[str],
    *,
    dropout_rate: float | None = None,
    rngs: nnx.Rngs,
) -> Tagger:
    """Puts a fresh head of tags on an encoder.

    Args:
      encoder: a trained one, from ``pretrained.load`` for example. It is not changed.
      labels: names of the tags.
      dropout_rate: of the vectors of the tokens; default: that of the encoder.
      rngs: for the head and dropout.

    Returns:
      A model with a copy of the encoder in evaluation mode. It has a pooler only if that is applied
      to each token, as in ModernBERT.

    Raises:
      TypeError: not an ``Encoder``.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import Encoder, EncoderConfig, Layers, tagger
    >>> layers = Layers(features=8, num_layers=1, num_heads=2)
    >>> encoder = Encoder(EncoderConfig(vocabulary=10, layers=layers), rngs=nnx.Rngs(0))
    >>> tagger(encoder, ["O", "B", "I"], rngs=nnx.Rngs(1))(np.array([[3, 1, 4]])).shape
    (1, 3, 3)
    """
    copy = _of_tokens(encoder, rngs)
    rate = copy.config.dropout_rate if dropout_rate is None else dropout_rate
    config = TaggerConfig(copy.config, _names(labels), rate)
    return _evaluating(Tagger(config, encoder=copy, rngs=rngs))


def reader(encoder: Encoder, *, dropout_rate: float = 0.0, rngs: nnx.Rngs) -> Reader:
    """Puts a fresh head of spans on an encoder.

    Args:
      encoder: a trained one, from ``pretrained.load`` for example. It is not changed.
      dropout_rate: of the vectors of the tokens.
      rngs: for the head and dropout.

    Returns:
      A model with a copy of the encoder in evaluation mode. It has a pooler only if that is applied
      to each token, as in ModernBERT.

    Raises:
      TypeError: not an ``Encoder``.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import Encoder, EncoderConfig, Layers, reader
    >>> layers = Layers(features=8, num_layers=1, num_heads=2)
    >>> encoder = Encoder(EncoderConfig(vocabulary=10, layers=layers), rngs=nnx.Rngs(0))
    >>> reader(encoder, rngs=nnx.Rngs(1))(np.array([[3, 1, 4]])).start.shape
    (1, 3)
    """
    copy = _of_tokens(encoder, rngs)
    return _evaluating(Reader(ReaderConfig(copy.config, dropout_rate), encoder=copy, rngs=rngs))


def label_ids(labels: Sequence[str], names: Iterable[str]) -> np.ndarray:
    """The indices of names among labels, such as those of a checkpoint in its own order.

    Args:
      labels: of the model, ``model.config.labels``.
      names: of the data, ``n`` of them.

    Returns:
      int32 ``[n]``.

    Raises:
      ValueError: names that are not among the labels; the message lists both.

    >>> from attention_jax.models import label_ids
    >>> label_ids(("positive", "negative"), ["negative", "positive", "negative"]).tolist()
    [1, 0, 1]
    """
    names = list(names)
    places = {label: i for i, label in enumerate(labels)}
    if unknown := sorted(set(names) - places.keys()):
        raise ValueError(
            f"names must be labels of the model, {', '.join(map(repr, labels))}; got "
            f"{', '.join(map(repr, unknown))}"
        )
    return np.array([places[name] for name in names], np.int32)


def _headless(
    encoder: Encoder, rngs: nnx.Rngs, *, pool: str = "first", pooler: bool = False
) -> Encoder:
    """A copy of an encoder without its head, pooled in another way."""
    if not isinstance(encoder, Encoder):
        raise TypeError(
            f"encoder must be an Encoder, got {type(encoder).__name__}"
            + (": pass its encoder" if isinstance(encoder, Classifier | Tagger | Reader) else "")
        )
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {POOLS}, got {pool!r}")
    copy = nnx.clone(encoder)
    changes: dict[str, Any] = {"head": None, "pool": pool, "pooler": pooler}
    copy.config = dataclasses.replace(encoder.config, **changes)
    copy.transform = copy.transform_norm = nnx.data(None)
    copy.token_bias = copy.replaced = nnx.data(None)
    if not pooler:
        copy.pooler = copy.pooler_norm = nnx.data(None)
    elif copy.pooler is None:
        copy.add_pooler(rngs)
    return copy


def _of_tokens(encoder: Encoder, rngs: nnx.Rngs) -> Encoder:
    """A copy of an encoder without its head, with a pooler only if that is for each token."""
    config = getattr(encoder, "config", None)
    pooler = isinstance(config, EncoderConfig) and config.pooler_config.tokens
    return _headless(encoder, rngs, pooler=pooler)


def _per_token(encoder: Encoder, x: jax.Array) -> jax.Array:
    """The vectors that a head of tokens reads."""
    config = encoder.config
    return encoder.projected(x) if config.pooler and config.pooler_config.tokens else x


def given_or_new(config: EncoderConfig, encoder: Encoder | None, rngs: nnx.Rngs) -> Encoder:
    """The encoder if there is one, after a check of its configuration; else a new one."""
    check_rngs(rngs)
    if encoder is None:
        return Encoder(config, rngs=rngs)
    if encoder.config != config:
        raise ValueError(
            f"encoder must have the configuration config.encoder, {config}, got {encoder.config}"
        )
    return encoder


def _dropout(rate: float, rngs: nnx.Rngs) -> nnx.Dropout:
    return nnx.Dropout(rate, rngs=rngs if rate else None)


def _logits(config: EncoderConfig, number: int, rngs: nnx.Rngs) -> nnx.Linear:
    layers = config.layers
    return linear(layers.features, number, axes=("embed", None), **layers.dtypes, rngs=rngs)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(accumulation_dtype(x.dtype))


def _names(labels: Sequence[str]) -> Any:
    # Anything else is refused by the configuration.
    return tuple(labels) if isinstance(labels, list | tuple) else labels


def _evaluating(model: Any) -> Any:
    model.eval()
    return model
