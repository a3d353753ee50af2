"""Tokenizers and sentence embeddings equal those of Hugging Face's libraries."""

import itertools
import json
import warnings

import checkpoints
import numpy as np
import pytest
import tiny_llama

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

from attention_jax.models import embed, pretrained  # noqa: E402
from experiments.serving import template  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

WORDS = ["The", "cats", "sat", "on", "mat", "?", "dog", "é😀"]
LENGTHS = [0, 1, 3, 4, 7, 12]
BERT_SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 9,
}


def texts(seed, n):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, LENGTHS[i % len(LENGTHS)])) for i in range(n)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = checkpoints.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return pretrained.load_tokenizer(folder), theirs


def assert_same(rows, expected):
    assert len(rows) == len(expected["input_ids"])
    for i, row in enumerate(rows):
        assert row.tokens.tolist() == expected["input_ids"][i]
        assert row.types.tolist() == expected["token_type_ids"][i]
        assert row.offsets.tolist() == [list(pair) for pair in expected["offset_mapping"][i]]
        words = [-1 if x is None else x for x in expected.word_ids(i)]
        assert row.words.tolist() == words
        real = np.array(expected["special_tokens_mask"][i]) == 0
        np.testing.assert_array_equal(row.text >= 0, real)
        # The first of two texts is missing in their sequence ids if the second was not cut.
        assert row.text[real].tolist() == sorted(row.text[real])
        np.testing.assert_array_equal(row.text[real] == 1, row.types[real] == 1)


OPTIONS = {
    "return_offsets_mapping": True,
    "return_special_tokens_mask": True,
    "return_token_type_ids": True,
}


@pytest.mark.parametrize("length", [5, 6, 8, 11])
def test_truncation_equals_hugging_face(both, length):
    ours, theirs = both
    first, second = zip(*itertools.product(texts(0, 6), texts(1, 6)), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = OPTIONS | {"truncation": "longest_first", "max_length": length}
        rows, cut = ours(first, max_length=length)
        assert_same(rows, theirs(list(first), **options))
        rows, cut = ours(first, second, max_length=length)
        assert_same(rows, theirs(list(first), list(second), **options))
    whole, _ = ours(first, second)
    lost = [len(a.tokens) - len(b.tokens) for a, b in zip(whole, rows, strict=True)]
    assert cut.tolist() == lost


@pytest.mark.parametrize(("length", "stride"), [(9, 0), (9, 1), (12, 4)])
def test_windows_equal_hugging_face(both, length, stride):
    ours, theirs = both
    questions, passages = ["cat ?", "the", ""] * 2, texts(1, 6)
    options = OPTIONS | {"max_length": length, "stride": stride, "return_overflowing_tokens": True}
    expected = theirs(questions, passages, truncation="only_second", **options)
    rows, cut = ours(questions, passages, max_length=length, stride=stride)
    assert_same(rows, expected)
    assert [row.example for row in rows] == expected["overflow_to_sample_mapping"]
    assert not cut.any()
    expected = theirs(passages, truncation=True, **options)
    assert_same(ours(passages, max_length=length, stride=stride).rows, expected)


def test_words_equal_hugging_face(both):
    ours, theirs = both
    words = [x.split() for x in texts(2, 6)[1:]]
    assert_same(ours(words).rows, theirs(words, is_split_into_words=True, **OPTIONS))


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_embeddings(tmp_path, pool, normalize):
    """Their formulas: sentence-transformers itself is not needed."""
    config = transformers.BertConfig(vocab_size=11, **BERT_SIZES)
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path)
    checkpoints.write_tokenizer(tmp_path)
    checkpoints.write_modules(tmp_path, pool=pool, normalize=normalize, max_length=8)
    tokenizer = pretrained.load_tokenizer(tmp_path)
    given = texts(3, 6)
    with pytest.warns(UserWarning, match="2 of 6 texts were cut to max_length = 8"):
        got = embed(pretrained.load_embedder(tmp_path), tokenizer, given, batch_size=4)

    expected = []
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in given:
        inputs = theirs([text], truncation=True, max_length=8, return_tensors="pt")
        with torch.no_grad():
            x = model(**inputs).last_hidden_state[0]
        x = x[0] if pool == "cls" else x.mean(dim=0)
        expected.append((x / x.norm() if normalize else x).numpy())
    np.testing.assert_allclose(got, np.stack(expected), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertModel"]


def test_a_chat_template_gives_the_text_of_transformers(tmp_path):
    folder = tiny_llama.write(tmp_path)
    roles = "system", "user", "assistant", "user"
    contents = "short", 'é <b> "q"\n', "yes", "{{ x }}"
    messages = [{"role": x, "content": y} for x, y in zip(roles, contents, strict=True)]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert template.load_template(folder)(messages) == expected
