"""Results do not depend on the other examples, on block sizes, or on how heads are batched."""

import functools
import math

import chex
import helpers
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import default_options
from helpers import close, slow

from attention_jax import attention, masks, scores
from attention_jax.backends import Blockwise
from attention_jax.backends.blockwise import formulas

B, T, S, N, K, H, D = 3, 5, 7, 4, 2, 3, 6
pytestmark = pytest.mark.usefixtures("small_blocks")
each_implementation = pytest.mark.parametrize("implementation", ["xla", "blockwise"])
seeds = st.integers(0, 2**32 - 1)


inputs = functools.partial(helpers.inputs, B=(B,), T=T, S=S, N=N, K=K, H=H, D=D, dtype=np.float32)


# --- An example's result does not depend on the others: bit by bit.


@pytest.mark.slow
@each_implementation
def test_an_example_does_not_depend_on_the_others(implementation):
    q, k, v = inputs(B=(B,), T=33, S=47)
    mask = masks.causal(align="end") & masks.lengths(key=np.array([20, 0, 47], np.int32))
    options = {
        "score": (scores.alibi(), scores.softcap(5.0)),
        "dropout_rate": 0.3,
        "dropout_key": jax.random.key(0),
    }

    # The compiler promises the same bits only with its default options.
    @functools.partial(jax.jit, compiler_options=default_options())
    def run(q, k, v, mask):
        def loss(q, k, v):
            out, lse = attention(
                q, k, v, mask=mask, **options, implementation=implementation, return_lse=True
            )
            return jnp.sin(out).sum(), (out, lse)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    one = run(q[:1], k[:1], v[:1], jax.tree.map(lambda x: x[:1], mask))
    together = run(q, k, v, mask)
    spoilt = run(*(x.at[1:].set(jnp.nan) for x in (q, k, v)), mask)
    first = jax.tree.map(lambda x: x[:1], together)
    chex.assert_trees_all_equal(first, jax.tree.map(lambda x: x[:1], spoilt))
    if implementation == "xla":  # XLA may take another kernel for another number of examples
        close(one, first)
    else:
        chex.assert_trees_all_equal(one, first)


@each_implementation
def test_results_are_the_same_bits_each_time(implementation):
    q, k, v = inputs(T=33, S=47)
    run = functools.partial(attention, q, k, v, mask=masks.causal(), implementation=implementation)
    chex.assert_trees_all_equal(run(), run())


# --- Blocks.

OPTIONS = {
    "mask and scores": {
        "mask": masks.causal(1) & masks.lengths(key=np.array([7, 4, 0], np.int32)),
        "score": (
            scores.bias(np.linspace(-1, 1, B * T * S, dtype=np.float32).reshape(B, 1, T, S)),
            scores.softcap(2.0),
        ),
        "sinks": jnp.linspace(-1.0, 1.0, N),
        "dropout_rate": 0.3,
    },
    "static mask": {"mask": masks.window(1, 0, align="end") | masks.prefix(2)},
}


@pytest.mark.parametrize("name", ["static mask", slow("mask and scores")])
def test_the_block_size_does_not_matter(name):
    q, k, v = inputs()
    options = OPTIONS[name]
    key = jax.random.key(1)
    rate = options.get("dropout_rate", 0.0)
    extra = {"dropout_key": key} if rate else {}

    def loss(run, q, k, v):
        out, lse = run(q, k, v)
        return jnp.sin(out).sum() + jnp.cos(jnp.where(lse == -jnp.inf, 0, lse)).sum(), (out, lse)

    def run_by(implementation):
        return functools.partial(
            attention, **options, **extra, implementation=implementation, return_lse=True
        )

    gradient = functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    expected = jax.jit(gradient(functools.partial(loss, run_by("xla"))))(q, k, v)
    for block in [(2, 3), (5, 2)]:
        run = jax.jit(gradient(functools.partial(loss, run_by(Blockwise(*block)))))
        close(run(q, k, v), expected, 1e-4)


@pytest.mark.parametrize(
    ("heads", "T", "each"),
    [
        (1, 20, False),
        slow(8, 20, True),
        (100, 2, False),
        slow(1, 20, True),
        slow(8, 20, False),
        slow(100, 20, False),
    ],
)
def test_the_number_of_batched_heads_does_not_matter(heads, T, each, monkeypatch):
    q, k, v = inputs(B=(4,), T=T)
    mask = masks.window(2, 0)
    if each:
        mask &= masks.lengths(key=np.array([7, 4, 1, 6], np.int32))

    def run(implementation):
        def loss(q, k, v):
            options = {"mask": mask, "implementation": implementation, "return_lse": True}
            out, lse = attention(q, k, v, **options)
            return jnp.sin(out).sum(), (out, lse)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    looped = []

    def spy(static, *rest):
        looped.append(math.prod(static.levels))
        return over_query_blocks(static, *rest)

    over_query_blocks = formulas.over_query_blocks
    monkeypatch.setattr(formulas, "over_query_blocks", spy)
    jax.clear_caches()
    close(run(Blockwise(3, 4, batch_pairs=heads * min(T, 3) * 4)), run("xla"))
    # Few queries: only heads that share keys. Other blocks for each example: not those.
    most = N // K if T == 2 else N if each else 4 * N
    assert set(looped) == {4 * N // min(heads, most)}


@pytest.mark.slow
def test_batched_heads_where_a_mapped_axis_comes_last():
    """The mapped axis is the outermost, and after the one that is split in two."""
    small = Blockwise(3, 4, batch_pairs=8 * 3 * 4)  # 8 of the heads of 4 examples with 4 heads
    arrays = [jnp.stack([x, 2 * x], axis=-1) for x in inputs(B=(4,), T=20)]

    def run(implementation):
        attend = functools.partial(attention, implementation=implementation)
        mapped = jax.vmap(attend, in_axes=-1, out_axes=-1)
        return jax.jit(jax.value_and_grad(lambda x: jnp.sin(mapped(*x)).sum()))(arrays)

    close(run(small), run("xla"))
