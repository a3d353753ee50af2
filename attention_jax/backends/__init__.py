"""The backends: what each supports, and which is tried first where.

=============  ====================================================================
``xla``        materialised: the formula in plain sight, and fast for short lengths
``blockwise``  linear memory on every platform, any mask and score
``native``     our CPU kernel in C++: linear memory, most masks and scores
``cudnn``      NVIDIA's fused kernel, for the calls that it computes exactly
``pallas_gpu`` our GPU kernels: linear memory, most masks and scores
``splash``     JAX's own TPU kernel
``fa4``        FlashAttention 4 from the package fa4-jax, where it is asked for by name
=============  ====================================================================

Nothing is probed at import and nothing is remembered: the choice depends on the ``Spec`` of a call
alone. ``attention`` also takes a configured value, such as ``Blockwise(block_q=128)``, or a
``Backend`` of your own, in place of a name.
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

# The kernels of each platform, in the order they are tried, before what runs everywhere.
KERNELS = {
    "cpu": (("native", "our kernel in C++: linear memory, skips empty blocks"),),
    "gpu": (
        ("cudnn", "the vendor's fused kernel, for the calls it computes exactly"),
        ("pallas_gpu", "linear memory, any mask and score, skips empty blocks"),
    ),
    "tpu": (("splash", "JAX's own kernel: linear memory, skips empty blocks"),),
}

# On a CPU, shorter calls are over before a kernel has prepared its blocks. Milliseconds, native
# and in one piece: 32 heads of 16 x 16, 0.20 and 0.11; 128 heads of 32 x 32, 0.68 and 0.78 (two
# cores of an AMD EPYC).
NATIVE_FROM = 33

# Without that kernel, sequences up to this length are faster in one batched product, which XLA
# fuses with the softmax, than in a loop over heads: `python -m experiments bench --only short`. The
# choice must not depend on heads or batch size, which may differ between training and serving.
MATERIALISE_UP_TO = 256

# The same holds for a few queries against a cache, whose mask holds positions: a decoding step is
# itself in a loop, in which XLA copies the cache for every loop inside. ms per token of GPT-2's
# size, blockwise and in one piece: 43 and 17 with room for 1,000 tokens, 64 and 22 for 2,000, 152
# and 45 for 6,000.
MOST_PAIRS_OF_A_CACHE = 2**20

# A name of IMPLEMENTATIONS, or a configured value.
Named = str | Backend


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
    """Whether the mesh in use has Auto axes, over which the compiler partitions the program.

    It cannot partition a kernel. Inside ``shard_map`` each device has a program of its own, and so
    it has for arrays on Explicit axes, see ``heads``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[name] > 1 for name in mesh.auto_axes)


def preference(spec: Spec) -> tuple[tuple[str, str], ...]:
    """All implementations in the order they are tried, each with the reason for its place.

    Those without a place come last, after what runs everywhere: they run only if asked for.
    """
    kernels = KERNELS.get(spec.platform, ())
    everywhere = _everywhere(spec)
    elsewhere = tuple(
        (name, f"for a {place}")
        for place, others in KERNELS.items()
        if place != spec.platform
        for name, _ in others
    )
    placed = (*kernels, *everywhere, *elsewhere)
    T, S = spec.sizes.T, spec.sizes.S
    if spec.platform == "cpu" and not spec.sizes.symbolic_lengths and max(T, S) < NATIVE_FROM:
        short = ("xla", f"T and S are below {NATIVE_FROM}: faster in one piece")
        placed = (short, *(each for each in placed if each[0] != "xla"))
    unplaced = (name for name in IMPLEMENTATIONS if name not in dict(placed))
    return (*placed, *((name, "only if asked for by name") for name in unplaced))


def _everywhere(spec: Spec) -> tuple[tuple[str, str], ...]:
    """What runs on every platform."""
    T, S = spec.sizes.T, spec.sizes.S
    if spec.sizes.symbolic_lengths:
        return (
            ("xla", "symbolic lengths: it needs no block sizes"),
            ("blockwise", "its blocks depend on lengths"),
        )
    if max(T, S) <= MATERIALISE_UP_TO:
        return (
            ("xla", f"T and S are at most {MATERIALISE_UP_TO}: faster in one piece"),
            ("blockwise", f"loops pay off only for T or S above {MATERIALISE_UP_TO}"),
        )
    if T <= FEW_QUERIES and leaves(spec.mask) and T * S <= MOST_PAIRS_OF_A_CACHE:
        return (
            ("xla", "few queries and a mask of arrays, as of a cache: faster in one piece"),
            ("blockwise", "inside a decoding loop its own loops would copy the cache"),
        )
    return (
        ("blockwise", "linear memory, skips empty blocks"),
        ("xla", "materialises T x S arrays: blockwise is preferred"),
    )


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
        if asked is None:
            return places[other]
        if other == name:
            return "asked for"
        return f"asked for after {name}" if other in names else "not asked for"

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
