"""Every implementation against the float64 oracle, forward and backward, in each dtype.

The core cases of the checker's catalogue come first, then calls that ``cudnn`` supports (its widths
are multiples of 8, those of the catalogue are primes), then the rest of the catalogue while time
lasts. The oracle and the plain formula, which sets the tolerance, are computed on the CPU: there
float32 products are not rounded to TF32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax

import attention_jax
from attention_jax import testing
from attention_jax.backends import PallasGPU
from attention_jax.core.axes import Sizes
from attention_jax.testing import Case, Row
from experiments.card.parts import Fields, Item, Setting
from experiments.card.worker import fatal

DTYPES = ("bfloat16", "float16", "float32")

_WIDE = Sizes(B=(2,), T=35, S=35, K=2, G=3, H=64, D=64)
_WHOLE = dataclasses.replace(_WIDE, T=256, S=256)
_LONG = dataclasses.replace(_WIDE, T=300, S=300, K=1, G=2, H=128, D=128)
FOR_CUDNN = tuple(
    Case(f"for cudnn: {mask}, {label}", sizes, mask=mask, lse=False, planted=mask == "lengths")
    for mask in ("none", "causal", "lengths")
    for label, sizes in (("35", _WIDE), ("256", _WHOLE), ("300", _LONG))
)


def implementations(dry: bool) -> dict[str, Any]:
    """By name, what ``attention`` takes as ``implementation``."""
    names = ("xla", "blockwise", "cudnn", "pallas_gpu")  # the last has never met a card
    return {
        name: PallasGPU(interpret=True) if dry and name == "pallas_gpu" else name for name in names
    }


def catalogue(dry: bool) -> list[Case]:
    """The cases in order, each in all dtypes."""
    if dry:
        cases = [testing.cases(name="plain")[0], FOR_CUDNN[0]]
    else:
        core = testing.cases(tag="core")
        rest = [case for case in testing.cases() if case not in core]
        cases = [*core, *FOR_CUDNN, *rest]
    seen, result = set(), []
    for case in cases:
        for dtype in DTYPES[:1] if dry else DTYPES:
            changed = dataclasses.replace(case, dtype=dtype)
            key = dataclasses.replace(changed, name="", tags=frozenset())
            if key not in seen:  # cases that differ in their dtype alone
                seen.add(key)
                result.append(changed)
    return result


def items(setting: Setting) -> Iterator[Item]:
    """An item for each case and dtype of this lane."""
    for case in catalogue(setting.dry)[setting.lane :: setting.lanes]:
        run = functools.partial(check, case, implementations(setting.dry))
        yield Item(f"{case.name}, {case.dtype}", run, limit=90.0)


def check(case: Case, chosen: dict[str, Any]) -> Iterator[Fields]:
    """A record for each implementation: the worst of its results, and all that failed."""
    with jax.default_device(jax.devices("cpu")[0]):
        prepared = testing.trial(case)
    for name, value in chosen.items():
        fn = functools.partial(attention_jax.attention, implementation=value)
        rows = testing.check(fn, cases=[prepared]).rows
        found = {"implementation": name, "dtype": case.dtype, **verdict(rows)}
        yield found
        if fatal(found):
            return


def verdict(rows: tuple[Row, ...]) -> Fields:
    """Rows of one case as the fields of a record: ok, refused or failed, and by how much."""
    failed = [row for row in rows if row.failed]
    refused = [row for row in rows if row.verdict.startswith("refused")]
    if failed:
        return {"verdict": "failed", "rows": [dataclasses.asdict(row) for row in failed]}
    if refused:
        return {"verdict": "refused", "reason": refused[0].verdict[len("refused: ") :][:300]}
    return {"verdict": "ok", "worst": max(row.ratio for row in rows)}
