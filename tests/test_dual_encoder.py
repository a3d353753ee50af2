"""Texts and images as comparable vectors: which token holds a text's vector, padding, bad input."""

import dataclasses

import checkpoints
import jax
import numpy as np
import pytest
from flax import nnx

from attention_jax import models

IMAGES = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype(np.float32)
END = 10


@pytest.fixture(scope="module")
def model():
    return checkpoints.make("clip")


@pytest.mark.slow
def test_the_vector_of_a_text_is_that_of_its_first_end(model):
    whole = model.texts(np.array([[3, 1, END, 4, END]]))
    assert np.allclose(np.linalg.norm(whole), 1, atol=1e-5)
    np.testing.assert_allclose(whole, model.texts(np.array([[3, 1, END]])), atol=1e-5)
    tokens = np.array([[7, END, 3, 1, END]])  # two tokens of padding, whatever they hold
    real = np.array([[False, False, True, True, True]])
    np.testing.assert_allclose(model.texts(tokens, real=real), whole, atol=1e-5)
    assert np.abs(model.texts(tokens) - whole).max() > 0.01


@pytest.mark.slow
def test_without_an_end_it_is_that_of_the_largest_token(model):
    old = models.DualEncoder(dataclasses.replace(model.config, end=None), rngs=nnx.Rngs(1))
    nnx.update(old, nnx.state(model))
    expected = model.texts(np.array([[3, 1, END]]))
    np.testing.assert_allclose(old.texts(np.array([[3, 1, END, 4]])), expected, atol=1e-5)
    assert old.texts(np.array([[3, 1, 4]])).shape == (1, 6)  # the last token is the largest


def test_logits_are_products_over_a_temperature(model):
    texts = np.array([[3, 1, END], [4, END, END], [END, 0, 0]])
    got = model(texts, IMAGES)
    expected = model.texts(texts) @ model.images(IMAGES).T / 0.07
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert got.shape == (3, 2)
    jitted = nnx.jit(lambda m, a, b: m(a, b))(model, texts, IMAGES)
    np.testing.assert_allclose(jitted, got, rtol=1e-4, atol=1e-4)
    assert isinstance(got, jax.Array)


def test_wrong_calls_and_configurations_raise(model):
    with pytest.raises(ValueError, match="tokens must hold end = 10 in each text"):
        model.texts(np.array([[3, END], [3, 1]]))
    found = nnx.jit(lambda m, x: m.texts(x))(model, np.array([[3, END], [3, 1]]))
    assert np.isnan(found).all(axis=1).tolist() == [False, True]
    with pytest.raises(ValueError, match="tokens must hold end = 10 in each text"):
        model.texts(np.array([[3, END]]), real=np.array([[True, False]]))
    config = model.config
    classes = dataclasses.replace(config.vision, classes=3)
    with pytest.raises(ValueError, match="vision must have no classes, got 3"):
        models.DualEncoderConfig(config.text, classes, 6)
    untied = dataclasses.replace(config.text, tied=False)
    with pytest.raises(ValueError, match="text must be tied"):
        models.DualEncoderConfig(untied, config.vision, 6)
    with pytest.raises(ValueError, match="features must be at least 1"):
        dataclasses.replace(config, features=0)
