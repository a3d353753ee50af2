"""Transformers, each one short file over ``nn``: encoder, decoder, both, and over images."""

from attention_jax.models import pretrained as pretrained
from attention_jax.models import sampling as sampling
from attention_jax.models.beam_search import Beams as Beams
from attention_jax.models.beam_search import beam_search as beam_search
from attention_jax.models.decoder import Decoder as Decoder
from attention_jax.models.decoder import DecoderConfig as DecoderConfig
from attention_jax.models.encoder import Encoder as Encoder
from attention_jax.models.encoder import EncoderConfig as EncoderConfig
from attention_jax.models.encoder_decoder import EncoderDecoder as EncoderDecoder
from attention_jax.models.encoder_decoder import EncoderDecoderConfig as EncoderDecoderConfig
from attention_jax.models.generate import Generated as Generated
from attention_jax.models.generate import generate as generate
from attention_jax.models.generate import stream as stream
from attention_jax.models.layers import Layers as Layers
from attention_jax.models.layers import Relative as Relative
from attention_jax.models.sampling import Sampling as Sampling
from attention_jax.models.vision import VisionConfig as VisionConfig
from attention_jax.models.vision import VisionTransformer as VisionTransformer

__all__ = [
    "Beams",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "Generated",
    "Layers",
    "Relative",
    "Sampling",
    "VisionConfig",
    "VisionTransformer",
    "beam_search",
    "generate",
    "pretrained",
    "sampling",
    "stream",
]
