"""Models of another size: more tokens, other images."""

import numpy as np
import pytest
from flax import nnx
from helpers import slow

from attention_jax import models
from attention_jax.models.resize import bicubic
from attention_jax.nn import low_rank

LAYERS = models.Layers(features=8, num_layers=1, num_heads=2, dropout_rate=0.1)
TOKENS = np.array([[3, 1, 4]])
VISION = models.VisionConfig(image=(8, 8), patch=4, channels=1, classes=3, layers=LAYERS)


@pytest.fixture(scope="module", params=[True, slow(False)], ids=["tied", "untied"])
def decoder(request):
    config = models.DecoderConfig(10, LAYERS, tied=request.param)
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    model.eval()
    return model


def test_old_tokens_keep_their_logits_and_new_ones_have_the_mean(decoder):
    larger = models.resize_vocabulary(decoder, 12)
    old, new = decoder(TOKENS), larger(TOKENS)
    np.testing.assert_allclose(new[..., :10], old, atol=1e-6)
    np.testing.assert_allclose(new[..., 10:], old.mean(-1, keepdims=True).repeat(2, -1), atol=1e-5)
    assert larger.config.vocabulary == 12
    assert decoder.config.vocabulary == 10
    assert larger(np.array([[11]])).shape == (1, 1, 12)


def test_the_first_tokens_are_kept(decoder):
    smaller = models.resize_vocabulary(decoder, 5)
    np.testing.assert_allclose(smaller(TOKENS), decoder(TOKENS)[..., :5], atol=1e-6)


def test_other_parameters_are_shared_and_the_mode_is_kept(decoder):
    larger = models.resize_vocabulary(decoder, 12)
    np.testing.assert_array_equal(larger(TOKENS), larger(TOKENS))  # no dropout
    same = larger.stack.norm.scale.get_value()
    assert same is decoder.stack.norm.scale.get_value()


@pytest.mark.slow
def test_an_encoder_within_a_classifier():
    encoder = models.EncoderConfig(10, LAYERS, head="tokens", max_length=4)
    masked = models.resize_vocabulary(models.Encoder(encoder, rngs=nnx.Rngs(0)), 11)
    assert masked.token_bias.shape == (11,)
    config = models.ClassifierConfig(models.EncoderConfig(10, LAYERS, pool="mean"), ("a", "b"))
    model = models.resize_vocabulary(models.Classifier(config, rngs=nnx.Rngs(0)), 11)
    assert model.config.encoder.vocabulary == 11
    assert model(np.array([[10, 3]])).shape == (1, 2)


def test_wrong_models_and_sizes_raise(decoder):
    vision = models.VisionTransformer(VISION, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="model must have a vocabulary in its config"):
        models.resize_vocabulary(vision, 12)
    with pytest.raises(ValueError, match="vocabulary must be at least 1, got 0"):
        models.resize_vocabulary(decoder, 0)
    adapted = low_rank(decoder, rank=1, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"as its config describes it, but differs in .*lora_a"):
        models.resize_vocabulary(adapted, 12)
    with pytest.raises(TypeError, match="model must be a VisionTransformer, got Decoder"):
        models.resize_image(decoder, (8, 8))
    with pytest.raises(ValueError, match=r"patch must divide the image \(8, 10\), got 4"):
        models.resize_image(vision, (8, 10))


def test_positions_are_interpolated_and_the_class_token_keeps_its_own():
    model = models.VisionTransformer(VISION, rngs=nnx.Rngs(0))
    larger = models.resize_image(model, (12, 8))
    old, new = (x.positions.get_value() for x in (model, larger))
    assert new.shape == (1 + 3 * 2, 8)
    np.testing.assert_array_equal(new[0], old[0])
    grid = np.asarray(old[1:]).reshape(2, 2, 8)
    expected = np.tensordot(bicubic(2, 3), grid, 1).reshape(6, 8)
    np.testing.assert_allclose(new[1:], expected, atol=1e-6)
    assert larger(np.ones((1, 12, 8, 1), np.float32)).shape == (1, 3)


def test_bicubic_interpolation_keeps_constants_and_lines():
    matrix = bicubic(12, 20)
    np.testing.assert_allclose(matrix.sum(1), 1)
    line = matrix @ (np.arange(12) + 0.5)
    middle = slice(4, -4)  # the samples at the ends go on beyond them
    np.testing.assert_allclose(line[middle], ((np.arange(20) + 0.5) * 12 / 20)[middle], atol=0.05)
    np.testing.assert_array_equal(bicubic(5, 5), np.eye(5))


def test_interpolated_positions_equal_hugging_face(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    config = transformers.ViTConfig(
        **sizes, num_attention_heads=2, image_size=12, patch_size=4, num_channels=1, num_labels=3
    )
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = models.resize_image(models.pretrained.load(tmp_path), (20, 16))
    images = np.random.default_rng(0).normal(size=(2, 20, 16, 1)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(
            torch.tensor(images.transpose(0, 3, 1, 2)), interpolate_pos_encoding=True
        ).logits
    np.testing.assert_allclose(ours(images), expected.numpy(), atol=1e-5)
