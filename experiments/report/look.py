"""A page that shows attention weights: one self-contained HTML file.

::

    python -m experiments look RUN        # writes RUN/look.html

The page is the template ``look.html`` with the weights as JSON. Its address holds the selection,
``look.html#view=0&layer=1&head=2&token=3``, so that a finding can be shared as a link.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.training.task import AttentionView

TEMPLATE = Path(__file__).with_name("look.html")
UNIT = 10_000  # the page holds probabilities as integers, in ten-thousandths
SLACK = 1e-2  # rounding by which a low-precision probability may leave [0, 1]


def page(heading: str, subtitle: str, views: Sequence[AttentionView]) -> str:
    """The HTML document.

    Args:
      heading: its title.
      subtitle: which weights these are, in a line.
      views: the kinds of attention to choose from; the first is shown first.

    Raises:
      ValueError: there is no view, or one whose weights are not probabilities over its tokens.
    """
    if not views:
        raise ValueError("a page needs at least one view, got none")
    # Only "<" could end the script element; escaped, it is the same JSON.
    data = json.dumps([_as_json(view) for view in views]).replace("<", "\\u003c")
    return filled(TEMPLATE, heading=html.escape(heading), subtitle=html.escape(subtitle), data=data)


def filled(template: Path, **parts: str) -> str:
    """The text of a template, with each ``{{name}}`` replaced by the part of this name."""
    text = template.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], text)


def write(file: Path, heading: str, subtitle: str, views: Sequence[AttentionView]) -> None:
    """Writes the page; see ``page``."""
    file.write_text(page(heading, subtitle, views), encoding="utf-8")


def _as_json(view: AttentionView) -> dict[str, Any]:
    """A view as JSON, its weights as little-endian uint16 in base64.

    Raises:
      ValueError: see ``page``.
    """
    weights = np.asarray(view.weights)
    T, S = len(view.queries), len(view.keys)
    if weights.ndim != 4 or weights.shape[2:] != (T, S) or not weights.size:
        raise ValueError(
            f"view {view.title!r}: weights must be [layers heads {T} {S}], for {T} queries and {S} "
            f"keys, with no empty axis, got {list(weights.shape)}"
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
