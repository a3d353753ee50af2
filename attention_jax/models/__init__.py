"""Transformers built from ``nn``: decoder, encoder, encoder-decoder, speech, vision, dual encoder.

A configuration is a frozen value; ``Layers`` describes the stack that all models share. A decoder
with grouped heads, rotary positions and a local layer, called under ``nnx.jit`` as one program:

>>> import jax
>>> import numpy as np
>>> from flax import nnx
>>> from attention_jax import masks
>>> from attention_jax.models import (
...     Decoder, DecoderConfig, Encoder, EncoderConfig, EncoderDecoder, EncoderDecoderConfig,
...     Layers, Request, Sampling, SpeechConfig, SpeechTransformer, VisionConfig, VisionTransformer,
...     beam_search, generate, log_mel, serve, tagger)
>>> from attention_jax.positions import Rotary
>>> layers = Layers(features=8, num_layers=1, num_heads=4, num_kv_heads=2, rotary=Rotary(),
...                 windows=(4,), norm="rms", gated=True, activation="silu")
>>> decoder = Decoder(DecoderConfig(vocabulary=10, layers=layers), rngs=nnx.Rngs(0))
>>> run = nnx.jit(lambda model, *inputs, **options: model(*inputs, **options))
>>> prompts = np.array([[0, 0, 5, 7], [3, 1, 4, 1]])
>>> real = np.array([[False, False, True, True], [True] * 4])  # False for padding
>>> run(decoder, prompts, real=real).shape
(2, 4, 10)

Generation by sampling or beam search, for prompts of different lengths, padded on either side.
Layers with a window keep no more than the window in their caches. ``stream`` yields tokens as they
come, and ``models.sampling`` has processors of logits that compose:

>>> generate(decoder, prompts, real=real, max_new_tokens=3, stop=2, key=jax.random.key(0),
...          sampling=Sampling(temperature=0.8, top_p=0.95)).tokens.shape
(2, 3)
>>> beam_search(decoder, prompts, real=real, max_new_tokens=3, stop=2, beams=2).tokens.shape
(2, 2, 3)

With a smaller ``draft``, ``speculate(model, draft, prompts, max_new_tokens=n)`` gives the tokens of
``generate`` in fewer calls of the model.

Serving: requests join and leave a running batch, whose caches are pages that they share. Each gets
the tokens of ``generate`` for it alone; ``Batch`` is the same, step by step:

>>> requests = [Request([5, 7], max_new_tokens=3), Request([3, 1, 4, 1], max_new_tokens=2)]
>>> events = list(serve(decoder, requests))
>>> [event.token for event in events if event.request == 0] == generate(
...     decoder, np.array([[5, 7]]), max_new_tokens=3).tokens[0].tolist()
True

An encoder over packed documents: masks of a call are combined with those of the configuration.

>>> config = EncoderConfig(vocabulary=10, max_length=6,
...                        layers=Layers(features=8, num_layers=1, num_heads=2, windows=(3,)))
>>> encoder = Encoder(config, rngs=nnx.Rngs(0))
>>> documents = np.repeat([[0, 1]], 3, axis=1)
>>> positions = np.array([[0, 1, 2, 0, 1, 2]])
>>> mask = masks.segments(documents)
>>> run(encoder, np.ones((1, 6), int), mask=mask, positions=positions).shape
(1, 6, 8)

Heads over an encoder: ``Classifier``, ``Tagger`` and ``Reader``; here a fresh one on an encoder
that is already trained:

>>> tag = tagger(encoder, ["O", "B", "I"], rngs=nnx.Rngs(0))
>>> run(tag, np.ones((1, 6), int)).shape
(1, 6, 3)

Fine-tuning, from the folder of a checkpoint to predictions. Here the checkpoint is a tiny one that
is made first; ``pretrained.minilm()`` is the folder of a real one:

>>> import pathlib, tempfile
>>> import optax, tokenizers
>>> from attention_jax.models import classifier, pretrained
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> words = {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3, "film": 4}
>>> made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
>>> made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
>>> made.save(str(folder / "tokenizer.json"))
>>> post = Layers(features=8, num_layers=1, num_heads=2, order="post")
>>> bert = EncoderConfig(len(words), post, types=2, embedding_norm=True)
>>> pretrained.save(Encoder(bert, rngs=nnx.Rngs(0)), folder)

>>> tokenizer = pretrained.load_tokenizer(folder)
>>> encoder = pretrained.load(folder, config={"architectures": ["BertModel"]})
>>> model = classifier(encoder, ["negative", "positive"], pool="mean", rngs=nnx.Rngs(0))
>>> optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
>>> @nnx.jit
... def step(model, optimizer, batch, labels):
...     def loss(model):
...         logits = model(batch.tokens, real=batch.real, types=batch.types)
...         return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
...     value, gradient = nnx.value_and_grad(loss)(model)
...     optimizer.update(model, gradient)
...     return value
>>> texts, labels = ["a good film", "good", "bad film", "a bad one"], np.array([1, 1, 0, 0])
>>> batch = pretrained.pad(tokenizer(texts).rows)
>>> model.train()  # enables dropout
>>> losses = [float(step(model, optimizer, batch, labels)) for _ in range(20)]
>>> losses[-1] < losses[0] / 2
True
>>> model.eval()
>>> new = pretrained.pad(tokenizer(["a good one", "a bad film"]).rows)
>>> logits = model(new.tokens, real=new.real, types=new.types)
>>> [model.config.labels[i] for i in np.argmax(logits, axis=-1)]
['positive', 'negative']

An encoder-decoder, one that reads spectrograms of speech, and a vision transformer:

>>> plain = Layers(features=8, num_layers=1, num_heads=2)
>>> translate = EncoderDecoder(EncoderDecoderConfig(10, plain, plain), rngs=nnx.Rngs(0))
>>> source, start = np.array([[3, 1, 4]]), np.array([[1]])
>>> generate(translate, start, source=source, max_new_tokens=2).tokens.shape
(1, 2)
>>> speech = SpeechConfig(10, plain, plain, max_length=5, mels=80, frames=100)
>>> transcribe = SpeechTransformer(speech, rngs=nnx.Rngs(0))
>>> sound = np.zeros((1, 16_000), np.float32)  # a second
>>> generate(transcribe, start, source=log_mel(sound), max_new_tokens=2).tokens.shape
(1, 2)
>>> vision = VisionConfig(image=(4, 4), patch=2, channels=1, classes=3, layers=plain)
>>> classify = VisionTransformer(vision, rngs=nnx.Rngs(0))
>>> run(classify, np.ones((2, 4, 4, 1), np.float32)).shape
(2, 3)

``models.pretrained`` loads and saves checkpoints in Hugging Face's format, with their tokenizers;
``embed`` makes vectors of texts; ``resize_vocabulary`` and ``resize_image`` change the size of a
model; ``nn.low_rank`` fine-tunes any of these models with few parameters; ``models.sharding``
splits them over devices.
"""

from attention_jax.models import pretrained as pretrained
from attention_jax.models import sampling as sampling
from attention_jax.models import sharding as sharding
from attention_jax.models.beam_search import Beams as Beams
from attention_jax.models.beam_search import beam_search as beam_search
from attention_jax.models.decoder import Decoder as Decoder
from attention_jax.models.decoder import DecoderConfig as DecoderConfig
from attention_jax.models.dual_encoder import DualEncoder as DualEncoder
from attention_jax.models.dual_encoder import DualEncoderConfig as DualEncoderConfig
from attention_jax.models.dual_encoder import ImageTower as ImageTower
from attention_jax.models.dual_encoder import ImageTowerConfig as ImageTowerConfig
from attention_jax.models.dual_encoder import TextTower as TextTower
from attention_jax.models.dual_encoder import TextTowerConfig as TextTowerConfig
from attention_jax.models.encoder import Encoder as Encoder
from attention_jax.models.encoder import EncoderConfig as EncoderConfig
from attention_jax.models.encoder import Pooler as Pooler
from attention_jax.models.encoder_decoder import EncoderDecoder as EncoderDecoder
from attention_jax.models.encoder_decoder import EncoderDecoderConfig as EncoderDecoderConfig
from attention_jax.models.generation import Generated as Generated
from attention_jax.models.generation import generate as generate
from attention_jax.models.generation import stream as stream
from attention_jax.models.heads import Classifier as Classifier
from attention_jax.models.heads import ClassifierConfig as ClassifierConfig
from attention_jax.models.heads import Reader as Reader
from attention_jax.models.heads import ReaderConfig as ReaderConfig
from attention_jax.models.heads import SpanLogits as SpanLogits
from attention_jax.models.heads import Tagger as Tagger
from attention_jax.models.heads import TaggerConfig as TaggerConfig
from attention_jax.models.heads import classifier as classifier
from attention_jax.models.heads import label_ids as label_ids
from attention_jax.models.heads import reader as reader
from attention_jax.models.heads import tagger as tagger
from attention_jax.models.layers import Experts as Experts
from attention_jax.models.layers import Latent as Latent
from attention_jax.models.layers import Layers as Layers
from attention_jax.models.layers import Relative as Relative
from attention_jax.models.requests import Event as Event
from attention_jax.models.requests import Request as Request
from attention_jax.models.resize import resize_image as resize_image
from attention_jax.models.resize import resize_vocabulary as resize_vocabulary
from attention_jax.models.sampling import Sampling as Sampling
from attention_jax.models.sentences import Embedder as Embedder
from attention_jax.models.sentences import EmbedderConfig as EmbedderConfig
from attention_jax.models.sentences import embed as embed
from attention_jax.models.serving import Batch as Batch
from attention_jax.models.serving import serve as serve
from attention_jax.models.speculative import Speculated as Speculated
from attention_jax.models.speculative import speculate as speculate
from attention_jax.models.speech import SpeechConfig as SpeechConfig
from attention_jax.models.speech import SpeechTransformer as SpeechTransformer
from attention_jax.models.speech import log_mel as log_mel
from attention_jax.models.vision import VisionConfig as VisionConfig
from attention_jax.models.vision import VisionTransformer as VisionTransformer

__all__ = [
    "Batch",
    "Beams",
    "Classifier",
    "ClassifierConfig",
    "Decoder",
    "DecoderConfig",
    "DualEncoder",
    "DualEncoderConfig",
    "Embedder",
    "EmbedderConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "Event",
    "Experts",
    "Generated",
    "ImageTower",
    "ImageTowerConfig",
    "Latent",
    "Layers",
    "Pooler",
    "Reader",
    "ReaderConfig",
    "Relative",
    "Request",
    "Sampling",
    "SpanLogits",
    "Speculated",
    "SpeechConfig",
    "SpeechTransformer",
    "Tagger",
    "TaggerConfig",
    "TextTower",
    "TextTowerConfig",
    "VisionConfig",
    "VisionTransformer",
    "beam_search",
    "classifier",
    "embed",
    "generate",
    "label_ids",
    "log_mel",
    "pretrained",
    "reader",
    "resize_image",
    "resize_vocabulary",
    "sampling",
    "serve",
    "sharding",
    "speculate",
    "stream",
    "tagger",
]
