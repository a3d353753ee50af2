"""Self-attention by hand: every number from the embeddings to the residual, a line for each step.

    python -m experiments walkthrough

First for three positions of width 1, then for three tokens of width 2 with weight matrices; then
the same tokens with two heads, causal, local, and looked at by other tokens. The numbers are the
NumPy oracle's, ``attention_jax.reference``.
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
    """Where the picture goes."""

    out: Path = Path("runs/walkthrough.png")
    """The file to write."""


class Weights(NamedTuple):
    """The four matrices of one head."""

    query: Array
    key: Array
    value: Array
    out: Array


class Steps(NamedTuple):
    """All that one head computes for tokens ``x [T E]``."""

    x: Array
    query: Array
    key: Array
    value: Array
    scores: Array
    """``Q K^T``, ``[T S]``."""
    scaled: Array
    """``scores / sqrt(H)``."""
    weights: Array
    """``softmax`` of each row."""
    heads: Array
    """``weights V``."""
    projected: Array
    """``heads W_O``."""
    residual: Array
    """``x + projected``."""


def by_hand(x: Array, W: Weights, mask: Any = None) -> Steps:
    """One head over tokens ``[T E]``.

    >>> x = np.array([[1.0], [2.0], [3.0]])
    >>> by_hand(x, Weights(*[np.ones((1, 1))] * 4)).weights.round(4).tolist()[0]
    [0.09, 0.2447, 0.6652]
    """
    q, k, v = x @ W.query, x @ W.key, x @ W.value
    scores = q @ k.T
    found = reference.head(q, k, v, mask=mask)
    projected = found.out @ W.out
    scaled = scores / np.sqrt(q.shape[1])
    return Steps(x, q, k, v, scores, scaled, found.weights, found.out, projected, x + projected)


ONE = np.ones((1, 1))
FIRST = np.array([[1.0], [2.0], [3.0]]), Weights(ONE, ONE, ONE, ONE)
ONES, SAME = np.ones((2, 2)), np.eye(2)
SECOND = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), Weights(ONES, SAME, SAME, ONES)
CAUSAL = np.tril(np.ones((3, 3), bool))
LOCAL = abs(np.subtract.outer(np.arange(3), np.arange(3))) <= 1


def variants() -> dict[str, Array]:
    """Weights ``[T S]`` of the other kinds of attention on the second example's tokens.

    Queries, keys and values are the tokens themselves. Other tokens ask in cross-attention:
    ``[1, 0]`` and ``[0, -1]``.
    """
    x, _ = SECOND
    heads = x[:, :, None]  # two heads of width 1: one has the first numbers, one the second
    split = reference.attention(heads, heads, heads).weights
    others = np.array([[1.0, 0.0], [0.0, -1.0]])
    return {
        "head 1 of 2": split[0],
        "head 2 of 2": split[1],
        "causal": reference.head(x, x, x, mask=CAUSAL).weights,
        "local": reference.head(x, x, x, mask=LOCAL).weights,
        "cross": reference.head(others, x, x).weights,
    }


SAID = {
    "head 1 of 2": "Two heads: each takes one of the two numbers of every token and attends by it.",
    "head 2 of 2": "The second head has weights of its own; both outputs stand side by side.",
    "causal": "Causal: a token sees itself and those before it. The first sees only itself.",
    "local": "Local: a token sees itself and one to each side.",
    "cross": "Cross-attention: two other tokens, [1, 0] and [0, -1], ask; keys and values stay.",
}


def shown(name: str, x: Array, why: str) -> Iterator[str]:
    """A step: its name, its numbers, and a line that says why."""
    rows = ["  ".join(f"{number:8.4f}" for number in row) for row in x]
    yield f"{name:10} {rows[0]}"
    for row in rows[1:]:
        yield f"{'':10} {row}"
    yield f"{'':11}{why}"
    yield ""


def heat_map(weights: Array) -> Iterator[str]:
    """A weight as a number and, the larger, the darker a cell."""
    for row in weights:
        cells = [f"{SHADES[min(int(p * len(SHADES)), len(SHADES) - 1)] * 2} {p:.4f}" for p in row]
        yield f"{'':10} " + "   ".join(cells) + f"    sum {row.sum():.4f}"


def explained(steps: Steps, of: str) -> Iterator[str]:
    """All steps of one head."""
    T, H = steps.query.shape
    yield from shown("x", steps.x, f"{of}: {T} tokens, one row each.")
    yield from shown("Q = x W_Q", steps.query, "What each token asks.")
    yield from shown("K = x W_K", steps.key, "What each token can be found by.")
    yield from shown("V = x W_V", steps.value, "What each token gives.")
    yield from shown("Q K^T", steps.scores, "Row i: how well each key answers query i.")
    why = f"Divided by sqrt({H}), so that wide heads do not have larger scores than narrow ones."
    yield from shown("scaled", steps.scaled, why)
    yield from shown(
        "weights",
        steps.weights,
        "softmax of each row: exp of each score over the row's sum of them.",
    )
    yield from heat_map(steps.weights)
    yield f"{'':11}Every row sums to 1. That is the check to make: copies of this example are"
    yield f"{'':11}about whose rows do not, and then an output is no mean of values."
    yield ""
    yield from shown("weights V", steps.heads, "Row i: the mean of the values by weights of row i.")
    yield from shown("... W_O", steps.projected, "The output projection mixes what heads found.")
    yield from shown("x + ...", steps.residual, "The residual: the token, and what it gathered.")


def text() -> str:
    """The whole walk."""
    lines = ["Three positions of width 1; queries, keys and values are the numbers.", ""]
    lines += explained(by_hand(*FIRST), "1, 2, 3")
    lines += ["Three tokens of width 2; W_Q and W_O are all ones, W_K and W_V identities.", ""]
    lines += explained(by_hand(*SECOND), "Embeddings")
    lines += ["The same tokens in other kinds of attention (queries, keys, values: tokens).", ""]
    for name, weights in variants().items():
        lines += [f"{name:10} {SAID[name]}", *heat_map(weights), ""]
    return "\n".join(lines)


def draw(file: Path) -> None:
    """All weights as heat maps."""
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
    """Prints the walk and writes the picture."""
    print(text())
    draw(options.out)
    print(f"wrote {options.out}")
    return 0
