"""Options of attention, language models and translation in the tasks."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import needs_files, slow

from experiments.datasets import text
from experiments.models import seq2seq
from experiments.models.inference import record_weights
from experiments.models.seq2seq import Seq2Seq, greedy
from experiments.tasks import (
    digits,
    load,
    multi30k,
    shakespeare,
)
from experiments.training import text_config
from experiments.training.losses import logits
from experiments.training.text_config import TextConfig

# --- Options of attention.


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["linear", "performer", "retention", "topk"])
def test_named_mechanisms_are_causal(attention):
    config = dataclasses.replace(shakespeare.PRESETS["smoke"], attention=attention)
    data = shakespeare.load(config)
    model = shakespeare.init(config, data, nnx.Rngs(0))
    model.eval()
    tokens = data.bytes[None, :16]
    other = tokens.copy()
    other[0, -1] += 1
    ours = logits(model, tokens)
    np.testing.assert_allclose(ours[:, :-1], logits(model, other)[:, :-1], atol=1e-6)
    plain = shakespeare.init(shakespeare.PRESETS["smoke"], data, nnx.Rngs(0))
    plain.eval()
    assert float(jnp.abs(ours - logits(plain, tokens)).max()) > 1e-4
    with pytest.raises(NotImplementedError, match=f"{attention}.* has no softmax weights"):
        shakespeare.look(config, model, data, None)


@pytest.mark.slow
def test_mechanisms_without_a_cache_can_be_sampled():
    config = dataclasses.replace(shakespeare.PRESETS["smoke"], attention="linear")
    data = shakespeare.load(config)
    model = shakespeare.init(config, data, nnx.Rngs(0))
    model.eval()
    assert shakespeare.sample(config, model, data, "scene", length=3).startswith("scene")


def test_mechanisms_are_rejected_by_tasks_that_need_weights_or_caches():
    for task in (digits, multi30k):
        with pytest.raises(ValueError, match="attention linear works for listops"):
            dataclasses.replace(task.PRESETS["smoke"], attention="linear")
    with pytest.raises(ValueError, match=r"attention must be one of .*linear.*got 'fast'"):
        TextConfig(attention="fast")


WORDS = np.array([[5, 6, 7, 8, 9, 5]], np.int32)


def classifier(**options):
    """One of ``trec``, in evaluation mode."""
    task = load("trec")
    config = dataclasses.replace(task.presets["smoke"], model="attention", window=1, **options)
    model = task.init(config, task.data(config), nnx.Rngs(0))
    model.eval()
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "positions"),
    [
        ("global", "sinusoidal"),
        ("window", "rotary"),
        ("window_prefix", "alibi"),
        ("chunked", "relative"),
        ("dilated", "learned"),
    ],
)
def test_masks_hide_keys_with_any_positions(mask, positions):
    _, weights = record_weights(classifier(mask=mask, positions=positions), WORDS)
    (layer,) = weights.values()
    i, j = np.arange(6)[:, None], np.arange(6)
    expected = {
        "global": np.ones((6, 6), bool),
        "window": abs(i - j) <= 1,
        "window_prefix": (abs(i - j) <= 1) | (j < 1),
        "chunked": i == j,
        "dilated": (i - j) % 2 == 0,
    }[mask]
    np.testing.assert_array_equal(np.asarray(layer[0, 0]) > 0, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "positions", ["none", "sinusoidal", "learned", "rotary", "alibi", "relative"]
)
def test_the_order_of_words_matters_with_positions(positions):
    both = np.concatenate([WORDS, WORDS[:, [1, 0, 2, 3, 4, 5]]])
    first, swapped = logits(classifier(positions=positions), both)
    assert (float(jnp.abs(first - swapped).max()) < 1e-5) == (positions == "none")


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["global", "window", "chunked"])
def test_flax_attention_matches_ours(mask):
    task = load("shakespeare")
    ours = dataclasses.replace(task.presets["smoke"], mask=mask, window=3)
    theirs = dataclasses.replace(ours, attention="flax")
    data = task.data(ours)
    tokens = data.bytes[None, :16]
    actual, expected = (logits(task.init(c, data, nnx.Rngs(0)), tokens) for c in (ours, theirs))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_flax_attention_rejects_unsupported_options():
    x = jnp.ones((1, 3, 1, 4))
    with pytest.raises(NotImplementedError, match="attention flax does not support scores"):
        text_config.flax_attention(x, x, x, scale=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads must divide width 128, got 3"),
        ({"window": 0}, "window must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"positions": "rotary", "width": 12, "heads": 4}, "even for rotary"),
    ],
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        TextConfig(**options)


# --- Characters.


def test_each_character_of_a_split_counts_once_for_any_context():
    config = shakespeare.PRESETS["smoke"]
    data = shakespeare.load(config)
    start, stop = data.splits["test"]

    class OneNat:
        def nats(self, tokens, targets):
            return np.ones(targets.shape)

    for context in (2, 16, 30):
        scores = shakespeare.evaluate(
            dataclasses.replace(config, context=context), OneNat(), data, "test"
        )
        assert scores["nats"] == pytest.approx(1.0)
        assert scores["bits"] == pytest.approx(1 / np.log(2))
    assert stop - start == len(data.bytes) // 10
    splits = sorted(data.splits.values())
    assert splits[0][0] == 0
    assert splits[-1][1] == len(data.bytes)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(splits))


def test_ngram_scores_match_those_of_one_character_at_a_time():
    config = dataclasses.replace(shakespeare.PRESETS["smoke"], model="ngram", order=3)
    data = shakespeare.load(config)
    model = shakespeare.init(config, data, nnx.Rngs(0))
    start, stop = data.splits["validation"]
    nats = [-model.logits(data.bytes[max(0, i - 8) : i])[data.bytes[i]] for i in range(start, stop)]
    scores = shakespeare.evaluate(config, model, data, "validation")
    assert scores["nats"] == pytest.approx(np.mean(nats), rel=1e-5)


def test_long_prompts_are_rejected():
    config = shakespeare.PRESETS["smoke"]
    with pytest.raises(ValueError, match="text has 17 bytes, the model reads 16"):
        shakespeare.prompt_of(config, "x" * 17)


@pytest.mark.parametrize("model", [slow("gru"), slow("gru_attention"), "transformer"])
def test_language_models_are_causal(model):
    config = dataclasses.replace(shakespeare.PRESETS["smoke"], model=model)
    data = shakespeare.load(config)
    lm = shakespeare.init(config, data, nnx.Rngs(0))
    lm.eval()
    tokens = data.bytes[None, :16]
    other = tokens.copy()
    other[0, -1] += 1
    first, second = (np.asarray(logits(lm, x)) for x in (tokens, other))
    np.testing.assert_allclose(first[:, :-1], second[:, :-1], atol=1e-6)
    assert np.abs(first[:, -1] - second[:, -1]).max() > 1e-4


# --- Translation.


@pytest.mark.slow
@pytest.mark.parametrize("attend", [False, True])
def test_greedy_picks_the_likeliest_token_and_ignores_padding(attend):
    model = Seq2Seq(12, 8, attend=attend, rngs=nnx.Rngs(0))
    source = np.array([[5, 6, 7, 0, 0], [8, 9, 10, 11, 5]], np.int32)
    tokens = np.asarray(greedy(model, source, start=2, stop=3, limit=6))
    whole = nnx.jit(lambda model, source, target: model(source, target))
    for row in range(2):
        alone = source[row : row + 1, : 3 if row == 0 else 5]
        target = [2]
        for t in range(6):
            prefix = np.array([target + [0] * (6 - len(target))], np.int32)  # the model is causal
            token = int(whole(model, alone, prefix)[0, t].argmax())
            assert tokens[row, t] == token
            if token == 3:
                break
            target.append(token)


@pytest.mark.slow
def test_additive_attention_weights_sum_to_1_over_the_source():
    model = Seq2Seq(12, 8, attend=True, rngs=nnx.Rngs(0))
    weights = model.weights(np.array([[5, 6, 7, 0]], np.int32), np.array([[2, 4, 4]], np.int32))
    assert weights.shape == (1, 3, 4)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert not weights[..., 3].any()


@pytest.mark.slow
def test_smoothed_loss_matches_smoothed_targets():
    import jax
    import optax

    config = dataclasses.replace(multi30k.PRESETS["smoke"], label_smoothing=0.1)
    data = multi30k.load(config)
    model = multi30k.init(config, data, nnx.Rngs(0))
    model.eval()
    batch = next(multi30k.batches(config, data, 0))
    targets = batch.target[:, 1:]

    @nnx.jit
    def both(model):
        loss = multi30k.loss(config, model, batch)
        logits = multi30k.logits_of(model, batch.source, batch.target[:, :-1])
        smooth = optax.smooth_labels(jax.nn.one_hot(targets, logits.shape[-1]), 0.1)
        return loss, optax.softmax_cross_entropy(logits, smooth)

    loss, each = both(model)
    assert float(loss.total) == pytest.approx(float(each[targets != 0].sum()), rel=1e-4)
    assert int(loss.number) == (targets != 0).sum()


def test_translations_are_in_the_order_of_the_sources(monkeypatch):
    config = multi30k.PRESETS["smoke"]
    data = multi30k.load(config)

    def copy(model, source, **_):
        return np.concatenate([source, np.full((len(source), 1), text.END)], axis=1)

    monkeypatch.setattr(seq2seq, "greedy", copy)
    model = Seq2Seq(data.subwords.get_vocab_size(), 8, attend=False, rngs=nnx.Rngs(0))
    rows = data.splits["train"].source_rows
    assert multi30k.translate(model, data, rows, size=10) == rows


@pytest.mark.slow
@needs_files
def test_translation_data_has_its_published_sizes_and_long_pairs_are_dropped(capsys):
    config = multi30k.PRESETS["cpu"]
    data = multi30k.load(config)
    assert len(data.splits["test"].sources) == 1000
    assert len(data.splits["validation"].sources) == 1014
    dropped = 29000 - len(data.splits["train"].sources)
    assert (
        f"{dropped} of 29000 training pairs have more than 40 subwords" in capsys.readouterr().out
    )
    assert dropped < 290
