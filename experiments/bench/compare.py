"""``compare``: our implementations and their peers, checked against the float64 oracle.

::

    python -m experiments compare            # all cases, a quarter of an hour on 2 cores
    python -m experiments compare --quick    # one case for each option

Prints a table for each implementation, then one over all options: ``ok``, ``differs`` (wrong
numbers), ``error`` (it raised) or ``refused`` (it has no such argument). Each case of that last
table uses a single option, so that a failure is that option's. The exit code is 1 if any of our
implementations is out of bounds; peers do not count.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from attention_jax import attention, testing
from attention_jax.backends import IMPLEMENTATIONS
from attention_jax.core.axes import Sizes
from attention_jax.testing import Case, Row
from experiments.bench.shapes import SMALL, SMALL_LONG
from experiments.options import not_one_of
from experiments.training.runs import device, versions


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ``compare``."""

    quick: bool = False
    """Check only one case for each option, not the whole catalogue."""
    gradients: bool = True
    """Also check gradients."""
    only: tuple[str, ...] = ()
    """Names of implementations; default all of ours and all installed peers."""
    out: Path | None = None
    """A JSON file to write all results to."""

    def __post_init__(self) -> None:
        known = contenders()
        for name in self.only:
            if name not in known:
                raise ValueError(not_one_of("only", name, known))


Contender = Callable[..., Any]

# The module of a peer, and the peer with our signature.
PEERS: dict[str, tuple[str, Contender]] = {
    "jax.nn": ("jax.nn", testing.jax_nn),
    "flax.linen": ("flax.linen", testing.flax_linen),
    "flax.nnx": ("flax.nnx", testing.flax_nnx),
}


def contenders() -> dict[str, Contender]:
    """Functions by name: ours in their order, then the peers that are installed."""
    ours = {name: functools.partial(attention, implementation=name) for name in IMPLEMENTATIONS}
    peers = {name: fn for name, (module, fn) in PEERS.items() if _installed(module)}
    return {**ours, **peers}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


# --- One option at a time. The rest is what every contender supports: as many key-value heads as
# query heads, one width, float32, no lse.


def _case(sizes: Sizes = SMALL, *, lse: bool = False, **options: Any) -> Case:
    return Case("", sizes, lse=lse, **options)


def _sized(**letters: Any) -> Sizes:
    return dataclasses.replace(SMALL, **letters)


OPTIONS: dict[str, Case] = {
    "no option": _case(),
    "mask: causal, T = S": _case(_sized(T=37), mask="causal"),
    "mask: causal, T < S": _case(mask="causal"),
    "mask: causal, aligned at the end": _case(mask="causal end"),
    "mask: causal, offset per example": _case(mask="causal offsets"),
    "mask: window": _case(SMALL_LONG, mask="window offset"),
    "mask: prefix or causal": _case(mask="prefix | causal"),
    "mask: lengths": _case(mask="lengths"),
    "mask: segments": _case(mask="segments"),
    "mask: chunked": _case(mask="chunked"),
    "mask: dilated": _case(mask="dilated & causal"),
    "mask: global tokens": _case(_sized(T=35, S=35), mask="global | window"),
    "mask: neighborhood": _case(_sized(T=35, S=35), mask="neighborhood"),
    "mask: block sparse": _case(mask="block_sparse"),
    "mask: bool array": _case(mask="dense"),
    "mask: function": _case(mask="mask_fn"),
    "score: softcap": _case(score="softcap"),
    "score: ALiBi": _case(score="alibi"),
    "score: bias": _case(score="bias"),
    "score: bias with -inf": _case(score="-inf bias"),
    "score: T5 relative bias": _case(score="relative_bias"),
    "score: Shaw relative embedding": _case(score="relative_embedding"),
    "score: function": _case(score="score_fn"),
    "score: bias, then softcap": _case(score="bias, softcap"),
    "sinks": _case(sinks=True),
    "scale": _case(scale=0.37),
    "negative scale": _case(scale=-0.61),
    "dropout": _case(dropout_rate=0.3),
    "lse": _case(lse=True),
    "heads: GQA": _case(_sized(K=2, G=3)),
    "heads: MQA": _case(_sized(K=1, G=5)),
    "value width D != H": _case(_sized(D=7)),
    "no batch axis": _case(_sized(B=())),
    "two batch axes": _case(_sized(B=(2, 3))),
    "one query": _case(_sized(T=1)),
    "long": _case(SMALL_LONG),
    "float64": _case(dtype="float64"),
    "bfloat16": _case(dtype="bfloat16"),
    "float16": _case(dtype="float16"),
    "large logits": _case(SMALL_LONG, magnitude=300.0),
    "large logits, bfloat16": _case(SMALL_LONG, magnitude=300.0, dtype="bfloat16"),
    "large logits, float16": _case(SMALL_LONG, magnitude=300.0, dtype="float16"),
    "empty rows: mask": _case(mask="nothing"),
    "empty rows: bias": _case(score="-inf bias", bias="T"),
    "no keys": _case(_sized(S=0)),
    "no queries": _case(_sized(T=0)),
    "no examples": _case(_sized(B=(0,))),
    "NaN in padding": _case(mask="lengths", planted=True),
}


# --- Comparing.

Results = dict[str, list[Row]]  # by contender


def main(options: Options) -> int:
    """Checks and prints; returns the exit code."""
    names = options.only or tuple(contenders())
    single = [dataclasses.replace(case, name=name) for name, case in OPTIONS.items()]
    catalogue = () if options.quick else testing.cases()
    rows = compare(names, [*single, *catalogue], gradients=options.gradients)
    reports = {name: testing.Report(tuple(found)) for name, found in rows.items()}
    table = matrix(rows)
    for name, report in reports.items():
        whose = "ours" if name in IMPLEMENTATIONS else "peer"
        print(f"\n=== {name} ({whose})\n{report}")
    print(f"\n=== Each option by itself\n{as_text(table, names)}")
    if options.out is not None:
        write(options.out, options, rows, table)
    wrong = [name for name in names if name in IMPLEMENTATIONS and not reports[name].ok]
    print(f"\nours: {'out of bounds in ' + ', '.join(wrong) if wrong else 'all within bounds'}")
    return 1 if wrong else 0


def compare(names: Sequence[str], cases: Sequence[Case], *, gradients: bool = True) -> Results:
    """The results of all contenders. Each case is prepared once, and freed when all have run."""
    functions = contenders()
    rows: Results = {name: [] for name in names}
    for case in tqdm(cases, desc="compare", unit="case", dynamic_ncols=True):
        trial = testing.trial(case, gradients=gradients)
        for name in names:
            rows[name] += testing.check(functions[name], cases=[trial], gradients=gradients).rows
    return rows


def matrix(rows: Results) -> dict[str, dict[str, str]]:
    """Verdicts by option and contender, for the cases with a single option."""
    table: dict[str, dict[str, str]] = {option: {} for option in OPTIONS}
    for name, found in rows.items():
        for option in OPTIONS:
            table[option][name] = verdict([row for row in found if row.case == option])
    return table


def verdict(rows: Sequence[Row]) -> str:
    """The worst of a case's verdicts, as a word."""
    verdicts = [row.verdict for row in rows]
    for sign, word in (("error", "error"), ("wrong", "differs"), ("refused", "refused")):
        if any(v.startswith(sign) for v in verdicts):
            return word
    return "ok"


def as_text(table: dict[str, dict[str, str]], names: Sequence[str]) -> str:
    """One line per option, one column per contender, and totals."""
    verdicts = ("ok", "differs", "error", "refused")
    lines = [["", *names], *([option, *(v[n] for n in names)] for option, v in table.items())]
    for word in verdicts:
        counts = (sum(v[n] == word for v in table.values()) for n in names)
        lines.append([f"total {word}", *map(str, counts)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def write(file: Path, options: Options, rows: Results, table: dict[str, dict[str, str]]) -> None:
    """Writes all results as JSON. NaN and infinities are written as strings."""
    found = {name: [_plain(dataclasses.asdict(row)) for row in r] for name, r in rows.items()}
    record = {
        "options": dataclasses.asdict(options),
        "device": device(),
        "versions": versions(),
        "table": table,
        "rows": found,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, default=str, indent=1, allow_nan=False) + "\n")
    print(f"\nwrote {file}")


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {k: x if not isinstance(x, float) or abs(x) < 1e300 else str(x) for k, x in row.items()}
