"""The native kernel beyond the contract: layouts, orders of summation, and what it refuses."""

import concurrent.futures
import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import default_options
from contract import needs_native
from helpers import close, inputs, normal, slow, value_and_gradients
from jax import export

from attention_jax import attention, cache, explain, masks, scores
from attention_jax.backends import Native
from attention_jax.backends.native import library

pytestmark = needs_native


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def both(arrays, **options):
    """A loss and its gradients by the kernel and by the formula."""
    return [
        value_and_gradients(attention, *arrays, implementation=name, return_lse=True, **options)
        for name in ("native", "xla")
    ]


# --- What it computes.


@pytest.mark.parametrize(
    "mask",
    [
        None,
        masks.causal(),
        slow(masks.window(100, 7, align="end")),
        slow(masks.chunked(300) | masks.causal(-200)),
        masks.segments(np.arange(900) // 250, np.arange(1000) // 250) & masks.causal(),
        slow(masks.dilated(3) & masks.causal()),
        masks.prefix(450) | masks.causal(),
    ],
    ids=str,
)
def test_several_blocks_of_keys(mask):
    close(*both(inputs(B=(2,), T=900, S=1000, N=2, K=1, H=24, D=16), mask=mask), 1e-4)


@pytest.mark.parametrize(
    ("T", "G", "dtype"),
    [
        (1, 8, jnp.float32),
        slow(1, 8, jnp.bfloat16),
        slow(3, 5, jnp.float16),
        slow(16, 1, jnp.bfloat16),
    ],
)
def test_few_queries(T, G, dtype):
    arrays = inputs(B=(2,), T=T, S=2500, N=3 * G, K=3, H=40, D=24, dtype=dtype)
    lengths = masks.lengths(key=jnp.array([2100, 900]))
    for mask in (lengths, lengths & masks.causal(align="end")):
        few, many = (
            attention(*arrays, mask=mask, implementation=Native(few_queries=n)) for n in (16, 0)
        )
        close(few, many, 1e-5 if dtype == jnp.float32 else 1e-2)


def test_values_that_are_not_finite_stay_with_the_queries_that_see_them():
    q, k, v = inputs(B=(), T=40, S=40, N=2, K=2, H=8, D=8)
    v, k = v.at[30].set(jnp.nan), k.at[35].set(jnp.inf)
    for few in (0, 64):
        out = attention(q, k, v, mask=masks.causal(), implementation=Native(few_queries=few))
        assert jnp.isfinite(out[:30]).all()
        assert jnp.isnan(out[30:]).all()


# Along axes of size 1, and those in front that are absent, entries are shared.
SHARED_BIAS = [
    *(((2, 1, 300, 1), 1), ((2, 6, 300, 200), 2), ((2, 1, 300, 200), 2)),
    *(((6, 300, 200), 2), ((1, 200), 2), ((300, 1), 1), ((), 2)),
    *(slow((300, 200), 2), slow((6, 1, 200), 1), slow((2, 6, 1, 1), 2), slow((2, 1, 1, 1), 1)),
]


@pytest.mark.parametrize(("shape", "K"), SHARED_BIAS)
def test_gradient_of_a_bias_that_heads_queries_or_keys_share(shape, K):
    """Threads that add to the same entries take turns: each run gives the same bits."""
    arrays = inputs(B=(2,), T=300, S=200, N=6, K=K, H=8, D=8)
    bias = jnp.asarray(normal(5, *shape))

    def derivative(implementation):
        def loss(q, k, v, bias):
            out = attention(q, k, v, score=scores.bias(bias), implementation=implementation)
            return jnp.sin(out).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))

    step = derivative(Native(block_k=96))
    first = step(*arrays, bias)
    close(first, derivative("xla")(*arrays, bias), 1e-4)
    for _ in range(30):
        equal(step(*arrays, bias), first)


def test_scores_of_distance_and_their_gradients():
    arrays = inputs(B=(2,), T=60, S=70, N=3, K=1, H=8, D=8)
    slopes, table = jnp.asarray(normal(1, 3)), jnp.asarray(normal(2, 8, 3))

    def fn(q, k, v, slopes, table, **options):
        score = (
            scores.alibi(slopes, offset=jnp.array([3, 5])),
            scores.softcap(3.0),
            scores.relative_bias(table, max_distance=20),
        )
        return attention(q, k, v, score=score, mask=masks.causal(), **options)

    ours, right = (
        value_and_gradients(fn, *arrays, slopes, table, implementation=name)
        for name in ("native", "xla")
    )
    close(ours, right, 1e-4)


# --- Transformations.


@pytest.mark.parametrize("axes", [(0, 0, 0), (1, None, 2), (3, 1, None), (None, 2, 0), (2, 3, 3)])
def test_vmap_over_any_axes(axes):
    q, k, v = inputs(B=(5,), T=20, S=30, N=2, K=1, H=8, D=8)
    moved = [
        x[0] if a is None else jnp.moveaxis(x, 0, a) for x, a in zip((q, k, v), axes, strict=True)
    ]
    scale = jnp.linspace(0.1, 1.0, 5)

    def total(name):
        def fn(q, k, v, scale):
            one = attention(q, k, v, scale=scale, mask=masks.causal(), implementation=name)
            return jnp.sin(one).sum()

        def loss(q, k, v, scale):
            return jax.vmap(fn, (*axes, 0))(q, k, v, scale).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*moved, scale)

    close(total("native"), total("xla"), 1e-5)


def test_tangents_and_second_derivatives():
    q, k, v = inputs(B=(), T=9, S=11, N=2, K=1, H=4, D=4)

    def loss(q, name):
        return jnp.sin(attention(q, k, v, mask=masks.causal(2), implementation=name)).sum()

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(name):
        tangent = jax.jvp(lambda q: loss(q, name), (q,), (jnp.cos(q),))
        return tangent, jax.grad(lambda q: (jax.grad(loss)(q, name) ** 2).sum())(q)

    close(derivatives("native"), derivatives("xla"), 1e-4)


def test_an_exported_program_has_no_code_of_this_machine():
    q, k, v = inputs(B=(2,), T=40, S=40, N=2, K=1, H=8, D=8)

    def fn(q, k, v):
        return jax.grad(
            lambda q: attention(q, k, v, mask=masks.causal(), implementation="native").sum()
        )(q)

    exported = export.export(jax.jit(fn), platforms=["cpu", "tpu"])(q, k, v)
    assert "attention_backward_jax" not in exported.mlir_module()
    assert "attention_backward_jax" in jax.jit(fn).lower(q, k, v).as_text()
    close(exported.call(q, k, v), fn(q, k, v))


# --- One order of summation.


def test_batch_independence_is_bitwise():
    arrays = inputs(B=(3,), T=300, S=500, N=4, K=2, H=16, D=16)
    together = value_and_gradients(attention, *arrays, implementation="native")
    for b in range(3):
        alone = value_and_gradients(attention, *(x[b] for x in arrays), implementation="native")
        equal(alone[1], [x[b] for x in together[1]])


PROGRAM = """
import hashlib, os, sys
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[: int(sys.argv[1])])
import jax, numpy as np
from attention_jax import attention, masks, scores
rng = np.random.default_rng(0)
q, k, v = (rng.normal(size=(1, n, 1, 16)).astype(np.float32) for n in (700, 1500, 1500))
bias = rng.normal(size=(1500,)).astype(np.float32)
def loss(q, k, v, bias):
    score = scores.bias(bias)
    out = attention(q, k, v, mask=masks.causal(800), score=score, implementation="native")
    return (out ** 2).sum()
gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, bias)
print([hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in gradients])
"""


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_threads():
    def run(threads):
        env = {x: y for x, y in os.environ.items() if x != "XLA_FLAGS"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(threads)], capture_output=True, text=True, env=env
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(1) == run(2)


def test_sixteen_python_threads_do_not_wait_for_one_another():
    arrays = inputs(B=(2,), T=200, S=200, N=4, K=2, H=8, D=8)
    step = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v, implementation="native").sum()))
    expected = step(*arrays)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        runs = [pool.submit(step, *arrays) for _ in range(64)]
        for run in runs:
            equal(run.result(timeout=60), expected)


FORK = """
import os, warnings
import jax, numpy as np
from attention_jax import attention, reference
warnings.simplefilter("ignore")  # JAX warns of forks: its own threads are lost in the child
x = np.random.default_rng(0).normal(size=(1, 200, 2, 8)).astype(np.float32)
step = jax.jit(jax.grad(lambda x: attention(x, x, x, implementation="native").sum()))
before = np.asarray(step(x))
child = os.fork()
if child == 0:
    reference.attention(x, x, x)
    os._exit(0)
after = np.asarray(step(x))
assert os.waitpid(child, 0)[1] == 0
assert (before == after).all()
"""


@pytest.mark.slow
def test_a_fork_leaves_parent_and_child_running():
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)


# --- What it refuses.


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"score": scores.score_fn(lambda s, b, n, q, k: s)},
            "score ScoreFn: its kernel supports softcap, bias",
        ),
        ({"score": (scores.softcap(3.0),) * 9}, "9 scores: it takes at most 8"),
        ({"platform": "gpu"}, "its kernel is for CPUs, the platform is gpu"),
        ({"mask": masks.mask_fn(lambda b, n, q, k: q != k)}, "would take 512 MiB as bits"),
        (
            {
                "query_positions": np.arange(2**14, dtype=np.int32),
                "dropout_rate": 0.1,
                "dropout_key": jax.random.key(0),
            },
            "dropout with query_positions or key_positions",
        ),
    ],
)
def test_explain_says_what_it_cannot_do(options, message):
    x = shape(1, 2**14, 16, 8)
    assert message in explain(x, x, x, **options).reasons["native"]


def test_it_takes_no_float64():
    x = shape(1, 300, 2, 8, dtype="float64")
    with jax.enable_x64(True):
        assert "float64: it takes float32" in explain(x, x, x).reasons["native"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Native(block_k=100), "block_k must be a multiple of 96 up to 384, got 100"),
        (
            lambda: Native(instructions="sse"),
            "instructions must be one of avx512bf16, avx512, avx2, ",
        ),
        (lambda: Native(few_queries=-1), "few_queries must be at least 0"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@needs_native
def test_values_of_width_0_are_left_to_others():
    x = inputs(B=(), T=64, S=64, N=1, K=1, H=4, D=4)
    out = attention(*x[:2], x[2][..., :0])
    assert out.shape == (64, 1, 0)


def test_instructions_that_the_processor_lacks_are_refused():
    missing = sorted({*library.INSTRUCTIONS} - {*library.load().instructions})[0]
    with pytest.raises(NotImplementedError, match=f"this processor has .*, not {missing}"):
        attention(
            *inputs(B=(), T=4, S=4, N=1, K=1, H=4, D=4), implementation=Native(instructions=missing)
        )


def test_without_the_library_another_backend_runs(monkeypatch):
    monkeypatch.setattr(library, "path", lambda: pathlib.Path("missing"))
    library.load.cache_clear()
    try:
        x = shape(1, 2048, 2, 64)
        explanation = explain(x, x, x)
        assert explanation.chosen == "blockwise"
        assert explanation.reasons["native"] == "cannot: not built (no C++ compiler when installed)"
    finally:
        monkeypatch.undo()
        library.load.cache_clear()


@pytest.mark.parametrize("K", [4, slow(1)])
def test_decoding_updates_the_cache_in_place(K):
    """A loop that appends to a cache and attends to it copies the cache nowhere."""
    x = jnp.ones((1, 1, 4, 8))
    start = cache.init((1,), capacity=300, num_kv_heads=K, head_dim=8)

    def step(state, _):
        out, state = cache.attend(state, x, x[:, :, :K], x[:, :, :K], implementation="native")
        return state, out

    @functools.partial(jax.jit, donate_argnums=0)
    def decode(state):
        return jax.lax.scan(step, state, length=300)

    text = decode.lower(start).compile(default_options()).as_text()
    assert "attention_forward" in text
    copies = re.findall(r"= f32\[(?:1,)?300,\S* copy\(", text)
    assert not copies


def test_a_nan_that_is_alone_in_a_chunk_of_keys_reaches_the_queries_that_see_it():
    q, k, v = inputs(B=(), T=1, S=2048, N=1, K=1, H=8, D=8)
    for mask, keys in (
        (None, k.at[1024:].set(jnp.nan)),
        (masks.dense(jnp.isin(jnp.arange(2048), jnp.array([3, 1500]))), k.at[1500].set(jnp.nan)),
    ):
        for few in (0, 4):
            out = attention(q, keys, v, mask=mask, implementation=Native(few_queries=few))
            assert jnp.isnan(out).all()
