"""One call of attention in our library, ``jax.nn`` and torch, to be timed side by side.

A contender is made from a ``Shape``: a function without arguments that runs to completion.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import attention_jax as aj
from experiments.bench.shapes import Shape


def ours(shape: Shape, *, backward: bool = False, **options: Any) -> Callable[[], Any]:
    mask = shape.mask
    return jitted(lambda q, k, v: aj.attention(q, k, v, mask=mask, **options), shape, backward)


def jax_nn(shape: Shape, *, backward: bool = False) -> Callable[[], Any]:
    window = None if shape.window is None else (shape.window - 1, 0)

    def attend(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=shape.causal, local_window_size=window, implementation="xla"
        )

    return jitted(attend, shape, backward)


def jitted(attend: Callable[..., Any], shape: Shape, backward: bool) -> Callable[[], Any]:
    q, k, v = shape.arrays()
    if not backward:
        forward = jax.jit(attend)
        return lambda: jax.block_until_ready(forward(q, k, v))
    cotangent = jnp.ones_like(q)
    both = jax.jit(lambda q, k, v: jax.vjp(attend, q, k, v)[1](cotangent))
    return lambda: jax.block_until_ready(both(q, k, v))


def torch_sdpa(shape: Shape, *, backward: bool = False) -> Callable[[], Any]:
    from torch.nn.functional import scaled_dot_product_attention

    def attend(q: Any, k: Any, v: Any) -> Any:
        grouped = shape.K is not None
        return scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=grouped)

    return _torch(attend, shape, backward)


def torch_flex(shape: Shape) -> Callable[[], Any]:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    documents = torch.tensor(shape.documents())

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        if shape.document:
            return documents[q] == documents[k]
        in_window = q - k < shape.window if shape.window else q >= k
        return (q >= k) & in_window

    blocks = create_block_mask(mask, None, None, shape.T, shape.S, device="cpu")
    compiled = torch.compile(flex_attention)
    return _torch(lambda q, k, v: compiled(q, k, v, block_mask=blocks), shape, False)


def _torch(attend: Callable[..., Any], shape: Shape, backward: bool) -> Callable[[], Any]:
    import torch

    q, k, v = (torch.tensor(np.asarray(x)).transpose(1, 2) for x in shape.arrays())
    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                return attend(q, k, v)

        return forward
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    cotangent = torch.ones_like(q)

    def both() -> Any:
        return torch.autograd.grad(attend(*leaves), leaves, cotangent)

    return both


def product() -> Callable[[], Any]:
    """A float32 matrix product by XLA, 2048 x 2048: a rate that dense attention can aim at."""
    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    multiply = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(multiply(x, x))


def total(size: int) -> Callable[[], Any]:
    """XLA sums this many float32 numbers: the rate at which memory is read."""
    x = jnp.ones(size)
    add = jax.jit(jnp.sum)
    return lambda: jax.block_until_ready(add(x))


def have_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


UNTIMED, TIMED = 2, 3  # runs in one turn of a contender


def timed_runs(repeats: int) -> int:
    """The number of timed runs in as many turns as give at least ``repeats``."""
    return TIMED * math.ceil(repeats / TIMED)


def in_turns(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each contender, of ``timed_runs(repeats)``.

    They take turns, so that other load on the machine affects all of them. A turn is two untimed
    and three timed runs: the first run after another library's is slower, by half for torch.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(timed_runs(repeats) // TIMED):
        for name, run in contenders.items():
            for _ in range(UNTIMED):
                run()
            for _ in range(TIMED):
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}
