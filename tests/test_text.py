"""Text to batches: every example exactly once per epoch, and the same order from any step."""

import itertools

import numpy as np
import pytest

from experiments.datasets import text
from experiments.tasks.shakespeare.ngrams import NGrams

LENGTHS = np.random.default_rng(0).integers(1, 40, 103)


def orders(step):
    return {
        "shuffled": text.shuffled(103, 10, seed=3, step=step),
        "alike": (index for index, _ in text.alike(LENGTHS, 10, seed=3, step=step)),
        "bucketed": (index for index, _ in bucketed(step)),
    }


def bucketed(step):
    return text.bucketed(LENGTHS, 10, seed=3, step=step, sizes=text.edges(LENGTHS, 4))


@pytest.mark.parametrize("name", ["shuffled", "alike", "bucketed"])
def test_order_from_a_step_is_the_rest_of_the_order_from_0(name):
    batches = list(itertools.islice(orders(0)[name], 45))
    for step in (1, 9, 10, 11, 37):
        rest = itertools.islice(orders(step)[name], 45 - step)
        assert all(np.array_equal(a, b) for a, b in zip(batches[step:], rest, strict=True))


@pytest.mark.parametrize("name", ["shuffled", "alike", "bucketed"])
def test_epochs_have_no_example_twice_and_differ_in_order(name):
    batches = list(itertools.islice(orders(0)[name], 20))
    for epoch in (batches[:10], batches[10:]):
        examples = np.concatenate(epoch)
        assert len(examples) == len(np.unique(examples)) == 100
    assert not np.array_equal(np.concatenate(batches[:10]), np.concatenate(batches[10:]))


def test_batches_of_similar_length_have_little_padding():
    def padding(batches):
        return sum(LENGTHS[b].max() * len(b) - LENGTHS[b].sum() for b in batches)

    alike, shuffled = (itertools.islice(orders(0)[name], 10) for name in ("alike", "shuffled"))
    assert padding(alike) < 0.2 * padding(shuffled)


def test_edges_need_the_least_padding():
    def padding(sizes):
        return sum(min(x for x in sizes if x >= length) - length for length in few)

    few = np.random.default_rng(1).integers(1, 14, 40)
    for count in (1, 2, 3, 4):
        shorter = itertools.combinations(range(1, few.max()), count - 1)
        best = min(padding((*sizes, few.max())) for sizes in shorter)
        chosen = text.edges(few, count)
        assert len(chosen) == count
        assert padding(chosen) == best
    assert text.edges(np.array([5, 5]), 3) == (5,)


def test_buckets_hold_their_batches_in_few_lengths():
    sizes = text.edges(LENGTHS, 8)
    padding, seen = [], set()
    for index, length in itertools.islice(text.bucketed(LENGTHS, 5, 0, 0, sizes), 100):
        assert length == min(x for x in sizes if x >= LENGTHS[index].max())
        padding.append(1 - LENGTHS[index].sum() / (length * len(index)))
        seen.add(length)
    assert seen == set(sizes)
    assert np.mean(padding) < 0.2


def test_batch_larger_than_the_data_is_all_of_it():
    assert sorted(next(text.shuffled(5, 100, seed=0, step=0))) == [0, 1, 2, 3, 4]


def test_covering_has_each_example_exactly_once():
    batches = text.covering(LENGTHS, 10)
    assert sorted(np.concatenate(batches)) == list(range(103))
    assert [len(b) for b in batches] == [10] * 10 + [3]


def test_padding_is_to_buckets():
    assert text.padded([[5] * 17, [6]]).shape == (2, 32)
    assert text.padded([[5]], count=3).tolist() == [[5, *[0] * 15], [0] * 16, [0] * 16]
    with pytest.raises(ValueError, match="at most 512 tokens, got 513"):
        text.bucket(513)


def test_rare_and_new_words_are_unknown():
    words = text.Words.of(["a b a", "b c"], least=2)
    assert words.words == (*text.SPECIAL, "a", "b")
    assert words.encode("a c d b") == [4, text.UNKNOWN, text.UNKNOWN, 5]


@pytest.mark.parametrize("blank", ["", "  ", "\n\t"])
def test_empty_text_raises(blank):
    with pytest.raises(ValueError, match="text must not be empty or blank"):
        text.check(blank)


def test_subwords_round_trip_any_text():
    subwords = text.subwords(["ein Haus", "a house", "zwei Häuser"] * 5, 300)
    for written in ("ein Häuser", "日本語 🎈", "x\ny"):
        numbers = subwords.encode(written).ids
        assert subwords.decode(numbers).strip() == written
        assert text.UNKNOWN not in numbers
    assert [subwords.id_to_token(i) for i in range(4)] == list(text.SPECIAL)
    again = text.subwords(["ein Haus", "a house", "zwei Häuser"] * 5, 300)
    assert again.to_str() == subwords.to_str()


# --- n-grams.


def by_hand(written, order, history, character):
    """The formula, on strings."""
    p = 1 / 256
    for h in range(order):
        context = history[len(history) - h :] if h else b""
        if h > len(history):
            break
        following = [
            written[i + h : i + h + 1]
            for i in range(len(written) - h)
            if written[i : i + h] == context
        ]
        if not following:
            continue
        types = len(set(following))
        p = (following.count(character) + types * p) / (len(following) + types)
    return p


@pytest.mark.parametrize("order", [1, 2, 4])
def test_ngrams_match_the_formula(order):
    written = b"the cat sat on the mat and the bat ate that"
    model = NGrams.count(np.frombuffer(written, np.uint8).astype(np.int32), order)
    rng = np.random.default_rng(0)
    for _ in range(20):
        start = rng.integers(0, len(written) - 6)
        history = written[start : start + rng.integers(1, 6)]
        logits = model.logits(np.frombuffer(history, np.uint8))
        for character in (b"t", b" ", b"z"):
            expected = by_hand(written, order, history, character)
            assert np.exp(logits[character[0]]) == pytest.approx(expected, rel=1e-5)
        assert np.exp(logits.astype(np.float64)).sum() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_nats_of_windows_are_those_of_each_character(order):
    written = np.frombuffer(b"abracadabra, abracadabra and again", np.uint8).astype(np.int32)
    model = NGrams.count(written, order)
    windows = np.stack([written[:9], written[10:19]])
    nats = model.nats(windows[:, :-1], windows[:, 1:])
    for b, t in np.ndindex(2, 8):
        expected = -model.logits(windows[b, : t + 1])[windows[b, t + 1]]
        assert nats[b, t] == pytest.approx(expected, rel=1e-5)
