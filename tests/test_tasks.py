"""The tasks of images, sentences, characters and translation: data, models, scores, figures."""

import dataclasses
import itertools
import os

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import slow

from attention_jax.nn import record_weights
from experiments.datasets import files, text
from experiments.models import sentences, seq2seq
from experiments.models.seq2seq import Seq2Seq, greedy
from experiments.tasks import (
    classification,
    digits,
    fashion,
    images,
    load,
    multi30k,
    relations,
    shakespeare,
)
from experiments.training import text_config
from experiments.training.text_config import TextConfig

needs_files = pytest.mark.skipif(
    files.VARIABLE not in os.environ, reason=f"{files.VARIABLE} names no folder of data sets"
)

# --- Images.


@pytest.fixture(scope="module")
def digit_data():
    return digits.read()


def test_splits_are_disjoint_stratified_and_fixed(digit_data):
    assert {name: len(split.labels) for name, split in digit_data.items()} == {
        "train": 1257,
        "validation": 180,
        "test": 360,
    }
    for split in digit_data.values():
        assert split.images.dtype == np.float32
        assert split.images.min() == 0
        assert split.images.max() == 1
        share = np.bincount(split.labels, minlength=10) / len(split.labels)
        np.testing.assert_allclose(share, 0.1, atol=0.01)
    union = np.concatenate([split.images for split in digit_data.values()])
    assert len(np.unique(union, axis=0)) == 1797  # no image twice
    np.testing.assert_array_equal(digits.read()["test"].images, digit_data["test"].images)


def test_shifted_moves_images_by_whole_pixels():
    rng = np.random.default_rng(0)
    before = rng.uniform(size=(50, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(images.shifted(before, 0, rng), before)
    shifts = set()
    for image, after in zip(before, images.shifted(before, 1, rng), strict=True):
        padded = np.pad(image, 1)
        windows = {(i, j): padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)}
        matches = [shift for shift, w in windows.items() if np.array_equal(w, after)]
        assert len(matches) == 1
        shifts.update(matches)
    assert len(shifts) == 9


def test_image_batches_are_resumable_from_any_step(digit_data):
    config = digits.PRESETS["cpu"]
    whole, part = images.batches(config, digit_data, 0), images.batches(config, digit_data, 2)
    first, _, third = next(whole), next(whole), next(whole)
    np.testing.assert_array_equal(third.images, next(part).images)
    assert first.images.shape == (64, 8, 8)


@pytest.mark.slow
def test_class_token_attention_is_that_of_the_last_layer(digit_data):
    config = dataclasses.replace(digits.PRESETS["smoke"], width=16, heads=2, depth=2)
    model = images.init(config, digit_data, nnx.Rngs(0))
    model.eval()
    batch = digit_data["test"].images[:5]
    weights = images.class_token_attention(model, batch)
    assert weights.shape == (5, 2, 17)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
    _, recorded = record_weights(model, batch)
    np.testing.assert_array_equal(
        weights, recorded["transformer.stack.blocks.1.attention.sublayer"][:, :, 0]
    )


@pytest.mark.slow
def test_the_attention_figure_is_not_blank(digit_data, tmp_path):
    from matplotlib.image import imread

    config = digits.PRESETS["smoke"]
    model = images.init(config, digit_data, nnx.Rngs(0))
    (file,) = images.pictures(tuple("0123456789"), config, model, digit_data, tmp_path)
    pixels = imread(file)
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 50


@pytest.mark.slow
def test_look_shows_any_test_image(digit_data):
    config = digits.PRESETS["smoke"]
    model = images.init(config, digit_data, nnx.Rngs(0))
    model.eval()
    (view,) = digits.TASK.look(config, model, digit_data, "7")
    patches = (8 // config.patch) ** 2
    assert list(view.queries[:3]) == ["class", "0,0", "0,1"]
    assert view.weights.shape == (config.depth, config.heads, 1 + patches, 1 + patches)
    assert view.note.startswith(f"Test image 7: {digit_data['test'].labels[7]}, predicted ")
    for wrong in ("360", "-1", "a cat"):
        with pytest.raises(ValueError, match="must be the index of a test image, 0 to 359"):
            digits.TASK.look(config, model, digit_data, wrong)
    with pytest.raises(ValueError, match="model cnn has no attention"):
        digits.TASK.look(dataclasses.replace(config, model="cnn"), None, digit_data, None)


def test_reads_idx_files(tmp_path, monkeypatch):
    import gzip

    raw = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes(range(6))
    (tmp_path / "x.gz").write_bytes(gzip.compress(raw))
    monkeypatch.setattr(fashion, "path", lambda name: tmp_path / name)
    assert fashion.idx("x.gz").tolist() == [[0, 1, 2], [3, 4, 5]]
    (tmp_path / "y.gz").write_bytes(gzip.compress(b"text"))
    with pytest.raises(ValueError, match=r"y\.gz must be an IDX file"):
        fashion.idx("y.gz")


# --- Sentences.


@needs_files
@pytest.mark.parametrize(
    ("name", "sizes"), [("trec", (4907, 545, 500)), ("sst2", (6920, 872, 1821))]
)
def test_sentence_data_has_its_published_sizes(name, sizes):
    task = load(name)
    config = task.presets["cpu"]
    data = task.data(config)
    assert tuple(len(data.splits[x].labels) for x in ("train", "validation", "test")) == sizes
    for split in data.splits.values():
        assert set(split.labels) == set(range(len(data.classes)))


def test_naive_bayes_matches_its_formula():
    rows, labels = [[4, 5], [4, 6], [7, 5, 5]], np.array([0, 0, 1])
    model = sentences.NaiveBayes(rows, labels)
    # Words and bigrams in training: 4, 5, 6, 7, "4 5", "4 6", "7 5", "5 5".
    counts = {
        0: {"4": 2, "5": 1, "6": 1, "4 5": 1, "4 6": 1},
        1: {"7": 1, "5": 2, "7 5": 1, "5 5": 1},
    }
    scores = []
    for label, prior in ((0, 2 / 3), (1, 1 / 3)):
        total = sum(counts[label].values())
        p = [(counts[label].get(x, 0) + 1) / (total + 8) for x in ("4", "5", "4 5")]
        scores.append(prior * np.prod(p))
    expected = np.log(np.array(scores) / sum(scores))
    np.testing.assert_allclose(model(np.array([[4, 5, 0, 0]]))[0], expected, rtol=1e-5)
    unknown = model(np.array([[text.UNKNOWN, 99]]))[0]  # ignored: the prior
    np.testing.assert_allclose(np.exp(unknown), [2 / 3, 1 / 3], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["text_cnn", "attention", "attention_cnn"])
def test_padding_and_the_batch_do_not_change_predictions(model):
    task = load("trec")
    config = dataclasses.replace(task.presets["smoke"], model=model)
    data = task.data(config)
    classifier = task.init(config, data, nnx.Rngs(0))
    classifier.eval()
    row = data.splits["test"].rows[0]
    alone = classifier(np.array([row], np.int32))
    batched = classifier(text.padded([row, [5, 6, 7] * 9], length=32))
    np.testing.assert_allclose(alone[0], batched[0], rtol=1e-4, atol=1e-5)


def test_each_sentence_is_scored_once():
    task = load("sst2")
    config = task.presets["smoke"]
    data = task.data(config)
    scored = []

    def model(words):
        real = [tuple(x for x in row if x) for row in np.asarray(words).tolist()]
        scored.extend(row for row in real if row)
        return np.tile([1.0, 0.0], (len(words), 1))

    scores = classification.evaluate(config, model, data, "test")
    split = data.splits["test"]
    assert sorted(scored) == sorted(map(tuple, split.rows))
    assert scores["accuracy"] == pytest.approx(np.mean(split.labels == 0))


# --- Relations.


def test_parses_marked_nouns_and_relations():
    content = (
        '1\t"The <e1>fire</e1>, so they say, was no <e2>spark</e2>."\r\n'
        "Cause-Effect(e2,e1)\r\nComment: none\r\n\r\n"
        '2\t"A <e1>b</e1> <e2>c</e2>"\r\nOther\r\nComment:\r\n'
    )
    labelled = relations.parse(content)
    assert labelled.texts == [
        "the <e1> fire </e1> , so they say , was no <e2> spark </e2> .",
        "a <e1> b </e1> <e2> c </e2>",
    ]
    assert [relations.CLASSES[i] for i in labelled.labels] == ["Cause-Effect(e2,e1)", "Other"]


def test_macro_f1_needs_the_direction_and_leaves_other_out():
    cause, back, topic = "Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", "Message-Topic(e1,e2)"
    names = [cause, cause, cause, topic, "Other", "Other"]
    guessed = [cause, back, "Other", topic, cause, "Other"]
    labels, guesses = (
        np.array([relations.CLASSES.index(x) for x in column]) for column in (names, guessed)
    )
    # Cause-Effect: 1 right of 3 predicted and 3 actual; Message-Topic: all; the other seven: none.
    assert relations.macro_f1(guesses, labels) == pytest.approx((1 / 3 + 1) / 9)


@needs_files
def test_relations_have_their_published_sizes():
    data = relations.read()
    assert {name: len(split.labels) for name, split in data.items()} == {
        "train": 7200,
        "validation": 800,
        "test": 2717,
    }
    for split in data.values():
        assert all(mark in t for t in split.texts for mark in ("<e1>", "</e1>", "<e2>", "</e2>"))


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
    np.testing.assert_allclose(model(tokens)[:, :-1], model(other)[:, :-1], atol=1e-6)
    plain = shakespeare.init(shakespeare.PRESETS["smoke"], data, nnx.Rngs(0))
    assert float(jnp.abs(model(tokens) - plain(tokens)).max()) > 1e-4
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


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["global", "window", "window_prefix", "chunked", "dilated"])
@pytest.mark.parametrize(
    "positions", ["none", "sinusoidal", "learned", "rotary", "alibi", "relative"]
)
def test_masks_and_positions_have_their_effect(mask, positions):
    config = dataclasses.replace(
        load("trec").presets["smoke"], model="attention", mask=mask, positions=positions, window=1
    )
    data = load("trec").data(config)
    model = load("trec").init(config, data, nnx.Rngs(0))
    model.eval()
    words = np.array([[5, 6, 7, 8, 9, 5]], np.int32)
    _, weights = record_weights(model, words)
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
    swapped = words[:, [1, 0, 2, 3, 4, 5]]
    moved = float(jnp.abs(model(words) - model(swapped)).max())
    if mask == "global":
        assert (moved < 1e-5) == (positions == "none")


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["global", "window", "chunked"])
def test_flax_attention_matches_ours(mask):
    task = load("shakespeare")
    ours = dataclasses.replace(task.presets["smoke"], mask=mask, window=3)
    theirs = dataclasses.replace(ours, attention="flax")
    data = task.data(ours)
    tokens = data.bytes[None, :16]
    actual, expected = (task.init(c, data, nnx.Rngs(0))(tokens) for c in (ours, theirs))
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


@pytest.mark.parametrize("model", [slow("gru"), "gru_attention", "transformer"])
def test_language_models_are_causal(model):
    config = dataclasses.replace(shakespeare.PRESETS["smoke"], model=model)
    data = shakespeare.load(config)
    lm = shakespeare.init(config, data, nnx.Rngs(0))
    lm.eval()
    tokens = data.bytes[None, :16]
    other = tokens.copy()
    other[0, -1] += 1
    np.testing.assert_allclose(lm(tokens)[:, :-1], lm(other)[:, :-1], atol=1e-6)
    assert np.abs(lm(tokens)[:, -1] - lm(other)[:, -1]).max() > 1e-4


# --- Translation.


@pytest.mark.slow
@pytest.mark.parametrize("attend", [False, True])
def test_greedy_picks_the_likeliest_token_and_ignores_padding(attend):
    model = Seq2Seq(12, 8, attend=attend, rngs=nnx.Rngs(0))
    source = np.array([[5, 6, 7, 0, 0], [8, 9, 10, 11, 5]], np.int32)
    tokens = np.asarray(greedy(model, source, start=2, stop=3, limit=6))
    for row in range(2):
        alone = source[row : row + 1, : 3 if row == 0 else 5]
        target = [2]
        for t in range(6):
            token = int(model(alone, np.array([target]))[0, -1].argmax())
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
    loss = multi30k.loss(config, model, batch)
    logits = multi30k.logits_of(model, batch.source, batch.target[:, :-1])
    targets = batch.target[:, 1:]
    smooth = optax.smooth_labels(jax.nn.one_hot(targets, logits.shape[-1]), 0.1)
    each = optax.softmax_cross_entropy(logits, smooth)
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
