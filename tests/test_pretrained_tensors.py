"""Checkpoints as they are published: older names, copies and unused heads of their tensors."""

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import TOKENS, assert_same
from flax import nnx

from attention_jax.models import pretrained

saved = pytest.fixture(checkpoints.saved)


def test_bert_base_uncased(saved):
    """Older names, and heads of pretraining that the model has no place for."""

    def published(arrays):
        arrays = {
            name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x
            for name, x in arrays.items()
        }
        return arrays | {
            "bert.pooler.dense.weight": np.ones((8, 8), np.float32),
            "bert.pooler.dense.bias": np.ones(8, np.float32),
            "cls.seq_relationship.weight": np.ones((2, 8), np.float32),
            "cls.seq_relationship.bias": np.ones(2, np.float32),
        }

    folder, expected = saved(
        "bert tokens", published, gradient_checkpointing=False, position_embedding_type="absolute"
    )
    with pytest.warns(UserWarning, match=r"left out bert\.pooler.*seq_relationship") as warned:
        model = pretrained.load(folder)
    assert len(warned) == 1
    assert_same(model, expected)
    ignore = [r"bert\.pooler\..*", r"cls\.seq_relationship\..*"]
    assert_same(pretrained.load(folder, ignore=ignore), expected)
    with pytest.warns(UserWarning, match=r"left out cls\.predictions"):
        vectors = pretrained.load(folder, config={"architectures": ["BertModel"]})
    assert vectors.pooler is not None
    assert_same(vectors.stack, model.stack)
    with pytest.warns(UserWarning, match="left out"):
        same = pretrained.load(folder, config={"architectures": ["BertForPreTraining"]})
    assert_same(same, expected)


def test_bert_without_a_pooler(saved):
    def without(arrays):
        return {name: x for name, x in arrays.items() if "pooler" not in name}

    folder, expected = saved("bert", without)
    model = pretrained.load(folder)
    assert_same(model.stack, expected.stack)
    assert model.pooler is None
    pretrained.save(model, folder)
    assert pretrained.load(folder).config == model.config


def test_a_pooler_of_vit_is_left_out_with_a_warning(saved):
    folder, expected = saved(
        "vit", lambda x: x | {"pooler.dense.weight": np.ones((8, 8), np.float32)}
    )
    with pytest.warns(UserWarning, match=r"left out pooler\.dense\.weight"):
        model = pretrained.load(folder)
    assert_same(model, expected)


COPIES = [
    ("gpt2", "lm_head.weight", "transformer.wte.weight"),
    ("llama tied", "lm_head.weight", "model.embed_tokens.weight"),
    ("gemma2", "lm_head.weight", "model.embed_tokens.weight"),
    ("bert tokens", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("bert tokens", "cls.predictions.decoder.bias", "cls.predictions.bias"),
    ("whisper", "proj_out.weight", "model.decoder.embed_tokens.weight"),
    ("t5", "encoder.embed_tokens.weight", "shared.weight"),
    ("t5", "decoder.embed_tokens.weight", "shared.weight"),
    ("t5", "lm_head.weight", "shared.weight"),
]


@pytest.mark.parametrize(("kind", "copy", "original"), COPIES)
def test_copies_may_be_stored_with_or_without_the_original(kind, copy, original, saved):
    folder, expected = saved(kind, lambda arrays: arrays | {copy: arrays[original]})
    model = pretrained.load(folder)
    assert_same(model, expected)

    def alone(arrays):
        return {copy if name == original else name: x for name, x in arrays.items()}

    folder, expected = saved(kind, alone)
    assert_same(pretrained.load(folder), expected)


@pytest.mark.parametrize(("kind", "copy", "original"), COPIES[:-1])
def test_a_copy_that_differs_raises(kind, copy, original, saved):
    folder, expected = saved(kind, lambda arrays: arrays | {copy: arrays[original] + 1})
    with pytest.raises(ValueError, match=f"{copy} should be a copy of {original} but differs"):
        pretrained.load(folder)
    ignored = pretrained.load(folder, ignore=[copy.replace(".", r"\.")])
    assert_same(ignored, expected)


@pytest.mark.parametrize(("kind", "copy", "original"), [COPIES[0], COPIES[1], COPIES[-1]])
def test_an_untied_head_is_used_if_the_config_says_so(kind, copy, original, saved):
    """T5 is recognized by its tensors: its entry sets the scale of the head's input."""
    doubled = "lm_head.weight"
    folder, expected = saved(kind, lambda arrays: arrays | {doubled: 2 * arrays[original]})
    config = {} if kind == "t5" else {"tie_word_embeddings": False}
    model = pretrained.load(folder, config=config)
    assert not model.config.tied
    np.testing.assert_array_equal(model.head.kernel, 2 * expected.embed.tokens[...].T)
    pretrained.save(model, folder)
    again = pretrained.load(folder)
    assert again.config == model.config
    assert_same(again, model)


def test_copies_that_differ_from_each_other(saved):
    def two(arrays):
        table = arrays.pop("shared.weight")
        names = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
        return arrays | {names[0]: table, names[1]: table + 1}

    folder, _ = saved("t5", two)
    with pytest.raises(ValueError, match=r"decoder\.embed_tokens\.weight should be a copy of"):
        pretrained.load(folder)


def test_a_missing_head_raises_with_advice(saved):
    def headless(arrays):
        return {name: x for name, x in arrays.items() if name != "lm_head.weight"}

    folder, _ = saved("llama", headless)
    with pytest.raises(ValueError, match=r"lm_head.weight is missing \(config=\{'tie_word"):
        pretrained.load(folder)
    assert pretrained.load(folder, config={"tie_word_embeddings": True}).config.tied


def test_long_lists_of_tensors_are_truncated(saved):
    folder, _ = saved("llama", lambda arrays: {f"other.{name}": x for name, x in arrays.items()})
    with pytest.raises(ValueError, match=r"and 4 more like these") as error:
        pretrained.load(folder)
    assert str(error.value).count("is missing") == 8


@pytest.mark.slow
def test_overflow_in_float16_raises(saved):
    def large(arrays):
        arrays["transformer.ln_f.weight"] = np.full(8, 1e5, np.float32)
        return arrays

    folder, _ = saved("gpt2", large)
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.weight overflows param_dtype"):
        pretrained.load(folder, param_dtype=jnp.float16)
    with pytest.raises(ValueError, match="param_dtype must be a floating one"):
        pretrained.load(folder, param_dtype=jnp.int8)


@pytest.mark.parametrize(
    "dtypes",
    [{"param_dtype": jnp.float16}, pytest.param({"dtype": jnp.float16}, marks=pytest.mark.slow)],
)
def test_t5_in_float16_has_a_float32_residual_stream(dtypes, saved):
    """The output of the feed-forward layers exceeds 65,504; the norms scale it down again."""

    def large(arrays):
        return {name: x * np.float32(5e4 if ".wo." in name else 1) for name, x in arrays.items()}

    folder, _ = saved("t5", large)
    wide, narrow = pretrained.load(folder), pretrained.load(folder, **dtypes)
    keys = jax.eval_shape(lambda: narrow.encode(TOKENS).contexts[0].key)
    assert keys.dtype == jnp.float16

    @nnx.jit
    def both(model):
        return model(TOKENS, TOKENS), model.encoder.blocks[0](model.embed(TOKENS))

    expected, summed = both(wide)
    assert np.abs(summed).max() > 65_504
    got = nnx.jit(lambda model: model(TOKENS, TOKENS))(narrow)
    np.testing.assert_allclose(got, expected, atol=4e-3 * np.abs(expected).max())
