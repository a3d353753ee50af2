"""Backends as configured values: what they compute and refuse; equal values compile once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, inputs

from attention_jax import attention, explain, masks, scores
from attention_jax.backends import XLA, Backend, Blockwise, PallasGPU, as_backends
from attention_jax.backends.pallas_gpu.launch import Tiles

Q, K, V = inputs(B=(2,), T=40, S=40, N=4, K=2, H=8, D=8, dtype=jnp.float32)
LARGE = [jax.ShapeDtypeStruct((1, 512, 2, 64), "bfloat16")] * 3


@pytest.mark.parametrize("backend", [Blockwise(16, 24), Blockwise(block_k=8), XLA()])
def test_a_configured_backend_computes_the_same(backend):
    options = {"mask": masks.causal(), "score": scores.softcap(3.0)}
    expected = attention(Q, K, V, **options)
    close(attention(Q, K, V, **options, implementation=backend), expected)
    assert explain(Q, K, V, **options, implementation=backend).chosen == str(backend)


def test_equal_values_compile_once():
    traced = []

    @dataclasses.dataclass(frozen=True)
    class Counting(XLA):
        size: int = 3

        def run(self, call, spec):
            traced.append(spec)
            return super().run(call, spec)

    for implementation in (Counting(), Counting(3), (Counting(size=3),)):
        attention(Q, K, V, implementation=implementation)
    assert len(traced) == 1
    attention(Q, K, V, implementation=Counting(4))
    assert len(traced) == 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Blockwise(0), ValueError, "block_q must be at least 1, got 0"),
        (lambda: Blockwise(batch_pairs=-1), ValueError, "batch_pairs must be at least 0"),
        (lambda: PallasGPU(None, Tiles(24, 16, 2, 1)), ValueError, "backward must have blocks of"),
    ],
)
def test_wrong_values_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_class_alone_is_not_a_backend():
    for implementation in (Blockwise, ("xla", Blockwise)):
        with pytest.raises((TypeError, ValueError), match=r"pass Blockwise\(\), not the class"):
            as_backends(implementation)


def test_a_backend_is_a_frozen_dataclass():
    class Plain(Backend):
        pass

    with pytest.raises(TypeError, match="Plain must be a frozen dataclass"):
        attention(Q, K, V, implementation=Plain())


def test_two_backends_may_not_print_alike():
    def make(factor):
        @dataclasses.dataclass(frozen=True)
        class Same(XLA):
            def run(self, call, spec):
                out, lse = super().run(call, spec)
                return factor * out, lse

        return Same()

    with pytest.raises(ValueError, match="another backend prints as Same"):
        attention(Q, K, V, implementation=(make(1), make(2)))


def test_tiles_that_do_not_fit_are_refused():
    huge = PallasGPU(forward=Tiles(4096, 4096, 8, 3))
    explanation = explain(*LARGE, platform="gpu", implementation=huge)
    assert explanation.chosen is None
    assert "shared memory" in explanation.reasons[str(huge)]
    assert explain(*LARGE, platform="gpu", implementation=PallasGPU()).chosen == "PallasGPU()"


def test_explain_knows_the_scale_where_attention_does():
    @dataclasses.dataclass(frozen=True)
    class NeedsScale(XLA):
        def why_unsupported(self, spec):
            return "scale is an array" if spec.scale is None else None

    assert explain(Q, K, V, implementation=NeedsScale()).chosen is None
    with pytest.raises(NotImplementedError, match="scale is an array"):
        attention(Q, K, V, implementation=NeedsScale())
    assert explain(Q, K, V, platform="gpu", implementation=NeedsScale()).chosen == "NeedsScale()"


@pytest.mark.parametrize("T", [40, 300])
def test_explain_without_keys(T):
    query, empty = jnp.ones((2, T, 4, 8)), jnp.ones((2, 0, 4, 8))
    assert explain(query, empty, empty).flops == 0


def test_explain_takes_numpy_float64_as_jax_does():
    x = np.ones((1, 300, 2, 64))
    assert explain(x, x, x, score=scores.alibi(), platform="gpu").chosen == "pallas_gpu"
