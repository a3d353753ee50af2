"""Spectrograms of speech and the transformer that reads them: padding, generation, bad input."""

import dataclasses

import checkpoints
import jax
import numpy as np
import pytest
from flax import nnx

from attention_jax import models
from attention_jax.models import pretrained
from attention_jax.models.speech import mel_filters, wave_table

RNG = np.random.default_rng(0)
SOURCE = RNG.normal(size=(2, 7, 3)).astype(np.float32)
TARGET = np.array([[1, 5], [1, 9]])
REAL = np.arange(7) < np.array([[7], [5]])


@pytest.fixture(scope="module")
def model():
    return checkpoints.make("whisper")


def run(model, *inputs, **options):
    return np.asarray(nnx.jit(lambda m, *x, **y: m(*x, **y))(model, *inputs, **options))


def test_a_row_with_padding_equals_the_row_alone(model):
    planted = np.where(REAL[..., None], SOURCE, np.nan)
    got = run(model, planted, TARGET, source_real=REAL)
    np.testing.assert_allclose(got[0], run(model, SOURCE[0], TARGET[0]), atol=1e-5)
    np.testing.assert_allclose(got[1], run(model, SOURCE[1, :5], TARGET[1]), atol=1e-5)
    assert np.abs(got[1] - run(model, SOURCE[1], TARGET[1])).max() > 1e-3


def test_generation_reads_spectrograms_with_padding(model):
    start = TARGET[:, :1]
    options = {"max_new_tokens": 4, "source": SOURCE, "source_real": REAL}
    tokens = np.asarray(models.generate(model, start, **options).tokens)
    alone = models.generate(model, start[1:], max_new_tokens=4, source=SOURCE[1:, :5]).tokens
    np.testing.assert_array_equal(tokens[1:], alone)
    logits = run(model, SOURCE, np.concatenate([start, tokens], axis=1), source_real=REAL)
    np.testing.assert_array_equal(tokens, logits[:, :-1].argmax(-1))
    best = models.beam_search(model, start, beams=1, **options)
    np.testing.assert_array_equal(best.tokens[:, 0], tokens)


def test_optimizers_leave_the_positions_of_the_source_alone(model):
    table = np.asarray(model.positions[...])
    np.testing.assert_allclose(table, wave_table(4, 8), atol=1e-6)
    assert np.allclose(table[3, [1, 2]], [np.sin(3 * 1e4 ** (-1 / 3)), np.sin(3 * 1e4 ** (-2 / 3))])
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    assert ("positions",) not in paths
    assert ("embed", "positions") in paths


def test_dropout_of_the_source_is_that_of_its_embeddings_only(model):
    config = dataclasses.replace(model.config, dropout_rate=0.5)
    made = models.SpeechTransformer(config, rngs=nnx.Rngs(0))
    memory = made.encode(SOURCE)
    made.eval()
    assert np.abs(memory.contexts[0].key - made.encode(SOURCE).contexts[0].key).max() > 1e-3
    rates = [(path, m.rate) for path, m in nnx.iter_modules(made) if isinstance(m, nnx.Dropout)]
    assert sorted(path for path, rate in rates if rate) == [
        ("embed", "dropout"),
        ("source_dropout",),
    ]


@pytest.mark.slow
def test_quantized_and_in_half_precision(model, tmp_path):
    pretrained.save(model, tmp_path)
    expected = run(model, SOURCE, TARGET)
    small = pretrained.load(tmp_path, quantize="int8")
    assert np.abs(run(small, SOURCE, TARGET) - expected).max() < 0.05
    half = pretrained.load(tmp_path, param_dtype=jax.numpy.float16)
    assert half.positions.dtype == np.float16
    np.testing.assert_allclose(run(half, SOURCE, TARGET), expected, atol=0.02)


WRONG = [
    (SOURCE[..., :2], None, ValueError, r"source must have shape \[\*B S M\] with M = 3"),
    (np.ones((2, 9, 3), np.float32), None, ValueError, "source must have 1 to 8 frames"),
    (SOURCE[:, :0], None, ValueError, "source must have 1 to 8 frames .* got 0"),
    (SOURCE.astype(int), None, TypeError, "source must have a floating dtype, got int"),
    (SOURCE, REAL[:, ::-1], ValueError, "source_real must be True for the first frames of a row"),
    (SOURCE, REAL[:1], ValueError, r"source_real must be bool of the frames' shape \(2, 7\)"),
]


@pytest.mark.parametrize(("source", "real", "error", "message"), WRONG)
def test_wrong_spectrograms_raise(source, real, error, message, model):
    with pytest.raises(error, match=message):
        model(source, TARGET, source_real=real)
    with pytest.raises(error, match=message):
        models.generate(model, TARGET, max_new_tokens=2, source=source, source_real=real)


def test_wrong_configurations_and_prompts_raise(model):
    config = model.config
    with pytest.raises(ValueError, match="frames must be even: the encoder halves them, got 7"):
        dataclasses.replace(config, frames=7)
    with pytest.raises(ValueError, match="mels must be at least 1"):
        dataclasses.replace(config, mels=0)
    odd = models.Layers(features=3, num_layers=1, num_heads=1)
    with pytest.raises(ValueError, match="encoder must have an even width of at least 4"):
        models.SpeechConfig(10, odd, odd)
    with pytest.raises(ValueError, match="source must have 1 rows, as the prompt"):
        models.generate(model, TARGET[:1], max_new_tokens=2, source=SOURCE)
    with pytest.raises(ValueError, match=r"source must have shape \[B S M\]"):
        models.generate(model, TARGET[:1], max_new_tokens=2, source=SOURCE[0])


# --- Spectrograms.


def test_a_spectrogram_is_that_of_its_formula():
    """Frame by frame, in float64."""
    sound = RNG.normal(size=1000)
    window, hop, mels = 64, 40, 10
    padded = np.pad(sound, window // 2, mode="reflect")
    hann = np.hanning(window + 1)[:-1]
    filters = mel_filters(mels, 16_000, window)
    rows = []
    for t in range(1000 // hop):
        frame = padded[t * hop : t * hop + window] * hann
        n = np.arange(window)
        bins = np.arange(window // 2 + 1)[:, None]
        power = np.abs((frame * np.exp(-2j * np.pi * bins * n / window)).sum(-1)) ** 2
        rows.append(np.log10(np.maximum(power @ filters, 1e-10)))
    x = np.stack(rows)
    expected = np.maximum(x, x.max() - 8) / 4 + 1
    got = models.log_mel(sound.astype(np.float32), mels=mels, window=window, hop=hop)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_silence_is_8_below_the_loudest_band_of_its_row():
    tone = np.sin(np.arange(4000)).astype(np.float32)
    both = np.stack([tone, 0.1 * tone])
    x = np.asarray(models.log_mel(both, length=8000))
    assert x.shape == (2, 50, 80)
    assert np.allclose(x.max(axis=(1, 2)) - x.min(axis=(1, 2)), 2, atol=1e-5)
    for row, sound in zip(x, both, strict=True):
        np.testing.assert_allclose(row, models.log_mel(sound, length=8000), atol=1e-5)
    np.testing.assert_array_equal(models.log_mel(np.zeros(800, np.float32)), np.float32(-1.5))


def test_waveforms_are_cut_and_checked():
    sound = RNG.normal(size=2000).astype(np.float32)
    np.testing.assert_allclose(
        models.log_mel(sound, length=1600), models.log_mel(sound[:1600]), atol=1e-6
    )
    assert models.log_mel(sound.astype(np.float16)).dtype == np.float32
    with pytest.raises(ValueError, match="waveform must have at least 201 samples, got 200"):
        models.log_mel(sound[:200])
    with pytest.raises(ValueError, match="hop must be at least 1, got 0"):
        models.log_mel(sound, hop=0)
