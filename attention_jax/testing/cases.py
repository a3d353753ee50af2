"""The checker's catalogue: named calls of attention, as values without arrays.

Two parts: the promises of the library one by one, and every option paired with every other
(``pairwise``). ``problems`` makes the arrays of a case, ``check`` checks a function on them.
Tags select cases:

======== ===========================================================================================
promise  one promise of the library
pair     a row of the pairwise table
core     enough for a quick check: the main promises, and pairs with every value of every option
small    a pair whose lengths span at most two blocks of (16, 32)
long     a pair whose lengths span many blocks
numerics a promise where rounding matters: long sums, large logits, low precision
padded   a promise with NaN and inf planted in padding
empty    a promise with no keys, no queries, no examples or queries that attend to no key
kernel   core promises that reach most of a kernel, for interpreters, which are slow
narrow   a promise that even limited functions can keep: one width, no grouped heads
placed   a promise with positions of queries and keys
======== ===========================================================================================
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from attention_jax.core.axes import Sizes
from attention_jax.testing.pairwise import pairwise

# Primes, none twice in one call.
SMALL = Sizes(B=(2,), T=23, S=37, K=2, G=3, H=11, D=7)
LONG = dataclasses.replace(SMALL, T=151, S=293)
# What even limited functions support: as many key heads as query heads, one width.
NARROW = dataclasses.replace(SMALL, K=3, G=1, D=11)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of attention: what the axes are and which options it uses.

    Attributes:
      name: a few words, unique among all cases; also the seed of the numbers.
      sizes: the sizes of the axes, by letter.
      dtype: of query, key, value, sinks and the arrays of scores.
      mask, score: the name of a kind in ``rules``.
      bias: the axes that a bias array has, of ``B N T S`` (``b``: the last of ``*B`` only); it
        broadcasts along the others.
      bias_dtype: of a bias array, where it is not ``dtype``.
      sinks: whether there is a sink per head.
      scale: None for the default, else a number, passed as an array and differentiated.
      dropout_rate: the probability of dropping a probability.
      lse: whether the normalizer is returned and the loss depends on it.
      magnitude: a factor of the query: 300 gives logits up to a thousand.
      positions: of queries and keys: ``"shuffled"``, with gaps and negative ones among the keys, or
        ``"per example"``, from another start in each; empty for none.
      planted: NaN and inf in every number that must not be read: masked keys and values, queries
        that attend to no key and their cotangents, bias entries of masked pairs.
      tags: what ``cases(tag=...)`` selects by.
    """

    name: str
    sizes: Sizes = SMALL
    dtype: str = "float32"
    mask: str = "none"
    score: str = "none"
    bias: str = "B N T S"
    bias_dtype: str | None = None
    sinks: bool = False
    scale: float | None = None
    dropout_rate: float = 0.0
    lse: bool = True
    magnitude: float = 1.0
    positions: str = ""
    planted: bool = False
    tags: frozenset[str] = frozenset()

    @property
    def wide(self) -> str:
        """The dtype of the normalizer: at least float32."""
        return "float64" if self.dtype == "float64" else "float32"

    def __str__(self) -> str:
        shown = [f"{self.name}: {self.dtype}"]
        shown += [f"{f.name}={getattr(self.sizes, f.name)}" for f in dataclasses.fields(Sizes)]
        for f in dataclasses.fields(self)[3:]:
            if f.name != "tags" and getattr(self, f.name) != f.default:
                shown.append(f"{f.name}={getattr(self, f.name)!r}")
        return " ".join(shown)


# --- Every option with every other.

MASKS = (
    "none",
    "causal",
    "causal end",
    "window offset",
    "prefix | causal",
    "lengths",
    "segments",
    "chunked",
    "dilated & causal",
    "global | window",
    "neighborhood",
    "block_sparse",
    "dense",
    "mask_fn",
    "causal offsets",
)
SCORES = (
    "none",
    "softcap",
    "alibi",
    "bias",
    "-inf bias",
    "relative_bias",
    "relative_embedding",
    "score_fn",
    "bias, softcap",
    "softcap, alibi",
)
# The first four span one or two blocks of (16, 32), the long ones many.
LENGTHS = {
    "T < S": (23, 37),
    "T > S": (41, 19),
    "T == S": (35, 35),
    "T == 1": (1, 37),
    "long T < S": (101, 173),
    "long T > S": (157, 97),
    "long T == S": (143, 143),
}
HEADS = {"MHA": (3, 1), "GQA": (2, 3), "MQA": (1, 5)}
OPTIONS: dict[str, Sequence[Any]] = {
    "mask": MASKS,
    "score": SCORES,
    "lengths": tuple(LENGTHS),
    "dtype": ("float32", "bfloat16", "float64", "float16"),
    "heads": tuple(HEADS),
    "batch": ((2,), (), (2, 3)),
    "scale": (None, 0.37, -0.61),
    "sinks": (False, True),
    "widths": ((11, 7), (11, 11)),
    "dropout_rate": (0.0, 0.3),
    "magnitude": (1.0, 3.0, 300.0),
    "lse": (True, False),
}


def possible(row: Mapping[str, Any]) -> bool:
    """Masks of self-attention need ``T == S``."""
    square = row.get("mask") not in ("neighborhood", "global | window")
    return square or row.get("lengths", "T == S").endswith("T == S")


@functools.cache  # a constant, which takes a second to compute
def _every_pair() -> tuple[Case, ...]:
    patterns = [
        " ".join(itertools.compress("BNTS", kept))
        for kept in itertools.product((True, False), repeat=4)
    ]
    turns = itertools.cycle(patterns)
    result = []
    met: set[tuple[str, Any]] = set()
    for number, row in enumerate(pairwise(OPTIONS, possible)):
        tags = {"pair", "long" if row["lengths"].startswith("long") else "small"}
        if not met.issuperset(row.items()):
            tags.add("core")
            met.update(row.items())
        T, S = LENGTHS[row["lengths"]]
        (K, G), (H, D) = HEADS[row["heads"]], row["widths"]
        fields = {name: row[name] for name in OPTIONS if name in Case.__annotations__}
        if row["score"] in ("bias", "bias, softcap"):
            fields["bias"] = next(turns)
        if row["score"] == "-inf bias":  # with neither T nor S it would mask everything
            fields["bias"] = next(p for p in turns if {*p} & {"T", "S"})
        result.append(
            Case(
                f"{number:03} {row['mask']}, {row['score']}",
                Sizes(B=row["batch"], T=T, S=S, K=K, G=G, H=H, D=D),
                planted=row["mask"] == "lengths",
                tags=frozenset(tags),
                **fields,
            )
        )
    return tuple(result)


# --- The promises, one by one.

_NUMERICS = {
    "plain",
    "lse, long",
    "lse, long, bfloat16",
    "large logits, bfloat16",
    "large logits, float16",
    "empty rows by both",
    "everything",
}
_KERNEL = {"planted, bias", "length 0, sinks"}
# Tags of single promises; a group of them has its tag in ``_promises``.
PROMISE_TAGS = {
    "numerics": _NUMERICS,
    "kernel": _KERNEL,
    "smoke": {"plain", "everything", "planted, bias", "lse, long, bfloat16"},
    "core": {
        *_NUMERICS,
        *_KERNEL,
        "heads in order",
        "no keys",
        "no queries",
        "no examples",
        "empty rows by mask",
        "empty rows by -inf bias",
        "length 0",
        "nothing visible",
        "no keys, sinks",
        "empty rows by mask, sinks",
        "planted",
        "planted, segments, long",
        "causal, T < S",
        "causal end, T < S",
        "softcap shows -inf bias again",
        "score_fn hides",
        "traced layout",
        "complement",
        "evaluated mask_fn",
        "positions, dropout",
        "positions per example",
    },
}


def _sized(sizes: Sizes = SMALL, **changes: Any) -> Sizes:
    return dataclasses.replace(sizes, **changes)


def _promises() -> list[Case]:
    nothing = {
        "no keys": Case("", _sized(S=0), score="bias, softcap"),
        "no queries": Case("", _sized(T=0), mask="causal end", score="bias"),
        "no examples": Case("", _sized(B=(0,)), mask="causal", score="bias"),
        "no examples, two axes": Case("", _sized(B=(2, 0)), score="relative_bias"),
        "empty rows by mask": Case("", mask="dense"),
        "empty rows by -inf bias": Case("", score="-inf bias"),
        "empty rows by both": Case("", mask="dense", score="-inf bias", bias="N T S"),
        "empty rows by causal offset": Case("", mask="causal offsets", score="softcap"),
        "length 0": Case("", mask="length 0", planted=True),
        "nothing visible": Case("", mask="nothing", score="relative_embedding", planted=True),
    }
    planted = {
        "planted": Case("", mask="lengths"),
        "planted, bfloat16": Case("", mask="lengths", dtype="bfloat16", score="softcap"),
        "planted, bias": Case("", mask="lengths", score="bias", dropout_rate=0.3),
        "planted, -inf bias": Case("", score="-inf bias", bias="B S"),
        "planted, alibi": Case("", mask="lengths", score="alibi", sinks=True),
        "planted, T5": Case("", mask="lengths", score="relative_bias", scale=0.3),
        "planted, Shaw": Case("", mask="lengths", score="relative_embedding"),
        "planted, score_fn": Case("", mask="lengths", score="score_fn"),
        "planted, segments, long": Case("", LONG, mask="segments", score="bias, softcap"),
    }
    others = {
        "plain": Case(""),
        "lse, long": Case("", LONG, mask="window offset"),
        "lse, long, bfloat16": Case("", LONG, mask="window offset", dtype="bfloat16"),
        "large logits, bfloat16": Case("", LONG, dtype="bfloat16", magnitude=300.0, mask="causal"),
        "large logits, float16": Case("", LONG, dtype="float16", magnitude=300.0, sinks=True),
        "causal, T < S": Case("", mask="causal"),
        "causal end, T < S": Case("", mask="causal end"),
        "causal, T > S": Case("", _sized(T=41, S=19), mask="causal"),
        "causal end, T > S": Case("", _sized(T=41, S=19), mask="causal end"),
        "heads in order": Case("", _sized(K=3, G=5), mask="mask_fn", score="score_fn", sinks=True),
        "odd widths": Case("", _sized(H=1, D=31), mask="causal"),
        "one key": Case("", _sized(S=1), score="softcap", sinks=True),
        "softcap shows -inf bias again": Case("", score="-inf bias, softcap"),
        "score_fn hides": Case("", mask="causal", score="hiding score_fn"),
        "T5, one direction": Case("", mask="causal", score="relative_bias, causal"),
        "Shaw, one table": Case("", score="relative_embedding, shared"),
        "float32 bias, bfloat16": Case("", dtype="bfloat16", score="bias", bias_dtype="float32"),
        "bias of one batch axis": Case("", _sized(B=(2, 3)), score="bias", bias="b N S"),
        "traced layout": Case("", LONG, mask="block_sparse traced"),
        "complement": Case("", LONG, mask="~chunked & causal", dropout_rate=0.3),
        "evaluated mask_fn": Case("", mask="mask_fn evaluated"),
        "positions per example": Case("", mask="prefix | causal", positions="per example"),
        "everything": Case(
            "",
            _sized(LONG, B=(2, 3)),
            mask="prefix | causal",
            score="bias, softcap",
            bias="B N T S",
            sinks=True,
            scale=-0.4,
            dropout_rate=0.3,
        ),
    }
    placed = {
        "positions, dropout": Case("", mask="causal", score="relative_bias", dropout_rate=0.3),
        "positions, functions": Case("", mask="mask_fn", score="score_fn", sinks=True),
        "positions, planted": Case("", score="bias, softcap", planted=True),
        "positions, long": Case("", LONG, mask="dilated & causal", dtype="bfloat16"),
    }
    narrow = {
        "plain, narrow": Case(""),
        "causal end, narrow": Case("", mask="causal end"),
        "bias, narrow": Case("", score="bias", bias="N T S"),
        "empty rows by mask, narrow": Case("", mask="dense"),
        "empty rows by -inf bias, narrow": Case("", score="-inf bias"),
        "planted, narrow": Case("", mask="lengths", planted=True),
        "float64, narrow": Case("", dtype="float64"),
        "bfloat16, narrow": Case("", dtype="bfloat16"),
        "no keys, narrow": Case("", _sized(S=0)),
    }
    every = {
        **_tagged(nothing, "empty"),
        **_tagged(
            {f"{n}, sinks": dataclasses.replace(c, sinks=True) for n, c in nothing.items()}, "empty"
        ),
        **_tagged({n: dataclasses.replace(c, planted=True) for n, c in planted.items()}, "padded"),
        **_tagged(
            {n: dataclasses.replace(c, positions="shuffled") for n, c in placed.items()}, "placed"
        ),
        **_tagged(others),
        **_tagged(
            {
                n: dataclasses.replace(c, sizes=_sized(NARROW, S=c.sizes.S), lse=False)
                for n, c in narrow.items()
            },
            "narrow",
        ),
    }
    return [
        dataclasses.replace(
            case,
            name=name,
            tags=case.tags | {tag for tag, names in PROMISE_TAGS.items() if name in names},
        )
        for name, case in every.items()
    ]


def _tagged(promises: Mapping[str, Case], *tags: str) -> dict[str, Case]:
    return {
        n: dataclasses.replace(c, tags=frozenset({"promise", *tags})) for n, c in promises.items()
    }


def cases(*, tag: str | None = None, **chosen: Any) -> tuple[Case, ...]:
    """The catalogue: the library's promises one by one, then every option with every other.

    Args:
      tag: only cases with this tag.
      **chosen: values that fields of ``Case`` must have; without any, the whole catalogue.

    Raises:
      TypeError: not a field of ``Case``.
      ValueError: no case has this tag.

    >>> from attention_jax.testing import cases
    >>> from attention_jax.testing.cases import MASKS
    >>> len(cases()) > 150
    True
    >>> print(*cases(name="causal, T < S"))
    causal, T < S: float32 B=(2,) T=23 S=37 K=2 G=3 H=11 D=7 mask='causal'
    >>> {case.mask for case in cases(tag="core")} >= set(MASKS)
    True
    """
    fields = [f.name for f in dataclasses.fields(Case)]
    for name in chosen:
        if name not in fields:
            raise TypeError(f"cases can be chosen by {', '.join(fields)}, got {name}")
    every = (*_promises(), *_every_pair())
    known = frozenset().union(*(case.tags for case in every))
    if tag is not None and tag not in known:
        raise ValueError(f"tag must be one of {', '.join(sorted(known))}, got {tag!r}")
    return tuple(
        case
        for case in every
        if (tag is None or tag in case.tags)
        and all(getattr(case, name) == value for name, value in chosen.items())
    )


def work(case: Case) -> int:
    """Multiplications of the forward pass: what a case costs."""
    z = case.sizes
    return math.prod(z.B) * z.N * z.T * z.S * (z.H + z.D)
