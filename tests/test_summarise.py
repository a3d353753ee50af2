"""Summaries: how they are scored, what is read, and that copying is what its formula says."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax.models import EncoderDecoder, EncoderDecoderConfig, Layers, generate
from attention_jax.models.encoder_decoder import Memory
from experiments.datasets import files
from experiments.datasets.text import END, PAD, START, UNKNOWN, Words
from experiments.tasks import summarise
from experiments.tasks.summarise import rouge, summaries
from experiments.tasks.summarise.copier import Copier
from experiments.training import train

needs_files = pytest.mark.skipif(
    files.VARIABLE not in os.environ, reason=f"{files.VARIABLE} names no folder of data sets"
)
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
@pytest.mark.parametrize("made", TEXTS)
def test_rouge_is_that_of_the_package(reference, made):
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    names = ["rouge1", "rouge2", "rougeL"]
    theirs = scorer.RougeScorer(names, use_stemmer=False).score(reference, made)
    np.testing.assert_allclose(
        rouge.rouge(reference, made), [theirs[name].fmeasure for name in names], atol=1e-12
    )


def test_rouge_by_hand_and_the_best_of_several_references():
    # cat, on, and one "the" of two; one pair of five and four; "the cat on" in order.
    assert rouge.rouge("the cat sat on the mat", "the cat lay on it") == pytest.approx(
        (2 * 3 / 11, 2 * 1 / 9, 2 * 3 / 11)
    )
    assert rouge.mean([["a b", "c d"], ["e"]], ["c d", "f"]) == (0.5, 0.5, 0.5)
    assert rouge.rouge("a", "a") == (1, 0, 1)


# --- The data.


def test_what_is_left_of_html_goes():
    written = r"Yahoo #39;s price is  #36;50\as he says &lt;b&gt; it#146;s quot;so quot;"
    assert summaries.clean(written) == 'Yahoo\'s price is $50 as he says <b> it’s "so "'


@needs_files
def test_the_splits_are_those_of_the_files_and_apart():
    found = summaries.titles()
    assert {name: len(split) for name, split in found.items()} == {
        "train": 6080,
        "validation": 760,
        "test": 760,
    }
    assert found == summaries.titles()
    papers = summaries.scitldr()
    assert [len(papers[name]) for name in ("train", "validation", "test")] == [1992, 619, 618]
    assert max(len(t.summaries) for t in papers["test"]) > 1


@needs_files
def test_the_floors_are_those_that_were_measured_before():
    """12 words of an article: 16.6 ROUGE-L of all titles; the first sentence: 22.9 on SciTLDR."""
    for corpus, floor in (("titles", 0.166), ("scitldr", 0.229)):
        config = dataclasses.replace(SMOKE, corpus=corpus, model="lead", synthetic=False)
        data = summarise.data(config)
        lead = summarise.init(config, data, nnx.Rngs(0))
        texts = [t for name in data.splits for t in data.splits[name].texts]
        if corpus == "scitldr":
            texts = data.splits["test"].texts
        found = rouge.mean([t.summaries for t in texts], [lead(t.source) for t in texts])
        assert found.rouge_l == pytest.approx(floor, abs=0.006)


def test_long_sources_are_cut_and_counted(capsys):
    config = dataclasses.replace(SMOKE, reads=10)
    data = summarise.data(config)
    assert "train: 64 of 64 sources have more than 10 words: cut" in capsys.readouterr().out
    assert max(map(len, data.splits["train"].sources)) == 10


def test_words_without_a_number_get_one_where_they_can_be_copied():
    known = Words.of(["a b"]).numbers()
    V = len(known)
    others = summarise.others_of(known, ["x", "a", "y", "x", "b", "z"])
    assert others == {"x": V, "y": V + 1, "z": V + 2}
    row = summarise.numbers(known, ["a", "z", "q", "b"], others)
    assert row == [4, V + 2, UNKNOWN, 5]
    many = [f"w{i}" for i in range(summarise.OTHERS + 5)]
    assert len(summarise.others_of({}, many)) == summarise.OTHERS


def test_the_rules_take_what_they_say():
    source = "Oil rose. Oil and gold fell in London. A man ran."
    assert summaries.Lead(4)(source) == "Oil rose. Oil and"
    assert summaries.Lead(None)(source) == "Oil rose."
    assert summaries.BestSentence([source])(source) == "Oil and gold fell in London."
    assert summaries.BestSentence(["a b"])("one line") == "one line"


# --- Copying.


@pytest.fixture(scope="module")
def copier():
    layers = Layers(features=8, num_layers=1, num_heads=2)
    model = Copier(EncoderDecoderConfig(10, layers, layers), others=4, rngs=nnx.Rngs(0))
    model.eval()
    return model


SOURCE = np.array([[5, 11, 5, 7, PAD], [12, 6, 6, 13, 4]], np.int32)
TARGET = np.array([[START, 11, 5], [START, 6, 4]], np.int32)


def test_copying_is_its_formula(copier):
    """Word by word in NumPy, from the parts of the model."""
    real = SOURCE != PAD
    log_p = np.asarray(copier(SOURCE, TARGET, source_real=real))
    assert log_p.shape == (2, 3, 14)
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, atol=1e-5)
    memory = copier.encode(SOURCE, real=real)
    plain = Memory(memory.contexts.contexts, real)
    x = np.asarray(EncoderDecoder.hidden(copier, copier.known(TARGET), plain))
    q, k = np.asarray(copier.query(x)), np.asarray(memory.contexts.keys)
    head = np.asarray(EncoderDecoder.logits(copier, jnp.asarray(x)))
    g = 1 / (1 + np.exp(-np.asarray(copier.gate(x))[..., 0]))
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


def test_what_stands_at_padding_does_not_matter(copier):
    real = SOURCE != PAD
    other = np.where(real, SOURCE, 9)
    np.testing.assert_array_equal(
        copier(SOURCE, TARGET, source_real=real), copier(other, TARGET, source_real=real)
    )


def test_copied_words_can_be_generated_and_steps_give_what_the_whole_gives(copier):
    """A gate that never makes a word: all are of the source, also those without a vector."""
    shut = nnx.merge(*nnx.split(copier))
    shut.gate.bias[...] = jnp.full(1, -50.0)
    real = SOURCE != PAD
    found = generate(
        shut,
        np.full((2, 1), START, np.int32),
        source=SOURCE,
        source_real=real,
        max_new_tokens=3,
    )
    made = np.asarray(found.tokens)
    for b in range(2):
        assert set(made[b]) <= set(SOURCE[b][real[b]])
    whole = np.concatenate([np.full((2, 1), START), made[:, :-1]], axis=1).astype(np.int32)
    log_p = np.asarray(shut(SOURCE, whole, source_real=real))
    np.testing.assert_array_equal(log_p.argmax(-1), made)
    np.testing.assert_allclose(
        found.log_probability,
        np.take_along_axis(jax.nn.log_softmax(log_p), made[..., None], -1)[..., 0].sum(-1),
        rtol=1e-4,
    )


def test_the_probability_of_one_word_is_that_among_all(copier):
    real = SOURCE != PAD
    wanted = np.array(
        [[11, 9, 5], [13, 6, 11]], np.int32
    )  # the last can neither be made nor copied
    found = copier.log_probability(
        SOURCE, TARGET, wanted, source_real=real, target_real=np.ones_like(TARGET, bool)
    )
    all_words = copier(SOURCE, TARGET, source_real=real)
    np.testing.assert_allclose(
        found, np.take_along_axis(np.asarray(all_words), wanted[..., None], -1)[..., 0], rtol=1e-5
    )
    assert found[1, 2] < -20


def test_smoothing_what_can_only_be_copied_is_refused():
    with pytest.raises(ValueError, match=r"label_smoothing must be 0 for copier, got 0\.1"):
        dataclasses.replace(SMOKE, label_smoothing=0.1)


# --- The task.


def test_batches_go_on_from_any_step():
    data = summarise.data(SMOKE)
    whole, part = summarise.batches(SMOKE, data, 0), summarise.batches(SMOKE, data, 2)
    _, _, third = next(whole), next(whole), next(whole)
    again = next(part)
    jax.tree.map(np.testing.assert_array_equal, third, again)
    assert third.target[:, 0].tolist() == [START] * 8
    assert ((third.target == END).sum(1) == 1).all()


@pytest.mark.slow
def test_unknown_words_that_cannot_be_copied_count_for_nothing(copier):
    known = np.array([[START, 6, END, PAD]], np.int32)
    unknown = np.array([[START, UNKNOWN, END, PAD]], np.int32)
    source = SOURCE[:1]
    found = [
        summarise.loss(SMOKE, copier, summarise.Batch(source, target))
        for target in (known, unknown)
    ]
    assert [float(x.number) for x in found] == [2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gru_attention", "transformer", "copier"])
def test_a_rung_learns_shows_and_reads_any_text(tmp_path, model, capsys):
    config = dataclasses.replace(SMOKE, model=model, steps=2)
    data = summarise.data(config)
    trained = train.train(summarise.TASK, config, data, tmp_path)
    assert "reference" in summarise.sample(config, trained.model, data, None)
    summarise.sample(config, trained.model, data, "new words " * 150)
    assert "text has 300 words: the first 64 (reads) are read" in capsys.readouterr().out
    views = summarise.look(config, trained.model, data, "some w1 and w2")
    titles = [view.title for view in views]
    assert "summary to source" in titles
    assert ("what is copied" in titles) == (model == "copier")
    for view in views:
        np.testing.assert_allclose(view.weights.sum(-1), 1, atol=1e-4)
    with pytest.raises(ValueError, match="text must not be empty"):
        summarise.sample(config, trained.model, data, " ")


def test_rules_and_a_gru_have_nothing_to_look_at():
    with pytest.raises(ValueError, match="model lead has no attention to look at"):
        summarise.look(dataclasses.replace(SMOKE, model="lead"), None, None, None)
