"""A page that shows who attends to whom: one HTML file, which needs no network to be read.

::

    python -m experiments look RUN        # writes RUN/look.html

The page is ``look.html``, with what it shows put in as JSON. Its address says what is chosen,
``look.html#view=0&layer=1&head=2&token=3``, so that a finding can be passed on as a link.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TEMPLATE = Path(__file__).with_name("look.html")
UNIT = 10_000  # the page has probabilities as integers, in ten-thousandths
SLACK = 1e-2  # by which a probability of low precision may miss 0..1


class View(NamedTuple):
    """Who attends to whom in one kind of attention of a model, for one example."""

    title: str
    """What attends to what: "encoder", "translation to source"."""
    queries: Sequence[str]
    """The tokens that attend, T of them."""
    keys: Sequence[str]
    """The tokens that are attended to, S of them."""
    weights: np.ndarray
    """Probabilities, ``[layers heads T S]``."""
    note: str = ""
    """What else a reader should know."""


def self_attention(title: str, tokens: Sequence[str], weights: Mapping[str, Any]) -> list[View]:
    """Of tokens to each other, in all layers, as ``record_weights`` found for one example."""
    return [View(title, tokens, tokens, np.stack([np.asarray(w[0]) for w in weights.values()]))]


def encoder_and_decoder(
    source: str,
    sources: Sequence[str],
    target: str,
    targets: Sequence[str],
    weights: Mapping[str, Any],
) -> list[View]:
    """Of an ``EncoderDecoder``'s target to its source, and of both to themselves.

    Args:
      source, target: what they are called.
      sources, targets: their tokens.
      weights: as ``record_weights`` found them for one example.
    """

    def of(begins: str, ends: str) -> np.ndarray:
        found = [w[0] for name, w in weights.items() if name.startswith(begins) and ends in name]
        return np.stack([np.asarray(w) for w in found])

    return [
        View(f"{target} to {source}", targets, sources, of("decoder", ".cross_attention")),
        View(source, sources, sources, of("encoder", ".attention")),
        View(target, targets, targets, of("decoder", ".attention")),
    ]


def page(heading: str, said: str, views: Sequence[View]) -> str:
    """The HTML document.

    Args:
      heading: its title.
      said: what the weights are of, in a line.
      views: one after the other; the first is shown first.

    Raises:
      ValueError: there is no view, or one whose weights are no probabilities of its tokens.
    """
    if not views:
        raise ValueError("a page shows at least one view, got none")
    # In a script only "<" could end it; as an escape it is the same JSON.
    data = json.dumps([_described(view) for view in views]).replace("<", "\\u003c")
    parts = {"heading": html.escape(heading), "said": html.escape(said), "data": data}
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def write(file: Path, heading: str, said: str, views: Sequence[View]) -> None:
    """Writes the page; see ``page``."""
    file.write_text(page(heading, said, views), encoding="utf-8")


def _described(view: View) -> dict[str, Any]:
    """A view as JSON, its weights as little-endian uint16 in base64.

    Raises:
      ValueError: see ``page``.
    """
    weights = np.asarray(view.weights)
    T, S = len(view.queries), len(view.keys)
    if weights.ndim != 4 or weights.shape[2:] != (T, S) or not weights.size:
        raise ValueError(
            f"view {view.title!r}: weights must be [layers heads {T} {S}], of {T} queries and {S} "
            f"keys, none of them 0, got {list(weights.shape)}"
        )
    weights = weights.astype(np.float64)
    if not (np.isfinite(weights).all() and -SLACK <= weights.min() <= weights.max() <= 1 + SLACK):
        raise ValueError(
            f"view {view.title!r}: weights must be probabilities, got {weights.min():.4g} to "
            f"{weights.max():.4g}"
        )
    whole = np.rint(weights.clip(0, 1) * UNIT).astype("<u2")
    return {
        "title": view.title,
        "note": view.note,
        "queries": list(view.queries),
        "keys": list(view.keys),
        "layers": weights.shape[0],
        "heads": weights.shape[1],
        "weights": base64.b64encode(whole.tobytes()).decode("ascii"),
    }
