"""The encoder-decoder over spectrograms of speech (Whisper), and those spectrograms."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attention_jax.core.axes import (
    AnyArray,
    accumulation_dtype,
    check_tokens,
    int_at_least,
    same_rank,
)
from attention_jax.core.shards import gathered
from attention_jax.models.encoder_decoder import (
    EncoderDecoder,
    EncoderDecoderConfig,
    Memory,
    widened,
)
from attention_jax.nn.linear import linear
from attention_jax.nn.logical import logical
from attention_jax.nn.padding import as_real
from attention_jax.positions import sinusoidal


@dataclasses.dataclass(frozen=True)
class SpeechConfig(EncoderDecoderConfig):
    """Configuration of a ``SpeechTransformer``: that of an ``EncoderDecoder``, and its source.

    ``positions``, ``max_length`` and ``embedding_scale`` are those of the target. ``dropout_rate``
    is that of the embeddings of both.

    Attributes:
      mels: bands of the spectrogram (M).
      frames: the largest number of frames, even: 3,000 are 30 seconds in Whisper.
    """

    positions: str | None = "learned"
    max_length: int | None = 448
    mels: int = 80
    frames: int = 3000

    def __post_init__(self) -> None:
        super().__post_init__()
        int_at_least("mels", self.mels, 1)
        int_at_least("frames", self.frames, 2)
        if self.frames % 2:
            raise ValueError(f"frames must be even: the encoder halves them, got {self.frames}")
        if self.encoder.features % 2 or self.encoder.features < 4:
            raise ValueError(
                f"encoder must have an even width of at least 4, for its sinusoidal positions, got "
                f"{self.encoder.features}"
            )


class SpeechTransformer(EncoderDecoder):
    """A sequence-to-sequence model from a spectrogram to tokens.

    Two convolutions over three frames each, of which the second one halves their number, take the
    place of the embeddings of the source::

        x = gelu(convolution(source))                  [S, E]
        x = gelu(convolution(x, stride=2)) + positions [S / 2, E]

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import Layers, SpeechConfig, SpeechTransformer, generate
    >>> layers = Layers(features=8, num_layers=1, num_heads=2)
    >>> config = SpeechConfig(10, layers, layers, max_length=5, mels=4, frames=6)
    >>> model = SpeechTransformer(config, rngs=nnx.Rngs(0))
    >>> source, start = np.ones((1, 6, 4), np.float32), np.array([[1]])
    >>> model(source, start).shape
    (1, 1, 10)
    >>> generate(model, start, source=source, max_new_tokens=3).tokens.shape
    (1, 3)

    Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision".
    """

    config: SpeechConfig

    def __init__(self, config: SpeechConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        layers, E = config.encoder, config.encoder.features
        options: dict[str, Any] = {"axes": (None, "embed"), "rngs": rngs, **layers.dtypes}
        self.convolution = linear(3 * config.mels, E, **options)
        self.halving_convolution = linear(3 * E, E, **options)
        # Fixed: not a parameter, so that optimizers leave it alone.
        table = wave_table(config.frames // 2, E).astype(layers.param_dtype)
        self.positions = nnx.Variable(table, **logical(None, "embed"))
        self.source_dropout, self.dropout = self.dropout, nnx.Dropout(0.0)

    def checked_source(self, source: Any, real: Any, *, name: str = "real") -> tuple[Any, Any]:
        """The spectrogram and its padding, which is named ``name`` in errors, after all checks."""
        source = jnp.asarray(source)
        check_tokens("source", source, "[*B S M]", self.config.mels)
        S = source.shape[-2]
        if not 1 <= S <= self.config.frames:
            raise ValueError(
                f"source must have 1 to {self.config.frames} frames (frames of the config), got {S}"
            )
        real = as_real(real, source.shape[:-1], name=name, of="the frames'")
        if real is not None and not isinstance(real, jax.core.Tracer):
            known = np.asarray(real)
            if (known[..., 1:] & ~known[..., :-1]).any():
                raise ValueError(
                    f"{name} must be True for the first frames of a row: padding comes behind them"
                )
        return source, real

    def encode(self, source: Any, *, real: Any = None) -> Memory:
        """Encodes a spectrogram for the decoder.

        Args:
          source: floats ``[*B S M]``, from ``log_mel`` for example; cast to the dtype of the model.
          real: bool ``[*B S]``, False for padding, which comes behind the frames of a row and may
            hold anything. Whisper was trained with 30 seconds of sound without padding: zeros in
            the waveform.

        Returns:
          The memory, of half as many positions.
        """
        source, real = self.checked_source(source, real)
        x = source.astype(self.embed.dtype or self.positions[...].dtype)
        x = jax.nn.gelu(self.convolution(neighbors(_zeroed(x, real))), approximate=False)
        x = neighbors(_zeroed(x, real), stride=2)
        x = widened(jax.nn.gelu(self.halving_convolution(x), approximate=False))
        table = gathered(self.positions[...], 1)[: x.shape[-2]]
        x, table = same_rank(x, table.astype(x.dtype))
        half = None if real is None else real[..., ::2]
        return self.memory(self.encoder(self.source_dropout(x + table), real=half), half)


def neighbors(x: Float[AnyArray, "*B T C"], *, stride: int = 1) -> jax.Array:
    """Every ``stride``-th vector between those before and after it, zeros beyond the ends.

    A convolution over three vectors is a product with these.

    >>> import numpy as np
    >>> from attention_jax.models.speech import neighbors
    >>> neighbors(np.array([[1.0], [2.0], [3.0]]), stride=2).tolist()
    [[0.0, 1.0, 2.0], [2.0, 3.0, 0.0]]
    """
    x = jnp.asarray(x)
    T = x.shape[-2]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(1, 1), (0, 0)])
    return jnp.concatenate([padded[..., i : i + T : stride, :] for i in range(3)], axis=-1)


def _zeroed(x: jax.Array, real: Any) -> jax.Array:
    """With zeros as padding, as beyond the ends."""
    return x if real is None else jnp.where(jnp.asarray(real)[..., None], x, 0)


def wave_table(length: int, width: int) -> Float[Array, "{length} {width}"]:
    """Whisper's sinusoidal positions: wavelengths from ``2 pi`` to exactly ``10,000 * 2 pi``."""
    theta = 10_000.0 ** (width / (width - 2))  # sinusoidal() would stop one step before
    return sinusoidal(np.arange(length), width, theta=theta, interleaved=False)


def log_mel(
    waveform: Float[AnyArray, "*B samples"],
    *,
    mels: int = 80,
    length: int | None = None,
    rate: int = 16_000,
    window: int = 400,
    hop: int = 160,
) -> Float[Array, "*B frames {mels}"]:
    """The logarithm of the power of a sound in bands of frequencies, over time::

        P[t]  = |DFT(hann * waveform around sample t * hop)| ** 2
        x[t]  = log10(max(P[t] . filters, 1e-10))
        y     = max(x, max(x) - 8) / 4 + 1

    Args:
      waveform: samples between -1 and 1; at the ends it is reflected.
      mels: number of bands (M): 80, or 128 in Whisper's large-v3.
      length: cut the waveform, or append zeros, to this number of samples: 480,000 in Whisper.
      rate: samples per second.
      window: samples in a window.
      hop: samples from one frame to the next.

    Returns:
      ``samples // hop`` frames ``[*B frames M]``, in float32 or wider.

    Raises:
      ValueError: a waveform that is shorter than half a window.
      TypeError: a waveform that is not of floats.

    >>> import numpy as np
    >>> from attention_jax.models import log_mel
    >>> tone = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000).astype(np.float32)
    >>> x = log_mel(tone)
    >>> x.shape, int(x[50].argmax())
    ((100, 80), 11)

    Source: Radford et al. 2022, section 2.2; the filters are those of Slaney 1998, "Auditory
    Toolbox".
    """
    for name, number in {"mels": mels, "rate": rate, "window": window, "hop": hop}.items():
        int_at_least(name, number, 1)
    sound = jnp.asarray(waveform)
    if not jnp.issubdtype(sound.dtype, jnp.floating):
        raise TypeError(f"waveform must be floats between -1 and 1, got {sound.dtype}")
    if sound.ndim < 1:
        raise ValueError("waveform must have shape [*B samples], got ()")
    sound = sound.astype(accumulation_dtype(sound.dtype))
    if length is not None:
        int_at_least("length", length, 1)
        sound = sound[..., :length]
        missing = length - sound.shape[-1]
        sound = jnp.pad(sound, [(0, 0)] * (sound.ndim - 1) + [(0, missing)])
    samples, half = sound.shape[-1], window // 2
    if samples < (least := max(half + 1, hop)):
        raise ValueError(f"waveform must have at least {least} samples, got {samples}")
    ends = [(0, 0)] * (sound.ndim - 1) + [(half, half)]
    sound = jnp.pad(sound, ends, mode="reflect")
    at = np.arange(samples // hop)[:, None] * hop + np.arange(window)
    hann = np.sin(np.pi * np.arange(window) / window) ** 2
    power = jnp.abs(jnp.fft.rfft(sound[..., at] * hann.astype(sound.dtype))) ** 2
    bands = power @ mel_filters(mels, rate, window).astype(sound.dtype)
    x = jnp.log10(jnp.maximum(bands, 1e-10))
    x = jnp.maximum(x, x.max(axis=(-2, -1), keepdims=True) - 8)
    return x / 4 + 1


def mel_filters(mels: int, rate: int, window: int) -> Float[np.ndarray, "bins {mels}"]:
    """Triangles over frequencies, each from the center of the last band to that of the next one.

    Centers are equally far apart on the mel scale, from 0 Hz to half the rate. All triangles have
    the same area.
    """
    frequency = np.linspace(0, rate / 2, 1 + window // 2)[:, None]
    edges = _hertz(np.linspace(0, _mel(rate / 2), mels + 2))
    low, center, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (frequency - low) / (center - low)
    falling = (high - frequency) / (high - center)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)


# Slaney's mel scale: three mels per 200 Hz up to 1,000 Hz, above it 27 mels per factor of 6.4.
_KNEE, _STEP = 1000.0, math.log(6.4) / 27


def _mel(hertz: float) -> float:
    return 15 + math.log(hertz / _KNEE) / _STEP if hertz > _KNEE else 3 * hertz / 200


def _hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, 200 * mel / 3, _KNEE * np.exp((mel - 15) * _STEP))
