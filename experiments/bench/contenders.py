"""What is measured side by side: one call of attention by ours, ``jax.nn`` and torch.

A contender is made from a ``Shape`` and is a function of no arguments that runs to completion.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import attention_jax as aj


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call: B examples, T queries, S keys, N heads, K key heads, width H = D."""

    T: int
    S: int
    N: int
    B: int = 1
    K: int | None = None
    H: int = 64
    causal: bool = False
    window: int | None = None

    def __str__(self) -> str:
        kind = "causal" if self.causal else f"window {self.window}" if self.window else "dense"
        heads = f"{self.N}" if self.K is None else f"{self.N}/{self.K}"
        lengths = f"{self.S}" if self.T == self.S else f"{self.T} x {self.S}"
        return f"{heads} heads, {lengths}, {kind}"

    @property
    def flops(self) -> int:
        """Of the forward pass, counted dense."""
        return 4 * self.B * self.N * self.T * self.S * self.H

    @property
    def mask(self) -> aj.Mask | None:
        """Our mask."""
        if self.window:
            return aj.masks.window(self.window - 1, 0)
        return aj.masks.causal() if self.causal else None

    def arrays(self) -> list[jax.Array]:
        """Query, key, value."""
        K = self.K or self.N
        shapes = (self.T, self.N), (self.S, K), (self.S, K)
        keys = jax.random.split(jax.random.key(0), 3)
        return [
            jax.random.normal(key, (self.B, length, heads, self.H))
            for key, (length, heads) in zip(keys, shapes, strict=True)
        ]


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

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        near = q - k < shape.window if shape.window else q >= k
        return (q >= k) & near

    blocks = create_block_mask(visible, None, None, shape.T, shape.S, device="cpu")
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
    """Median seconds of each, run in turns."""
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
