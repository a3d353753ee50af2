"""The modules: their formulas by hand, under Flax's transformations, with and without a cache."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import attention, masks, mechanisms, nn, positions, reference, scores

B, T, S, E = 2, 7, 5, 12


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(a, b, atol=2e-5):
    chex.assert_trees_all_close(a, b, rtol=2e-5, atol=atol)


def randomised(module, seed=0):
    """Every parameter random, since zeros and ones hide mistakes."""
    state = nnx.state(module, nnx.Param)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    nnx.update(module, jax.tree.unflatten(tree, leaves))
    return module


def new(features=E, num_heads=4, **options):
    return randomised(nn.MultiHeadAttention(features, num_heads, rngs=nnx.Rngs(0), **options))


def linear(module, x):
    y = x @ np.asarray(module.kernel[...])
    return y if module.bias is None else y + np.asarray(module.bias[...])


def by_hand(m, x, context=None, visible=None, cap=None, turn=None):
    """Heads one by one, in float64, each by the oracle."""
    context = x if context is None else context
    q = linear(m.query, x).reshape(*x.shape[:-1], m.num_heads, m.head_dim)
    k = linear(m.key, context).reshape(*context.shape[:-1], m.num_kv_heads, m.head_dim)
    v = linear(m.value, context).reshape(*context.shape[:-1], m.num_kv_heads, m.value_dim)
    if m.query_norm is not None:
        q, k = np.asarray(m.query_norm(q)), np.asarray(m.key_norm(k))
    if turn is not None:
        q, k = np.asarray(turn(q)), np.asarray(turn(k))
    sinks = None if m.sinks is None else np.asarray(m.sinks[...], np.float64)
    out = reference.attention(
        *(np.asarray(a, np.float64) for a in (q, k, v)),
        mask=visible,
        scores=[] if cap is None else [reference.Softcap(cap)],
        sinks=sinks,
        scale=m.scale,
    )
    flat = out.out.reshape(*x.shape[:-1], -1)
    if m.gate is not None:
        flat = flat / (1 + np.exp(-linear(m.gate, x)))
    return linear(m.out, flat)


OPTIONS = {
    "plain": {},
    "kv heads": {"num_kv_heads": 2},
    "widths": {"head_dim": 5, "value_dim": 2, "out_features": 9},
    "one head for all": {"num_kv_heads": 1, "bias": False},
    "biases": {"bias": ("query", "out")},
    "norm": {"norm": nnx.RMSNorm, "scale": 0.7},
    "sinks": {"sinks": True},
    "gate": {"gate": True, "value_dim": 4},
    "gate without bias": {"gate": True, "bias": ("key",)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_matches_the_formula(name):
    module, x = new(**OPTIONS[name]), normal(B, T, E)
    close(np.asarray(module(x), np.float64), by_hand(module, x))


def test_masks_and_scores_of_module_and_call():
    x, table = normal(B, T, E), normal(4, T, T, seed=1)
    module = new(mask=masks.causal(), score=scores.softcap(1.5))
    visible = np.tril(np.ones((T, T), bool)) & (np.arange(T) != 2)
    got = module(x, mask=np.arange(T) != 2)
    close(np.asarray(got, np.float64), by_hand(module, x, visible=visible, cap=1.5))
    both = module(x, score=scores.bias(table))
    separate = new(mask=masks.causal(), score=(scores.softcap(1.5), scores.bias(table)))
    close(both, separate(x))


def test_positions_rotate_queries_and_keys():
    x, at = normal(B, T, E), np.array([[0, 1, 2, 0, 1, 2, 3], [5, 6, 7, 8, 9, 10, 11]])
    module = new(rotary=positions.Rotary(theta=50.0, width=2))
    turn = functools.partial(positions.rotary, theta=50.0, width=2)
    close(
        np.asarray(module(x, positions=at), np.float64),
        by_hand(module, x, turn=lambda h: turn(h, at)),
    )
    counted = by_hand(module, x, turn=lambda h: turn(h, np.arange(T)))
    close(np.asarray(module(x), np.float64), counted)


@pytest.mark.parametrize("fused", [False, True])
def test_cross_attention(fused):
    x, context = normal(B, T, E), normal(B, S, 6, seed=1)
    module = new(context_features=6, num_kv_heads=2, fused=fused)
    got = module(x, context)
    close(got, module(x, module.keys_values(context)))
    if not fused:
        close(np.asarray(got, np.float64), by_hand(module, x, context))
    hidden = np.arange(S) < np.array([3, 5])[:, None]
    got = module(x, context, mask=hidden[:, None, None])
    close(got[0], module(x[0], context[0, :3]))


def test_fused_is_the_same_product():
    x = normal(B, T, E)
    fused, separate = new(fused=True, num_kv_heads=2), new(num_kv_heads=2)
    parts = ("query", "key", "value")
    kernel = jnp.concatenate([getattr(separate, p).kernel[...] for p in parts], axis=-1)
    bias = jnp.concatenate([getattr(separate, p).bias[...] for p in parts])
    fused.query_key_value.kernel[...], fused.query_key_value.bias[...] = kernel, bias
    fused.out = separate.out
    close(fused(x), separate(x))


def test_weights_are_the_probabilities():
    module, x = new(mask=masks.window(2, 1), sinks=True), normal(B, T, E)
    out, weights = module(x, return_weights=True)
    close(out, module(x))
    assert weights.shape == (B, 4, T, T)
    value = module._project(x, x, "value")[0]
    close(module.out(jnp.einsum("bnts,bsnd->btnd", weights, value).reshape(B, T, -1)), out)


CACHED = {
    "causal": {"mask": masks.causal()},
    "window, kv heads": {"mask": masks.window(2, 0), "num_kv_heads": 2},
    "rotary, norm": {"rotary": positions.Rotary(), "norm": nnx.RMSNorm, "head_dim": 4},
    "gate, sinks": {"gate": True, "sinks": True, "value_dim": 5},
    "fused": {"fused": True, "score": scores.softcap(2.0)},
    "scores of distances": {
        "mask": masks.causal(),
        "num_kv_heads": 2,
        "score": (scores.alibi(), scores.relative_bias(normal(8, 4), max_distance=6)),
    },
}


step = nnx.jit(lambda module, x, cache: module(x, cache=cache))


@pytest.mark.parametrize("cuts", [[4, 2, 1], [1] * T])
@pytest.mark.parametrize("name", CACHED)
def test_caches_do_not_change_the_result(name, cuts):
    module, x = new(**CACHED[name]), normal(B, T, E)
    cache, parts, start = module.init_cache((B,), T + 1), [], 0
    for n in cuts:
        out, cache = step(module, x[:, start : start + n], cache)
        parts.append(out)
        start += n
    whole = module(x, mask=masks.causal())
    close(jnp.concatenate(parts, axis=1), whole)


def test_rolling_caches_do_not_change_scores():
    score = scores.alibi(), scores.relative_bias(normal(8, 4), max_distance=6)
    module, x = new(mask=masks.window(2, 0), score=score), normal(B, T, E)
    cache, parts = module.init_cache((B,), 3, rolling=True), []
    for part in np.split(x, [2, 5, 6], axis=1):
        out, cache = step(module, part, cache)
        parts.append(out)
    close(jnp.concatenate(parts, axis=1), module(x))


def test_a_prefix_is_bidirectional_with_a_cache():
    module, x = new(mask=masks.prefix(3) | masks.causal()), normal(B, T, E)
    cache, parts = module.init_cache((B,), T), []
    for part in np.split(x, [4, 5, 6], axis=1):
        out, cache = module(part, cache=cache)
        parts.append(out)
    close(jnp.concatenate(parts, axis=1), module(x))
    with pytest.raises(ValueError, match="they must come in one call"):
        module(x[:, :2], cache=module.init_cache((B,), T))
    both = new(mask=masks.window(2, 2))
    with pytest.raises(ValueError, match="mask may let a query attend to later"):
        both(x, cache=both.init_cache((B,), T))


def test_weights_with_a_cache():
    module, x = new(), normal(B, T, E)
    _, weights, cache = module(x, cache=module.init_cache((B,), T), return_weights=True)
    assert weights.shape == (B, 4, T, T)
    close(weights, module(x, mask=masks.causal(), return_weights=True)[1])
    assert cache.length.tolist() == [T, T]


def test_attention_can_be_replaced():
    """A replacement gets the arguments that ours would get."""
    asked = []

    def uniform(query, key, value, **options):
        asked.append(options)
        mean = value.mean(axis=-3, keepdims=True)
        return jnp.broadcast_to(mean, (*query.shape[:-1], value.shape[-1]))

    mask, x = masks.window(1, 1), normal(B, T, E)
    m = new(attention=uniform, mask=mask, scale=0.5)
    value = linear(m.value, x).mean(axis=1, keepdims=True)
    close(m(x), np.broadcast_to(linear(m.out, value), (B, T, E)))
    assert asked == [{"mask": mask, "score": (), "sinks": None, "scale": 0.5}]
    new(attention=uniform, implementation="mine")(x)
    assert asked[1]["implementation"] == "mine"


def test_recorded_weights_are_those_of_each_module_and_the_model_is_unchanged():
    class Two(nnx.Module):
        def __init__(self):
            self.first = new(mask=masks.causal(), dropout_rate=0.5)
            self.second = new(num_kv_heads=2, sinks=True)
            self.unused = new()

        def __call__(self, x):
            return self.second(self.first(x))

    model, x = Two(), normal(B, T, E)
    result, found = nn.record_weights(model, x)
    assert list(found) == ["first", "second"]
    y, first = model.first(x, return_weights=True, deterministic=True)
    z, second = model.second(y, return_weights=True)
    close((result, found["first"], found["second"]), (z, first, second))
    assert model.first.attention is attention
    assert not model.first.deterministic
    _, again = jax.jit(nn.record_weights)(model, x)
    close(again["first"], first)


@pytest.mark.parametrize("name", mechanisms.NAMED)
def test_mechanisms_have_no_weights(name):
    attention = functools.partial(mechanisms.NAMED[name])
    module, x = new(attention=attention, mask=masks.causal()), normal(B, T, E)
    said = f"{name}.* has no softmax weights over keys"
    with pytest.raises(NotImplementedError, match=said):
        module(x, return_weights=True)
    with pytest.raises(NotImplementedError, match=said):
        nn.record_weights(module, x)


def test_a_module_that_is_not_called_need_not_have_weights():
    class Two(nnx.Module):
        def __init__(self):
            self.first, self.unused = new(), new(attention=mechanisms.NAMED["linear"])

        def __call__(self, x):
            return self.first(x)

    _, found = nn.record_weights(Two(), normal(B, T, E))
    assert list(found) == ["first"]


def test_recording_weights_requires_an_attention_module():
    with pytest.raises(ValueError, match="model must hold a MultiHeadAttention"):
        nn.record_weights(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), normal(1, 2))


def test_dropout_follows_train_and_eval():
    module, x = new(dropout_rate=0.5), normal(B, T, E)
    module.eval()
    close(module(x), module(x))
    kept = module(x)
    module.train()
    first, second = module(x), module(x)
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(first - kept).max() > 1e-3
    close(module(x, deterministic=True), kept)
    key = jax.random.key(3)
    close(module(x, rngs=key), module(x, rngs=key))
    close(module(x, rngs=nnx.Rngs(dropout=3)), module(x, rngs=nnx.Rngs(dropout=3)))
    off = nnx.view(module, deterministic=True)
    close(off(x), kept)


def test_dtypes_are_those_of_flax():
    x = normal(B, T, E)
    module = new(dtype=jnp.bfloat16)
    assert module(x).dtype == jnp.bfloat16
    assert module.query.kernel.dtype == jnp.float32
    assert module.init_cache((B,), 3).key.dtype == jnp.bfloat16
    assert (
        nn.MultiHeadAttention(E, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)).out.kernel.dtype
        == jnp.bfloat16
    )


def test_equals_the_flax_module():
    x = normal(B, T, E)
    theirs = nnx.MultiHeadAttention(4, E, decode=False, rngs=nnx.Rngs(1))
    module = new()
    for name in ("query", "key", "value"):
        part = getattr(module, name)
        part.kernel[...] = getattr(theirs, name).kernel[...].reshape(E, E)
        part.bias[...] = getattr(theirs, name).bias[...].reshape(E)
    module.out.kernel[...] = theirs.out.kernel[...].reshape(E, E)
    module.out.bias[...] = theirs.out.bias[...]
    mask = np.tril(np.ones((T, T), bool))
    close(module(x, mask=masks.causal()), theirs(x, mask=mask))


# --- Blocks.


def block(rngs, order="pre", cross=False, dropout_rate=0.0):
    return nn.Block(
        nn.MultiHeadAttention(E, 3, mask=masks.causal(), rngs=rngs),
        nn.FeedForward(E, 20, dropout_rate=dropout_rate, rngs=rngs),
        norm=functools.partial(nnx.LayerNorm, E, rngs=rngs),
        cross_attention=nn.MultiHeadAttention(E, 3, context_features=6, rngs=rngs)
        if cross
        else None,
        order=order,
        dropout_rate=dropout_rate,
        rngs=rngs,
    )


def test_norm_positions_of_a_block():
    x, context = normal(B, T, E), normal(B, S, 6, seed=1)
    for order in ("pre", "post", "both"):
        module = randomised(block(nnx.Rngs(0), order, cross=True))
        y = x
        for part in ("attention", "cross_attention", "feed_forward"):
            r = getattr(module, part)
            inner = r.norm(y) if order != "post" else y
            added = r.sublayer(inner, *[context] * (part == "cross_attention"))
            if order == "both":
                added = r.norm_after(added)
            y = y + added
            if order == "post":
                y = r.norm(y)
        close(module(x, context), y)


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
    x = normal(B, T, E)
    m = randomised(nn.FeedForward(E, 20, activation=activation, gated=gated, rngs=nnx.Rngs(0)))
    act = formulas.get(activation, np.tanh)
    up = linear(m.up, x)
    hidden = act(linear(m.gate, x)) * up if gated else act(up)
    close(np.asarray(m(x)), linear(m.down, hidden), atol=1e-4)


def test_transformations_of_flax():
    x = normal(B, T, E)
    module = randomised(block(nnx.Rngs(0)))
    expected = module(x)
    close(nnx.jit(lambda m, x: m(x))(module, x), expected)
    graph, state = nnx.split(module)
    close(nnx.merge(graph, state)(x), expected)

    def loss(m, x):
        return jnp.sum(m(x) ** 2)

    plain = nnx.grad(loss)(module, x)
    for leaf in jax.tree.leaves(plain):
        assert np.isfinite(leaf).all()
    kernel = plain["attention"]["sublayer"]["value"]["kernel"]
    assert np.abs(kernel[...]).max() > 0
    remat = nnx.grad(lambda m, x: jnp.sum(nnx.remat(lambda m, x: m(x))(m, x) ** 2))(module, x)
    close(jax.tree.leaves(plain), jax.tree.leaves(remat), atol=1e-4)
    jitted = nnx.jit(nnx.grad(loss))(module, x)
    close(jax.tree.leaves(plain), jax.tree.leaves(jitted), atol=1e-4)


@pytest.mark.slow
def test_layers_under_scan_and_models_under_vmap():
    x, depth = normal(B, T, E), 3
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

    x = normal(B, T, E)
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


def test_one_plus_rms_norm():
    x = normal(B, T, E)
    m = randomised(nn.OnePlusRMSNorm(E, epsilon=1e-3, rngs=nnx.Rngs(0)))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * (1 + np.asarray(m.scale[...]))
    close(np.asarray(m(x)), expected)
    assert nn.OnePlusRMSNorm(E, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x).dtype == jnp.bfloat16


def test_pooling_ignores_padding():
    x, real = normal(B, T, E), np.arange(T) < np.array([[3], [T]])
    x = np.where(real[..., None], x, np.nan)
    close(np.asarray(nn.pooling.mean(x, real))[0], x[0, :3].mean(0))
    pool = randomised(nn.AttentionPooling(E, 3, queries=2, rngs=nnx.Rngs(0)))
    assert pool(x, real).shape == (B, 2, E)
    close(pool(x, real)[0], pool(x[0, :3]))
    assert nn.pooling.mean(x, np.zeros_like(real)).tolist() == np.zeros((B, E)).tolist()
    first = nn.ClassToken(E, rngs=nnx.Rngs(0))
    close(first(x)[:, 0], jnp.broadcast_to(first.token[...], (B, E)))


def test_dynamic_ntk_is_per_row():
    rotary = positions.Rotary(scaling=positions.DynamicNTK(2.0, 4))
    x, at = normal(B, T, 2, 8), np.stack([np.arange(T), np.arange(T) % 3])
    both = rotary(x, at)
    for i in range(B):
        close(both[i], rotary(x[i], at[i]))
        alone = positions.rotary(
            x[i], at[i], scaling=positions.DynamicNTK(2.0, 4), length=int(at[i].max()) + 1
        )
        close(both[i], alone)


def test_gradients_reach_every_parameter():
    module = new(sinks=True, gate=True, norm=nnx.RMSNorm, rotary=positions.Rotary(), head_dim=4)
    grads = nnx.grad(lambda m: jnp.sum(jnp.sin(m(normal(B, T, E)))))(module)
    for path, leaf in nnx.to_flat_state(grads):
        assert np.abs(leaf.get_value()).max() > 1e-6, path


def test_modules_call_attention():
    """The module has no formula of its own."""
    module, x = new(implementation="blockwise"), normal(B, T, E)
    q, k, v = module._project(x, x, "query", "key", "value")
    heads = attention(q, k, v, implementation="blockwise")
    close(module(x), module.out(heads.reshape(B, T, -1)))
