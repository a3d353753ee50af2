"""Models: padding and caches do not change results, and every parameter learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import close, mostly_slow, randomized, slow

from attention_jax import masks, models, positions, scores
from attention_jax.models import Layers, Relative
from attention_jax.nn import Embeddings, record_weights

V, B, T, S = 13, 2, 9, 5
SMALL = Layers(features=12, num_layers=1, num_heads=3, hidden=16)


def tokens(seed, *shape):
    return np.random.default_rng(seed).integers(0, V, shape)


def layers(**changes):
    return dataclasses.replace(SMALL, **changes)


DECODERS = {
    "learned": models.DecoderConfig(V, SMALL, positions="learned", max_length=T),
    "sinusoidal, untied": models.DecoderConfig(V, SMALL, positions="sinusoidal", tied=False),
    "rotary, windows": models.DecoderConfig(
        V,
        layers(
            num_layers=3,
            windows=(3, None),
            rotary=(positions.Rotary(), None, positions.Rotary(100.0)),
            head_dim=4,
            num_kv_heads=1,
            norm="rms",
            gated=True,
            activation="silu",
        ),
    ),
    "relative, a window": models.DecoderConfig(
        V, layers(num_layers=2, relative=Relative(8, 6), windows=(4,), scale=1.0)
    ),
    "alibi, a mask": models.DecoderConfig(
        V,
        layers(
            num_layers=2,
            alibi=True,
            mask=masks.window(5, 0) | masks.prefix(2),
            windows=(None, 4),
        ),
    ),
    "capped, both norms": models.DecoderConfig(
        V,
        layers(
            rotary=positions.Rotary(),
            head_dim=6,
            windows=(2,),
            softcap=2.0,
            order="both",
            norm="one_plus_rms",
        ),
        embedding_scale=3.0,
        logits_softcap=4.0,
    ),
    "sinks, gate, norm of heads, post": models.DecoderConfig(
        V, layers(sinks=True, gate=True, query_key_norm=True, order="post"), positions="sinusoidal"
    ),
}


call = nnx.jit(lambda model, *args: model(*args))
step = nnx.jit(lambda model, x, caches, count: model(x, caches=caches, count=count))
padded = nnx.jit(lambda model, x, real: model(x, real=real))


def decoder(name):
    return randomized(models.Decoder(DECODERS[name], rngs=nnx.Rngs(0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_caches_do_not_change_the_result(name):
    model, x = decoder(name), tokens(0, B, T)
    whole = call(model, x)
    assert whole.shape == (B, T, V)
    for cuts in ([4, 4, 1], [1] * T):
        caches, start, parts = model.init_caches((B,), T), 0, []
        for n in cuts:
            logits, caches = step(model, x[:, start : start + n], caches, np.array([n, n]))
            parts.append(logits)
            start += n
        close(jnp.concatenate(parts, axis=1), whole, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["learned", "rotary, windows", "relative, a window", "alibi, a mask"]
)
def test_ragged_chunks_do_not_change_the_result(name):
    """Row 0 gets 4 tokens and then 3, row 1 gets 2 and then 4, in chunks with padding last."""
    model, x = decoder(name), tokens(0, B, T)
    whole, caches = call(model, x), model.init_caches((B,), T)
    first = np.stack([x[0, :4], np.concatenate([x[1, :2], [0] * 2])])
    second = np.stack([np.concatenate([x[0, 4:7], [0]]), x[1, 2:6]])
    a, caches = step(model, first, caches, np.array([4, 2]))
    b, caches = step(model, second, caches, np.array([3, 4]))
    close(a[0], whole[0, :4], atol=1e-4)
    close(a[1, :2], whole[1, :2], atol=1e-4)
    close(b[0, :3], whole[0, 4:7], atol=1e-4)
    close(b[1], whole[1, 2:6], atol=1e-4)


def test_caches_of_windows_are_no_larger_than_the_window():
    config = DECODERS["rotary, windows"]
    caches = models.Decoder(config, rngs=nnx.Rngs(0)).init_caches((B,), 100)
    assert [c.capacity for c in caches] == [3, 100, 3]
    assert [c.rolling for c in caches] == [True, False, True]
    assert caches[0].key.shape == (B, 3, 1, 4)  # one key head, as the layers have
    caches = models.Decoder(config, rngs=nnx.Rngs(0)).init_caches((B,), 100, spare=4)
    assert [c.capacity for c in caches] == [7, 100, 7]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rotary, windows", "relative, a window"])
def test_rollback_of_speculated_tokens(name):
    """Two tokens are speculated; one row rolls back both, the other one of them."""
    model, x = decoder(name), tokens(0, B, T)
    whole, caches = call(model, x), model.init_caches((B,), T + 2, spare=2)
    _, caches = step(model, x[:, :6], caches, np.array([6, 5]))
    tried = np.stack([x[0, 6:8] + 1, [x[1, 5], x[1, 6] + 1]]) % V
    _, caches = step(model, tried, caches, np.array([2, 2]))
    caches = tuple(c.rollback(np.array([6, 6])) for c in caches)
    logits, _ = step(model, x[:, 6:8], caches, np.array([2, 2]))
    close(logits, whole[:, 6:8], atol=1e-4)


def prefix_decoder(**changes):
    options = {"prefix_lm": True, "num_layers": 2, "rotary": positions.Rotary(), "head_dim": 4}
    config = models.DecoderConfig(V, layers(**options, **changes))
    return randomized(models.Decoder(config, rngs=nnx.Rngs(0)))


def test_the_prompt_of_a_prefix_lm_is_bidirectional():
    model, x = prefix_decoder(), tokens(0, B, T)
    lengths = np.array([4, 6])
    run = nnx.jit(lambda model, x: model(x, prefix=lengths))
    whole = np.asarray(run(model, x))
    for j in range(T):
        other = x.copy()
        other[:, j] = (other[:, j] + 1) % V
        changed = np.abs(np.asarray(run(model, other)) - whole).max(-1) > 1e-6
        for row, n in enumerate(lengths):
            i = np.arange(T)
            np.testing.assert_array_equal(changed[row], (j <= i) | ((j < n) & (i < n)))
    with pytest.raises(ValueError, match="prefix must be given for a prefix-LM"):
        model(x)


@pytest.mark.slow
def test_caches_of_a_prefix_lm_do_not_change_the_result():
    model, x = prefix_decoder(windows=(3, None)), tokens(0, B, T)
    lengths = np.array([4, 2])
    whole = nnx.jit(lambda model, x: model(x, prefix=lengths))(model, x)
    prompt, caches = step(model, x[:, :4], model.init_caches((B,), T), lengths)
    close(prompt[0], whole[0, :4], atol=1e-4)
    close(prompt[1, :2], whole[1, :2], atol=1e-4)
    rest = np.stack([x[0, 4:9], x[1, 2:7]])
    parts = []
    for part in np.split(rest, [4], axis=1):
        logits, caches = step(model, part, caches, np.full(B, part.shape[1]))
        parts.append(logits)
    close(jnp.concatenate(parts, 1), jnp.stack([whole[0, 4:9], whole[1, 2:7]]), atol=1e-4)
    with pytest.raises(ValueError, match="they must come in one call"):
        model(x[:, :3], caches=model.init_caches((B,), T), prefix=lengths)


def test_decoders_are_causal():
    model, x = decoder("learned"), tokens(0, B, T)
    other = x.copy()
    other[:, -1] = (other[:, -1] + 1) % V
    a, b = call(model, x), call(model, other)
    close(a[:, :-1], b[:, :-1])
    assert np.abs(a[:, -1] - b[:, -1]).max() > 1e-3


@pytest.mark.slow
def test_the_mask_of_the_layers_is_combined_with_others_and_alibi():
    i, j = np.arange(T)[:, None], np.arange(T)
    mask = masks.chunked(4)
    config = models.DecoderConfig(V, layers(mask=mask, alibi=True))
    model = randomized(models.Decoder(config, rngs=nnx.Rngs(0)))
    record = nnx.jit(lambda model: record_weights(model, tokens(0, 1, T))[1])
    (weights,) = record(model).values()
    np.testing.assert_array_equal(weights[0, 0] > 0, (j <= i) & (i // 4 == j // 4))
    without = dataclasses.replace(config, layers=layers(mask=mask))
    plain = models.Decoder(without, rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(model))
    (flat,) = record(plain).values()
    slopes = np.asarray(scores.alibi_slopes(3))
    far = np.exp(-slopes[:, None, None] * np.abs(i - j)) * flat[0]
    close(weights[0], far / far.sum(-1, keepdims=True))


def test_the_window_of_an_encoder_is_centered():
    config = models.EncoderConfig(V, layers(windows=(4,)), max_length=T)
    model, x = randomized(models.Encoder(config, rngs=nnx.Rngs(0))), tokens(0, 1, T)
    for j in range(T):
        other = x.copy()
        other[0, j] = (other[0, j] + 1) % V
        changed = np.abs(np.subtract(call(model, x), call(model, other))).max(axis=(0, 2)) > 1e-6
        i = np.arange(T)
        np.testing.assert_array_equal(changed, (i - 2 <= j) & (j <= i + 1))


ENCODERS = {
    "vectors": {},
    "tokens": {"head": "tokens", "types": 2, "embedding_norm": True},
    "classes": {"pooler": True},
    "mean": {"pool": "mean"},
}


@pytest.mark.parametrize("name", mostly_slow(ENCODERS, {"tokens", "mean"}))
def test_padding_does_not_change_the_result(name):
    config = models.EncoderConfig(
        V, layers(num_layers=2, order="post"), max_length=T, **ENCODERS[name]
    )
    classes = name in ("classes", "mean")
    if classes:
        config = models.ClassifierConfig(config, ("a", "b", "c", "d"))
    made = (models.Classifier if classes else models.Encoder)(config, rngs=nnx.Rngs(0))
    model = randomized(made)
    x, lengths = tokens(0, B, T), np.array([4, T])
    got = padded(model, x, np.arange(T) < lengths[:, None])
    alone = call(model, x[:1, :4])
    close(got[:1] if classes else got[:1, :4], alone)


@pytest.mark.slow
def test_masks_of_a_call_compose():
    model, x = decoder("learned"), tokens(0, B, T)
    documents = np.array([[0] * 4 + [1] * 5] * B)
    at = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * B)
    run = nnx.jit(lambda model, x: model(x, mask=masks.segments(documents), positions=at))
    packed = run(model, x)
    close(packed[:, :4], call(model, x[:, :4]))
    close(packed[:, 4:], call(model, x[:, 4:]))


KINDS = {
    "learned": ({"positions": "learned", "max_length": T}, {}),
    "sinusoidal": ({"positions": "sinusoidal"}, {}),
    "rotary": ({}, {"rotary": positions.Rotary(), "head_dim": 4}),
    "rotary, as long as the row": (
        {},
        {"rotary": positions.Rotary(scaling=positions.DynamicNTK(2.0, 4)), "head_dim": 4},
    ),
    "alibi": ({}, {"alibi": True}),
    "relative": ({}, {"relative": Relative(8, 6)}),
}
# Rows with their real tokens last, first, and in the middle.
SIDES = {"left": slice(3, None), "right": slice(0, T), "both": slice(1, T + 1)}
placed = nnx.jit(lambda model, x, real, at: model(x, real=real, positions=at))


def beside_padding(x, side, fill=-1):
    """Tokens ``[B T]`` with three of padding, which hold invalid tokens."""
    wide = np.full((len(x), x.shape[1] + 3), fill)
    wide[:, SIDES[side]] = x
    real = np.zeros(wide.shape, bool)
    real[:, SIDES[side]] = True
    return wide, real


@pytest.mark.parametrize(
    "kind", ["learned", *[pytest.param(k, marks=pytest.mark.slow) for k in [*KINDS][1:]]]
)
def test_positions_start_after_the_padding(kind):
    config, changes = KINDS[kind]
    config = models.DecoderConfig(V, layers(**changes), **config)
    model, x = randomized(models.Decoder(config, rngs=nnx.Rngs(0))), tokens(0, B, T)
    expected = call(model, x)
    for side, part in SIDES.items():
        wide, real = beside_padding(x, side)
        close(padded(model, wide, real)[:, part], expected)
        at = np.where(real, np.cumsum(real, axis=1) - 1, -1)
        close(placed(model, wide, real, at)[:, part], expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["learned", "rotary"])
def test_positions_of_an_encoder_start_after_the_padding(kind):
    config, changes = KINDS[kind]
    config = {"positions": None, **config}
    config = models.EncoderConfig(V, layers(**changes), types=2, **config)
    config = models.ClassifierConfig(config, ("a", "b", "c"))  # of the first token that is real
    model, x = randomized(models.Classifier(config, rngs=nnx.Rngs(0))), tokens(0, B, T)
    run = nnx.jit(lambda m, x, types, real: m(x, types=types, real=real))
    expected = run(model, x, x % 2, np.ones(x.shape, bool))
    for side in SIDES:
        wide, real = beside_padding(x, side)
        close(run(model, wide, np.where(real, wide % 2, 7), real), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sinusoidal", "rotary", "relative"])
def test_positions_of_both_sequences_start_after_the_padding(kind):
    config, changes = KINDS[kind]
    config = {"positions": None, **config}
    one = layers(**changes)
    config = models.EncoderDecoderConfig(V, one, one, **config)
    model = randomized(models.EncoderDecoder(config, rngs=nnx.Rngs(0)))
    source, target = tokens(0, B, T), tokens(1, B, T)
    expected = call(model, source, target)
    run = nnx.jit(lambda m, a, b, x, y: m(a, b, source_real=x, target_real=y))
    for here, there in [("left", "right"), ("both", "left"), ("right", "both")]:
        (a, x), (b, y) = beside_padding(source, here), beside_padding(target, there)
        close(run(model, a, b, x, y)[:, SIDES[there]], expected, atol=1e-4)


def test_padding_may_hold_any_integers_and_tokens_must_be_in_the_vocabulary():
    embed = Embeddings(V, 4, positions="learned", max_length=3, types=2, rngs=nnx.Rngs(0))
    x, real = np.array([[99, -5, 3, 4, 12]]), [[False, False, True, True, True]]
    got = embed(x, real=real, types=np.where(real, 1, 9), positions=np.array([[-1, 9, 2, 0, 1]]))
    expected = embed(x[:, 2:], types=1 + 0 * x[:, 2:], positions=np.array([[2, 0, 1]]))
    np.testing.assert_array_equal(got[:, 2:], expected)
    with pytest.raises(ValueError, match=r"tokens must be from 0 to 12, .* got 0 to 13"):
        embed(x + 1, real=real)
    with pytest.raises(ValueError, match=r"real must be bool of the tokens' shape \(1, 5\)"):
        embed(x, real=np.ones((2, 5), bool))
    with pytest.raises(ValueError, match=r"real must be bool .* got int64\(1, 5\)"):
        embed(x, real=np.ones((1, 5), int))


SEQUENCES = {
    "Vaswani": models.EncoderDecoderConfig(
        V, layers(order="post"), layers(order="post"), embedding_scale=12**0.5
    ),
    "T5": models.EncoderDecoderConfig(
        V,
        layers(relative=Relative(8, 6), scale=1.0, bias=False, norm="rms"),
        layers(relative=Relative(8, 6), scale=1.0, bias=False, norm="rms", num_layers=2),
        positions=None,
        tied=False,
        head_scale=0.5,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SEQUENCES)
def test_encoder_decoder(name):
    model = randomized(models.EncoderDecoder(SEQUENCES[name], rngs=nnx.Rngs(0)))
    source, target = tokens(0, B, S), tokens(1, B, T)
    real = np.arange(S) < np.array([3, S])[:, None]
    whole = nnx.jit(lambda m, a, b, real: m(a, b, source_real=real))(model, source, target, real)
    close(whole[:1], call(model, source[:1, :3], target[:1]), atol=1e-4)  # padding changes nothing
    memory = nnx.jit(lambda m, a, real: m.encode(a, real=real))(model, source, real)
    decode = nnx.jit(lambda m, x, memory, caches: m.decode(x, memory, caches=caches))
    caches, parts = model.init_caches((B,), T), []
    for cut in np.split(target, [4, 8], axis=1):
        logits, caches = decode(model, cut, memory, caches)
        parts.append(logits)
    close(jnp.concatenate(parts, axis=1), whole, atol=1e-4)


@pytest.mark.parametrize("pool", ["class", slow("mean"), slow("attention")])
def test_vision(pool):
    config = models.VisionConfig((4, 6), 2, SMALL, classes=5, channels=3, pool=pool)
    model = randomized(models.VisionTransformer(config, rngs=nnx.Rngs(0)))
    images = np.random.default_rng(0).normal(size=(B, 4, 6, 3)).astype(np.float32)
    assert call(model, images).shape == (B, 5)
    tokens = nnx.eval_shape(lambda model: model.tokens(images), model)
    assert tokens.shape == (B, 6 + (pool == "class"), 12)
    other = images.copy()
    other[:, :2, 2:4] += 1  # the second patch of the first row
    embed = nnx.jit(lambda model, x: model.embed(models.vision.patches(x, 2)))
    changed = np.abs(np.subtract(embed(model, images), embed(model, other))).max(axis=(0, 2))
    assert (changed > 1e-6).tolist() == [False, True, False, False, False, False]


MODELS = {
    "decoder": lambda rngs: models.Decoder(DECODERS["sinks, gate, norm of heads, post"], rngs=rngs),
    "encoder": lambda rngs: models.Encoder(
        models.EncoderConfig(V, SMALL, max_length=T, types=2, embedding_norm=True, head="tokens"),
        rngs=rngs,
    ),
    "encoder-decoder": lambda rngs: models.EncoderDecoder(SEQUENCES["T5"], rngs=rngs),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_learns(name):
    model, x = randomized(MODELS[name](nnx.Rngs(0))), tokens(0, B, T)

    def loss(model):
        logits = model(x, x) if name == "encoder-decoder" else model(x, **more)
        return optax.softmax_cross_entropy_with_integer_labels(logits, (x + 1) % V).mean()

    more = {"types": x % 2} if name == "encoder" else {}
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.Param)

    @nnx.jit
    @jax.numpy_dtype_promotion("standard")  # Optax's own
    def step(model, optimizer):
        now, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return now, gradients

    first, gradients = step(model, optimizer)
    for path, leaf in nnx.to_flat_state(gradients):
        assert np.abs(leaf.get_value()).max() > 1e-9, path
    for _ in range(14):
        last, _ = step(model, optimizer)
    assert last < 0.7 * first


def test_equal_configurations_are_equal():
    short = Layers(features=12, num_layers=4, num_heads=3, windows=(2, None))
    long = Layers(
        features=12,
        num_layers=4,
        num_heads=3,
        num_kv_heads=3,
        head_dim=4,
        hidden=48,
        windows=(2, None, 2, None),
    )
    assert short == long
    assert hash(short) == hash(long)


def test_rotary_positions_of_each_layer():
    near, far = positions.Rotary(), positions.Rotary(1e6)
    one, two = layers(rotary=near, num_layers=2), layers(rotary=(near, None), num_layers=3)
    assert one == layers(rotary=(near,), num_layers=2) == layers(rotary=(near, near), num_layers=2)
    assert one.rotaries == (near, near)
    assert two.rotary == two.rotaries == (near, None, near)
    assert (two.period, layers(rotary=(near, far), num_layers=4).period) == (3, 2)
    model = models.Decoder(models.DecoderConfig(V, two), rngs=nnx.Rngs(0))
    assert [block.attention.sublayer.rotary for block in model.stack.blocks] == [near, None, near]


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # Flax's own, in its norms
def test_bfloat16_computation_with_float32_logits():
    config = dataclasses.replace(DECODERS["learned"], layers=layers(dtype=jnp.bfloat16))
    model, x = models.Decoder(config, rngs=nnx.Rngs(0)), tokens(0, B, T)
    logits, caches = nnx.eval_shape(lambda m: m(x, caches=m.init_caches((B,), T)), model)
    assert logits.dtype == jnp.float32
    assert caches[0].key.dtype == jnp.bfloat16
    assert jax.tree.leaves(nnx.state(model, nnx.Param))[0].dtype == jnp.float32
