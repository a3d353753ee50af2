"""``walkthrough``: self-attention by hand, every number from the embeddings to the residual.

    python -m experiments walkthrough

Three positions of width 1, then three tokens of width 2 with weight matrices; then the same tokens
with two heads, causal and local attention, and cross-attention. The numbers are those of the NumPy
oracle, ``attention_jax.reference``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attention_jax import reference

Array = np.ndarray[Any, np.dtype[np.float64]]
SHADES = " ░▒▓█"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ``walkthrough``."""

    out: Path = Path("runs/walkthrough.png")
    """The picture to write."""


class Projections(NamedTuple):
    """The four projection matrices of one head."""

    query: Array
    key: Array
    value: Array
    out: Array


class HeadSteps(NamedTuple):
    """Everything that one head computes for tokens ``x [T E]``."""

    x: Array
    query: Array
    key: Array
    value: Array
    scores: Array
    """``Q K^T``, ``[T S]``."""
    scaled: Array
    """``scores / sqrt(H)``."""
    weights: Array
    """``softmax`` of each row of ``scaled``."""
    heads: Array
    """``weights V``."""
    projected: Array
    """``heads W_O``."""
    residual: Array
    """``x + projected``."""


def by_hand(x: Array, W: Projections, mask: Any = None) -> HeadSteps:
    """One head on tokens ``[T E]``.

    >>> x = np.array([[1.0], [2.0], [3.0]])
    >>> by_hand(x, Projections(*[np.ones((1, 1))] * 4)).weights.round(4).tolist()[0]
    [0.09, 0.2447, 0.6652]
    """
    q, k, v = x @ W.query, x @ W.key, x @ W.value
    scores = q @ k.T
    found = reference.head(q, k, v, mask=mask)
    projected = found.out @ W.out
    scaled = scores / np.sqrt(q.shape[1])
    return HeadSteps(x, q, k, v, scores, scaled, found.weights, found.out, projected, x + projected)


ONE = np.ones((1, 1))
FIRST = np.array([[1.0], [2.0], [3.0]]), Projections(ONE, ONE, ONE, ONE)
ONES, IDENTITY = np.ones((2, 2)), np.eye(2)
SECOND = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), Projections(ONES, IDENTITY, IDENTITY, ONES)
CAUSAL = np.tril(np.ones((3, 3), bool))
LOCAL = abs(np.subtract.outer(np.arange(3), np.arange(3))) <= 1


def variants() -> dict[str, Array]:
    """Attention weights ``[T S]`` of other kinds of attention on the tokens of the second example.

    Queries, keys and values are the tokens themselves. In cross-attention, the queries are
    ``[1, 0]`` and ``[0, -1]``.
    """
    x, _ = SECOND
    heads = x[:, :, None]  # two heads of width 1: one per feature
    split = reference.attention(heads, heads, heads).weights
    others = np.array([[1.0, 0.0], [0.0, -1.0]])
    return {
        "head 1 of 2": split[0],
        "head 2 of 2": split[1],
        "causal": reference.head(x, x, x, mask=CAUSAL).weights,
        "local": reference.head(x, x, x, mask=LOCAL).weights,
        "cross": reference.head(others, x, x).weights,
    }


CAPTIONS = {
    "head 1 of 2": "Two heads: each attends by one of the two features of every token.",
    "head 2 of 2": "The second head has its own weights; the outputs are concatenated.",
    "causal": "Causal: a token attends to itself and the tokens before it.",
    "local": "Local: a token attends to itself and one neighbor on each side.",
    "cross": "Cross-attention: the queries are two other tokens, [1, 0] and [0, -1].",
}


def step_lines(name: str, x: Array, why: str) -> Iterator[str]:
    """A step: its name, its numbers, and a line of explanation."""
    rows = ["  ".join(f"{number:8.4f}" for number in row) for row in x]
    yield f"{name:10} {rows[0]}"
    for row in rows[1:]:
        yield f"{'':10} {row}"
    yield f"{'':11}{why}"
    yield ""


def heat_map(weights: Array) -> Iterator[str]:
    """Weights as numbers and as cells, darker for larger weights."""
    for row in weights:
        cells = [f"{SHADES[min(int(p * len(SHADES)), len(SHADES) - 1)] * 2} {p:.4f}" for p in row]
        yield f"{'':10} " + "   ".join(cells) + f"    sum {row.sum():.4f}"


def explained(steps: HeadSteps, title: str) -> Iterator[str]:
    """All steps of one head."""
    T, H = steps.query.shape
    yield from step_lines("x", steps.x, f"{title}: {T} tokens, one row each.")
    yield from step_lines("Q = x W_Q", steps.query, "Queries: what each token looks for.")
    yield from step_lines("K = x W_K", steps.key, "Keys: what each token is matched by.")
    yield from step_lines("V = x W_V", steps.value, "Values: what each token passes on.")
    yield from step_lines("Q K^T", steps.scores, "Row i: how well each key matches query i.")
    why = f"Divided by sqrt({H}), so that scores do not grow with the width of a head."
    yield from step_lines("scaled", steps.scaled, why)
    yield from step_lines(
        "weights",
        steps.weights,
        "softmax of each row: exp of each score, divided by their sum.",
    )
    yield from heat_map(steps.weights)
    yield f"{'':11}Every row sums to 1. Check this in other versions of this example: in some"
    yield f"{'':11}it does not hold, and then the output is not a mean of the values."
    yield ""
    yield from step_lines(
        "weights V", steps.heads, "Row i: the mean of the values, weighted by row i."
    )
    yield from step_lines("... W_O", steps.projected, "The output projection mixes the heads.")
    yield from step_lines(
        "x + ...", steps.residual, "The residual: the token plus the output of attention."
    )


def text() -> str:
    """The whole walkthrough."""
    lines = ["Three positions of width 1; queries, keys and values are the numbers.", ""]
    lines += explained(by_hand(*FIRST), "1, 2, 3")
    lines += ["Three tokens of width 2; W_Q and W_O are all ones, W_K and W_V identities.", ""]
    lines += explained(by_hand(*SECOND), "Embeddings")
    lines += [
        "The same tokens in other kinds of attention; queries, keys and values are the tokens.",
        "",
    ]
    for name, weights in variants().items():
        lines += [f"{name:10} {CAPTIONS[name]}", *heat_map(weights), ""]
    return "\n".join(lines)


def draw(file: Path) -> None:
    """Draws all weights as heat maps."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "1, 2, 3": by_hand(*FIRST).weights,
        "[1,2] [3,4] [5,6]": by_hand(*SECOND).weights,
        **variants(),
    }
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.2 * len(panels), 2.7), layout="constrained"
    )
    for axis, (name, weights) in zip(axes, panels.items(), strict=True):
        axis.imshow(weights, vmin=0, vmax=1, cmap="Blues")
        for (i, j), p in np.ndenumerate(weights):
            axis.text(
                j, i, f"{p:.2f}", ha="center", va="center", color="white" if p > 0.6 else "black"
            )
        axis.set_title(name, fontsize=10)
        axis.set_xticks(range(weights.shape[1]), range(1, weights.shape[1] + 1))
        axis.set_yticks(range(len(weights)), range(1, len(weights) + 1))
    axes[0].set_ylabel("query")
    figure.supxlabel("key", fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(options: Options) -> int:
    """Prints the walkthrough and writes the picture; returns the exit code."""
    print(text())
    draw(options.out)
    print(f"wrote {options.out}")
    return 0
