"""The checker's catalogue: named calls of attention, as values without arrays.

Two parts: every option paired with every other (``pairwise``), and the promises of the library one
by one (``PROMISES``). ``_problems`` makes arrays of a case, ``testing`` checks a function on them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from attention_jax.core.axes import Sizes

Row = dict[str, Any]

# Primes, none twice in one call.
SMALL = Sizes(B=(2,), T=23, S=37, K=2, G=3, H=11, D=7)
LONG = dataclasses.replace(SMALL, T=151, S=293)
# What the narrowest of functions can do: as many key heads as query heads, one width.
NARROW = dataclasses.replace(SMALL, K=3, G=1, D=11)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of attention: what the axes are and which options it uses.

    Attributes:
      name: says it all in a few words; also the seed of the numbers.
      sizes: what the axis letters stand for.
      dtype: of query, key, value, sinks and of what scores hold.
      mask, score: the name of a kind in ``_problems``.
      bias: the axes that a bias array has, of ``B N T S`` (``b``: the last of ``*B`` only); it
        broadcasts along the others.
      bias_dtype: of a bias array, where it is not ``dtype``.
      sinks: is there a sink per head.
      scale: None for the default, else a number, passed as an array and differentiated.
      dropout_rate: the probability of dropping a probability.
      lse: is the normaliser asked for, and does the loss depend on it.
      magnitude: what the query is multiplied by: 300 gives logits up to a thousand.
      planted: NaN and inf wherever nothing may look: hidden keys and values, queries that see
        nothing and their cotangents, bias entries of hidden pairs.
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
    planted: bool = False

    @property
    def wide(self) -> str:
        """The dtype of the normaliser: at least float32."""
        return "float64" if self.dtype == "float64" else "float32"

    def __str__(self) -> str:
        shown = [f"{self.name}: {self.dtype}"]
        shown += [f"{f.name}={getattr(self.sizes, f.name)}" for f in dataclasses.fields(Sizes)]
        for f in dataclasses.fields(self)[3:]:
            if getattr(self, f.name) != f.default:
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
# Small ones span two or more blocks of (16, 32), long ones many.
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


def pairwise(
    options: Mapping[str, Sequence[Any]], possible: Callable[[Row], bool] = lambda row: True
) -> list[Row]:
    """Few choices of every option, such that every two values of two options meet in one.

    Greedy and deterministic: each row starts from two values that have not met and takes, option
    by option, the value that meets most others for the first time; of equals, one drawn by lot.

    Args:
      options: name -> values; a value must be hashable.
      possible: may these values (of some options) stand in one row; must allow the first value of
        each option with all values of the others.

    >>> for row in pairwise({"a": (0, 1), "b": (0, 1), "c": (0, 1)}):
    ...     print(*row.values())
    0 0 0
    1 1 0
    0 1 1
    1 0 1

    Source: Cohen et al. 1997, "The AETG System: An Approach to Testing Based on Combinatorial
    Design".
    """
    names = list(options)
    order = {name: i for i, name in enumerate(names)}
    # By lot, with a fixed seed: taking turns would keep options of two values in step for ever.
    lot = random.Random(0)

    def meet(a: tuple[str, Any], b: tuple[str, Any]) -> tuple[Any, Any]:
        return (a, b) if order[a[0]] < order[b[0]] else (b, a)

    def first(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[Any, Any]]:
        for a, b in pairs:  # along diagonals, so that the first rows differ in every option
            for shift, (i, x) in itertools.product(range(len(options[b])), enumerate(options[a])):
                y = options[b][(i + shift) % len(options[b])]
                if possible({a: x, b: y}):
                    yield (a, x), (b, y)

    seeds = list(first(itertools.combinations(names, 2)))
    missing = set(seeds)
    rows = []
    for seed in seeds:
        if seed not in missing:
            continue
        row = dict(seed)
        for name in names:
            if name not in row:
                row[name] = max(
                    (x for x in options[name] if possible({**row, name: x})),
                    key=lambda x, name=name: (  # type: ignore[misc]
                        sum(meet((name, x), other) in missing for other in row.items()),
                        lot.random(),
                    ),
                )
        missing -= {meet(a, b) for a, b in itertools.combinations(row.items(), 2)}
        rows.append({name: row[name] for name in names})
    return rows


def _every_pair() -> list[Case]:
    patterns = [
        " ".join(itertools.compress("BNTS", kept))
        for kept in itertools.product((True, False), repeat=4)
    ]
    turns = itertools.cycle(patterns)
    result = []
    for number, row in enumerate(pairwise(OPTIONS, possible)):
        T, S = LENGTHS[row["lengths"]]
        (K, G), (H, D) = HEADS[row["heads"]], row["widths"]
        fields = {name: row[name] for name in OPTIONS if name in Case.__annotations__}
        if row["score"] in ("bias", "bias, softcap"):
            fields["bias"] = next(turns)
        if row["score"] == "-inf bias":  # with neither T nor S it would hide everything
            fields["bias"] = next(p for p in turns if {*p} & {"T", "S"})
        result.append(
            Case(
                f"{number:03} {row['mask']}, {row['score']}",
                Sizes(B=row["batch"], T=T, S=S, K=K, G=G, H=H, D=D),
                planted=row["mask"] == "lengths",
                **fields,
            )
        )
    return result


# --- The promises, one by one.


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
    replace = dataclasses.replace
    return [
        *(replace(c, name=name) for name, c in nothing.items()),
        *(replace(c, name=f"{name}, sinks", sinks=True) for name, c in nothing.items()),
        *(replace(c, name=name, planted=True) for name, c in planted.items()),
        *(replace(c, name=name) for name, c in others.items()),
        *(
            replace(c, name=name, sizes=replace(NARROW, S=c.sizes.S), lse=False)
            for name, c in narrow.items()
        ),
    ]


def cases(**chosen: Any) -> tuple[Case, ...]:
    """The catalogue: the library's promises one by one, then every option with every other.

    Args:
      **chosen: values that fields of ``Case`` must have; without any, the whole catalogue.

    Raises:
      TypeError: not a field of ``Case``.

    >>> len(cases()) > 150
    True
    >>> print(*cases(name="causal, T < S"))
    causal, T < S: float32 B=(2,) T=23 S=37 K=2 G=3 H=11 D=7 mask='causal'
    """
    fields = [f.name for f in dataclasses.fields(Case)]
    for name in chosen:
        if name not in fields:
            raise TypeError(f"cases can be chosen by {', '.join(fields)}, got {name}")
    return tuple(
        case
        for case in (*_promises(), *_every_pair())
        if all(getattr(case, name) == value for name, value in chosen.items())
    )


def work(case: Case) -> int:
    """Multiplications of the forward pass: what a case costs."""
    z = case.sizes
    return math.prod(z.B) * z.N * z.T * z.S * (z.H + z.D)
