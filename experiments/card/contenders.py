"""Implementations of a call that are timed side by side: ours, those of JAX, of torch, and others.

Those of JAX are functions of query, key, value and, for documents, their ids, in the layout
``B T N H``; those of torch take ``B N T H``, which is theirs. What a library cannot do it refuses
here by ``NotImplementedError``, as ours does.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import attention_jax
from attention_jax.backends import PallasGPU
from experiments.card.calls import CAP, WAVE, Call
from experiments.card.parts import Skipped

Attend = Callable[..., Any]


def of_jax(dry: bool) -> dict[str, Callable[[Call], Attend]]:
    """By name, how to make the function of a call.

    Those that are most likely to take the process down come late.
    """
    pallas = PallasGPU(interpret=True) if dry else "pallas_gpu"
    return {
        "jax.nn, cudnn": functools.partial(_jax_nn, dry),
        "ours, cudnn": functools.partial(_ours, "cudnn"),
        "ours, pallas_gpu": functools.partial(_ours, pallas),
        "ours, auto": functools.partial(_ours, None),
        "ours, fa4": functools.partial(_ours, "fa4"),
        "fa4_jax": _fa4,
        "tokamax": _tokamax,
        "jax, Hopper kernel": _hopper,
        "ours, blockwise": functools.partial(_ours, "blockwise"),
    }


def of_torch() -> dict[str, Callable[[Call, bool], Attend]]:
    """By name, how to make the function of a call; the flag is whether it is a dry run."""
    return {"torch, SDPA": _torch_sdpa, "torch, flex": _torch_flex}


# What must be importable; a missing one is recorded once.
NEEDS = {
    "ours, fa4": "fa4_jax",
    "fa4_jax": "fa4_jax",
    "tokamax": "tokamax",
    "torch, SDPA": "torch",
    "torch, flex": "torch",
}


def missing(name: str) -> str | None:
    """The package that a contender needs and that is not installed."""
    needed = NEEDS.get(name)
    return needed if needed and importlib.util.find_spec(needed) is None else None


# --- JAX.


def _ours(implementation: Any, call: Call) -> Attend:
    def attend(q: Any, k: Any, v: Any, ids: Any = None) -> Any:
        options = call.options(ids)
        return attention_jax.attention(q, k, v, implementation=implementation, **options)

    return attend


def _jax_nn(dry: bool, call: Call) -> Attend:
    if call.kind in ("documents", "softcap", "alibi", "score_fn"):
        raise NotImplementedError(f"jax.nn has no {call.kind} for cuDNN")

    def attend(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=call.causal,
            local_window_size=None if call.window is None else (call.window - 1, 0),
            implementation="xla" if dry else "cudnn",
        )

    return attend


def _hopper(call: Call) -> Attend:
    """JAX's own example of a kernel for Hopper, with the blocks of its benchmark."""
    if call.kind not in ("dense", "causal"):
        raise NotImplementedError(f"JAX's Hopper kernel has no {call.kind}")
    if jax.default_backend() != "gpu":
        raise Skipped("JAX's Hopper kernel needs a Hopper card")
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(
        block_q=64,
        block_kv=128,
        max_concurrent_steps=2,
        causal=call.causal,
        block_q_dkv=64,
        block_kv_dkv=64,
        block_q_dq=64,
        block_kv_dq=64,
    )

    def attend(q: Any, k: Any, v: Any) -> Any:
        scaled = (q * jnp.asarray(call.H**-0.5, q.dtype)).astype(q.dtype)  # it does not scale
        return attention_mgpu.attention(scaled, k, v, config)

    return attend


def _fa4(call: Call) -> Attend:
    if call.kind in ("softcap", "alibi", "score_fn"):
        raise NotImplementedError(f"fa4_jax has no {call.kind}")
    from fa4_jax import document_mask, flash_attn  # type: ignore[import-not-found]

    def attend(q: Any, k: Any, v: Any, ids: Any = None) -> Any:
        return flash_attn(
            q,
            k,
            v,
            causal=call.causal and call.window is None,
            window_size=None if call.window is None else (call.window - 1, 0),
            mask_mod=None if ids is None else document_mask(ids),
        )

    return attend


def _tokamax(call: Call) -> Attend:
    if call.kind in ("documents", "alibi", "score_fn"):
        raise NotImplementedError(f"tokamax takes {call.kind} only as a bias of T x S")
    import tokamax  # type: ignore[import-not-found]

    def attend(q: Any, k: Any, v: Any) -> Any:
        return tokamax.dot_product_attention(
            q,
            k,
            v,
            is_causal=call.causal and call.window is None,
            local_window_size=None if call.window is None else (call.window - 1, 0),
            logits_soft_cap=CAP if call.kind == "softcap" else None,
        )

    return attend


def gradients(attend: Attend) -> Attend:
    """Forward and backward pass: the gradients, given a cotangent."""

    def both(q: Any, k: Any, v: Any, cotangent: Any, *rest: Any) -> Any:
        _, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *rest), q, k, v)
        return pull(cotangent)

    return both


# --- torch.


def torch_arrays(call: Call) -> list[Any]:
    """Query, key, value and a cotangent for torch, on the card if there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    query, key = (call.B, call.N, call.T, call.H), (call.B, call.K, call.S, call.H)
    return [
        torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        for shape in (query, key, key, query)
    ]


def _torch_sdpa(call: Call, dry: bool) -> Attend:
    if call.kind not in ("dense", "causal", "gqa", "decode"):
        raise NotImplementedError(f"torch's SDPA has no {call.kind} without an array of T x S")
    from torch.nn.functional import scaled_dot_product_attention

    grouped = call.N != call.K
    return lambda q, k, v: scaled_dot_product_attention(
        q, k, v, is_causal=call.causal, enable_gqa=grouped
    )


def _torch_flex(call: Call, dry: bool) -> Attend:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = None if call.documents is None else torch.tensor(call.documents, device=device)
    slopes = torch.tensor(_alibi_slopes(call.N), device=device)

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        inside = q >= k
        if call.window is not None:
            inside = inside & (q - k < call.window)
        if ids is not None:
            inside = inside & (ids[b, q] == ids[b, k])
        return inside

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        if call.kind == "softcap":
            return CAP * torch.tanh(s / CAP)
        if call.kind == "alibi":
            return s - slopes[h] * (q - k).abs()
        return s + torch.cos((q - k) * WAVE)

    blocks = None
    if call.causal:
        batch = None if ids is None else call.B
        blocks = create_block_mask(visible, batch, None, call.T, call.S, device=device)
    # On a CPU compiling takes a C++ compiler and half a minute.
    compiled = flex_attention if dry else torch.compile(flex_attention, dynamic=False)
    scored = score if call.kind in ("softcap", "alibi", "score_fn") else None
    return lambda q, k, v: compiled(
        q, k, v, score_mod=scored, block_mask=blocks, enable_gqa=call.N != call.K
    )


def _alibi_slopes(N: int) -> np.ndarray:
    """Those of ``scores.alibi()``."""
    from attention_jax import scores

    return np.asarray(scores.alibi().resolve(1, 1, N).slopes, np.float32)  # type: ignore[attr-defined]


def torch_gradients(attend: Attend, leaves: list[Any], cotangent: Any) -> Callable[[], Any]:
    """Forward and backward pass of torch."""
    import torch

    def both() -> Any:
        return torch.autograd.grad(attend(*leaves), leaves, cotangent)

    return both
