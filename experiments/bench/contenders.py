"""One call of attention in our library, ``jax.nn`` and torch, to be timed side by side.

A contender is made from a ``Shape``: a function without arguments that runs to completion.
"""

from __future__ import annotations

import importlib.util
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

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
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


def have_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def in_turns(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each contender. They take turns, after two runs each to warm up."""
    for run in contenders.values():
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}
