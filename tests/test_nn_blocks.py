"""Blocks, embeddings, norms and pooling: their formulas by hand, under Flax's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, linear, normal, randomized

from attention_jax import masks, nn, positions
from attention_jax.models import Encoder, EncoderConfig, Layers, classifier
from attention_jax.models.stack import Stack

B, T, S, E = 2, 7, 5, 12


# --- Blocks.


def block(rngs, order="pre", cross=False, dropout_rate=0.0, **options):
    return nn.Block(
        nn.MultiHeadAttention(E, 3, mask=masks.causal(), rngs=rngs),
        nn.FeedForward(E, 20, dropout_rate=dropout_rate, rngs=rngs),
        norm=functools.partial(nnx.LayerNorm, E, rngs=rngs),
        cross_attention=nn.MultiHeadAttention(E, 3, context_features=6, rngs=rngs)
        if cross
        else None,
        order=order,
        dropout_rate=dropout_rate,
        **options,
        rngs=rngs,
    )


@pytest.mark.slow
def test_norm_positions_of_a_block():
    x, context = normal(0, B, T, E), normal(1, B, S, 6)
    for order, scale in (("pre", 1.0), ("post", 0.3), ("both", 0.3), ("after", 0.3)):
        module = randomized(block(nnx.Rngs(0), order, cross=True, scale=scale))
        y = x
        for part in ("attention", "cross_attention", "feed_forward"):
            r = getattr(module, part)
            inner = r.norm(y) if order in ("pre", "both") else y
            added = r.sublayer(inner, *[context] * (part == "cross_attention"))
            if order in ("both", "after"):
                added = r.norm_after(added)
            y = y + scale * added
            if order == "post":
                y = r.norm(y)
        close(module(x, context), y)


@pytest.mark.slow
def test_parallel_sublayers_read_the_same_input():
    x, module = normal(0, B, T, E), randomized(block(nnx.Rngs(0), scale=0.3, parallel=True))
    first, second = module.attention, module.feed_forward
    added = first.sublayer(first.norm(x)) + second.sublayer(second.norm(x))
    close(module(x), x + 0.3 * added)
    for options in ({"order": "post"}, {"cross": True}):
        with pytest.raises(ValueError, match="parallel must be False with a cross-attention or"):
            block(nnx.Rngs(0), parallel=True, **options)


@pytest.mark.slow
def test_a_fused_feed_forward_layer_is_the_same():
    m = randomized(nn.FeedForward(E, 20, gated=True, fused=True, rngs=nnx.Rngs(0)))
    other = nn.FeedForward(E, 20, gated=True, rngs=nnx.Rngs(0))
    for name in ("kernel", "bias"):
        gate, up = jnp.split(getattr(m.gate_up, name)[...], 2, axis=-1)
        getattr(other.gate, name)[...], getattr(other.up, name)[...] = gate, up
    other.down = m.down
    x = normal(0, B, T, E)
    close(m(x), other(x), atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_mixture_of_experts(normalize):
    """Values and gradients equal those of all experts for all tokens, masked by the weights."""
    options = {"experts": 5, "per_token": 2, "normalize": normalize}
    m = randomized(nn.MixtureOfExperts(E, 7, **options, rngs=nnx.Rngs(0)))
    x = jnp.asarray(normal(0, B, T, E))
    x = x.at[1].set(x[1, :1])  # tokens that all choose the same experts, none of which is dropped
    graph, state = nnx.split(m)

    def dense(m, x):
        p = jax.nn.softmax(x @ m.router.kernel[...])
        least = jnp.sort(p, axis=-1)[..., -2:-1]
        p = jnp.where(p >= least, p, 0.0)
        p = p / p.sum(axis=-1, keepdims=True) if normalize else p
        gate, up = (jnp.einsum("bte,xef->btxf", x, k[...]) for k in (m.gate, m.up))
        return jnp.einsum("btxf,xfe,btx->bte", jax.nn.silu(gate) * up, m.down[...], p)

    def run(call):
        def total(state, x):
            y = call(nnx.merge(graph, state), x)
            return (y**2).sum(), y

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(state, x)

    got, expected = run(lambda m, x: m(x)), run(dense)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        close(a, b, atol=1e-3)
    assert np.abs(got[1]).max() > 0.1


@pytest.mark.parametrize(("gating", "best"), [("softmax", 1), ("sigmoid", 2)])
def test_experts_in_groups(gating, best):
    """For each token by hand: the best groups, in them the best experts, and a shared one."""
    options = {"experts": 6, "per_token": 3, "groups": 3, "groups_per_token": 2, "scale": 1.7}
    m = nn.MixtureOfExperts(E, 7, **options, gating=gating, shared=5, rngs=nnx.Rngs(0))
    x = normal(0, B * T, E)
    logits = x @ np.asarray(m.router.kernel[...])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rank = p
    if gating == "sigmoid":
        p = 1 / (1 + np.exp(-logits))
        m.correction[...] = normal(1, 6)
        rank = p + normal(1, 6)
    chosen = []
    for row in rank:
        values = np.sort(row.reshape(3, 2))[:, -best:].sum(-1)
        kept = [e for e in range(6) if e // 2 in np.argsort(values)[-2:]]
        chosen.append(sorted(kept, key=lambda e: -row[e])[:3])
    assert any(set(c) != set(np.argsort(row)[-3:]) for c, row in zip(chosen, rank, strict=True))
    expected = np.array(m.shared(x))
    for t, experts in enumerate(chosen):
        for e in experts:
            gate, up, down = (np.asarray(k[...])[e] for k in (m.gate, m.up, m.down))
            y = np.asarray(jax.nn.silu(x[t] @ gate)) * (x[t] @ up) @ down
            expected[t] += 1.7 * p[t, e] / p[t, experts].sum() * y
    close(nnx.jit(lambda m, x: m(x))(m, x), expected, atol=1e-5)


def test_routing_is_not_rounded_to_half_precision():
    m = nn.MixtureOfExperts(E, 7, experts=4, per_token=1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    kernel = np.zeros((E, 4), np.float32)
    kernel[0] = 1 + np.arange(4) * 1e-4  # equal in bfloat16
    m.router.kernel[...] = kernel
    _, chosen = m.route(jnp.ones((1, E), jnp.bfloat16))
    assert chosen.tolist() == [[3]]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", jnp.tanh])
def test_feed_forward(activation, gated):
    from math import erf, sqrt

    formulas = {
        "gelu": np.vectorize(lambda a: a * 0.5 * (1 + erf(a / sqrt(2)))),
        "gelu_tanh": lambda a: a * 0.5 * (1 + np.tanh(sqrt(2 / np.pi) * (a + 0.044715 * a**3))),
        "relu": lambda a: np.maximum(a, 0),
        "silu": lambda a: a / (1 + np.exp(-a)),
    }
    x = normal(0, B, T, E)
    m = randomized(nn.FeedForward(E, 20, activation=activation, gated=gated, rngs=nnx.Rngs(0)))
    act = formulas.get(activation, np.tanh)
    up = linear(m.up, x)
    hidden = act(linear(m.gate, x)) * up if gated else act(up)
    close(np.asarray(m(x)), linear(m.down, hidden), atol=1e-4)


@pytest.mark.slow
def test_transformations_of_flax():
    x = normal(0, B, T, E)
    module = randomized(block(nnx.Rngs(0)))
    expected = module(x)
    close(nnx.jit(lambda m, x: m(x))(module, x), expected)
    graph, state = nnx.split(module)
    close(nnx.merge(graph, state)(x), expected)

    def loss(m, x):
        return jnp.sum(m(x) ** 2)

    plain = nnx.jit(nnx.grad(loss))(module, x)
    for leaf in jax.tree.leaves(plain):
        assert np.isfinite(leaf).all()
    kernel = plain["attention"]["sublayer"]["value"]["kernel"]
    assert np.abs(kernel[...]).max() > 0
    remat = nnx.grad(lambda m, x: jnp.sum(nnx.remat(lambda m, x: m(x))(m, x) ** 2))
    close(jax.tree.leaves(plain), jax.tree.leaves(nnx.jit(remat)(module, x)), atol=1e-4)


@pytest.mark.slow
def test_layers_under_scan_and_models_under_vmap():
    x, depth = normal(0, B, T, E), 3
    keys = jax.random.split(jax.random.key(0), depth)
    layers = nnx.vmap(lambda key: block(nnx.Rngs(key)))(keys)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def scanned(x, layer):
        return layer(x)

    graph, state = nnx.split(layers)
    each = [nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state)) for i in range(depth)]
    close(scanned(x, layers), functools.reduce(lambda y, layer: layer(y), each, x))
    together = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(layers, x)
    close(together, jnp.stack([layer(x) for layer in each]))


@pytest.mark.slow
def test_dropout_in_a_block_under_scan():
    keys = jax.random.split(jax.random.key(0), 2)
    layers = nnx.vmap(lambda key: block(nnx.Rngs(key), dropout_rate=0.3))(keys)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def scanned(x, layer):
        return layer(x)

    x = normal(0, B, T, E)
    assert np.abs(scanned(x, layers) - scanned(x, layers)).max() > 1e-3
    layers.eval()
    close(scanned(x, layers), scanned(x, layers))


# --- Embeddings, norms, pooling.


def test_embeddings():
    tokens, types = np.array([[3, 1, 4], [1, 5, 9]]), np.array([[0, 1, 1], [0, 0, 1]])
    m = nn.Embeddings(
        10, 6, positions="learned", max_length=4, types=2, scale=2.0, rngs=nnx.Rngs(0)
    )
    at = np.array([[1, 2, 3], [0, 0, 1]])
    expected = 2 * m.tokens[...][tokens] + m.positions[...][at] + m.types[...][types]
    close(m(tokens, positions=at, types=types), expected)
    close(m(tokens), 2 * m.tokens[...][tokens] + m.positions[...][:3] + m.types[...][0])
    close(m.logits(expected), expected @ m.tokens[...].T)
    plain = nn.Embeddings(10, 6, positions="sinusoidal", rngs=nnx.Rngs(0))
    close(plain(tokens), plain.tokens[...][tokens] + positions.sinusoidal(np.arange(3), 6))


@pytest.mark.parametrize("name", ["tokens", "positions", "types"])
@pytest.mark.parametrize("wrong", [-1, 5, 2**31 - 1])
def test_an_index_out_of_range_raises_and_is_nan_under_jit(name, wrong):
    embed = nn.Embeddings(5, 4, positions="learned", max_length=5, types=5, rngs=nnx.Rngs(0))
    good = dict.fromkeys(("tokens", "positions", "types"), np.array([[3, 1], [4, 0]], np.int32))
    bad = {**good, name: np.array([[3, wrong], [4, 0]], np.int32)}
    with pytest.raises(ValueError, match=f"{name} must be from 0 to 4, .*, got"):
        embed(**bad)
    found = nnx.jit(lambda embed, indices: embed(**indices))(embed, bad)
    assert np.isnan(found[0, 1]).all()
    right = np.array([[True, False], [True, True]])
    np.testing.assert_allclose(found[right], embed(**good)[right], rtol=1e-6)


def test_a_token_out_of_range_trains_no_row():
    embed = nn.Embeddings(5, 4, rngs=nnx.Rngs(0))
    total = nnx.jit(nnx.grad(lambda embed, tokens: embed(tokens).sum()))
    gradient = total(embed, np.array([[3, 5, -1]], np.int32))["tokens"][...]
    np.testing.assert_array_equal(gradient, np.eye(5)[3][:, None] * np.ones(4))


@pytest.mark.slow
def test_logits_of_a_token_out_of_range_are_nan_under_jit():
    layers = Layers(features=8, num_layers=1, num_heads=2)
    encoder = Encoder(EncoderConfig(13, layers), rngs=nnx.Rngs(0))
    head = classifier(encoder, ["a", "b"], pool="mean", rngs=nnx.Rngs(0))
    tokens = np.array([[3, 13, 1], [3, 2, 1]], np.int32)
    with pytest.raises(ValueError, match=r"tokens must be from 0 to 12, .* got 1 to 13"):
        head(tokens)
    found = nnx.jit(lambda model, tokens: model(tokens))(head, tokens)
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1:], head(tokens[1:]), rtol=1e-5)


def test_positions_that_start_at_a_later_row_of_the_table():
    m = nn.Embeddings(5, 6, positions="learned", max_length=3, first_position=2, rngs=nnx.Rngs(0))
    assert m.positions[...].shape == (5, 6)
    tokens, real = np.array([[4, 3, 1]]), np.array([[False, True, True]])
    close(m(tokens), m.tokens[...][tokens] + m.positions[...][2:])
    close(m(tokens, real=real)[:, 1:], m.tokens[...][tokens[:, 1:]] + m.positions[...][2:4])
    for at in (-1, 3):  # counted from the first position, whatever the rows
        with pytest.raises(ValueError, match=f"positions must be from 0 to 2, .* got .*{at}"):
            m(tokens, positions=np.array([[0, 1, at]]))


def test_the_output_of_the_attention_has_a_dropout_rate_of_its_own():
    sizes = {"features": E, "num_layers": 1, "num_heads": 3, "order": "post"}
    for given, expected in [(0.0, (0.0, 0.5)), (None, (0.5, 0.5)), (0.2, (0.2, 0.5))]:
        config = Layers(**sizes, dropout_rate=0.5, attention_output_dropout_rate=given)
        (block,) = Stack(config, causal=False, rngs=nnx.Rngs(0)).blocks
        assert (block.attention.dropout.rate, block.feed_forward.dropout.rate) == expected
    with pytest.raises(ValueError, match="attention_output_dropout_rate must be"):
        Layers(**sizes, attention_output_dropout_rate=1.5)


def test_norms_without_bias_and_a_first_layer_without_a_norm():
    sizes = {"features": E, "num_layers": 2, "num_heads": 3}
    stack = Stack(
        Layers(**sizes, norm_bias=False, first_norm=False), causal=False, rngs=nnx.Rngs(0)
    )
    first, second = stack.blocks
    assert first.attention.norm is None
    assert {x.norm.bias for x in (first.feed_forward, second.attention)} == {None}
    assert stack.norm.bias is None
    x = normal(0, B, T, E)
    close(first.attention(x), x + first.attention.sublayer(x))
    with pytest.raises(ValueError, match="first_norm must be True with scan, and with another"):
        Layers(**sizes, first_norm=False, order="post")
    with pytest.raises(ValueError, match="order must be 'pre' without a norm, got 'both'"):
        nn.Residual(lambda x: x, None, order="both")


def test_one_plus_rms_norm():
    x = normal(0, B, T, E)
    m = randomized(nn.OnePlusRMSNorm(E, epsilon=1e-3, rngs=nnx.Rngs(0)))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * (1 + np.asarray(m.scale[...]))
    close(np.asarray(m(x)), expected)
    assert nn.OnePlusRMSNorm(E, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x).dtype == jnp.bfloat16


def test_pooling_ignores_padding():
    x, real = normal(0, B, T, E), np.arange(T) < np.array([[3], [T]])
    x = np.where(real[..., None], x, np.nan)
    close(np.asarray(nn.pooling.mean(x, real))[0], x[0, :3].mean(0))
    pool = randomized(nn.AttentionPooling(E, 3, queries=2, rngs=nnx.Rngs(0)))
    assert pool(x, real).shape == (B, 2, E)
    close(pool(x, real)[0], pool(x[0, :3]))
    assert nn.pooling.mean(x, np.zeros_like(real)).tolist() == np.zeros((B, E)).tolist()
    first = nn.ClassToken(E, rngs=nnx.Rngs(0))
    close(first(x)[:, 0], jnp.broadcast_to(first.token[...], (B, E)))


@pytest.mark.slow
def test_dynamic_ntk_is_per_row():
    rotary = positions.Rotary(scaling=positions.DynamicNTK(2.0, 4))
    x, at = normal(0, B, T, 2, 8), np.stack([np.arange(T), np.arange(T) % 3])
    both = rotary(x, at)
    for i in range(B):
        close(both[i], rotary(x[i], at[i]))
        alone = positions.rotary(
            x[i], at[i], scaling=positions.DynamicNTK(2.0, 4), length=int(at[i].max()) + 1
        )
        close(both[i], alone)
