"""The table of implementations: what each supports, and which is tried first where.

An implementation is two functions: ``why_unsupported(spec)`` says in words what it cannot do,
or None; ``run(call, spec)`` does it. Nothing is probed at import and nothing is remembered: the
choice depends on the ``Spec`` of a call alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from attention_jax.backends import blockwise, cudnn, pallas_gpu, splash, xla
from attention_jax.backends.call import Call
from attention_jax.backends.call import Spec as Spec
from attention_jax.core.compat import mesh_platform
from attention_jax.core.pytree import leaves


class Implementation(NamedTuple):
    """One way to compute attention."""

    why_unsupported: Callable[[Spec], str | None]
    run: Callable[[Call, Spec], tuple[jax.Array, jax.Array]]
    extra_bytes: Callable[[Spec], int]  # forward, beside arguments and results
    # Queries and keys per block, where cost follows the blocks that a mask leaves; else None.
    block: Callable[[Spec], tuple[int, int] | None] = lambda spec: None


IMPLEMENTATIONS: dict[str, Implementation] = {
    "blockwise": Implementation(
        why_unsupported=lambda spec: None,
        run=lambda call, spec: blockwise.run(call, spec.sizes),
        extra_bytes=lambda spec: blockwise.extra_bytes(spec.sizes, spec.dtype, spec.mask),
        block=lambda spec: blockwise.block_sizes(spec.sizes.T, spec.sizes.S, spec.mask),
    ),
    "xla": Implementation(
        why_unsupported=lambda spec: None,
        run=lambda call, spec: xla.run(call, spec.sizes),
        extra_bytes=lambda spec: xla.extra_bytes(spec.sizes, spec.dtype),
    ),
    "cudnn": Implementation(cudnn.why_unsupported, cudnn.run, cudnn.extra_bytes),
    "pallas_gpu": Implementation(
        pallas_gpu.why_unsupported, pallas_gpu.run, pallas_gpu.extra_bytes, pallas_gpu.block
    ),
    "splash": Implementation(splash.why_unsupported, splash.run, splash.extra_bytes, splash.block),
}

# The kernels of each platform, in the order they are tried, before what runs everywhere.
KERNELS = {
    "cpu": (),
    "gpu": (
        ("cudnn", "the vendor's fused kernel, where it computes exactly this"),
        ("pallas_gpu", "linear memory, any mask and score, skips empty blocks"),
    ),
    "tpu": (("splash", "JAX's own kernel: linear memory, skips empty blocks"),),
}

# On a CPU, heads this short are done sooner in one batched product, which XLA fuses with the
# softmax, than in a loop over heads: `python -m experiments bench --only short`. The choice must
# not depend on the number of heads or examples, which may differ between training and serving.
MATERIALISE_UP_TO = 256

# So are a few queries of a cache, whose mask holds its positions: a step of decoding is itself in
# a loop, in which XLA copies the cache for every loop inside. GPT-2's size, ms per token, blockwise
# and in one piece: 43 and 17 with room for 1,000 tokens, 64 and 22 for 2,000, 152 and 45 for 6,000.
MOST_PAIRS_OF_A_CACHE = 2**20


def platform() -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``: where what is being traced will run.

    The platform of the mesh in use (``jax.set_mesh``), which may be one that this machine does not
    have: so programs are compiled ahead of time. Else that of the default device, if one is set,
    else the default backend.
    """
    device = mesh_platform() or jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend()
    name = device if isinstance(device, str) else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def partitioned() -> bool:
    """Whether the mesh in use has axes over which the compiler itself splits the program.

    It cannot split a kernel. Inside ``shard_map`` each device has a program of its own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = jax.sharding.AxisType.Manual
    sizes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(kind != manual and size > 1 for kind, size in sizes)


def preference(spec: Spec) -> tuple[tuple[str, str], ...]:
    """All implementations in the order they are tried, each with the reason for its place."""
    kernels = KERNELS.get(spec.platform, ())
    everywhere = _everywhere(spec)
    elsewhere = tuple(
        (name, f"for a {place}")
        for place, others in KERNELS.items()
        if place != spec.platform
        for name, _ in others
    )
    return (*kernels, *everywhere, *elsewhere)


def _everywhere(spec: Spec) -> tuple[tuple[str, str], ...]:
    """What needs no kernel of a platform's own."""
    if spec.sizes.symbolic_lengths:
        return (
            ("xla", "symbolic lengths: nothing of it depends on blocks"),
            ("blockwise", "its blocks depend on lengths"),
        )
    if max(spec.sizes.T, spec.sizes.S) <= MATERIALISE_UP_TO:
        return (
            ("xla", f"T and S are at most {MATERIALISE_UP_TO}: faster in one piece"),
            ("blockwise", f"loops pay off only for T or S above {MATERIALISE_UP_TO}"),
        )
    few = spec.sizes.T <= blockwise.FEW_QUERIES and bool(leaves(spec.mask))
    if few and spec.sizes.T * spec.sizes.S <= MOST_PAIRS_OF_A_CACHE:
        return (
            ("xla", "few queries and a mask of arrays, as of a cache: faster in one piece"),
            ("blockwise", "inside a decoding loop its own loops would copy the cache"),
        )
    return (
        ("blockwise", "linear memory, skips empty blocks"),
        ("xla", "makes arrays of T x S: blockwise comes first"),
    )


def why_unsupported(name: str, spec: Spec) -> str | None:
    """What of a call an implementation cannot do, in words; None where it can all."""
    if spec.sizes.symbolic_lengths and name != "xla":
        return "T or S is symbolic, and its blocks depend on lengths that are known while tracing"
    if spec.sizes.symbolic_batch and name not in ("xla", "blockwise"):
        return "B is symbolic, and its kernel is launched for a number of examples that is known"
    return IMPLEMENTATIONS[name].why_unsupported(spec)


def choose(implementation: str | Sequence[str] | None, spec: Spec) -> tuple[str, dict[str, str]]:
    """The implementation to run, and for each that there is the reason for or against it.

    Raises:
      NotImplementedError: none of those asked for supports the call.
    """
    why_not = {name: why_unsupported(name, spec) for name in IMPLEMENTATIONS}
    order = preference(spec)
    if implementation is None:
        asked = tuple(name for name, _ in order)
    else:
        asked = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    able = [name for name in asked if why_not[name] is None]
    if not able:
        others = [name for name, reason in why_not.items() if reason is None]
        raise NotImplementedError(
            "; ".join(f"implementation {name!r} cannot: {why_not[name]}" for name in asked)
            + f". These can: {', '.join(others) or 'none'}"
        )
    chosen = able[0]
    reasons = {}
    for name, place in order:
        refusal = why_not[name]
        if refusal is not None:
            reasons[name] = f"cannot: {refusal}"
        elif implementation is None:
            reasons[name] = place
        elif name == chosen:
            reasons[name] = "asked for"
        elif name in asked:
            reasons[name] = f"asked for after {chosen}"
        else:
            reasons[name] = "not asked for"
    return chosen, reasons


def check_names(implementation: Any) -> str | tuple[str, ...] | None:
    """The argument ``implementation`` in hashable form; raises for what it cannot be."""
    if implementation is None:
        return None
    if isinstance(implementation, str):
        names: tuple[Any, ...] = (implementation,)
    elif isinstance(implementation, Sequence):
        names = tuple(implementation)
    else:
        raise TypeError(
            f"implementation must be a name, a sequence of names or None, got "
            f"{type(implementation).__name__}"
        )
    known = ", ".join(IMPLEMENTATIONS)
    if not names:
        raise ValueError(f"implementation must name at least one of {known}, got an empty sequence")
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"implementation must be one of {known}, or None, got {name!r}")
    return implementation if isinstance(implementation, str) else names
