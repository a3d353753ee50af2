"""Which implementation runs, and what ``explain`` says of it."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attention, backends, explain, masks, scores
from attention_jax.backends.native import library
from attention_jax.core.axes import Sizes
from attention_jax.masks import block_map

B, T, S, N, K, H, D = 2, 11, 13, 4, 2, 3, 6
# Without a compiler the package installs without the native kernel.
FOR_LARGE = "native" if library.load().why_not is None else "blockwise"
each_platform = pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])


def shapes(T=T, S=S, dtype="float32"):
    sizes = (B, T, N, H), (B, S, K, H), (B, S, K, D)
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in sizes]


def arrays(T=T, S=S):
    return [jnp.ones(x.shape) for x in shapes(T, S)]


@pytest.fixture
def blocks_of_3_by_4(monkeypatch):
    monkeypatch.setitem(backends.IMPLEMENTATIONS, "blockwise", backends.Blockwise(3, 4))


@each_platform
def test_prints_a_table_for_every_platform(platform):
    explanation = explain(*shapes(512, 512), mask=masks.causal(), platform=platform)
    first, *rest = str(explanation).splitlines()
    assert first == f"attention on {platform}"
    assert explanation.platform == platform
    chosen = [line for line in rest if line.startswith("->")]
    assert [line.split()[1] for line in chosen] == [explanation.chosen]
    assert set(explanation.reasons) == set(explanation.extra_bytes) == set(backends.IMPLEMENTATIONS)
    for name, reason in explanation.reasons.items():
        assert reason
        assert any(name in line and reason in line for line in rest)
    assert "visited" in rest[-2]
    assert "GFLOP" in rest[-1]


def test_small_calls_take_xla_and_large_ones_the_kernel():
    assert explain(*shapes(), platform="cpu").chosen == "xla"
    assert explain(*shapes(512, 512), platform="cpu").chosen == FOR_LARGE
    named = explain(*shapes(), implementation="blockwise")
    assert (named.chosen, named.reasons["xla"]) == ("blockwise", "not asked for")
    both = explain(*shapes(), implementation=["xla", "blockwise"])
    assert (both.chosen, both.reasons["blockwise"]) == ("xla", "not needed: xla comes first")


def test_reasons_are_true_of_those_passed_over():
    large, small = (explain(*shapes(n, n), platform="cpu") for n in (512, 16))
    for explanation in (large, small, explain(*shapes(512, 512), platform="tpu")):
        able = {n: r for n, r in explanation.reasons.items() if not r.startswith("cannot")}
        first = able.pop(explanation.chosen)
        assert "not needed" not in first
        assert set(able.values()) == {f"not needed: {explanation.chosen} comes first"}
    assert "below" in small.reasons["xla"]
    lines = str(large).splitlines()
    assert ["extra" in line for line in lines[1:8]] == [
        not reason.startswith("cannot") for reason in large.reasons.values()
    ]


def test_the_choice_does_not_depend_on_examples_or_heads():
    for b, n in ((1, 1), (64, 32)):
        q, k = (jax.ShapeDtypeStruct((b, length, n, H), "float32") for length in (64, 64))
        assert explain(q, k, k, platform="cpu").chosen == (
            "native" if FOR_LARGE == "native" else "xla"
        )


def count(visible):
    """Blocks of 3 x 4 with a visible pair, and with nothing else, over all heads and examples."""
    visible = np.broadcast_to(visible, (B, N, T, S))
    parts = [visible[..., i : i + 3, j : j + 4] for i in range(0, T, 3) for j in range(0, S, 4)]
    visited = sum(int(p.any((-1, -2)).sum()) for p in parts)
    full = sum(int(p.all((-1, -2)).sum()) for p in parts)
    return {
        "block_q": 3,
        "block_k": 4,
        "visited": visited,
        "full": full,
        "skipped": len(parts) * B * N - visited,
    }


LENGTHS = np.array([5, 13], np.int32)
HIDING = np.random.default_rng(0).random((B, N, T, S)) < 0.05
ROWS, COLUMNS = np.arange(T)[:, None], np.arange(S)


@pytest.mark.parametrize(
    ("mask", "visible"),
    [
        (None, True),
        (masks.causal(), COLUMNS <= ROWS),
        (masks.causal(align="end"), COLUMNS <= ROWS + S - T),
        (masks.lengths(key=LENGTHS), LENGTHS[:, None, None, None] > COLUMNS),
        (masks.dense(HIDING), HIDING),
        (HIDING[0, 0], HIDING[0, 0]),
    ],
    ids=["none", "causal", "causal end", "lengths", "dense", "bool array"],
)
def test_explain_counts_blocks(mask, visible, blocks_of_3_by_4):
    expected = count(np.asarray(visible))
    for given in (shapes(), arrays()):
        explanation = explain(*given, mask=mask, implementation="blockwise")
        assert explanation.blocks == expected
    pairs = B * N * T * S
    assert explanation.dense_flops == 2 * pairs * (H + D)
    assert explanation.flops == min(
        explanation.dense_flops, 2 * expected["visited"] * 3 * 4 * (H + D)
    )


@pytest.mark.parametrize(
    "mask",
    [
        None,
        masks.causal(),
        masks.window(700, 60) | masks.prefix(1000),
        masks.chunked(1000) & ~masks.dilated(1),
        masks.dilated(1) & masks.lengths(query=70_000, key=50_001),
    ],
    ids=["none", "causal", "window or prefix", "nothing", "lengths"],
)
def test_large_maps_are_counted_as_small_ones(mask):
    sizes = {"block_q": 61, "block_k": 64, "B": 3, "N": 2}
    counts = block_map.count(mask, 70_001, 66_000, **sizes)
    assert block_map.LARGE_MAP < 1148 * 1032
    kinds = block_map.block_map(mask, 70_001, 66_000, block_q=61, block_k=64).kinds
    visited, full = (
        6 * int((kinds != block_map.EMPTY).sum()),
        6 * int((kinds == block_map.FULL).sum()),
    )
    assert counts == (visited, full, 6 * kinds.size - visited)


def test_a_million_tokens_are_explained_within_seconds():
    x = jax.ShapeDtypeStruct((1, 2**20, 8, 64), "float32")
    start = time.perf_counter()
    explanation = explain(x, x, x, mask=masks.causal(), platform="gpu")
    assert time.perf_counter() - start < 5
    size = explanation.blocks["block_q"]
    assert explanation.blocks["visited"] == 8 * (2**20 // size) * (2**20 // size + 1) // 2


def test_without_blocks_all_pairs_are_counted():
    explanation = explain(*shapes(), mask=masks.causal(), platform="cpu")
    assert (explanation.chosen, explanation.blocks) == ("xla", None)
    assert explanation.flops == explanation.dense_flops
    *_, blocks, forward = str(explanation).splitlines()
    assert blocks == "blocks: not counted for xla"
    assert forward.endswith("(100% of dense)")
    traced = masks.lengths(key=LENGTHS)
    assert explain(*shapes(), mask=traced).flops == explanation.dense_flops


def test_what_is_known_only_at_run_time_is_not_counted(blocks_of_3_by_4):
    said = []

    @jax.jit
    def run(q, k, v, lengths):
        said.append(explain(q, k, v, mask=masks.lengths(key=lengths), implementation="blockwise"))
        return q

    run(*arrays(), jnp.asarray(LENGTHS))
    (explanation,) = said
    assert explanation.blocks is None
    assert explanation.flops is None
    assert "known only at run time" in str(explanation)
    assert "at most" in str(explanation)


@each_platform
@pytest.mark.parametrize(
    "options", [{}, {"mask": masks.causal(), "score": scores.alibi()}, {"dropout_rate": 0.1}]
)
def test_positions_may_be_given_by_shape(options, platform):
    if "dropout_rate" in options:
        options = options | {"dropout_key": jax.random.key(0)}
    x = shapes(T=64, S=96)
    per_example, shared = np.zeros((B, 64), np.int32), np.arange(96, dtype=np.int64)
    positions = {"query_positions": per_example, "key_positions": shared}
    structs = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in positions.items()}
    given = explain(*x, platform=platform, **options, **positions)
    by_shape = explain(*x, platform=platform, **options, **structs)
    assert by_shape.chosen == given.chosen
    assert by_shape.reasons == given.reasons
    assert by_shape.extra_bytes == given.extra_bytes
    assert explain(*x, implementation="blockwise", **options, **structs).blocks is None
    with pytest.raises(ValueError, match=r"query_positions has shape \(7,\)"):
        explain(*x, query_positions=jax.ShapeDtypeStruct((7,), np.int32))


def test_an_empty_call_costs_nothing():
    for t, s in ((0, 5), (5, 0)):
        explanation = explain(*shapes(t, s), mask=masks.causal())
        assert explanation.flops == explanation.dense_flops == 0
        assert "GFLOP" in str(explanation)


def test_memory_counts_logits_or_tiles():
    small, large = (explain(*shapes(n, n), mask=masks.causal()) for n in (2048, 4096))
    assert large.extra_bytes["xla"] == 4 * small.extra_bytes["xla"]
    assert small.extra_bytes["xla"] >= 4 * B * N * 2048**2
    assert large.extra_bytes["blockwise"] <= 2 * small.extra_bytes["blockwise"]


# --- An implementation that cannot.


@pytest.fixture
def picky(monkeypatch):
    """A further implementation, first in line, that refuses softcap; what it ran."""
    ran = []

    class Picky(backends.XLA):
        def why_unsupported(self, spec):
            return "it knows no scores" if spec.score else None

        def run(self, call, spec):
            ran.append(spec)
            return super().run(call, spec)

    monkeypatch.setitem(backends.IMPLEMENTATIONS, "picky", Picky())
    order = backends.preference

    def first(spec):
        return (("picky", "the best"), *(each for each in order(spec) if each[0] != "picky"))

    monkeypatch.setattr(backends, "preference", first)
    jax.clear_caches()
    yield ran
    jax.clear_caches()


def test_unsupported_implementations_are_skipped(picky):
    expected = attention(*arrays(), score=scores.softcap(2.0), implementation="xla")
    out = attention(*arrays(), score=scores.softcap(2.0))
    np.testing.assert_array_equal(out, expected)
    out = attention(*arrays(), score=scores.softcap(2.0), implementation=("picky", "xla"))
    np.testing.assert_array_equal(out, expected)
    assert picky == []
    attention(*arrays())
    attention(*arrays(), implementation=["picky"])
    assert len(picky) == 2


def test_an_unsupported_name_raises_and_says_which_can(picky):
    for implementation in ("picky", ["picky"]):
        with pytest.raises(
            NotImplementedError, match=r"'picky' cannot: it knows no scores.*blockwise, xla"
        ):
            attention(*arrays(), score=scores.softcap(2.0), implementation=implementation)


def test_the_reason_is_explained(picky):
    explanation = explain(*shapes(), score=scores.softcap(2.0))
    assert explanation.chosen == "xla"
    assert explanation.reasons["picky"] == "cannot: it knows no scores"
    assert "cannot: it knows no scores" in str(explanation)
    assert explain(*shapes()).chosen == "picky"
    assert explain(*shapes()).reasons["picky"] == "the best"
    asked = explain(*shapes(), score=scores.softcap(2.0), implementation="picky")
    assert asked.chosen is None
    assert "->" not in str(asked)
    assert asked.reasons["picky"] == "cannot: it knows no scores"
    assert asked.reasons["xla"] == "not asked for"
    assert (asked.blocks, asked.flops) == (None, None)
    assert "GFLOP" not in str(asked)


# --- Kernels of other platforms.


def kernel_shapes(T=1024, S=1024, H=64, dtype="bfloat16"):
    return [jax.ShapeDtypeStruct((2, n, h, H), dtype) for n, h in ((T, 8), (S, 2), (S, 2))]


def test_a_gpu_takes_cudnn_where_it_computes_exactly_this_else_our_kernel():
    gpu = {"platform": "gpu"}
    assert explain(*kernel_shapes(), mask=masks.causal(), **gpu).chosen == "cudnn"
    for options in (
        {"score": scores.softcap(30.0)},
        {"mask": masks.window(100, 100)},
        {"return_lse": True},
        {"sinks": np.zeros(8, np.float32)},
    ):
        assert explain(*kernel_shapes(), **options, **gpu).chosen == "pallas_gpu"
    assert explain(*kernel_shapes(dtype="float32"), **gpu).chosen == "pallas_gpu"
    with jax.enable_x64(True):
        assert explain(*kernel_shapes(dtype="float64"), **gpu).chosen == "blockwise"


def test_blocks_are_those_of_the_kernel_that_is_chosen():
    options = {"mask": masks.causal(), "score": scores.softcap(30.0), "platform": "gpu"}
    assert explain(*kernel_shapes(), **options).blocks == {
        "block_q": 128,
        "block_k": 64,
        "visited": 2 * 8 * (2 + 4 + 6 + 8 + 10 + 12 + 14 + 16),
        "full": 2 * 8 * (0 + 2 + 4 + 6 + 8 + 10 + 12 + 14),
        "skipped": 2 * 8 * (14 + 12 + 10 + 8 + 6 + 4 + 2),
    }


def test_a_platform_without_kernels_runs_what_runs_everywhere():
    spec = backends.Spec(
        sizes=Sizes(B=(2,), T=600, S=600, K=2, G=4, H=64, D=64),
        dtype="float32",
        mask=None,
        score=(),
        scale=0.125,
        sinks=False,
        dropout=False,
        return_lse=False,
        platform="METAL",
    )
    choice = backends.choose(None, spec)
    assert choice.name == "blockwise"
    assert set(choice.reasons) == set(backends.IMPLEMENTATIONS)


def test_the_platform_is_that_of_the_mesh_in_use():
    card = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform="gpu")
    tpu = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=card)
    assert explain(*shapes()).platform == "cpu"
    with jax.sharding.use_abstract_mesh(mesh):
        assert explain(*shapes()).platform == "gpu"
    kinds = jax.sharding.AxisType
    for kind, chosen in ((kinds.Auto, "blockwise"), (kinds.Explicit, "splash")):
        devices = jax.sharding.AbstractMesh((4,), ("x",), (kind,), abstract_device=tpu)
        with jax.sharding.use_abstract_mesh(devices):
            explanation = explain(*kernel_shapes())
            assert (explanation.platform, explanation.chosen) == ("tpu", chosen)
            if kind == kinds.Auto:
                assert "shard_map" in explanation.reasons["splash"]
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("x",), abstract_device=tpu)
    ):
        assert explain(*kernel_shapes()).chosen == "splash"
    with jax.default_device("cpu"):
        assert explain(*shapes()).platform == "cpu"


def test_blocks_are_counted_whatever_the_mesh_in_use():
    q, k = (jax.ShapeDtypeStruct((2, 600, n, 64), jnp.float32) for n in (8, 2))
    mask = masks.lengths(key=np.array([600, 100]))
    blockwise = functools.partial(explain, implementation="blockwise")
    expected = blockwise(q, k, k, mask=mask).blocks
    device = jax.sharding.AbstractDevice("any", num_cores=None, platform="cpu")
    absent = jax.sharding.AbstractMesh((2,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(absent):
        assert blockwise(q, k, k, mask=mask).blocks == expected
    explicit = (jax.sharding.AxisType.Explicit,)
    with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=explicit)):
        split = jax.device_put(jnp.array([600, 100]), jax.sharding.PartitionSpec("x"))
        assert blockwise(q, k, k, mask=masks.lengths(key=split)).blocks == expected
