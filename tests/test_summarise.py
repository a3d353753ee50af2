"""Summaries: ROUGE, the data, the copy mechanism and the task."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import needs_files

from attention_jax.models import EncoderDecoder, EncoderDecoderConfig, Layers, generate
from attention_jax.models.encoder_decoder import Memory
from experiments.datasets.text import END, PAD, START, UNKNOWN, Words
from experiments.tasks import summarise
from experiments.tasks.summarise import data as summarise_data
from experiments.tasks.summarise import rouge
from experiments.tasks.summarise.copier import Copier
from experiments.tasks.summarise.data import load
from experiments.tasks.summarise.extractive import BestSentence, Lead

SMOKE = summarise.PRESETS["smoke"]

# --- The score.

TEXTS = [
    "The cat sat on the mat.",
    "the the the cat",
    "A dog's 3-2 win, U.S. says",
    "mat the on sat cat the",
    "",
    "...",
    "one",
]


@pytest.mark.parametrize("reference", TEXTS)
@pytest.mark.parametrize("generated", TEXTS)
def test_rouge_matches_rouge_score(reference, generated):
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    names = ["rouge1", "rouge2", "rougeL"]
    theirs = scorer.RougeScorer(names, use_stemmer=False).score(reference, generated)
    np.testing.assert_allclose(
        rouge.rouge(reference, generated), [theirs[name].fmeasure for name in names], atol=1e-12
    )


def test_rouge_computed_by_hand_and_with_several_references():
    # Common words: the, cat, on. Common bigrams: the cat. Common subsequence: the cat on.
    assert rouge.rouge("the cat sat on the mat", "the cat lay on it") == pytest.approx(
        (2 * 3 / 11, 2 * 1 / 9, 2 * 3 / 11)
    )
    assert rouge.mean([["a b", "c d"], ["e"]], ["c d", "f"]) == (0.5, 0.5, 0.5)
    assert rouge.rouge("a", "a") == (1, 0, 1)


# --- The data.


def test_clean_removes_remnants_of_html():
    raw = r"Yahoo #39;s price is  #36;50\as he says &lt;b&gt; it#146;s quot;so quot;"
    assert summarise_data.clean(raw) == 'Yahoo\'s price is $50 as he says <b> it’s "so "'


@needs_files
def test_splits_have_their_published_sizes_and_are_fixed():
    titles = summarise_data.titles()
    assert {name: len(split) for name, split in titles.items()} == {
        "train": 6080,
        "validation": 760,
        "test": 760,
    }
    assert titles == summarise_data.titles()
    papers = summarise_data.scitldr()
    assert [len(papers[name]) for name in ("train", "validation", "test")] == [1992, 619, 618]
    assert max(len(t.summaries) for t in papers["test"]) > 1


@needs_files
@pytest.mark.slow
def test_lead_baseline_reaches_its_measured_score():
    """ROUGE-L 16.6 with 12 words, on all titles; 22.9 with the first sentence, on SciTLDR."""
    for corpus, expected in (("titles", 0.166), ("scitldr", 0.229)):
        config = dataclasses.replace(SMOKE, corpus=corpus, model="lead", synthetic=False)
        data = load(config)
        lead = summarise.init(config, data, nnx.Rngs(0))
        texts = [t for name in data.splits for t in data.splits[name].texts]
        if corpus == "scitldr":
            texts = data.splits["test"].texts
        scores = rouge.mean([t.summaries for t in texts], [lead(t.source) for t in texts])
        assert scores.rouge_l == pytest.approx(expected, abs=0.006)


def test_long_sources_are_cut_and_counted(capsys):
    config = dataclasses.replace(SMOKE, reads=10)
    data = load(config)
    assert "train: 64 of 64 sources have more than 10 words: cut" in capsys.readouterr().out
    assert max(map(len, data.splits["train"].sources)) == 10


def test_words_outside_the_vocabulary_get_an_index_if_the_source_has_them():
    known = Words.of(["a b"]).numbers()
    V = len(known)
    others = summarise_data.others_of(known, ["x", "a", "y", "x", "b", "z"])
    assert others == {"x": V, "y": V + 1, "z": V + 2}
    row = summarise_data.numbers(known, ["a", "z", "q", "b"], others)
    assert row == [4, V + 2, UNKNOWN, 5]
    many = [f"w{i}" for i in range(summarise_data.OTHERS + 5)]
    assert len(summarise_data.others_of({}, many)) == summarise_data.OTHERS


def test_extractive_baselines():
    source = "Oil rose. Oil and gold fell in London. A man ran."
    assert Lead(4)(source) == "Oil rose. Oil and"
    assert Lead(None)(source) == "Oil rose."
    assert BestSentence([source])(source) == "Oil and gold fell in London."
    assert BestSentence(["a b"])("one line") == "one line"


# --- Copying.


@pytest.fixture(scope="module")
def copier():
    layers = Layers(features=8, num_layers=1, num_heads=2)
    model = Copier(EncoderDecoderConfig(10, layers, layers), others=4, rngs=nnx.Rngs(0))
    model.eval()
    return model


SOURCE = np.array([[5, 11, 5, 7, PAD], [12, 6, 6, 13, 4]], np.int32)
TARGET = np.array([[START, 11, 5], [START, 6, 4]], np.int32)


@nnx.jit
def log_probabilities(copier, source, target, real=SOURCE != PAD):
    """Of all words, ``[B T V]``."""
    return copier(source, target, source_real=real)


@pytest.mark.slow
def test_copier_matches_its_formula(copier):
    """The formula word by word in NumPy, with the layers of the model."""
    real = SOURCE != PAD
    log_p = np.asarray(log_probabilities(copier, SOURCE, TARGET))
    assert log_p.shape == (2, 3, 14)
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, atol=1e-5)

    @nnx.jit
    def layers(copier):
        memory = copier.encode(SOURCE, real=real)
        plain = Memory(memory.contexts.contexts, real)
        x = EncoderDecoder.hidden(copier, copier.known(TARGET), plain)
        head = EncoderDecoder.logits(copier, x)
        return copier.query(x), memory.contexts.keys, head, copier.gate(x)

    q, k, head, gate = map(np.asarray, layers(copier))
    g = 1 / (1 + np.exp(-gate[..., 0]))
    for b in range(2):
        for t in range(3):
            s = np.where(real[b], k[b] @ q[b, t] / np.sqrt(8), -np.inf)
            a = np.exp(s - s.max())
            a /= a.sum()
            p = np.zeros(14)
            p[:10] = g[b, t] * np.exp(head[b, t]) / np.exp(head[b, t]).sum()
            for j, word in enumerate(SOURCE[b]):
                p[word] += (1 - g[b, t]) * a[j]
            np.testing.assert_allclose(np.exp(log_p[b, t]), p, atol=2e-6)


@pytest.mark.slow
def test_padding_does_not_change_the_copier(copier):
    real = SOURCE != PAD
    other = np.where(real, SOURCE, 9)
    np.testing.assert_array_equal(
        *(log_probabilities(copier, x, TARGET, real) for x in (SOURCE, other))
    )


def test_cached_decoding_copies_words_and_matches_the_full_pass(copier):
    """With the gate closed, every word is copied, including those without an embedding."""
    shut = nnx.merge(*nnx.split(copier))
    shut.gate.bias[...] = jnp.full(1, -50.0)
    real = SOURCE != PAD
    result = generate(
        shut,
        np.full((2, 1), START, np.int32),
        source=SOURCE,
        source_real=real,
        max_new_tokens=3,
    )
    generated = np.asarray(result.tokens)
    for b in range(2):
        assert set(generated[b]) <= set(SOURCE[b][real[b]])
    whole = np.concatenate([np.full((2, 1), START), generated[:, :-1]], axis=1).astype(np.int32)
    log_p = np.asarray(log_probabilities(shut, SOURCE, whole))
    np.testing.assert_array_equal(log_p.argmax(-1), generated)
    np.testing.assert_allclose(
        result.log_probability,
        np.take_along_axis(jax.nn.log_softmax(log_p), generated[..., None], -1)[..., 0].sum(-1),
        rtol=1e-4,
    )


def test_log_probability_matches_the_logits(copier):
    real = SOURCE != PAD
    # The last word is neither in the vocabulary nor in its source.
    wanted = np.array([[11, 9, 5], [13, 6, 11]], np.int32)
    log_p = nnx.jit(Copier.log_probability)(
        copier, SOURCE, TARGET, wanted, source_real=real, target_real=np.ones_like(TARGET, bool)
    )
    all_words = log_probabilities(copier, SOURCE, TARGET)
    np.testing.assert_allclose(
        log_p, np.take_along_axis(np.asarray(all_words), wanted[..., None], -1)[..., 0], rtol=1e-5
    )
    assert log_p[1, 2] < -20


def test_label_smoothing_is_rejected_for_the_copier():
    with pytest.raises(ValueError, match=r"label_smoothing must be 0 for copier, got 0\.1"):
        dataclasses.replace(SMOKE, label_smoothing=0.1)


# --- The task.


def test_batches_are_resumable_from_any_step():
    data = load(SMOKE)
    whole, part = summarise.batches(SMOKE, data, 0), summarise.batches(SMOKE, data, 2)
    _, _, third = next(whole), next(whole), next(whole)
    again = next(part)
    jax.tree.map(np.testing.assert_array_equal, third, again)
    assert third.target[:, 0].tolist() == [START] * 8
    assert ((third.target == END).sum(1) == 1).all()


@pytest.mark.slow
def test_unknown_words_that_cannot_be_copied_are_ignored(copier):
    known = np.array([[START, 6, END, PAD]], np.int32)
    unknown = np.array([[START, UNKNOWN, END, PAD]], np.int32)
    source = SOURCE[:1]
    loss = nnx.jit(lambda copier, batch: summarise.loss(SMOKE, copier, batch))
    losses = [loss(copier, summarise.Batch(source, target)) for target in (known, unknown)]
    assert [float(x.number) for x in losses] == [2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gru_attention", "copier"])
def test_models_sample_and_look_at_a_given_text(model, capsys):
    config = dataclasses.replace(SMOKE, model=model)
    data = load(config)
    summarizer = summarise.init(config, data, nnx.Rngs(0))
    summarizer.eval()
    summarise.sample(config, summarizer, data, "new words " * 150)
    assert "text has 300 words: only the first 64 (reads) are read" in capsys.readouterr().out
    views = summarise.look(config, summarizer, data, "some w1 and w2")
    titles = [view.title for view in views]
    assert "summary to source" in titles
    assert ("copied words" in titles) == (model == "copier")
    for view in views:
        np.testing.assert_allclose(view.weights.sum(-1), 1, atol=1e-4)
    with pytest.raises(ValueError, match="text must not be empty"):
        summarise.sample(config, summarizer, data, " ")


def test_look_rejects_models_without_attention():
    with pytest.raises(ValueError, match="model lead has no attention to look at"):
        summarise.look(dataclasses.replace(SMOKE, model="lead"), None, None, None)
