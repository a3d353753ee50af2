"""Models whose parameters are sharded: by which rules, what devices send, and what is computed."""

import functools
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import spmd
from helpers import mostly_slow, slow
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attention_jax.models import (
    Classifier,
    ClassifierConfig,
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    Experts,
    Latent,
    Layers,
    Relative,
    SpeechConfig,
    SpeechTransformer,
    VisionConfig,
    VisionTransformer,
    pretrained,
    sharding,
)
from attention_jax.nn import FeedForward, MixtureOfExperts, low_rank
from attention_jax.positions import Rotary
from experiments.bench.sharding import KINDS, WAYS, mesh_of, rules_of, step_collectives
from experiments.training.checkpoints import LAST, Checkpoints

V, T, B = 64, 16, 8
TOKENS = np.random.default_rng(0).integers(0, V, (B, T + 1)).astype(np.int32)


def layers(**more):
    return Layers(**{"features": 32, "num_layers": 2, "num_heads": 8, "hidden": 64, **more})


def decoder(**more):
    config = DecoderConfig(V, layers(**more), positions="learned", max_length=T)
    return Decoder(config, rngs=nnx.Rngs(0))


def loss(graph, state, tokens):
    log_p = jax.nn.log_softmax(nnx.merge(graph, state)(tokens[:, :-1]))
    return -(log_p * jax.nn.one_hot(tokens[:, 1:], V)).sum(-1).mean()


@pytest.mark.parametrize("name", mostly_slow(WAYS, {"fsdp and model"}))
def test_a_training_step_has_the_ideal_number_of_collectives(name):
    axes, _, expected = WAYS[name]
    assert step_collectives(mesh_of(**axes), rules_of(name)) == expected


@pytest.mark.slow
def test_without_a_split_vocabulary_only_layers_have_collectives():
    """Two forward and two backward in each of the two layers."""
    rules = dict(sharding.rules(model="model")) | {"vocab": None}
    assert step_collectives(mesh_of(model=8), tuple(rules.items())) == {"all-reduce": 8}


MODELS = {
    "plain": {"num_layers": 1},
    "grouped, gated, rotary": {
        "num_layers": 1,
        "num_kv_heads": 2,
        "gated": True,
        "rotary": Rotary(),
        "norm": "rms",
        "sinks": True,
        "gate": True,
        "query_key_norm": True,
    },
    "fused, scan, remat": {"fused": True, "scan": True, "remat": True, "norm": "one_plus_rms"},
    "relative": {
        "num_layers": 1,
        "relative": Relative(4, 8),
        "dropout_rate": 0.2,
        "attention_dropout_rate": 0.2,
    },
    "joint norm, fused gates": {
        "num_layers": 1,
        "num_kv_heads": 2,
        "gated": True,
        "fused": True,
        "query_key_norm": "joint",
        "norm": "rms",
        "order": "after",
        "rotary": Rotary(width=2),
    },
    "joint norm, parallel": {"num_layers": 1, "query_key_norm": "joint", "parallel": True},
    "experts": {
        "num_layers": 1,
        "experts": Experts(4, 2),
        "gated": True,
        "feed_forward_bias": False,
        "activation": "silu",
    },
}


MODELS["latent"] = MODELS["experts"] | {
    "latent": Latent(features=8, rotary_dim=4, query_features=6),
    "experts": Experts(4, 2, gating="sigmoid", groups=2, groups_per_token=1, shared=8),
    "rotary": Rotary(),
    "norm": "rms",
    "bias": False,
}


def loss_and_gradient(graph, state, rest, tokens):
    def total(state):
        return loss(graph, nnx.merge_state(state, jax.tree.map(lambda x: x, rest)), tokens)

    return jax.value_and_grad(total)(state)


@functools.cache
def on_one_device(model):
    """A model in parts, its loss and gradient."""
    graph, state, rest = nnx.split(decoder(**MODELS[model]), nnx.Param, ...)
    return (
        graph,
        state,
        rest,
        jax.jit(loss_and_gradient, static_argnums=0)(graph, state, rest, TOKENS),
    )


@pytest.mark.parametrize(
    ("model", "name", "kind"),
    [
        slow("plain", "data", "Auto"),
        slow("plain", "model", "Auto"),
        slow("grouped, gated, rotary", "fsdp and model", "Auto"),
        slow("grouped, gated, rotary", "model", "Explicit"),
        slow("fused, scan, remat", "fsdp", "Explicit"),
        slow("fused, scan, remat", "data and model", "Auto"),
        slow("relative", "data", "Explicit"),
        slow("relative", "fsdp", "Auto"),
        slow("relative", "data and model", "Explicit"),
        slow("relative", "fsdp and model", "Explicit"),
        slow("joint norm, fused gates", "model", "Explicit"),
        slow("joint norm, parallel", "fsdp and model", "Auto"),
        slow("experts", "data and model", "Auto"),
        slow("latent", "fsdp and model", "Auto"),
    ],
)
def test_loss_and_gradient_equal_those_of_one_device(model, name, kind):
    axes, _, _ = WAYS[name]
    mesh, rules = mesh_of(kind, **axes), rules_of(name)
    graph, state, rest, expected = on_one_device(model)
    placed = sharding.shardings(state, mesh, rules)
    sharded = jax.device_put(state, placed)
    rest = jax.device_put(rest, sharding.shardings(rest, mesh, rules))
    tokens = jax.device_put(TOKENS, sharding.of_batch(mesh, rules))
    with jax.set_mesh(mesh):
        step = jax.jit(loss_and_gradient, static_argnums=0)
        value, gradient = step(graph, sharded, rest, tokens)
    chex.assert_trees_all_close(float(value), float(expected[0]), rtol=1e-5)
    chex.assert_trees_all_close(
        jax.device_get(gradient), jax.device_get(expected[1]), atol=1e-5, rtol=1e-3
    )


@pytest.mark.slow
def test_experts_refuse_explicit_axes():
    mesh = mesh_of("Explicit", data=8)
    module = MixtureOfExperts(8, 8, experts=2, per_token=1, rngs=nnx.Rngs(0))
    x = jax.device_put(np.ones((8, 8), np.float32), NamedSharding(mesh, P("data")))
    with (
        jax.set_mesh(mesh),
        pytest.raises(NotImplementedError, match="axis_types of AxisType"),
    ):
        module(x)


ONE = layers(num_layers=1)
RELATIVE = layers(num_layers=1, relative=Relative(4, 8), sinks=True, gate=True, norm="rms")
VISION = VisionConfig(image=(4, 4), patch=2, channels=1, classes=3, layers=ONE)
ENCODER = EncoderConfig(V, ONE, max_length=T, types=2, head="tokens")
SPEECH = SpeechConfig(V, ONE, ONE, max_length=T, mels=3, frames=2 * T)
CLASSIFIER = ClassifierConfig(EncoderConfig(V, ONE, max_length=T, pooler=True), ("no", "yes"))
TRANSLATOR = EncoderDecoderConfig(V, RELATIVE, RELATIVE, positions=None)
EACH = {
    "decoder": lambda rngs: decoder(num_layers=1),
    "untied": lambda rngs: Decoder(DecoderConfig(V, RELATIVE, tied=False), rngs=rngs),
    "encoder": lambda rngs: Encoder(ENCODER, rngs=rngs),
    "classifier": lambda rngs: Classifier(CLASSIFIER, rngs=rngs),
    "translator": lambda rngs: EncoderDecoder(TRANSLATOR, rngs=rngs),
    "vision": lambda rngs: VisionTransformer(VISION, rngs=rngs),
    "speech": lambda rngs: SpeechTransformer(SPEECH, rngs=rngs),
    "latent": lambda rngs: decoder(**MODELS["latent"]),
    "adapted": lambda rngs: low_rank(decoder(num_layers=1), rank=2, rngs=rngs),
}


@pytest.mark.parametrize("name", EACH)
def test_every_parameter_names_its_axes(name):
    known = dict(sharding.rules())
    state = nnx.eval_shape(lambda: nnx.state(EACH[name](nnx.Rngs(0))))
    for path, x in nnx.to_flat_state(state):
        if not isinstance(x, nnx.RngState):
            names = x.get_metadata()["out_sharding"]
            assert len(names) == x.get_value().ndim, path
            assert set(names) <= {*known, None}, path


def test_specs_are_those_of_flax():
    mesh = mesh_of(data=4, model=2)
    rules = sharding.rules(data="data", model="model", fsdp=True)
    state = nnx.state(nnx.eval_shape(decoder), nnx.Param)
    with spmd.logical_axis_rules(rules):
        theirs = nnx.get_partition_spec(state)
    ours = jax.tree.map(lambda x: x.spec, sharding.shardings(state, mesh, rules))
    assert jax.tree.leaves(ours, is_leaf=lambda x: isinstance(x, P)) == jax.tree.leaves(
        theirs, is_leaf=lambda x: isinstance(x, P)
    )


@pytest.mark.slow
def test_a_module_created_under_a_mesh_is_not_sharded():
    with jax.set_mesh(mesh_of(data=8)):
        kernel = FeedForward(8, 16, rngs=nnx.Rngs(0)).up.kernel[...]
    assert kernel.sharding.is_fully_replicated


def test_what_does_not_divide_stays_whole():
    mesh, rules = mesh_of(data=2, model=4), sharding.rules(data="data", model="model", fsdp=True)
    state = nnx.state(nnx.eval_shape(lambda: decoder(num_kv_heads=2, hidden=30)))
    block = sharding.shardings(state, mesh, rules).stack.blocks[0]
    attention = block.attention.sublayer
    assert attention.query.kernel.get_value().spec == P("data", "model")
    # 2 heads over 4 shards, though each has a width of 4
    assert attention.key.kernel.get_value().spec == P("data", None)
    assert block.feed_forward.sublayer.up.kernel.get_value().spec == P("data", None)


def test_fused_projections_are_not_split_by_heads():
    state = nnx.state(nnx.eval_shape(lambda: decoder(fused=True)))
    placed = sharding.shardings(state, mesh_of(model=8), sharding.rules(model="model"))
    attention = placed.stack.blocks[0].attention.sublayer
    assert attention.query_key_value.kernel.get_value().spec == P(None, None)
    assert attention.out.kernel.get_value().spec == P("model", None)


def test_an_optimizer_is_sharded_as_its_parameters():
    mesh, rules = mesh_of(data=8), sharding.rules(data="data", fsdp=True)
    state = nnx.state(nnx.eval_shape(decoder), nnx.Param)
    moments = jax.eval_shape(optax.adamw(1e-3).init, state)
    placed = sharding.shardings(moments, mesh, rules)
    assert placed[0].mu.embed.tokens.get_value().spec == P(None, "data")
    assert placed[0].count.spec == P()


@pytest.mark.slow
def test_created_in_shards_equals_created_whole():
    mesh, rules = mesh_of(data=4, model=2), sharding.rules(data="data", model="model", fsdp=True)
    created = nnx.state(sharding.create(lambda: decoder(num_layers=1), mesh, rules))
    sharded = nnx.state(sharding.shard(decoder(num_layers=1), mesh, rules))
    assert jax.tree.map(lambda x: x.sharding, created) == jax.tree.map(
        lambda x: x.sharding, sharded
    )
    params = [jax.device_get(nnx.filter_state(x, nnx.Param)) for x in (created, sharded)]
    chex.assert_trees_all_close(*params, rtol=1e-6)


def test_rules_with_context_split_the_sequence_and_the_parameters():
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
    pretrained.save(decoder(activation="gelu_tanh", fused=True, num_layers=1), tmp_path)
    sizes = []
    make = jax.make_array_from_callback

    def recorded(shape, placed, part):
        def shard(index):
            sizes.append((np.prod(shape), part(index).size))
            return part(index)

        return make(shape, placed, shard)

    monkeypatch.setattr(jax, "make_array_from_callback", recorded)
    for name in ("asarray", "isfinite"):
        monkeypatch.setattr(jnp, name, lambda x, *_: pytest.fail("placed whole"))
    mesh, rules = mesh_of(data=8), sharding.rules(data="data", fsdp=True)
    pretrained.load(tmp_path, param_dtype=jnp.bfloat16, mesh=mesh, rules=rules)
    large = [(whole, part) for whole, part in sizes if whole >= 32 * 32]
    assert len(large) == 5 * 8  # tensors, each on every device
    assert all(part == whole // 8 for whole, part in large)


@pytest.mark.slow
def test_saving_holds_one_whole_tensor_at_a_time(tmp_path):
    """tracemalloc counts the arrays of NumPy, though not JAX's."""
    large = {"activation": "gelu_tanh", "fused": True, "num_layers": 4, "features": 256}
    graph, state = nnx.split(nnx.eval_shape(lambda: decoder(**large)))
    placed = sharding.shardings(state, mesh_of(data=8), sharding.rules(data="data", fsdp=True))
    zeros = jax.tree.map(lambda x, s: jnp.zeros(x.shape, x.dtype, device=s), state, placed)
    sizes = [x.nbytes for x in jax.tree.leaves(zeros)]
    model = nnx.merge(graph, zeros)
    pretrained.save(model, tmp_path)  # what Python keeps of the first time is not counted
    tracemalloc.start()
    pretrained.save(model, tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(sizes) < peak < max(sizes) + sum(sizes) / 3


def test_a_sharded_run_is_saved_and_restored_in_shards(tmp_path, monkeypatch):
    mesh, rules = mesh_of(data=8), sharding.rules(data="data", fsdp=True)
    state = nnx.state(sharding.create(lambda: decoder(num_layers=1), mesh, rules), nnx.Param)
    get, sizes = jax.device_get, []

    def recorded(x):
        sizes.extend(leaf.size for leaf in jax.tree.leaves(x))
        return get(x)

    monkeypatch.setattr(jax, "device_get", recorded)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(LAST, 1, state, {})
    restored = checkpoints.restore(LAST, state).state
    assert max(sizes) < 32 * 8  # the norms and biases, which are not sharded
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert x.committed
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        np.testing.assert_array_equal(get(x), get(y))


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
