"""Spectrograms, and generation from them, equal those of Hugging Face's Whisper."""

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

import peers  # noqa: E402

from attention_jax.models import beam_search, generate, log_mel, pretrained  # noqa: E402
from attention_jax.models.speech import wave_table  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

B, NEW, END = 4, 9, 2
SOURCE = np.random.default_rng(0).normal(size=(B, 18, 6)).astype(np.float32)
PROMPT = np.array([[1, 5]] * B)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    name, entries = peers.MODELS["whisper"]
    model = peers.peer(name, entries | {"init_std": 0.5})
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return model, pretrained.load(folder)


def theirs(model, **options):
    """Their search as for any model, without Whisper's own loop over a long recording."""
    with torch.no_grad():
        return transformers.GenerationMixin.generate(
            model,
            torch.tensor(SOURCE.transpose(0, 2, 1)),
            decoder_input_ids=torch.tensor(PROMPT),
            max_new_tokens=NEW,
            do_sample=False,
            **options,
        ).numpy()[:, PROMPT.shape[1] :]


def test_greedy_generation_equals_hugging_face(whisper):
    model, ours = whisper
    expected = theirs(model)
    got = generate(ours, PROMPT, source=SOURCE, max_new_tokens=NEW, stop=END)
    np.testing.assert_array_equal(got.tokens[:, : expected.shape[1]], expected)
    assert len({tuple(row) for row in expected}) > 1


def test_beams_equal_hugging_face(whisper):
    model, ours = whisper
    expected = theirs(model, num_beams=3)
    options = {"max_new_tokens": NEW, "stop": END, "beams": 3, "early_stopping": False}
    got = beam_search(ours, PROMPT, source=SOURCE, **options)
    np.testing.assert_array_equal(got.tokens[:, 0, : expected.shape[1]], expected)


def test_positions_equal_hugging_face():
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**peers.WHISPER, suppress_tokens=None)
    )
    table = model.model.encoder.embed_positions.weight.detach().numpy()
    np.testing.assert_allclose(wave_table(9, 24), table, atol=1e-6)


@pytest.mark.parametrize("mels", [80, 128])
def test_spectrograms_equal_hugging_face(mels):
    extract = transformers.WhisperFeatureExtractor(feature_size=mels)
    sound = np.random.default_rng(0).normal(size=(2, 30_000)).astype(np.float32)
    sound[1, 20_000:] = 0
    expected = extract(list(sound), sampling_rate=16_000, return_tensors="np").input_features
    got = log_mel(sound, mels=mels, length=480_000)
    np.testing.assert_allclose(got, expected.transpose(0, 2, 1), atol=1e-5)
