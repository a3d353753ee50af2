"""Answers and their scores, windows of passages, match features, and the models."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import needs_files

from experiments.tasks import qa
from experiments.tasks.qa import answers, features
from experiments.tasks.qa import data as qa_data
from experiments.tasks.qa.answers import Passage, Question, Split
from experiments.tasks.qa.data import Window, load
from experiments.tasks.qa.features import Rarity
from experiments.tasks.qa.models import MASKED, Overlap, spans
from experiments.training.losses import logits

CONFIG = qa.PRESETS["smoke"]


@pytest.fixture(scope="module")
def data():
    return load(CONFIG)


def build(data, **options):
    config = dataclasses.replace(CONFIG, **options)
    model = qa.init(config, data, nnx.Rngs(0))
    if isinstance(model, nnx.Module):
        model.eval()
    return config, model


# --- Scores.


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "f1"),
    [
        ("The cat", "cat.", 1, 1),
        ("a red cat", "the cat", 0, 2 / 3),  # precision 1 / 2, recall 1
        ("cat cat dog", "cat dog dog bird", 0, 4 / 7),  # one cat and one dog are shared
        ("U.S.", "us", 1, 1),
        ("well-known", "well known", 0, 0),  # as in SQuAD, the hyphen is deleted
        ("12 May", "May 12", 0, 1),
        ("another", "an other", 0, 0),
        ("\u201cthe cat\u201d", "cat", 0, 0),  # quotes outside ASCII are kept
        ("dog", "cat", 0, 0),
        ("", "cat", 0, 0),
        ("the", "a", 1, 0),  # no words on either side, so F1 is 0
    ],
)
def test_scores_computed_by_hand(answer, reference, exact, f1):
    assert answers.exact(answer, reference) == exact
    assert answers.f1(answer, reference) == pytest.approx(f1)
    assert answers.f1(reference, answer) == pytest.approx(f1)


def test_agreement_uses_the_best_reference():
    scores = answers.agreement(
        ["cat", "a dog"], [["bird", "the cat"], ["red dog", "dog house big"]]
    )
    assert scores == {"f1": pytest.approx((1 + 2 / 3) / 2), "exact": 0.5}
    for said, references in ([], []), (["cat"], []), (["cat"], [[]]):
        with pytest.raises(
            ValueError, match="expected one answer and at least one reference for each"
        ):
            answers.agreement(said, references)


# --- Text.


def test_words_are_slices_of_the_text():
    passage = Passage.of('  In\t1,200.5 B.C., "Don\'t"\u2014caf\u00e9!\n')
    for word, (start, stop) in zip(passage.words, passage.places, strict=True):
        assert passage.text[start:stop] == word
    assert "".join(passage.words) == "".join(passage.text.split())
    assert passage.words[:2] == ["In", "1,200.5"]
    assert passage.cut(0, 1) == "In\t1,200.5"
    assert Passage.of(" \n ").words == []


def squad(context, *pairs, question="Who?"):
    said = [{"answer_start": start, "text": text} for start, text in pairs]
    qas = [{"id": "q7", "question": question, "answers": said}]
    return [{"paragraphs": [{"context": context, "qas": qas}]}]


def test_answers_within_words_are_extended_and_counted():
    split = answers.parse(squad("Ann Lees left.", (0, "Ann Lee"), (4, "Lees"), (3, " Lees ")))
    (question,) = split.questions
    assert question.spans == [(0, 1), (1, 1)]
    assert question.answers == ["Ann Lee", "Lees", " Lees "]
    assert split.unaligned == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (squad("Ann left.", (1, "Ann")), "question q7: 'Ann' is not at character 1"),
        (squad("Ann left.", (0, " ")), "question q7: '' is not at"),
        (squad("Ann left."), "question q7 has no answer"),
        (squad("Ann left.", (0, "Ann"), question=" "), "question q7 has no words"),
    ],
)
def test_invalid_questions_are_rejected(given, message):
    with pytest.raises(ValueError, match=message):
        answers.parse(given)


def test_long_questions_are_cut():
    split = answers.parse(squad("Ann left.", (0, "Ann"), question="Who left?" + "," * 99))
    assert len(split.questions[0].words) == answers.LONGEST_QUESTION


def test_sentence_boundaries():
    words = Passage.of("Did J. Doe pay 3.5 million? Yes. It was $4. then Bo left!").words
    numbers = features.sentences(words)
    ends = [words[i] for i in np.nonzero(np.diff(numbers))[0]]
    assert ends == ["?", "."]
    assert features.sentences(["one"]).tolist() == [0]


# --- Splits.


@needs_files
def test_splits_have_distinct_articles_and_do_not_depend_on_the_seed():
    preset = qa.PRESETS["cpu"]
    parts = qa_data.read(preset)
    titles = {name: {article["title"] for article in part} for name, part in parts.items()}
    assert {name: len(some) for name, some in titles.items()} == {
        "test": 5,
        "validation": 5,
        "train": 38,
        "xquad": 48,
    }
    for one, other in itertools.combinations(titles.values(), 2):
        assert not one & other
    assert parts == qa_data.read(dataclasses.replace(preset, seed=7))


@needs_files
def test_splits_have_their_published_sizes(capsys):
    everything = load(qa.PRESETS["cpu"])
    sizes = {name: len(split.questions) for name, split in everything.splits.items()}
    assert sizes == {"test": 759, "validation": 664, "train": 6515, "xquad": 1190}
    assert sum(split.unaligned for split in everything.splits.values()) == 45
    assert (
        "train: 34 of 18799 reference answers start or end within a word" in capsys.readouterr().out
    )
    for split in everything.splits.values():
        for question in split.questions:
            passage = split.passages[question.passage]
            cut = {passage.cut(*span) for span in question.spans}
            for answer in question.answers:
                assert any(answer.strip() in written for written in cut)


def test_reads_files_in_the_squad_format(tmp_path, monkeypatch):
    raw = {
        "data": [{**article, "title": str(i)} for i, article in enumerate(qa_data.synthetic(20, 0))]
    }
    file = tmp_path / "some.json"
    file.write_text(json.dumps(raw))
    monkeypatch.setattr(qa_data, "path", lambda name: file)
    parts = qa_data.read(qa.PRESETS["cpu"])
    assert [len(parts[name]) for name in ("train", "validation", "test", "xquad")] == [16, 2, 2, 20]


# --- Windows.


def long(n, *spans):
    """A passage of ``n`` words and a question about it."""
    words = [f"w{i}" for i in range(n)]
    return Split([Passage.of(" ".join(words))], [Question("?", ["?"], 0, [], list(spans))], 0)


@pytest.mark.parametrize("n", [1, 9, 10, 11, 14, 15, 30, 97])
def test_windows_cover_a_passage_and_some_window_holds_each_short_span(n):
    some = qa_data.windows(long(n), reads=10, stride=5)
    assert all(0 <= x.start < x.stop <= n and x.stop - x.start <= 10 for x in some)
    assert {i for x in some for i in range(x.start, x.stop)} == set(range(n))
    for first in range(n):
        last = min(first + 5, n - 1)  # six words, the longest with reads 10 and stride 5
        assert any(x.start <= first and last < x.stop for x in some)
    assert len(some) == 1 + max(0, -(-(n - 10) // 5))


def test_options_that_would_lose_answers_are_rejected():
    with pytest.raises(ValueError, match="stride must be at most reads - longest \\+ 1, 6"):
        qa.Config(reads=10, longest=5, stride=7)
    with pytest.raises(ValueError, match="reads must be at most"):
        qa.Config(reads=1000)
    with pytest.raises(ValueError, match="width must be even"):
        qa.Config(width=33, heads=3)


def test_references_are_in_the_window_and_not_too_long():
    split = long(30, (2, 2), (7, 10), (9, 12), (11, 16))  # the last has 6 words; longest is 4
    assert [qa_data.references(CONFIG, split, Window(0, a, a + 10)) for a in (0, 5, 10)] == [
        [(2, 0)],
        [(2, 3), (4, 3)],
        [],
    ]


def test_the_answer_is_the_best_span_of_all_windows(monkeypatch):
    split = Split(long(40).passages, [Question("?", ["?"], 0, [], [])] * 2, 0)
    monkeypatch.setattr(qa_data, "DIGITS_TO_ZERO", {})  # keep w20 and w33 distinct
    lexicon = qa_data.Lexicon.of(split.passages, split.questions, 1)
    (low, high) = lexicon.words.encode("w20 w33")

    def scores(_, inputs):
        result = np.full((*inputs.words.shape, CONFIG.longest), MASKED, np.float32)
        result[inputs.words == low, 1], result[inputs.words == high, 1] = 2, 3
        return result

    monkeypatch.setattr(qa, "logits", scores)
    for got in qa.answer(CONFIG, None, qa_data.Data(lexicon, {}), split, size=3):
        assert (got.first, got.last, got.score) == (33, 34, 3.0)
        assert got.window.start <= 33 < got.window.stop


# --- The rule.


def test_the_rule_picks_new_words_next_to_those_of_the_question():
    text = "The old bridge was long. The bridge was designed by Ann Lee, who was rich. Bo came."
    passages = [Passage.of(x) for x in (text, *["The man was by the sea, who said it."] * 20)]
    rule = Overlap(Rarity.among(passages), longest=20)
    question = Passage.of("Who designed the bridge?").words
    assert passages[0].cut(*rule.answer(question, passages[0].words)) == "Ann Lee"
    match = features.match(question, passages[0].words, rule.rarity)
    assert match.coverage.argmax() == 1
    assert match.coverage[1] == pytest.approx(1)  # the sentence has every word of the question
    assert match.weight[passages[0].words.index("old")] == 0


def test_the_rule_always_answers():
    rule = Overlap(Rarity.among([Passage.of("a b c")]), longest=20)
    for text in ("x", "?", "x ? x", ", , ."):
        words = Passage.of(text).words
        first, last = rule.answer(["x", "?"], words)
        assert 0 <= first <= last < len(words)


# --- Readers.


def test_features_are_finite_and_bounded():
    rarity = Rarity.among([Passage.of("one two. Two three!")])
    for text in ("one", "?", "Two is 1905, not TWO. So what", "one " * 300):
        ours, theirs = features.features(["Two", "?"], Passage.of(text).words, rarity)
        assert ours.shape == (2, features.FEATURES)
        assert theirs.shape[1] == features.FEATURES
        assert np.isfinite(ours).all()
        assert np.isfinite(theirs).all()
        assert abs(theirs).max() < 10


def test_span_scores_are_sums_and_masked_outside_the_passage():
    ends = jnp.arange(12, dtype=jnp.float32).reshape(1, 6, 2)
    passage = jnp.array([[False, False, True, True, True, False]])
    scores = np.asarray(spans(ends, jnp.array([0.5, 0.25, 0.125]), passage))[0]
    for i, more in np.ndindex(scores.shape):
        inside = i >= 2 and i + more <= 4
        expected = 2 * i + 2 * (i + more) + 1 + (0.5, 0.25, 0.125)[more] if inside else MASKED
        assert scores[i, more] == expected


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_padding_does_not_change_scores(data, model):
    config, reader = build(data, model=model)
    split = data.splits["test"]
    windows = qa_data.windows(split, config.reads, config.stride)[:3]
    short = qa_data.encode(data.lexicon, split, windows, 32)
    long = qa_data.encode(data.lexicon, split, windows, 48, count=4)
    dirty = long._replace(
        suffixes=np.where(long.words == 0, 3, long.suffixes),
        features=np.where(long.words[..., None] == 0, 99, long.features),
    )
    first, second, third = (np.asarray(logits(reader, x)) for x in (short, long, dirty))
    np.testing.assert_allclose(first, second[:3, :32], atol=1e-4)
    np.testing.assert_allclose(second[:3], third[:3], atol=1e-4)
    assert (second[:3, 32:] == MASKED).all()
    assert np.isfinite(second).all()


@pytest.mark.slow
def test_loss_and_gradient_are_finite(data):
    config, reader = build(data, label_smoothing=0.1)
    batch = next(qa.batches(config, data, 0))

    def mean(reader):
        total, number = qa.loss(config, reader, batch)
        return total / number

    value, gradient = nnx.jit(nnx.value_and_grad(mean))(reader)
    assert 0 < value < 20
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_loss_sums_the_probabilities_of_all_references():
    scores = jnp.log(jnp.array([[[0.1, 0.2], [0.3, 0.4]]]))
    batch = qa_data.Batch(None, np.array([[[True, False], [False, True]]]))
    total, number = qa.loss(CONFIG, lambda _: scores, batch)
    assert float(total) == pytest.approx(-np.log(0.5), rel=1e-5)
    assert float(number) == 1


def test_batches_hold_references_and_are_resumable_from_any_step(data):
    whole, part = (qa.batches(CONFIG, data, step) for step in (0, 11))
    for _ in range(11):
        next(whole)
    for _ in range(3):
        one, other = next(whole), next(part)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)
        assert one.right.any(axis=(1, 2)).all()
        rows, first, more = np.nonzero(one.right)
        assert (one.inputs.passage[rows, first] == 1).all()
        assert (one.inputs.passage[rows, first + more] == 1).all()


def test_windows_without_an_answer_are_dropped_and_counted(data, capsys):
    next(qa.batches(CONFIG, data, 0))
    windows = qa_data.windows(data.splits["train"], CONFIG.reads, CONFIG.stride)
    message = (
        f"of {len(windows)} windows, of 64 of 64 questions, contain a reference answer of up to 4"
    )
    assert message in capsys.readouterr().out


# --- The task.


def test_evaluates_both_test_sets_and_samples(data):
    config, model = build(data, model="overlap")
    scores = qa.evaluate(config, model, data, "test")
    assert {"f1", "exact", "unaligned", "xquad_f1", "xquad_exact"} <= scores.keys()
    assert set(qa.evaluate(config, model, data, "validation")) == {"f1", "exact", "unaligned"}
    assert 0.5 < scores["f1"] <= 1  # some names occur twice
    printed = qa.sample(config, model, data, None)
    for word in ("question", "passage", "reference", "model"):
        assert printed.count(f"{word:<11}") == 5
    with pytest.raises(ValueError, match="no attention to look at"):
        qa.look(config, model, data, None)


def test_a_users_question(data):
    config, model = build(data, model="overlap")
    printed = qa.sample(
        config, model, data, "What is the 9th called? ||| Bo left. The 9th is called Ann."
    )
    assert printed.endswith("model      Ann")
    assert "reference" not in printed
    split = qa.asked(data, "Who?")
    assert split.passages[0] == data.splits["test"].passages[0]
    with pytest.raises(ValueError, match="text must not be empty or blank"):
        qa.asked(data, "  ")
    for given in ("Who? |||  ", " ||| Bo left.", "x " * 99):
        with pytest.raises(ValueError, match="text must be a question of up to 46 words"):
            qa.asked(data, given)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_look_shows_the_window_of_the_answer(data, model):
    config, reader = build(data, model=model)
    given = "Who wrote it? ||| " + "Bo left. " * 20 + "Ann Lee wrote it."
    (view,) = qa.look(config, reader, data, given)
    assert view.weights.shape[-2:] == (len(view.queries), len(view.keys))
    np.testing.assert_allclose(view.weights.sum(-1), 1, atol=1e-4)
    assert view.queries[:6] == ["<s>", "Who", "wrote", "it", "?", "</s>"]
    assert len(view.queries) <= 6 + config.reads
    assert view.note.removeprefix("The answer: ") in qa.sample(config, reader, data, given)


@pytest.mark.slow
def test_look_rejects_mechanisms_without_weights(data):
    config, reader = build(data, model="transformer", attention="linear")
    with pytest.raises(NotImplementedError, match="linear_attention has no softmax weights"):
        qa.look(config, reader, data, None)
