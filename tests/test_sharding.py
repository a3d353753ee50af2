"""Models whose parameters are sharded: by which rules, what devices send, and what is computed."""

import collections
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import spmd
from helpers import mostly_slow
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from attention_jax.models import (
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    Layers,
    Relative,
    VisionConfig,
    VisionTransformer,
    pretrained,
    sharding,
)
from attention_jax.nn import low_rank
from attention_jax.positions import Rotary

V, T, B = 64, 16, 8
COLLECTIVES = r" (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
TOKENS = np.random.default_rng(0).integers(0, V, (B, T + 1)).astype(np.int32)
KINDS = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}


def layers(**more):
    return Layers(**{"features": 32, "num_layers": 2, "num_heads": 8, "hidden": 64, **more})


def decoder(**more):
    config = DecoderConfig(V, layers(**more), positions="learned", max_length=T)
    return Decoder(config, rngs=nnx.Rngs(0))


def mesh_of(kind="Auto", **axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(KINDS[kind],) * len(axes))


def loss(graph, state, tokens):
    log_p = jax.nn.log_softmax(nnx.merge(graph, state)(tokens[:, :-1]))
    return -(log_p * jax.nn.one_hot(tokens[:, 1:], V)).sum(-1).mean()


# A decoder of two layers with six kernels each, tied table and learned positions. A collective of
# several arrays counts as one. XLA on a CPU has no reduce-scatter: it reduces, then slices.
#   data    the gradients, all at once
#   fsdp    each kernel and the positions once, the table as table and as head; the gradients
#   model   each layer two forward and two backward; the look-up; the head's maximum, sum and
#           gradient
# A product of ways needs what each of them needs.
WAYS = {
    "data": ({"data": 8}, {}, {"all-reduce": 1}),
    "fsdp": ({"data": 8}, {"fsdp": True}, {"all-gather": 15, "all-reduce": 1}),
    "model": ({"model": 8}, {}, {"all-reduce": 12}),
    "data and model": ({"data": 4, "model": 2}, {}, {"all-reduce": 13}),
    "fsdp and model": (
        {"data": 4, "model": 2},
        {"fsdp": True},
        {"all-gather": 15, "all-reduce": 13},
    ),
}


@pytest.mark.parametrize("name", mostly_slow(WAYS, {"data", "fsdp", "model"}))
def test_a_training_step_sends_no_more_than_it_must(name):
    axes, options, expected = WAYS[name]
    mesh, rules = mesh_of(**axes), sharding.rules(**{axis: axis for axis in axes}, **options)
    graph, state = nnx.split(sharding.create(decoder, mesh, rules))
    placed = sharding.shardings(state, mesh, rules)

    def step(state, tokens):
        def total(state):
            logits = nnx.merge(graph, state)(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradient = jax.value_and_grad(total)(state)
        return value, jax.lax.with_sharding_constraint(gradient, placed)

    tokens = jax.device_put(TOKENS, sharding.of_batch(mesh, rules))
    with jax.set_mesh(mesh):
        text = jax.jit(step).lower(state, tokens).compile().as_text()
    assert collections.Counter(re.findall(COLLECTIVES, text)) == expected


MODELS = {
    "plain": {},
    "grouped, gated, rotary": {
        "num_kv_heads": 2,
        "gated": True,
        "rotary": Rotary(),
        "norm": "rms",
        "sinks": True,
        "gate": True,
        "query_key_norm": True,
    },
    "fused, scan, remat": {"fused": True, "scan": True, "remat": True, "norm": "one_plus_rms"},
    "relative": {"relative": Relative(4, 8), "dropout_rate": 0.2, "attention_dropout_rate": 0.2},
}
FAST = {
    ("plain", "fsdp and model", "Explicit"),
    ("grouped, gated, rotary", "fsdp and model", "Auto"),
}


@pytest.mark.parametrize(
    ("model", "name", "kind"),
    [
        pytest.param(m, n, k, marks=[] if (m, n, k) in FAST else [pytest.mark.slow])
        for m in MODELS
        for n in WAYS
        for k in KINDS
    ],
)
def test_loss_and_gradient_equal_those_of_one_device(model, name, kind):
    axes, options, _ = WAYS[name]
    mesh, rules = mesh_of(kind, **axes), sharding.rules(**{axis: axis for axis in axes}, **options)
    graph, state, rest = nnx.split(decoder(**MODELS[model]), nnx.Param, ...)

    def both(state, rest, tokens):
        def total(state):
            whole = nnx.merge_state(state, jax.tree.map(lambda x: x, rest))
            return loss(graph, whole, tokens)

        return jax.value_and_grad(total)(state)

    expected = jax.jit(both)(state, rest, TOKENS)
    placed = sharding.shardings(state, mesh, rules)
    sharded = jax.device_put(state, placed)
    rest = jax.device_put(rest, sharding.shardings(rest, mesh, rules))
    tokens = jax.device_put(TOKENS, sharding.of_batch(mesh, rules))
    with jax.set_mesh(mesh):
        value, gradient = jax.jit(both)(sharded, rest, tokens)
    chex.assert_trees_all_close(float(value), float(expected[0]), rtol=1e-5)
    chex.assert_trees_all_close(
        jax.device_get(gradient), jax.device_get(expected[1]), atol=1e-5, rtol=1e-3
    )


def models():
    plain = layers(num_layers=1)
    vision = VisionConfig(image=(4, 4), patch=2, channels=1, classes=3, layers=plain)
    relative = layers(num_layers=1, relative=Relative(4, 8), sinks=True, gate=True, norm="rms")
    return {
        "decoder": decoder(num_layers=1),
        "untied": Decoder(DecoderConfig(V, relative, tied=False), rngs=nnx.Rngs(0)),
        "encoder": Encoder(
            EncoderConfig(V, plain, max_length=T, types=2, head="tokens"), rngs=nnx.Rngs(0)
        ),
        "translator": EncoderDecoder(
            EncoderDecoderConfig(V, relative, relative, positions=None), rngs=nnx.Rngs(0)
        ),
        "vision": VisionTransformer(vision, rngs=nnx.Rngs(0)),
        "adapted": low_rank(decoder(num_layers=1), rank=2, rngs=nnx.Rngs(1)),
    }


@pytest.mark.parametrize("name", list(models()))
def test_every_parameter_names_its_axes(name):
    known = dict(sharding.rules())
    state = nnx.state(models()[name])
    for path, x in nnx.to_flat_state(state):
        if not isinstance(x, nnx.RngState):
            names = x.get_metadata()["out_sharding"]
            assert len(names) == x.get_value().ndim, path
            assert set(names) <= {*known, None}, path


def test_specs_are_those_of_flax():
    mesh = mesh_of(data=4, model=2)
    rules = sharding.rules(data="data", model="model", fsdp=True)
    state = nnx.state(decoder(), nnx.Param)
    with spmd.logical_axis_rules(rules):
        theirs = nnx.get_partition_spec(state)
    ours = jax.tree.map(lambda x: x.spec, sharding.shardings(state, mesh, rules))
    assert jax.tree.leaves(ours, is_leaf=lambda x: isinstance(x, P)) == jax.tree.leaves(
        theirs, is_leaf=lambda x: isinstance(x, P)
    )


def test_a_module_created_under_a_mesh_is_not_sharded():
    with jax.set_mesh(mesh_of(data=8)):
        table = decoder().embed.tokens[...]
    assert table.sharding.is_fully_replicated


def test_what_does_not_divide_stays_whole():
    mesh, rules = mesh_of(data=2, model=4), sharding.rules(data="data", model="model", fsdp=True)
    model = sharding.create(lambda: decoder(num_kv_heads=2, hidden=30), mesh, rules)
    attention = model.stack.blocks[0].attention.sublayer
    assert attention.query.kernel[...].sharding.spec == P("data", "model")
    # 2 heads over 4 shards, though each has a width of 4
    assert attention.key.kernel[...].sharding.spec == P("data", None)
    assert model.stack.blocks[0].feed_forward.sublayer.up.kernel[...].sharding.spec == P(
        "data", None
    )


def test_fused_projections_are_not_split_by_heads():
    model = sharding.create(
        lambda: decoder(fused=True), mesh_of(model=8), sharding.rules(model="model")
    )
    attention = model.stack.blocks[0].attention.sublayer
    assert attention.query_key_value.kernel[...].sharding.spec == P(None, None)
    assert attention.out.kernel[...].sharding.spec == P("model", None)


def test_an_optimizer_is_sharded_as_its_parameters():
    mesh, rules = mesh_of(data=8), sharding.rules(data="data", fsdp=True)
    state = nnx.state(sharding.create(decoder, mesh, rules), nnx.Param)
    moments = jax.eval_shape(optax.adamw(1e-3).init, state)
    placed = sharding.shardings(moments, mesh, rules)
    assert placed[0].mu.embed.tokens.get_value().spec == P(None, "data")
    assert placed[0].count.spec == P()


def test_created_in_shards_equals_created_whole():
    mesh, rules = mesh_of(data=4, model=2), sharding.rules(data="data", model="model", fsdp=True)
    created = nnx.state(sharding.create(decoder, mesh, rules))
    sharded = nnx.state(sharding.shard(decoder(), mesh, rules))
    assert jax.tree.map(lambda x: x.sharding, created) == jax.tree.map(
        lambda x: x.sharding, sharded
    )
    params = [jax.device_get(nnx.filter_state(x, nnx.Param)) for x in (created, sharded)]
    chex.assert_trees_all_close(*params, rtol=1e-6)


def test_sequences_are_split_along_context():
    mesh = mesh_of(data=4, context=2)
    rules = sharding.rules(data="data", context="context", fsdp=True)
    assert sharding.of_batch(mesh, rules).spec == P("data", "context")
    assert dict(rules)["embed"] == ("data", "context")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_loaded_into_shards_and_saved_from_them(tmp_path, kind):
    config = {"activation": "gelu_tanh", "fused": True, "num_layers": 1}
    model = decoder(**config)
    pretrained.save(model, tmp_path / "whole")
    mesh = mesh_of(kind, data=4, model=2)
    rules = sharding.rules(data="data", model="model", fsdp=True)
    loaded = pretrained.load(tmp_path / "whole", mesh=mesh, rules=rules)
    expected = sharding.shard(model, mesh, rules)
    for (path, x), (_, y) in zip(
        nnx.to_flat_state(nnx.state(loaded, nnx.Param)),
        nnx.to_flat_state(nnx.state(expected, nnx.Param)),
        strict=True,
    ):
        assert x.get_value().sharding == y.get_value().sharding, path
        np.testing.assert_array_equal(x.get_value(), y.get_value())
    pretrained.save(loaded, tmp_path / "again")
    first, again = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again")
    )
    assert first == again


def test_loading_never_holds_a_whole_tensor_on_a_device(tmp_path, monkeypatch):
    pretrained.save(decoder(activation="gelu_tanh", fused=True), tmp_path)
    sizes = []
    make = jax.make_array_from_callback

    def recorded(shape, placed, part):
        def shard(index):
            sizes.append((np.prod(shape), part(index).size))
            return part(index)

        return make(shape, placed, shard)

    monkeypatch.setattr(jax, "make_array_from_callback", recorded)
    monkeypatch.setattr(jnp, "asarray", lambda x, *_: pytest.fail("placed whole"))
    mesh, rules = mesh_of(data=8), sharding.rules(data="data", fsdp=True)
    pretrained.load(tmp_path, mesh=mesh, rules=rules)
    assert all(part == whole // 8 for whole, part in sizes if whole >= 32 * 32)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sharding.rules(data="x", model="x"), "must be different mesh axes"),
        (lambda: sharding.rules(model="model", fsdp=True), "give one of them"),
        (
            lambda: sharding.shard(decoder(), mesh_of(data=8), sharding.rules(model="model")),
            "rules shard 'vocab' over 'model', expected axes of the mesh: data",
        ),
        (
            lambda: sharding.shard(decoder(), mesh_of(data=8), (("embed", "data"),)),
            "rules must have an entry for",
        ),
        (lambda: pretrained.load("x", rules=sharding.rules()), "mesh must be given with rules"),
    ],
)
def test_invalid_rules_raise(call, said):
    with pytest.raises(ValueError, match=said):
        call()
