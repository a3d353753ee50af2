"""``PrimitiveBackend``: the primitives of one head as a backend for all heads of all examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attention_jax.backends.call import Backend, Call, Head, Results, Spec
from attention_jax.backends.chunks import OUTPUTS, operand_axes, operands
from attention_jax.backends.heads import as_arrays, lift, over_heads_and_examples
from attention_jax.backends.primitive import HeadAttention
from attention_jax.scores import Score

Plan = Callable[[Head], tuple[Head, Any, Any]]  # -> head, schedule, config


class PrimitiveBackend(Backend):
    """A backend that maps the primitives of one head over all heads of all examples.

    A subclass sets ``PRIMITIVES`` and defines ``head_plan``.

    Attributes:
      PRIMITIVES: from ``primitive.make``.
      RESHAPE: see ``heads.lift``.
    """

    CHUNKS = True
    PRIMITIVES: ClassVar[HeadAttention]
    RESHAPE: ClassVar[bool] = True

    def head_plan(self, spec: Spec) -> Plan:
        """A function from a head to what the primitives take: head, schedule and config."""
        raise NotImplementedError(f"{type(self).__name__} must define head_plan(spec)")

    def planned_score(self) -> Callable[[Head, Score], Score] | None:
        """What ``head_plan`` makes of each score of a head; None if it keeps the scores."""
        return None

    def run(self, call: Call, spec: Spec) -> tuple[jax.Array, jax.Array]:
        plan = self.head_plan(spec)

        def head(one: Head) -> tuple[jax.Array, jax.Array]:
            out, lse = self.PRIMITIVES(*plan(one))
            return out.astype(one.query.dtype), lse

        outputs = "*B T N D", "*B T N"
        out, lse = over_heads_and_examples(head, call, spec.sizes, outputs, reshape=self.RESHAPE)
        return out, lse

    def chunk(self, call: Call, spec: Spec) -> Results:
        plan = self.head_plan(spec)

        def head(one: Head) -> Any:
            return self.PRIMITIVES.forward(*plan(one))

        return Results(*over_heads_and_examples(head, call, spec.sizes, OUTPUTS))

    def chunk_cotangents(
        self, call: Call, spec: Spec, results: Results, wrt: Sequence[int], cotangents: Any
    ) -> list[jax.Array]:
        """The transpose of the primitive ``tangent``, mapped over all heads of all examples."""
        plan = self.head_plan(spec)
        flat, axes, structure = as_arrays(call, spec.sizes)
        every, every_axes = operands(call), operand_axes(call)

        def one(*xs: Any) -> Any:
            head: Head = jax.tree.unflatten(structure, xs[: len(flat)])
            rest = xs[len(flat) :]
            tangents = dict(zip(wrt, rest[len(OUTPUTS) :], strict=True))
            if (planned := self.planned_score()) is not None:
                tangents = _of_planned_scores(planned, head, tangents)
            return self.PRIMITIVES.tangent(*plan(head), rest[: len(OUTPUTS)], tangents)

        def of_results(*tangents: Any) -> Any:
            letters = [*axes, *OUTPUTS, *(every_axes[i] for i in wrt)]
            return lift(one, [*flat, *results, *tangents], spec.sizes, letters, OUTPUTS[:2])

        return list(jax.linear_transpose(of_results, *(every[i] for i in wrt))(tuple(cotangents)))


def _of_planned_scores(
    planned: Callable[[Head, Score], Score], head: Head, tangents: dict[int, Any]
) -> dict[int, Any]:
    """Tangents of the operands with planned scores, given those with the scores of the call.

    Both are by index of the operand. A score whose arrays have no tangents gets none, because a
    kernel may lack some of its derivatives.
    """
    before = after = 3  # query, key and value come first
    result = {i: x for i, x in tangents.items() if i < before}
    for score in head.score:
        given, structure = jax.tree.flatten(score)
        inner = [i for i in range(len(given)) if before + i in tangents]

        def arrays(
            *changed: Any, given: Any = given, structure: Any = structure, inner: Any = inner
        ) -> list[Any]:
            every = list(given)
            for i, x in zip(inner, changed, strict=True):
                every[i] = x
            return jax.tree.leaves(planned(head, jax.tree.unflatten(structure, every)))

        primals = [given[i] for i in inner]
        found = jax.eval_shape(arrays, *primals)
        if inner:
            _, dots = jax.jvp(arrays, primals, [tangents[before + i] for i in inner])
            floats = (i for i, x in enumerate(found) if jnp.issubdtype(x.dtype, jnp.inexact))
            result |= {after + i: dots[i] for i in floats}
        before += len(given)
        after += len(found)
    return result | {after + i - before: x for i, x in tangents.items() if i >= before}
