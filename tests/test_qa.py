"""Answers and their scores, passages in windows, how questions match them, and the readers."""

import dataclasses
import itertools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.datasets import files
from experiments.tasks import qa
from experiments.tasks.qa import answers, readers
from experiments.tasks.qa.answers import Passage, Question, Split
from experiments.tasks.qa.readers import Rarity, Window

CONFIG = qa.PRESETS["smoke"]

needs_files = pytest.mark.skipif(
    files.VARIABLE not in os.environ, reason=f"{files.VARIABLE} names no folder"
)


@pytest.fixture(scope="module")
def found():
    return qa.data(CONFIG)


def rung(found, **options):
    config = dataclasses.replace(CONFIG, **options)
    model = qa.init(config, found, nnx.Rngs(0))
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
        ("well-known", "well known", 0, 0),  # as in SQuAD, nothing takes the hyphen's place
        ("12 May", "May 12", 0, 1),
        ("another", "an other", 0, 0),
        ("\u201cthe cat\u201d", "cat", 0, 0),  # quotes that are not ASCII stay
        ("dog", "cat", 0, 0),
        ("", "cat", 0, 0),
        ("the", "a", 1, 0),  # no words on either side: F1 has nothing that is shared
    ],
)
def test_scores_by_hand(answer, reference, exact, f1):
    assert answers.exact(answer, reference) == exact
    assert answers.f1(answer, reference) == pytest.approx(f1)
    assert answers.f1(reference, answer) == pytest.approx(f1)


def test_the_best_reference_of_each_question_counts():
    scores = answers.agreement(
        ["cat", "a dog"], [["bird", "the cat"], ["red dog", "dog house big"]]
    )
    assert scores == {"f1": pytest.approx((1 + 2 / 3) / 2), "exact": 0.5}
    for said, references in ([], []), (["cat"], []), (["cat"], [[]]):
        with pytest.raises(ValueError, match="answers must be one for each question"):
            answers.agreement(said, references)


# --- Text.


def test_words_have_their_places_in_the_text_as_it_is_written():
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


def test_answers_that_break_a_word_stand_for_what_they_touch_and_are_counted():
    split = answers.parsed(squad("Ann Lees left.", (0, "Ann Lee"), (4, "Lees"), (3, " Lees ")))
    (question,) = split.questions
    assert question.spans == [(0, 1), (1, 1)]
    assert question.answers == ["Ann Lee", "Lees", " Lees "]
    assert split.unaligned == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (squad("Ann left.", (1, "Ann")), "question q7: 'Ann' is not at character 1"),
        (squad("Ann left.", (0, " ")), "question q7: '' is not at"),
        (squad("Ann left."), "question q7 has no answer"),
        (squad("Ann left.", (0, "Ann"), question=" "), "question q7 has no words"),
    ],
)
def test_broken_questions_are_named(given, said):
    with pytest.raises(ValueError, match=said):
        answers.parsed(given)


def test_of_a_long_question_the_first_words_are_read():
    split = answers.parsed(squad("Ann left.", (0, "Ann"), question="Who left?" + "," * 99))
    assert len(split.questions[0].words) == answers.LONGEST_QUESTION


def test_sentences_end_where_the_next_begins():
    words = Passage.of("Did J. Doe pay 3.5 million? Yes. It was $4. then Bo left!").words
    numbers = readers.sentences(words)
    ends = [words[i] for i in np.nonzero(np.diff(numbers))[0]]
    assert ends == ["?", "."]
    assert readers.sentences(["one"]).tolist() == [0]


# --- Splits.


@needs_files
def test_articles_are_in_one_split_the_same_for_every_seed():
    preset = qa.PRESETS["cpu"]
    parts = qa.read(preset)
    titles = {name: {article["title"] for article in part} for name, part in parts.items()}
    assert {name: len(some) for name, some in titles.items()} == {
        "test": 5,
        "validation": 5,
        "train": 38,
        "xquad": 48,
    }
    for one, other in itertools.combinations(titles.values(), 2):
        assert not one & other
    assert parts == qa.read(dataclasses.replace(preset, seed=7))


@needs_files
def test_every_question_is_read(capsys):
    everything = qa.data(qa.PRESETS["cpu"])
    sizes = {name: len(split.questions) for name, split in everything.splits.items()}
    assert sizes == {"test": 759, "validation": 664, "train": 6515, "xquad": 1190}
    assert sum(split.unaligned for split in everything.splits.values()) == 45
    assert "train: 34 of 18799 reference answers break a word" in capsys.readouterr().out
    for split in everything.splits.values():
        for question in split.questions:
            passage = split.passages[question.passage]
            cut = {passage.cut(*span) for span in question.spans}
            for answer in question.answers:
                assert any(answer.strip() in written for written in cut)


def test_a_file_in_the_format_of_squad_is_what_is_read(tmp_path, monkeypatch):
    raw = {"data": [{**article, "title": str(i)} for i, article in enumerate(qa.made_up(20, 0))]}
    file = tmp_path / "some.json"
    file.write_text(json.dumps(raw))
    monkeypatch.setattr(qa, "path", lambda name: file)
    parts = qa.read(qa.PRESETS["cpu"])
    assert [len(parts[name]) for name in ("train", "validation", "test", "xquad")] == [16, 2, 2, 20]


# --- Windows.


def long(n, *spans):
    """A passage of so many words and a question about it."""
    words = [f"w{i}" for i in range(n)]
    return Split([Passage.of(" ".join(words))], [Question("?", ["?"], 0, [], list(spans))], 0)


@pytest.mark.parametrize("n", [1, 9, 10, 11, 14, 15, 30, 97])
def test_windows_cover_a_passage_and_each_short_span_is_whole_in_one(n):
    some = readers.windows(long(n), reads=10, stride=5)
    assert all(0 <= x.start < x.stop <= n and x.stop - x.start <= 10 for x in some)
    assert {i for x in some for i in range(x.start, x.stop)} == set(range(n))
    for first in range(n):
        last = min(first + 5, n - 1)  # six words, the most where reads is 10 and stride 5
        assert any(x.start <= first and last < x.stop for x in some)
    assert len(some) == 1 + max(0, -(-(n - 10) // 5))


def test_options_that_would_lose_answers_are_refused():
    with pytest.raises(ValueError, match="stride must be at most reads - longest \\+ 1, 6"):
        qa.Config(reads=10, longest=5, stride=7)
    with pytest.raises(ValueError, match="reads must be at most"):
        qa.Config(reads=1000)
    with pytest.raises(ValueError, match="width must be even"):
        qa.Config(width=33, heads=3)


def test_references_are_those_whole_in_a_window_and_not_too_long():
    split = long(30, (2, 2), (7, 10), (9, 12), (11, 16))  # the last has 6 words, longest is 4
    assert [qa.inside(CONFIG, split, Window(0, a, a + 10)) for a in (0, 5, 10)] == [
        [(2, 0)],
        [(2, 3), (4, 3)],
        [],
    ]


def test_the_answer_is_the_best_span_of_any_window(monkeypatch):
    split = Split(long(40).passages, [Question("?", ["?"], 0, [], [])] * 2, 0)
    monkeypatch.setattr(readers, "ZEROS", {})  # that each word has a number of its own
    lexicon = readers.Lexicon.of(split.passages, split.questions, 1)
    (low, high) = lexicon.words.encode("w20 w33")

    def scores(_, inputs):
        found = np.full((*inputs.words.shape, CONFIG.longest), readers.NEVER, np.float32)
        found[inputs.words == low, 1], found[inputs.words == high, 1] = 2, 3
        return found

    monkeypatch.setattr(qa, "logits", scores)
    for got in qa.answer(CONFIG, None, qa.Data(lexicon, {}), split, size=3):
        assert (got.first, got.last, got.score) == (33, 34, 3.0)
        assert got.window.start <= 33 < got.window.stop


# --- The rule.


def test_the_rule_takes_new_words_beside_those_of_the_question_in_the_best_sentence():
    text = "The old bridge was long. The bridge was designed by Ann Lee, who was rich. Bo came."
    passages = [Passage.of(x) for x in (text, *["The man was by the sea, who said it."] * 20)]
    rule = readers.Overlap(Rarity.among(passages), longest=20)
    question = Passage.of("Who designed the bridge?").words
    assert passages[0].cut(*rule.answer(question, passages[0].words)) == "Ann Lee"
    match = readers.match(question, passages[0].words, rule.rarity)
    assert match.shares.argmax() == 1
    assert match.shares[1] == pytest.approx(1)  # it has all of the question
    assert match.share[passages[0].words.index("old")] == 0


def test_the_rule_always_answers():
    rule = readers.Overlap(Rarity.among([Passage.of("a b c")]), longest=20)
    for text in ("x", "?", "x ? x", ", , ."):
        words = Passage.of(text).words
        first, last = rule.answer(["x", "?"], words)
        assert 0 <= first <= last < len(words)


# --- Readers.


def test_what_is_counted_is_finite_and_does_not_depend_on_hashing():
    rarity = Rarity.among([Passage.of("one two. Two three!")])
    for text in ("one", "?", "Two is 1905, not TWO. So what", "one " * 300):
        ours, theirs = readers.features(["Two", "?"], Passage.of(text).words, rarity)
        assert ours.shape == (2, readers.FEATURES)
        assert theirs.shape[1] == readers.FEATURES
        assert np.isfinite(ours).all()
        assert np.isfinite(theirs).all()
        assert abs(theirs).max() < 10


def test_spans_are_sums_and_stay_in_the_passage():
    ends = jnp.arange(12, dtype=jnp.float32).reshape(1, 6, 2)
    passage = jnp.array([[False, False, True, True, True, False]])
    scores = np.asarray(readers.spans(ends, jnp.array([0.5, 0.25, 0.125]), passage))[0]
    for i, more in np.ndindex(scores.shape):
        inside = i >= 2 and i + more <= 4
        expected = (
            2 * i + 2 * (i + more) + 1 + (0.5, 0.25, 0.125)[more] if inside else readers.NEVER
        )
        assert scores[i, more] == expected


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_what_is_at_padding_changes_nothing(found, model):
    config, reader = rung(found, model=model)
    split = found.splits["test"]
    some = readers.windows(split, config.reads, config.stride)[:3]
    short = readers.inputs_of(found.lexicon, split, some, 32)
    long = readers.inputs_of(found.lexicon, split, some, 48, count=4)
    dirty = long._replace(
        endings=np.where(long.words == 0, 3, long.endings),
        features=np.where(long.words[..., None] == 0, 99, long.features),
    )
    first, second, third = (np.asarray(reader(x)) for x in (short, long, dirty))
    np.testing.assert_allclose(first, second[:3, :32], atol=1e-4)
    np.testing.assert_allclose(second[:3], third[:3], atol=1e-4)
    assert (second[:3, 32:] == readers.NEVER).all()
    assert np.isfinite(second).all()


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_and_its_gradient_are_finite(found, smoothing):
    config, reader = rung(found, label_smoothing=smoothing)
    batch = next(qa.batches(config, found, 0))

    def mean(reader):
        total, number = qa.loss(config, reader, batch)
        return total / number

    value, gradient = nnx.value_and_grad(mean)(reader)
    assert 0 < value < 20
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_the_loss_is_that_of_all_references_together():
    scores = jnp.log(jnp.array([[[0.1, 0.2], [0.3, 0.4]]]))
    batch = qa.Batch(None, np.array([[[True, False], [False, True]]]))
    total, number = qa.loss(CONFIG, lambda _: scores, batch)
    assert float(total) == pytest.approx(-np.log(0.5), rel=1e-5)
    assert float(number) == 1


def test_batches_hold_references_and_are_the_same_from_any_step(found):
    whole, part = (qa.batches(CONFIG, found, step) for step in (0, 11))
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


def test_windows_without_an_answer_are_counted(found, capsys):
    next(qa.batches(CONFIG, found, 0))
    windows = readers.windows(found.splits["train"], CONFIG.reads, CONFIG.stride)
    said = capsys.readouterr().out
    assert f"of {len(windows)} windows hold a reference answer of up to 4 words" in said
    assert "64 of 64 questions have one" in said


# --- The task.


def test_the_rule_is_scored_on_both_test_sets_and_read(found):
    config, model = rung(found, model="overlap")
    scores = qa.evaluate(config, model, found, "test")
    assert {"f1", "exact", "unaligned", "xquad_f1", "xquad_exact"} <= scores.keys()
    assert set(qa.evaluate(config, model, found, "validation")) == {"f1", "exact", "unaligned"}
    assert 0.5 < scores["f1"] <= 1  # some names are there twice
    read = qa.sample(config, model, found, None)
    for word in ("question", "passage", "reference", "model"):
        assert read.count(f"{word:<11}") == 5
    with pytest.raises(ValueError, match="no attention to look at"):
        qa.look(config, model, found, None)


def test_a_question_of_ones_own(found):
    config, model = rung(found, model="overlap")
    said = qa.sample(
        config, model, found, "What is the 9th called? ||| Bo left. The 9th is called Ann."
    )
    assert said.endswith("model      Ann")
    assert "reference" not in said
    split = qa.asked(found, "Who?")
    assert split.passages[0] == found.splits["test"].passages[0]
    with pytest.raises(ValueError, match="text must not be empty or blank"):
        qa.asked(found, "  ")
    for given in ("Who? |||  ", " ||| Bo left.", "x " * 99):
        with pytest.raises(ValueError, match="text must be a question of up to 46 words"):
            qa.asked(found, given)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_a_reader_is_looked_at_in_the_window_of_its_answer(found, model):
    config, reader = rung(found, model=model)
    given = "Who wrote it? ||| " + "Bo left. " * 20 + "Ann Lee wrote it."
    (view,) = qa.look(config, reader, found, given)
    assert view.weights.shape[-2:] == (len(view.queries), len(view.keys))
    np.testing.assert_allclose(view.weights.sum(-1), 1, atol=1e-4)
    assert view.queries[:6] == ["<s>", "Who", "wrote", "it", "?", "</s>"]
    assert len(view.queries) <= 6 + config.reads
    assert view.note.removeprefix("The answer: ") in qa.sample(config, reader, found, given)


@pytest.mark.slow
def test_what_has_no_weights_is_not_looked_at(found):
    config, reader = rung(found, model="transformer", attention="linear")
    with pytest.raises(NotImplementedError, match="linear_attention has no weights of a softmax"):
        qa.look(config, reader, found, None)
