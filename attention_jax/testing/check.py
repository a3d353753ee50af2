"""The checker: any attention-like function against the oracle.

    report = testing.check(my_attention)  # called as attention(query, key, value, mask=..., ...)
    print(report)                         # case by case: what is off, by how much

Forward and gradients on a catalogue of cases (``cases``): every option with every other, and each
of the library's promises by itself. How far off a result may be is not chosen but derived: twice
as far (gradients: three times) as the plain formula in the same dtype is, and a rounding error.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.masks import Mask
from attention_jax.testing.cases import Case
from attention_jax.testing.cases import cases as catalogue
from attention_jax.testing.problems import Inputs, Problem, oracle, plain, problem, reordered, tries
from attention_jax.testing.rules import positions

# How often the plain formula is tried. The worst error counts, or four standard deviations if that
# is more: an array of thousands of numbers has one that far off, but all eight tries of a single
# number (the gradient of ``scale``) can be near by luck.
TRIES = 8
DEVIATIONS = 4


class Trial(NamedTuple):
    """A case with its numbers: what goes in, what must come out, and how far off it may be."""

    problem: Problem
    right: dict[str, np.ndarray]  # by name: "out", "lse", "d query", ...
    allowed: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Row:
    """One result of one case: its largest error, the error allowed, and what that means.

    The verdict is ``ok``, ``wrong``, ``wrong: ...`` (shape or dtype), ``refused: ...`` (the
    function raised ``NotImplementedError``) or ``error: ...`` (it raised anything else).
    """

    case: str
    what: str
    error: float
    allowed: float
    verdict: str

    @property
    def failed(self) -> bool:
        """Neither right nor refused."""
        return not self.verdict.startswith(("ok", "refused"))

    @property
    def ratio(self) -> float:
        """The error in units of what is allowed."""
        return self.error / self.allowed if self.error else 0.0


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``check`` found. Prints as a table: per case the worst result, and all that fail."""

    rows: tuple[Row, ...]

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that are neither right nor refused."""
        return tuple(row for row in self.rows if row.failed)

    @property
    def ok(self) -> bool:
        """True if nothing failed. A refusal is no failure."""
        return not self.failures

    def __str__(self) -> str:
        by_case: dict[str, list[Row]] = {}
        for row in self.rows:
            by_case.setdefault(row.case, []).append(row)
        table = [("case", "what", "error", "allowed", "verdict")]
        for rows in by_case.values():
            shown = [r for r in rows if r.failed] or [max(rows, key=lambda r: r.ratio)]
            for r in shown:
                numbers = (
                    ("", "") if math.isnan(r.error) else (f"{r.error:.2g}", f"{r.allowed:.2g}")
                )
                table.append((r.case, r.what, *numbers, r.verdict))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in table]
        failed = sum(any(r.failed for r in rows) for rows in by_case.values())
        refused = sum(rows[0].verdict.startswith("refused") for rows in by_case.values())
        good = len(by_case) - failed - refused
        lines.append(f"{len(by_case)} cases: {good} right, {refused} refused, {failed} failed")
        return "\n".join(line.rstrip() for line in lines)


def check(
    fn: Callable[..., Any],
    *,
    cases: Sequence[Case | Trial] | None = None,
    gradients: bool = True,
    compiler_options: Mapping[str, Any] | None = None,
) -> Report:
    """Compares an attention function with the float64 oracle, forward and backward.

    With ``plain`` the materialized formula in the case's own dtype, a result passes if::

        |fn - oracle| <= f * max |plain - oracle| + eps(dtype) * max |oracle|

    everywhere, with ``f = 2`` for outputs and 3 for gradients. The plain formula's error is the
    worst of a few tries, in other orders of summation and with inputs moved by one rounding, and
    at least four standard deviations.

    Args:
      fn: called as ``fn(query, key, value, *, mask, score, sinks, scale, dropout_rate,
        dropout_key, return_lse)``, and in a few cases with ``query_positions, key_positions``, with
        the meaning these have in ``attention``: ``mask`` a ``Mask`` or None, ``score`` a tuple of
        ``Score``. It is traced by ``jax.jit`` and
        ``jax.vjp``. What it cannot do it should refuse with ``NotImplementedError``.
      cases: what to try; None is the whole catalogue. A ``Trial`` is a case that has been
        prepared, for checking several functions.
      gradients: also compare the gradients of query, key, value, sinks, scale and scores.
      compiler_options: for XLA, which compiles ``fn`` and the plain formula.

    Returns:
      A Report, which prints as a table.

    >>> import attention_jax as aj
    >>> from attention_jax.testing import cases, check, jax_nn
    >>> few = cases(name="plain, narrow") + cases(name="empty rows by mask, narrow")
    >>> check(aj.attention, cases=few, gradients=False).ok
    True
    >>> report = check(jax_nn, cases=few, gradients=False)
    >>> [(row.case, row.verdict) for row in report.rows]
    [('plain, narrow', 'ok'), ('empty rows by mask, narrow', 'wrong')]

    Source: the tolerance is that of FlashAttention's tests (Dao et al. 2022).
    """
    rows: list[Row] = []
    for each in catalogue() if cases is None else cases:
        t = each
        if isinstance(t, Case):
            t = trial(t, gradients=gradients, compiler_options=compiler_options)
        rows += _judge(fn, t, gradients, compiler_options)
    return Report(tuple(rows))


def trial(
    case: Case, *, gradients: bool = True, compiler_options: Mapping[str, Any] | None = None
) -> Trial:
    """A case, prepared: numbers, oracle and plain formula have been computed.

    Args:
      case: from ``cases()``, or one's own.
      gradients: also those of the gradients.
      compiler_options: for XLA, which compiles the plain formula.

    >>> from attention_jax.testing import Case, trial
    >>> t = trial(Case("two keys", score="softcap", dtype="bfloat16"), gradients=False)
    >>> 0 < t.allowed["lse"] < 0.2
    True
    """
    p = problem(case)
    right = oracle(p, gradients)
    inputs, *others = tries(p, TRIES)
    evaluated = _evaluate(
        functools.partial(plain, p),
        inputs,
        tuple(others),
        case,
        gradients,
        compiler_options,
        mapped=True,
    )
    orders = [jax.tree.map(lambda x, i=i: x[i], others[-1]) for i in range(TRIES)]
    plainly, eps = _named(p, evaluated), float(jnp.finfo(case.dtype).eps)
    allowed = {}
    for name, x in right.items():
        errors = np.stack(
            [
                _errors(one, reordered(name, x, order))
                for one, order in zip(plainly[name], orders, strict=True)
            ]
        )
        deviation = np.linalg.norm(errors) / math.sqrt(max(errors.size, 1))
        off = max(np.max(errors, initial=0.0), DEVIATIONS * deviation)
        largest = np.max(np.abs(x), initial=0.0, where=np.isfinite(x))
        allowed[name] = float((3 if name.startswith("d ") else 2) * off + eps * largest)
    return Trial(p, right, allowed)


# --- Running and judging.


def _judge(
    fn: Callable[..., Any], t: Trial, gradients: bool, options: Mapping[str, Any] | None
) -> Iterator[Row]:
    p, case = t.problem, t.problem.case

    def call(x: Inputs, mask: Mask | None, key: Any) -> tuple[Any, ...]:
        score = tuple(term.build(**a) for term, a in zip(p.terms, x.score, strict=True))
        results = fn(
            x.query,
            x.key,
            x.value,
            mask=mask,
            score=score,
            sinks=x.sinks,
            scale=x.scale,
            dropout_rate=case.dropout_rate,
            dropout_key=key,
            return_lse=case.lse,
            **placed,
        )
        return tuple(results) if case.lse else (results,)

    placed = {}
    if case.positions:
        placed = dict(zip(("query_positions", "key_positions"), positions(case), strict=True))
        if not _takes(fn, *placed):
            refusal = "refused: it takes no query_positions and key_positions"
            yield Row(case.name, "all", math.nan, math.nan, refusal)
            return
    key = None
    if case.dropout_rate:
        key = jax.random.wrap_key_data(jnp.asarray(p.dropout_key), impl="threefry2x32")
    found, raised = {}, ""
    for backward in (True, False) if gradients else (False,):
        try:
            found = _named(p, _evaluate(call, p.planted, (p.mask, key), case, backward, options))
            break
        except NotImplementedError as refusal:
            raised = f"refused: {refusal}"
        except Exception as error:  # noqa: BLE001 - whatever a stranger's function raises is a verdict
            raised = f"error: {type(error).__name__}: {error}"
    raised = raised.split("\n")[0]
    if not found:
        yield Row(case.name, "all", math.nan, math.nan, raised)
        return
    for name, x in t.right.items():
        if name in found:
            off, allowed = _error(found[name], x), t.allowed[name]
            verdict = _verdict(name, found[name], x, case, off <= allowed)
            yield Row(case.name, name, off, allowed, verdict)
    if raised:
        yield Row(case.name, "gradients", math.nan, math.nan, raised)


def _takes(fn: Callable[..., Any], *names: str) -> bool:
    """Whether a function has these arguments, as far as it tells."""
    try:
        known = inspect.signature(fn).parameters
    except ValueError:  # a function written in C may have no signature
        return True
    return {*names} <= {*known} or any(p.kind is p.VAR_KEYWORD for p in known.values())


def _verdict(name: str, found: Any, right: Any, case: Case, near: bool) -> str:
    if found.shape != right.shape:
        return f"wrong: shape {found.shape}, expected {right.shape}"
    if name == "out" and found.dtype != case.dtype:
        return f"wrong: dtype {found.dtype}, expected {case.dtype}"
    if name == "lse" and found.dtype != case.wide:
        return f"wrong: dtype {found.dtype}, expected {case.wide}"
    return "ok" if near else "wrong"


def _error(found: Any, right: Any) -> float:
    """The largest absolute difference; another shape is infinitely far."""
    if found.shape != right.shape:
        return math.inf
    return float(np.max(_errors(found, right), initial=0.0))


def _errors(found: Any, right: Any) -> np.ndarray:
    """The absolute differences; NaN is infinitely far."""
    found = np.asarray(found, np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where(found == right, 0.0, np.abs(found - right))
    return np.where(np.isnan(difference), np.inf, difference)


def _evaluate(
    call: Callable[..., tuple[Any, ...]],
    x: Inputs,
    others: tuple[Any, ...],
    case: Case,
    gradients: bool,
    options: Mapping[str, Any] | None,
    mapped: bool = False,
) -> tuple[tuple[Any, ...], Inputs | None]:
    """``call(x, *others)``, one program, and the gradient of ``sum d_out * out + d_lse * lse``.

    If ``mapped``, over the first axis of every array.
    """
    arguments = x._replace(d_out=None, d_lse=None)
    # Cotangents come transposed: in use they are rarely laid out as the outputs are.
    cotangents = np.moveaxis(x.d_out, -3, -1), x.d_lse

    def program(arguments: Inputs, cotangents: Any, others: tuple[Any, ...]) -> Any:
        def forward(arguments: Inputs) -> tuple[Any, ...]:
            return call(arguments, *others)

        if not gradients:
            return forward(arguments), None
        results, pull = jax.vjp(forward, arguments)
        given = (jnp.moveaxis(cotangents[0], -1, -3), cotangents[1])
        return results, pull(tuple(d.astype(r.dtype) for d, r in zip(given, results, strict=False)))

    if mapped:
        program = jax.vmap(program)
    with jax.enable_x64(case.dtype == "float64"):
        compiled = jax.jit(program, compiler_options=dict(options) if options else None)
        results, pulled = jax.tree.map(np.asarray, compiled(arguments, cotangents, others))
    return results, pulled[0] if gradients else None


def _named(p: Problem, evaluated: tuple[tuple[Any, ...], Inputs | None]) -> dict[str, np.ndarray]:
    """Results and gradients by the names that rows have."""
    results, g = evaluated
    named = dict(zip(("out", "lse"), results, strict=False))
    if g is None:
        return named
    named |= {f"d {n}": getattr(g, n) for n in ("query", "key", "value", "sinks", "scale")}
    for term, arrays in zip(p.terms, g.score, strict=True):
        named |= {f"d {term.name}.{name}": x for name, x in arrays.items()}
    return {name: x for name, x in named.items() if x is not None}
