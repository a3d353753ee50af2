"""Low-rank adapters: initially without effect, few trainable parameters, and merged again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import mostly_slow, normal

from attention_jax.models import (
    Classifier,
    ClassifierConfig,
    Decoder,
    DecoderConfig,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    Layers,
    generate,
    pretrained,
)
from attention_jax.nn import (
    Frozen,
    MultiHeadAttention,
    low_rank,
    low_rank_state,
    merged,
    with_low_rank,
)
from attention_jax.positions import Rotary

V, T = 13, 5
TOKENS = np.random.default_rng(0).integers(3, V, (2, T)).astype(np.int32)


def layers(**more):
    return Layers(**{"features": 12, "num_layers": 2, "num_heads": 3, **more})


def decoder(**more):
    return Decoder(DecoderConfig(V, layers(**more), positions="sinusoidal"), rngs=nnx.Rngs(0))


def classifier():
    config = ClassifierConfig(EncoderConfig(V, layers(), max_length=T), ("a", "b", "c", "d"))
    return Classifier(config, rngs=nnx.Rngs(0))


def translator():
    return EncoderDecoder(EncoderDecoderConfig(V, layers(), layers()), rngs=nnx.Rngs(0))


def adapted(model, seed=1, **options):
    return low_rank(model, **{"rank": 2, **options}, rngs=nnx.Rngs(seed))


def moved(model, size=0.3):
    """With nonzero adapters."""
    for i, (_, module) in enumerate(nnx.iter_modules(model)):
        if isinstance(module, nnx.LoRA):
            b = module.lora_b
            b[...] = jnp.asarray(size * normal(i, *b.shape), b.dtype)
    return model


call = nnx.jit(lambda model, *tokens: model(*tokens))


def names(model, kind):
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, kind))}


MODELS = {
    "decoder": (decoder, [TOKENS]),
    "fused": (lambda: decoder(fused=True, num_kv_heads=1), [TOKENS]),
    "gated": (lambda: decoder(gated=True, gate=True, bias=False), [TOKENS]),
    "classifier": (classifier, [TOKENS]),
    "translator": (translator, [TOKENS, TOKENS[:, :3]]),
}


@pytest.mark.parametrize("name", mostly_slow(MODELS, {"fused"}))
def test_adapters_start_at_zero_and_merging_keeps_the_outputs(name):
    make, tokens = MODELS[name]
    model = make()
    before = np.asarray(call(model, *tokens))
    new = adapted(model)
    np.testing.assert_array_equal(call(new, *tokens), before)
    after = np.asarray(call(moved(new), *tokens))
    assert np.abs(after - before).max() > 1e-2
    plain = merged(new)
    np.testing.assert_allclose(call(plain, *tokens), after, rtol=1e-4, atol=1e-5)
    assert nnx.graphdef(plain) == nnx.graphdef(model)
    np.testing.assert_array_equal(call(model, *tokens), before)  # left as it is


@pytest.mark.parametrize(
    ("model", "where", "layers_of"),
    [
        (decoder(), ("query", "value"), {"query", "value"}),
        (decoder(fused=True), ("key",), {"query_key_value"}),
        (decoder(), ("out", "up", "down"), {"out", "up", "down"}),
        (classifier(), ("classify",), {"classify"}),
    ],
)
def test_only_named_projections_are_adapted_and_train(model, where, layers_of):
    new = adapted(model, where=where)
    assert {name.split(".")[-2] for name in names(new, nnx.Param)} == layers_of
    assert names(new, nnx.Param) == names(new, nnx.LoRAParam)
    kept = {name.replace(".base_module", "") for name in names(new, Frozen)}
    assert kept == names(model, nnx.Param)


def test_a_named_head_trains_in_full():
    new = adapted(classifier(), train=("classify", "norm"))
    whole = names(new, nnx.Param) - names(new, nnx.LoRAParam)
    assert {name for name in whole if ".norm." not in f".{name}"} == {
        "classify.kernel",
        "classify.bias",
    }
    assert "encoder.stack.norm.scale" in whole
    only = adapted(classifier(), where=(), train=("classify",))
    assert names(only, nnx.Param) == {"classify.kernel", "classify.bias"}


@pytest.mark.slow
def test_gradients_are_of_adapters_only_and_a_step_reduces_the_loss():
    new = adapted(classifier(), train=("classify",))
    labels = jnp.array([0, 1])
    graph, parameters, rest = nnx.split(new, nnx.Param, ...)

    @jax.jit
    def loss(parameters):
        logits = nnx.merge(graph, parameters, rest)(TOKENS)
        return -jax.nn.log_softmax(logits)[jnp.arange(2), labels].sum()

    value, gradient = jax.value_and_grad(loss)(parameters)
    flat = {path[-1]: np.abs(x[...]).max() for path, x in nnx.to_flat_state(gradient)}
    assert flat.keys() == {"lora_a", "lora_b", "kernel", "bias"}
    assert flat["lora_a"] == 0  # as B is 0
    assert flat["lora_b"] > 0
    step = jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradient)
    assert loss(step) < value


def test_tied_tables_stay_tied():
    model = decoder()
    new = adapted(model, train=("embed",))
    assert "embed.tokens" in names(new, nnx.Param)
    new.embed.tokens[...] = 0 * new.embed.tokens[...]
    assert not np.asarray(call(merged(new), TOKENS)).any()  # it is the head as well
    assert np.asarray(call(model, TOKENS)).any()


class Twice(nnx.Module):
    """A projection under two names, in modules of which one is shared."""

    def __init__(self, *, rngs):
        self.query = nnx.Linear(4, 4, rngs=rngs)
        self.other = self.query
        self.inner = nnx.List([MultiHeadAttention(4, 2, rngs=rngs)] * 2)
        self.tied = nnx.Linear(4, 4, rngs=rngs)
        self.tied.kernel = self.query.kernel

    def __call__(self, x):
        for attention in self.inner:
            x = x + attention(x)
        return self.tied(self.other(self.query(x)))


def test_shared_projections_stay_shared():
    model = Twice(rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    new = adapted(model)
    assert new.query is new.other
    assert new.inner[0] is new.inner[1]
    assert isinstance(new.inner[0].query, nnx.LoRA)
    assert new.tied.kernel is new.query.base_module.kernel
    np.testing.assert_array_equal(new(x), model(x))
    after = moved(new)(x)
    assert np.abs(after - model(x)).max() > 1e-2
    plain = merged(new)
    assert plain.query is plain.other
    assert plain.tied.kernel is not plain.query.kernel  # one was adapted, the other not
    np.testing.assert_allclose(plain(x), after, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # Flax's norms mix dtypes
def test_adapters_have_the_dtype_of_their_projection():
    def dtypes(model, kind):
        return {str(x.dtype) for x in jax.tree.leaves(nnx.state(model, kind))}

    model = decoder(num_layers=1, param_dtype=jnp.bfloat16)
    new = adapted(model)
    assert dtypes(new, nnx.LoRAParam) == {"bfloat16"}
    np.testing.assert_array_equal(new(TOKENS), model(TOKENS))
    after = moved(new)(TOKENS)
    plain = merged(new)
    assert dtypes(plain, nnx.Param) == {"bfloat16"}
    np.testing.assert_allclose(plain(TOKENS), after, atol=2**-6 * np.abs(after).max())
    half = decoder(num_layers=1, dtype=jnp.bfloat16)  # of the computation alone
    np.testing.assert_array_equal(adapted(half)(TOKENS), half(TOKENS))


def test_a_second_adapter_keeps_the_first():
    first = moved(adapted(decoder(), where=("query",)))
    second = adapted(first, where=("value",))
    assert {name.split(".")[-2] for name in names(second, nnx.Param)} == {"value"}
    after = call(moved(second), TOKENS)
    np.testing.assert_allclose(call(merged(second), TOKENS), after, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_loaded_decoder_generates_the_same_adapted_and_merged(tmp_path):
    more = {"num_kv_heads": 1, "gated": True, "norm": "rms", "bias": False}
    more |= {"feed_forward_bias": False, "activation": "silu", "windows": (3,)}
    config = DecoderConfig(V, layers(**more, rotary=Rotary()), max_length=64)
    pretrained.save(Decoder(config, rngs=nnx.Rngs(0)), tmp_path / "first")
    model = pretrained.load(tmp_path / "first")
    new = adapted(model)
    np.testing.assert_array_equal(call(new, TOKENS), call(model, TOKENS))
    moved(new, 1.0)
    expected = new(TOKENS)
    np.testing.assert_allclose(call(new, TOKENS), expected, rtol=1e-4, atol=1e-5)

    step = nnx.jit(lambda model, x, caches: model(x, caches=caches))
    logits, caches = step(new, TOKENS[:, :3], new.init_caches((2,), capacity=T))
    rest, _ = step(new, TOKENS[:, 3:], caches)
    np.testing.assert_allclose(np.concatenate([logits, rest], 1), expected, rtol=1e-4, atol=1e-5)

    pretrained.save(merged(new), tmp_path / "second")
    plain = pretrained.load(tmp_path / "second")
    np.testing.assert_allclose(call(plain, TOKENS), expected, rtol=1e-4, atol=1e-5)
    made = [np.asarray(generate(m, TOKENS, max_new_tokens=6).tokens) for m in (new, plain)]
    np.testing.assert_array_equal(*made)


def test_a_loaded_encoder_is_adapted(tmp_path):
    config = EncoderConfig(
        V,
        layers(order="post"),
        max_length=T,
        types=2,
        embedding_norm=True,
        pooler=True,
    )
    config = ClassifierConfig(config, ("a", "b", "c", "d"))
    pretrained.save(Classifier(config, rngs=nnx.Rngs(0)), tmp_path)
    model = pretrained.load(tmp_path)
    new = adapted(model, train=("classify",))
    np.testing.assert_array_equal(call(new, TOKENS), call(model, TOKENS))
    few, all_of = (
        sum(x.size for x in jax.tree.leaves(nnx.state(m, nnx.Param))) for m in (new, model)
    )
    assert few < all_of / 8
    after = call(moved(new), TOKENS)
    np.testing.assert_allclose(call(merged(new), TOKENS), after, rtol=1e-4, atol=1e-5)


def test_adapters_round_trip_without_the_model(tmp_path):
    options = {"where": ("query", "down"), "train": ("classify",)}
    trained = moved(adapted(classifier(), **options))
    trained.classify.bias[...] = jnp.arange(4, dtype=jnp.float32)
    state = low_rank_state(trained)
    assert state.keys() == names(trained, nnx.Param)
    pretrained.save_adapters(trained, tmp_path / "a.safetensors")
    fresh = adapted(classifier(), seed=5, **options)
    before = call(fresh, TOKENS)
    for again in (
        with_low_rank(fresh, state),
        pretrained.load_adapters(fresh, tmp_path / "a.safetensors"),
    ):
        np.testing.assert_array_equal(call(again, TOKENS), call(trained, TOKENS))
        assert nnx.graphdef(again) == nnx.graphdef(fresh)
    again.classify.bias[...] = 0 * again.classify.bias[...]
    np.testing.assert_array_equal(call(fresh, TOKENS), before)  # left as it is
    np.testing.assert_array_equal(low_rank_state(trained)["classify.bias"], np.arange(4))


def test_saved_adapters_include_frozen_ones():
    second = moved(adapted(moved(adapted(decoder(), where=("query",))), where=("value",)))
    state = low_rank_state(second)
    again = with_low_rank(adapted(decoder(), seed=7), state)  # both at once
    np.testing.assert_array_equal(call(again, TOKENS), call(second, TOKENS))


def test_loaded_adapters_take_the_dtype_of_the_model():
    new = adapted(decoder())
    state = {name: np.asarray(x, jnp.bfloat16) for name, x in low_rank_state(moved(new)).items()}
    again = low_rank_state(with_low_rank(new, state))
    assert {str(x.dtype) for x in again.values()} == {"float32"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 3}, r"query.lora_a has shape \(12, 2\), expected \(12, 3\)"),
        ({"where": ("query",)}, r"value.lora_a is not expected"),
        ({"where": ("query", "value", "out")}, r"out.lora_b is missing"),
        ({"train": ("embed",)}, r"embed.tokens is missing"),
    ],
)
def test_adapters_that_do_not_fit_raise(options, said):
    state = low_rank_state(adapted(decoder()))
    with pytest.raises(ValueError, match=f"same rank, where and train: .*{said}"):
        with_low_rank(adapted(decoder(), **options), state)


def test_a_model_without_adapters_raises():
    for model in (decoder(), merged(adapted(decoder()))):
        with pytest.raises(ValueError, match="model must have adapters"):
            low_rank_state(model)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        (
            {"where": ("query", "qeury")},
            "where must name some of down, key, out, query, up, value; got qeury",
        ),
        ({"train": ("classify",)}, r"train must name some of .*embed.*; got classify"),
        # Modules that are trained in full are not adapted.
        ({"train": ("stack",)}, "where must name some of no attribute, since there are none"),
    ],
)
def test_invalid_names_raise(options, said):
    with pytest.raises(ValueError, match=said):
        adapted(decoder(), **options)
