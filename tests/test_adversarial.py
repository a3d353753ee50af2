"""Adversarial training: the perturbation, and the gradient against the formula."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax.models import encoder
from attention_jax.nn import Embeddings, moved_embeddings
from experiments.models import sentences
from experiments.models.sentences import NormalizedEmbeddings
from experiments.tasks import load
from experiments.training import adversarial
from experiments.training.config import TrainConfig
from experiments.training.steps import trainer
from experiments.training.task import ALL, Loss
from experiments.training.train import train


class Bag(nnx.Module):
    """Classifies the sum of two embedding look-ups of every word."""

    def __init__(self, rngs):
        init = nnx.initializers.normal(1.0)
        self.embed = Embeddings(11, 5, embedding_init=init, rngs=rngs)
        self.classify = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, words):
        real = (words != 0)[..., None]
        once, twice = self.embed(words), jnp.tanh(self.embed(words))
        return self.classify(jnp.where(real, once + twice, 0).sum(1))


WORDS = np.array([[1, 2, 3, 0], [4, 4, 0, 0], [5, 6, 7, 8]], np.int32)
LABELS = np.array([0, 2, 1], np.int32)


def loss(config, model, batch):
    words, labels = batch
    log_p = jax.nn.log_softmax(model(words))
    each = -jnp.take_along_axis(log_p, labels[:, None], axis=1)
    return Loss(each.sum(), jnp.float32(each.size))


def by_hand(model, epsilon):
    """The loss at ``x + r``, and ``r``, from one gradient per example and look-up."""
    total = np.float32(0)
    perturbations = []
    for words, label in zip(WORDS, LABELS, strict=True):
        table = np.asarray(model.embed.tokens[...])
        x = table[words]

        def loss_at(first, second, words=words, label=label):
            real = (words != 0)[:, None]
            logits = model.classify(jnp.where(real, first + jnp.tanh(second), 0).sum(0))
            return -jax.nn.log_softmax(logits)[label]

        g = [np.asarray(a, np.float64) for a in jax.grad(loss_at, argnums=(0, 1))(x, x)]
        size = np.sqrt(sum((a**2).sum() for a in g))
        norm = np.sqrt(2 * (x[words != 0].astype(np.float64) ** 2).sum())
        r = [epsilon * norm * a / size for a in g]
        perturbations.append(r)
        total += float(loss_at(x + r[0].astype(np.float32), x + r[1].astype(np.float32)))
    return total, perturbations


@pytest.mark.slow
def test_gradient_is_that_of_clean_and_adversarial_loss_with_r_held_constant():
    model = Bag(nnx.Rngs(0))
    graph, parameters = nnx.split(model, nnx.Param)
    worse, perturbations = by_hand(model, 0.3)

    def total(parameters, perturb):
        found = loss(None, moved_embeddings(nnx.merge(graph, parameters), perturb), (WORDS, LABELS))
        return found.total, found.number

    value, count, gradient = jax.jit(lambda p: adversarial.value_and_grad(total, p, 0.3))(
        parameters
    )
    clean = loss(None, model, (WORDS, LABELS)).total
    np.testing.assert_allclose(value, clean, rtol=1e-6)
    assert count == 3
    assert worse > clean  # a step along the gradient of a convex loss
    rs = [np.stack([r[i] for r in perturbations]).astype(np.float32) for i in range(2)]

    def both(parameters):
        remaining = iter(rs)
        return (
            total(parameters, lambda x: x)[0] + total(parameters, lambda x: x + next(remaining))[0]
        )

    exact, expected = jax.jit(jax.value_and_grad(both))(parameters)
    np.testing.assert_allclose(exact, clean + worse, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected
    )


def test_perturbation_has_the_norm_epsilon_x_and_is_zero_without_a_gradient():
    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=(3, 4, 5)).astype(np.float32) for _ in range(2)]
    gradients = [rng.normal(size=(3, 4, 5)).astype(np.float32) for _ in range(2)]
    for g in gradients:
        g[0, 2:] = 0  # padding
        g[1] = 0
    rs = adversarial.perturbations(vectors, gradients, 0.1)
    length = np.sqrt(sum(np.square(r).sum((1, 2)) for r in rs))
    expected = np.sqrt(
        sum(
            np.square(np.where(g != 0, x, 0)).sum((1, 2))
            for g, x in zip(gradients, vectors, strict=True)
        )
    )
    np.testing.assert_allclose(length, 0.1 * expected, rtol=1e-5)
    assert not rs[0][1].any()
    assert not rs[0][0, 2:].any()


def test_model_without_embeddings_raises():
    with pytest.raises(ValueError, match="model must hold Embeddings"):
        moved_embeddings(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), lambda x: x)


@pytest.mark.slow
def test_infinitesimal_perturbation_doubles_the_gradient():
    """With microbatches and dropout: both passes see the same random numbers."""
    task = load("trec")
    config = dataclasses.replace(
        task.presets["smoke"], model="text_cnn", accumulate=2, clip=1e9, adversarial=1e-30
    )
    data = task.data(config)
    batch = next(task.batches(config, data, 0))

    def after(config):
        training = trainer(task.loss, config, task.init(config, data, nnx.Rngs(0)))
        state = training.put(training.initial)
        _, value, count, norm = training.update(state, batch, 0)
        return float(value), float(count), float(norm)

    value, count, norm = after(config)
    plain = after(dataclasses.replace(config, adversarial=0.0))
    assert (value, count) == pytest.approx(plain[:2], rel=1e-5)
    assert norm == pytest.approx(2 * plain[2], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("trec", "text_cnn"),
        ("ner", "gru"),
        ("multi30k", "gru_attention"),
        ("multi30k", "transformer"),
        ("shakespeare", "gru"),
        ("listops", "transformer"),
        ("vqa", "cross"),
        ("summarise", "transformer"),
        ("qa", "transformer"),
    ],
)
def test_text_task_trains_adversarially(name, model):
    task = load(name)
    config = dataclasses.replace(task.presets["smoke"], model=model, adversarial=0.1)
    data = task.data(config)
    training = trainer(task.loss, config, task.init(config, data, nnx.Rngs(0)))
    batch = next(task.batches(config, data, 0, ALL))
    _, loss, _, norm = training.update(training.put(training.initial), batch, 0)
    assert np.isfinite(loss)
    assert 0 < norm < np.inf


# --- Classification, with normalized embeddings.

FREQUENCIES = np.array([0, 0, 0.1, 0.5, 0.4])


def test_normalized_embeddings_have_mean_0_and_variance_1_over_the_words_of_the_data():
    options = {"embedding_init": nnx.initializers.normal(1.0), "rngs": nnx.Rngs(0)}
    embed = NormalizedEmbeddings(5, 7, frequencies=FREQUENCIES, **options)
    table = np.asarray(embed.tokens[...], np.float64)
    vectors = np.asarray(embed(np.arange(5)[None])[0], np.float64)
    np.testing.assert_allclose(FREQUENCIES @ vectors, 0, atol=1e-6)
    np.testing.assert_allclose(FREQUENCIES @ vectors**2, 1, rtol=1e-4)
    mean = FREQUENCIES @ table
    expected = (table - mean) / np.sqrt(FREQUENCIES @ (table - mean) ** 2)
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)
    larger = nnx.merge(*nnx.split(embed))
    larger.tokens[...] = 10 * embed.tokens[...] + 3
    np.testing.assert_allclose(larger(np.arange(5)[None])[0], vectors, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["text_cnn", "attention_cnn"])
def test_classifier_trains_on_its_loss_and_that_of_its_perturbed_embeddings(model):
    task, epsilon = load({"text_cnn": "trec", "attention_cnn": "sst2"}[model]), 0.3
    config = task.configured(
        "smoke", model=model, normalize_embeddings=True, adversarial=epsilon, clip=1e9
    )
    data = task.data(config)
    batch = next(task.batches(config, data, 0, ALL))
    module = task.init(config, data, nnx.Rngs(0))
    module.eval()  # without dropout
    graph, parameters, rest = nnx.split(module, nnx.Param, ...)

    def total(parameters, perturb):
        found = task.loss(
            config, moved_embeddings(nnx.merge(graph, parameters, rest), perturb), batch
        )
        return found.total, found.number

    _, _, gradient = jax.jit(lambda p: adversarial.value_and_grad(total, p, epsilon))(parameters)

    def at(parameters, perturbations):  # the loss, with one perturbation for each look-up
        remaining = iter(perturbations)
        return total(parameters, lambda x: x + next(remaining, 0))[0]

    @jax.jit
    def vectors(parameters):
        found = []
        total(parameters, lambda x: found.append(x) or x)
        return found

    found = vectors(parameters)
    assert len(found) == {"text_cnn": 1, "attention_cnn": 2}[model]
    zeros = [jnp.zeros_like(x) for x in found]
    g = [np.asarray(x, np.float64) for x in jax.jit(jax.grad(at, argnums=1))(parameters, zeros)]
    real = np.asarray(batch.words != 0)[..., None]
    rs = []
    for i in range(len(batch.words)):  # the formula, for one sentence
        x = np.stack([np.asarray(one[i], np.float64) * real[i] for one in found])
        size = epsilon * np.linalg.norm(x) / np.linalg.norm([one[i] for one in g])
        rs.append([size * one[i] for one in g])
    worst = [jnp.asarray([r[n] for r in rs], jnp.float32) for n in range(len(found))]

    def by_losses(parameters):
        (clean, g), (worse, h) = (jax.value_and_grad(at)(parameters, r) for r in (zeros, worst))
        return clean, worse, jax.tree.map(jnp.add, g, h)

    clean, worse, expected = jax.jit(by_losses)(parameters)
    assert worse > clean
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), gradient, expected
    )


@pytest.mark.slow
def test_classifier_trains_with_normalized_embeddings(tmp_path):
    task = load("trec")
    config = task.configured(
        "smoke", model="attention", normalize_embeddings=True, adversarial=0.3, steps=2
    )
    found = train(task, config, task.data(config), tmp_path)
    assert found.progress.step == 2


@pytest.mark.parametrize("normalize", [False, True])
def test_embeddings_are_built_once(monkeypatch, normalize):
    built = []

    class Counted(sentences.NormalizedEmbeddings if normalize else Embeddings):
        def __init__(self, *arguments, **options):
            built.append(arguments)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(encoder, "Embeddings", Counted)
    monkeypatch.setattr(sentences, "NormalizedEmbeddings", Counted)
    config = load("trec").configured("smoke", model="attention", normalize_embeddings=normalize)
    model = load("trec").init(config, load("trec").data(config), nnx.Rngs(0))
    assert len(built) == 1
    assert type(model.encoder.embed) is Counted


@pytest.mark.parametrize("model", ["naive_bayes", "pretrained"])
def test_model_without_embeddings_of_its_own_cannot_normalize_them(model):
    with pytest.raises(ValueError, match=f"normalize_embeddings needs a model .* model {model}"):
        load("trec").configured("smoke", model=model, normalize_embeddings=True)


def test_negative_size_raises():
    with pytest.raises(ValueError, match="adversarial must be at least 0, got -1"):
        TrainConfig(adversarial=-1)
