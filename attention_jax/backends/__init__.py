"""The backends, and the order in which they are tried.

=============  ====================================================================
``xla``        the formula in plain JAX, with ``T x S`` arrays; fast for short lengths
``blockwise``  linear memory on every platform, any mask and score
``native``     our CPU kernel in C++: linear memory, most masks and scores
``cudnn``      NVIDIA's fused kernel, for the calls that it computes accurately
``pallas_gpu`` our GPU kernels: linear memory, most masks and scores
``splash``     JAX's own TPU kernel
``fa4``        FlashAttention 4 from the package fa4-jax, only if asked for by name
=============  ====================================================================

Nothing is probed at import and no state is kept: the choice depends only on the ``Spec`` of a call.
In place of a name, ``attention`` also takes a configured value, such as ``Blockwise(block_q=128)``,
or a ``Backend`` of your own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from attention_jax.backends.blockwise.run import FEW_QUERIES, Blockwise
from attention_jax.backends.call import Backend, Spec
from attention_jax.backends.cudnn import CuDNN
from attention_jax.backends.fa4 import FA4
from attention_jax.backends.native.run import Native
from attention_jax.backends.pallas_gpu.run import PallasGPU
from attention_jax.backends.splash import Splash
from attention_jax.backends.xla import XLA
from attention_jax.core.compat import mesh_platform
from attention_jax.core.pytree import leaves

__all__ = [
    "FA4",
    "IMPLEMENTATIONS",
    "XLA",
    "Backend",
    "Blockwise",
    "Choice",
    "CuDNN",
    "Native",
    "PallasGPU",
    "Spec",
    "Splash",
    "as_backends",
    "choose",
    "partitioned",
    "platform",
    "preference",
]

IMPLEMENTATIONS: dict[str, Backend] = {
    "blockwise": Blockwise(),
    "xla": XLA(),
    "native": Native(),
    "cudnn": CuDNN(),
    "pallas_gpu": PallasGPU(),
    "splash": Splash(),
    "fa4": FA4(),
}

# The kernels of each platform in the order they are tried, with the reason to choose them.
KERNELS = {
    "cpu": (("native", "our kernel in C++: linear memory, skips empty blocks"),),
    "gpu": (
        ("cudnn", "NVIDIA's fused kernel: linear memory"),
        ("pallas_gpu", "our GPU kernels: linear memory, skips empty blocks"),
    ),
    "tpu": (("splash", "JAX's own kernel: linear memory, skips empty blocks"),),
}

# On a CPU, xla is faster than native for shorter calls, in which preparing blocks takes most of the
# time. Milliseconds of native and xla: 32 heads of 16 x 16, 0.20 and 0.11; 128 heads of 32 x 32,
# 0.68 and 0.78 (two cores of an AMD EPYC).
NATIVE_FROM = 33

# Without native, sequences up to this length are faster as one batched product, which XLA fuses
# with the softmax, than in blockwise's loop over heads: `python -m experiments bench --only short`.
# The choice must not depend on heads or batch size, which may differ between training and serving.
MATERIALIZE_UP_TO = 256

# The same holds for a few queries against a cache, whose mask holds positions: a decoding step is
# part of a loop, and XLA copies the cache for every loop inside it. Milliseconds per token of a
# model of GPT-2's size with blockwise and xla: 43 and 17 for a capacity of 1,000 tokens, 64 and 22
# for 2,000, 152 and 45 for 6,000.
MOST_PAIRS_OF_A_CACHE = 2**20

ONLY_BY_NAME = "only if asked for by name"

# A name of IMPLEMENTATIONS, or a configured value.
Named = str | Backend


def platform() -> str:
    """The platform that the program being traced will run on: ``"cpu"``, ``"gpu"`` or ``"tpu"``.

    It is that of the mesh in use (``jax.set_mesh``), which this machine need not have when it
    compiles ahead of time; otherwise that of the default device, if set, or of the default backend.
    """
    device = mesh_platform() or jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend()
    name = device if isinstance(device, str) else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def partitioned() -> bool:
    """Whether the mesh in use has Auto axes, over which the compiler partitions the program.

    The compiler cannot partition a kernel. Inside ``shard_map`` every device runs its own program,
    and so it does for arrays on Explicit axes, see ``heads``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[name] > 1 for name in mesh.auto_axes)


def preference(spec: Spec) -> tuple[tuple[str, str], ...]:
    """All implementations in the order they are tried, each with the reason to choose it.

    Those that run only if asked for come last.
    """
    kernels = KERNELS.get(spec.platform, ())
    everywhere = _everywhere(spec)
    ranked = (*kernels, *everywhere)
    T, S = spec.sizes.T, spec.sizes.S
    if spec.platform == "cpu" and not spec.sizes.symbolic_lengths and max(T, S) < NATIVE_FROM:
        short = ("xla", f"fastest where T and S are below {NATIVE_FROM}")
        ranked = (short, *(each for each in ranked if each[0] != "xla"))
    unranked = (name for name in IMPLEMENTATIONS if name not in dict(ranked))
    return (*ranked, *((name, ONLY_BY_NAME) for name in unranked))


def _everywhere(spec: Spec) -> tuple[tuple[str, str], ...]:
    """The backends that run on every platform, in the order in which they are tried."""
    T, S = spec.sizes.T, spec.sizes.S
    in_blocks = "linear memory, skips empty blocks"
    if spec.sizes.symbolic_lengths:
        return (
            ("xla", "its program does not depend on the lengths, which are symbolic"),
            ("blockwise", in_blocks),
        )
    if max(T, S) <= MATERIALIZE_UP_TO:
        return (
            ("xla", f"faster than loops where T and S are at most {MATERIALIZE_UP_TO}"),
            ("blockwise", in_blocks),
        )
    if T <= FEW_QUERIES and leaves(spec.mask) and T * S <= MOST_PAIRS_OF_A_CACHE:
        return (
            ("xla", "faster than loops for a few queries and a mask that holds arrays"),
            ("blockwise", in_blocks),
        )
    return (("blockwise", in_blocks), ("xla", "computes all T x S pairs at once"))


class Choice(NamedTuple):
    """The backend that runs a call, and the reasons."""

    name: str | None  # None: none of those asked for supports the call
    backends: dict[str, Backend]  # configured ones, then all that have a name, as they are tried
    reasons: dict[str, str]  # for or against each
    refusal: str  # what to raise if there is none

    @property
    def backend(self) -> Backend:
        """The chosen backend.

        Raises:
          NotImplementedError: none of those asked for supports the call.
        """
        if self.name is None:
            raise NotImplementedError(self.refusal)
        return self.backends[self.name]


def choose(asked: tuple[Named, ...] | None, spec: Spec) -> Choice:
    """The first backend of those asked for, or of ``preference``, that supports the call."""
    places = dict(preference(spec))
    given = {_label(x): x for x in asked or () if isinstance(x, Backend)}
    backends = given | {name: IMPLEMENTATIONS[name] for name in places}
    names = tuple(places) if asked is None else tuple(map(_label, asked))
    why_not = {name: backend.why_unsupported(spec) for name, backend in backends.items()}
    name = next((name for name in names if why_not[name] is None), None)

    def reason(other: str) -> str:
        if (refused := why_not[other]) is not None:
            return f"cannot: {refused}"
        if asked is not None and other not in names:
            return "not asked for"
        if other == name:
            return places[other] if asked is None else "asked for"
        if asked is None and places[other] == ONLY_BY_NAME:
            return ONLY_BY_NAME
        return f"not needed: {name} comes first"

    able = [other for other in (*given, *IMPLEMENTATIONS) if why_not[other] is None]
    refusal = "; ".join(f"implementation {x!r} cannot: {why_not[x]}" for x in names)
    return Choice(
        name,
        backends,
        {other: reason(other) for other in backends},
        f"{refusal}. These can: {', '.join(able) or 'none'}",
    )


def _label(x: Named) -> str:
    return str(x)


def as_backends(implementation: Any) -> tuple[Named, ...] | None:
    """The argument ``implementation`` as a tuple; None chooses.

    Raises:
      TypeError, ValueError: it is not a name, a ``Backend``, or a sequence of these.
    """
    if implementation is None:
        return None
    asked: tuple[Any, ...]
    if isinstance(implementation, (str, Backend)):
        asked = (implementation,)
    elif isinstance(implementation, Sequence):
        asked = tuple(implementation)
    else:
        is_class = isinstance(implementation, type)
        got = implementation.__name__ if is_class else type(implementation).__name__
        raise TypeError(
            f"implementation must be a name, a Backend, a sequence of these or None, got {got}"
            + (f": pass {got}(), not the class" if is_class else "")
        )
    known = ", ".join(IMPLEMENTATIONS)
    if not asked:
        raise ValueError(f"implementation must name at least one of {known}, got an empty sequence")
    for x in asked:
        if not isinstance(x, Backend) and not (isinstance(x, str) and x in IMPLEMENTATIONS):
            hint = f": pass {x.__name__}(), not the class" if isinstance(x, type) else ""
            raise ValueError(
                f"implementation must be one of {known}, a Backend or None, got {x!r}{hint}"
            )
    configured = [x for x in asked if isinstance(x, Backend)]
    for x in configured:
        if not dataclasses.is_dataclass(x) or type(x).__hash__ is None:
            raise TypeError(
                f"implementation: {type(x).__name__} must be a frozen dataclass, so that equal "
                f"values share one compilation"
            )
        if str(x) in IMPLEMENTATIONS or any(x != y and str(x) == str(y) for y in configured):
            raise ValueError(f"implementation: another backend prints as {x} too: rename its class")
    return asked
