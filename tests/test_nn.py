"""``MultiHeadAttention``: its formula by hand, with and without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, linear, mostly_slow, normal, randomized

from attention_jax import attention, masks, mechanisms, nn, positions, reference, scores

B, T, S, E = 2, 7, 5, 12


def new(features=E, num_heads=4, **options):
    return randomized(nn.MultiHeadAttention(features, num_heads, rngs=nnx.Rngs(0), **options))


call = nnx.jit(lambda module, *args, **options: module(*args, **options))


def by_hand(m, x, context=None, visible=None, cap=None, turn=None):
    """Heads one by one, in float64, each by the oracle."""
    context = x if context is None else context
    q = linear(m.query, x).reshape(*x.shape[:-1], m.num_heads, m.head_dim)
    k = linear(m.key, context).reshape(*context.shape[:-1], m.num_kv_heads, m.head_dim)
    v = linear(m.value, context).reshape(*context.shape[:-1], m.num_kv_heads, m.value_dim)
    if m.joint_norm:
        q, k = (
            np.asarray(norm(a.reshape(*x.shape[:-1], -1))).reshape(a.shape)
            for norm, a in ((m.query_norm, q), (m.key_norm, k))
        )
    elif m.query_norm is not None:
        q, k = np.asarray(m.query_norm(q)), np.asarray(m.key_norm(k))
    if turn is not None:
        q, k = np.asarray(turn(q)), np.asarray(turn(k))
    sinks = None if m.sinks is None else np.asarray(m.sinks[...], np.float64)
    out = reference.attention(
        *(np.asarray(a, np.float64) for a in (q, k, v)),
        mask=visible,
        score=[] if cap is None else [reference.Softcap(cap)],
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
    "joint norm": {"norm": nnx.RMSNorm, "joint_norm": True, "num_kv_heads": 2},
    "sinks": {"sinks": True},
    "gate": {"gate": True, "value_dim": 4},
    "gate without bias": {"gate": True, "bias": ("key",)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_matches_the_formula(name):
    module, x = new(**OPTIONS[name]), normal(0, B, T, E)
    close(np.asarray(call(module, x), np.float64), by_hand(module, x))


def test_masks_and_scores_of_module_and_call():
    x, table = normal(0, B, T, E), normal(1, 4, T, T)
    module = new(mask=masks.causal(), score=scores.softcap(1.5))
    visible = np.tril(np.ones((T, T), bool)) & (np.arange(T) != 2)
    got = call(module, x, mask=np.arange(T) != 2)
    close(np.asarray(got, np.float64), by_hand(module, x, visible=visible, cap=1.5))
    both = call(module, x, score=scores.bias(table))
    separate = new(mask=masks.causal(), score=(scores.softcap(1.5), scores.bias(table)))
    close(both, call(separate, x))


def test_positions_rotate_queries_and_keys():
    x, at = normal(0, B, T, E), np.array([[0, 1, 2, 0, 1, 2, 3], [5, 6, 7, 8, 9, 10, 11]])
    module = new(rotary=positions.Rotary(theta=50.0, width=2))
    turn = functools.partial(positions.rotary, theta=50.0, width=2)
    close(
        np.asarray(call(module, x, positions=at), np.float64),
        by_hand(module, x, turn=lambda h: turn(h, at)),
    )
    counted = by_hand(module, x, turn=lambda h: turn(h, np.arange(T)))
    close(np.asarray(call(module, x), np.float64), counted)


@pytest.mark.parametrize("fused", [False, True])
def test_cross_attention(fused):
    x, context = normal(0, B, T, E), normal(1, B, S, 6)
    module = new(context_features=6, num_kv_heads=2, fused=fused)
    got = call(module, x, context)
    kept = nnx.jit(lambda module, context: module.keys_values(context))(module, context)
    close(got, call(module, x, kept))
    if not fused:
        close(np.asarray(got, np.float64), by_hand(module, x, context))
    hidden = np.arange(S) < np.array([3, 5])[:, None]
    got = call(module, x, context, mask=hidden[:, None, None])
    close(got[0], call(module, x[0], context[0, :3]))


def test_a_fused_projection_is_the_same_product():
    x = normal(0, B, T, E)
    fused, separate = new(fused=True, num_kv_heads=2), new(num_kv_heads=2)
    parts = ("query", "key", "value")
    kernel = jnp.concatenate([getattr(separate, p).kernel[...] for p in parts], axis=-1)
    bias = jnp.concatenate([getattr(separate, p).bias[...] for p in parts])
    fused.query_key_value.kernel[...], fused.query_key_value.bias[...] = kernel, bias
    fused.out = separate.out
    close(call(fused, x), call(separate, x))


def test_weights_are_the_probabilities():
    module, x = new(mask=masks.window(2, 1), sinks=True), normal(0, B, T, E)
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
        "score": (scores.alibi(), scores.relative_bias(normal(0, 8, 4), max_distance=6)),
    },
}


step = nnx.jit(lambda module, x, cache: module(x, cache=cache))


QUICK_CACHED = {"window, kv heads", "rotary, norm", "scores of distances"}


@pytest.mark.parametrize("name", mostly_slow(CACHED, QUICK_CACHED))
def test_caches_do_not_change_the_result(name):
    module, x = new(**CACHED[name]), normal(0, B, T, E)
    cache, parts, start = module.init_cache((B,), T + 1), [], 0
    for n in [4, 2, 1]:
        out, cache = step(module, x[:, start : start + n], cache)
        parts.append(out)
        start += n
    whole = call(module, x, mask=masks.causal())
    close(jnp.concatenate(parts, axis=1), whole)


@pytest.mark.slow
def test_rolling_caches_do_not_change_scores():
    score = scores.alibi(), scores.relative_bias(normal(0, 8, 4), max_distance=6)
    module, x = new(mask=masks.window(2, 0), score=score), normal(0, B, T, E)
    cache, parts = module.init_cache((B,), 3, rolling=True), []
    for part in np.split(x, [2, 5, 6], axis=1):
        out, cache = step(module, part, cache)
        parts.append(out)
    close(jnp.concatenate(parts, axis=1), call(module, x))


@pytest.mark.slow
def test_a_prefix_is_bidirectional_with_a_cache():
    module, x = new(mask=masks.prefix(3) | masks.causal()), normal(0, B, T, E)
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
    module, x = new(), normal(0, B, T, E)
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

    mask, x = masks.window(1, 1), normal(0, B, T, E)
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

    model, x = Two(), normal(0, B, T, E)
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
    module, x = new(attention=attention, mask=masks.causal()), normal(0, B, T, E)
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

    _, found = nn.record_weights(Two(), normal(0, B, T, E))
    assert list(found) == ["first"]


def test_recording_weights_requires_an_attention_module():
    with pytest.raises(ValueError, match="model must hold a MultiHeadAttention"):
        nn.record_weights(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), normal(0, 1, 2))


def test_dropout_follows_train_and_eval():
    module, x = new(dropout_rate=0.5), normal(0, B, T, E)
    module.eval()
    close(module(x), module(x))
    undropped = module(x)
    module.train()
    first, second = module(x), module(x)
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(first - undropped).max() > 1e-3
    close(module(x, deterministic=True), undropped)
    key = jax.random.key(3)
    close(module(x, rngs=key), module(x, rngs=key))
    close(module(x, rngs=nnx.Rngs(dropout=3)), module(x, rngs=nnx.Rngs(dropout=3)))
    off = nnx.view(module, deterministic=True)
    close(off(x), undropped)


def test_dtypes_are_those_of_flax():
    x = normal(0, B, T, E)
    module = new(dtype=jnp.bfloat16)
    assert module(x).dtype == jnp.bfloat16
    assert module.query.kernel.dtype == jnp.float32
    assert module.init_cache((B,), 3).key.dtype == jnp.bfloat16
    assert (
        nn.MultiHeadAttention(E, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)).out.kernel.dtype
        == jnp.bfloat16
    )


def test_equals_the_flax_module():
    x = normal(0, B, T, E)
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


def test_gradients_reach_every_parameter():
    module = new(sinks=True, gate=True, norm=nnx.RMSNorm, rotary=positions.Rotary(), head_dim=4)
    loss = lambda module: jnp.sum(jnp.sin(module(normal(0, B, T, E))))  # noqa: E731
    grads = nnx.jit(nnx.grad(loss))(module)
    for path, leaf in nnx.to_flat_state(grads):
        assert np.abs(leaf.get_value()).max() > 1e-6, path


def test_modules_call_attention():
    """The module has no formula of its own."""
    module, x = new(implementation="blockwise"), normal(0, B, T, E)
    q, k, v = module._project(x, x, "query", "key", "value")
    heads = attention(q, k, v, implementation="blockwise")
    close(module(x), module.out(heads.reshape(B, T, -1)))
