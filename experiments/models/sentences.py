"""Sentence classifiers: from word indices ``[B T]`` to logits ``[B C]``."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.models import Encoder, EncoderConfig
from attention_jax.nn import Embeddings, Frozen
from attention_jax.nn.linear import Linear
from attention_jax.positions.vectors import rows
from experiments.datasets.text import PAD, UNKNOWN
from experiments.training import text_config
from experiments.training.task import Array


class NaiveBayes:
    """scikit-learn's multinomial naive Bayes on words and bigrams, with add-one smoothing.

    It is fitted on construction and has no parameters to train. Unknown words are ignored.
    """

    def __init__(self, rows: list[list[int]], labels: np.ndarray) -> None:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.naive_bayes import MultinomialNB
        from sklearn.pipeline import make_pipeline

        self.model = make_pipeline(CountVectorizer(analyzer=_words_and_bigrams), MultinomialNB())
        self.model.fit(rows, labels)

    def __call__(self, words: np.ndarray) -> np.ndarray:
        """Log-probabilities ``[B C]``."""
        return np.asarray(self.model.predict_log_proba(np.asarray(words).tolist()), np.float32)


def _words_and_bigrams(row: list[int]) -> list[str]:
    words = [str(x) for x in row if x not in (PAD, UNKNOWN)]
    return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]


class Convolutions(nnx.Module):
    """``max_t relu(conv_w(x))`` for each width ``w``: ``[B T E]`` to ``[B widths * filters]``."""

    def __init__(
        self, features: int, filters: int, widths: tuple[int, ...], *, rngs: nnx.Rngs
    ) -> None:
        self.convolutions = nnx.List(
            [nnx.Conv(features, filters, kernel_size=(w,), rngs=rngs) for w in widths]
        )

    def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
        """Padding, where ``real [B T]`` is false, is zeroed and excluded from the maximum."""
        x = jnp.where(real[..., None], x, 0)
        outputs = [jax.nn.relu(convolution(x)) for convolution in self.convolutions]
        return jnp.concatenate([jnp.where(real[..., None], y, 0).max(1) for y in outputs], axis=-1)


SMALLEST = 1e-8  # added to a variance, so that equal vectors do not divide by 0


class NormalizedEmbeddings(Embeddings):
    """Embeddings whose vectors have mean 0 and variance 1 over the words of the training split::

        mean, variance = sum_k f_k e_k, sum_k f_k (e_k - mean)^2     f_k the frequency of word k
        vector of k    = (e_k - mean) / sqrt(variance)

    A model cannot escape a perturbation of these vectors by making its embeddings larger.

    Source: Miyato et al. 2017, "Adversarial Training Methods for Semi-Supervised Text
    Classification", equation 1.
    """

    def __init__(
        self, vocabulary: int, features: int, *, frequencies: np.ndarray, **options: Any
    ) -> None:
        """See ``Embeddings``; ``frequencies [V]`` are positive for some words and sum to 1."""
        super().__init__(vocabulary, features, **options)
        self.frequencies = Frozen(jnp.asarray(frequencies, jnp.float32))

    def vectors(self, tokens: Any) -> jax.Array:
        """The normalized vectors, ``[*B T]`` to ``[*B T E]``, without positions."""
        table, f = self.tokens[...], self.frequencies[...].astype(self.tokens.dtype)
        mean = f @ table
        variance = f @ jnp.square(table - mean)
        x = (rows(table, tokens, "tokens") - mean) * jax.lax.rsqrt(variance + SMALLEST)
        return x if self.moved is None else self.moved(x)


WIDTHS = (3, 4, 5)


class TextCNN(nnx.Module):
    """Word embeddings, convolutions of three widths, max pooling, dropout and a linear layer.

    Source: Kim 2014, "Convolutional Neural Networks for Sentence Classification" (CNN-rand).
    """

    def __init__(
        self,
        config: Any,
        vocabulary: int,
        classes: int,
        rngs: nnx.Rngs,
        *,
        frequencies: np.ndarray | None = None,
    ) -> None:
        options: dict[str, Any] = {"embedding_init": nnx.initializers.normal(0.25), "rngs": rngs}
        self.embed = (
            Embeddings(vocabulary, config.word_width, **options)
            if frequencies is None
            else NormalizedEmbeddings(
                vocabulary, config.word_width, frequencies=frequencies, **options
            )
        )
        self.noise = WordDropout(config.word_dropout, rngs=rngs)
        self.features = Convolutions(config.word_width, config.filters, WIDTHS, rngs=rngs)
        self.dropout = nnx.Dropout(config.feature_dropout, rngs=rngs)
        self.classify = nnx.Linear(len(WIDTHS) * config.filters, classes, rngs=rngs)

    def __call__(self, words: Array) -> jax.Array:
        """Logits ``[B C]``."""
        real = words != PAD
        x = self.features(self.embed(self.noise(words)), real)
        return self.classify(self.dropout(x))


class SelfAttention(nnx.Module):
    """A transformer encoder; classifies the mean of its outputs, or features from convolutions.

    With ``convolve``, the convolutions read each word's embedding concatenated with the encoder's
    output.
    """

    def __init__(
        self,
        config: Any,
        vocabulary: int,
        classes: int,
        rngs: nnx.Rngs,
        *,
        convolve: bool,
        frequencies: np.ndarray | None = None,
    ) -> None:
        E = config.width
        self.noise = WordDropout(config.word_dropout, rngs=rngs)
        embed = None
        if frequencies is not None:
            embed = NormalizedEmbeddings(
                vocabulary,
                E,
                frequencies=frequencies,
                positions=config.vectors,
                max_length=config.longest,
                dropout_rate=config.dropout,
                rngs=rngs,
            )
        self.encoder = Encoder(
            EncoderConfig(
                vocabulary,
                text_config.layers(config),
                positions=config.vectors,
                max_length=config.longest,
                embedding_scale=text_config.EMBEDDING_SCALE,
                pool="mean",
                dropout_rate=config.dropout,
            ),
            embed=embed,
            rngs=rngs,
        )
        self.features = nnx.data(None)
        width = E
        if convolve:
            self.features = Convolutions(2 * E, config.filters, WIDTHS, rngs=rngs)
            width = len(WIDTHS) * config.filters
        self.dropout = nnx.Dropout(config.feature_dropout, rngs=rngs)
        self.classify = Linear(width, classes, rngs=rngs)

    def __call__(self, words: Array) -> jax.Array:
        """Logits ``[B C]``."""
        real = words != PAD
        words = self.noise(words)
        x = self.encoder.hidden(words, real=real)
        if self.features is None:
            x = self.encoder.pooled(x, real)
        else:
            vectors = self.encoder.embed.vectors(words)
            x = self.features(jnp.concatenate([vectors, x], axis=-1), real)
        return self.classify(self.dropout(x))


class WordDropout(nnx.Module):
    """Replaces random words in training: by the unknown word, so that its embedding is trained.

    Source: Iyyer et al. 2015, "Deep Unordered Composition Rivals Syntactic Methods".
    """

    def __init__(
        self,
        rate: float,
        *,
        unknown: int = UNKNOWN,
        kept: tuple[int, ...] = (PAD,),
        rngs: nnx.Rngs,
    ) -> None:
        """``rate`` is the probability of each word, except ``kept``, to become ``unknown``."""
        self.rate, self.unknown, self.kept, self.deterministic = rate, unknown, kept, False
        self.rngs = rngs.dropout.fork()

    def __call__(self, words: Array) -> jax.Array:
        """``[B T]`` to ``[B T]``."""
        words = jnp.asarray(words)
        if self.deterministic or not self.rate:
            return words
        drop = jax.random.bernoulli(self.rngs(), self.rate, words.shape)
        return jnp.where(drop & ~jnp.isin(words, jnp.array(self.kept)), self.unknown, words)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Called by ``nnx.view``."""
        if deterministic is not None:
            self.deterministic = deterministic


def build(
    config: Any,
    vocabulary: int,
    classes: int,
    rngs: nnx.Rngs,
    frequencies: np.ndarray | None = None,
) -> nnx.Module:
    """The trained model that ``config.model`` names.

    Args:
      config: the options.
      vocabulary, classes: how many there are.
      rngs: for parameters and dropout.
      frequencies: of the words in the training split, ``[V]``, for normalized embeddings.
    """
    if config.model == "text_cnn":
        return TextCNN(config, vocabulary, classes, rngs, frequencies=frequencies)
    convolve = config.model == "attention_cnn"
    return SelfAttention(
        config, vocabulary, classes, rngs, convolve=convolve, frequencies=frequencies
    )
