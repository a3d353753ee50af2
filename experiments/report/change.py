"""A page that compares attention before and after training, on the same tokens.

::

    python -m experiments look RUN --compare        # writes RUN/compare.html

For each head, with probabilities ``p`` before and ``q`` after, averaged over the queries ``i``::

    change = mean_i  1/2 sum_j |q_ij - p_ij|

which is 0 for the same attention and 1 where no key is shared. The page has the change of every
head, and maps of the heads that changed most. It is one self-contained HTML file without scripts.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.report.look import filled
from experiments.training.task import AttentionView

TEMPLATE = Path(__file__).with_name("change.html")
HEADS = 4  # whose maps are shown, of each view
PAIRS = 5  # whose numbers are shown, of each head
LABELED = 40  # tokens up to which the sides of a map have room for them
WIDTH, CELL = 360, (2, 20)  # pixels of a map, and the least and most of a cell

BLUE, RED, ORANGE = (27, 89, 147), (176, 48, 48), (180, 80, 11)


def page(
    heading: str, subtitle: str, before: Sequence[AttentionView], after: Sequence[AttentionView]
) -> str:
    """The HTML document.

    Args:
      heading: its title.
      subtitle: which weights these are, in a line.
      before, after: the same kinds of attention, on the same tokens.

    Raises:
      ValueError: there are none, or the tokens differ.
    """
    if not after:
        raise ValueError("a page needs at least one view, got none")
    if [_axes(view) for view in before] != [_axes(view) for view in after]:
        raise ValueError(
            "the tokens before and after training differ, so the two cannot be compared: choose "
            "a text that the model reads as a whole"
        )
    content = "\n".join(_section(*pair) for pair in zip(before, after, strict=True))
    heading, subtitle = html.escape(heading), html.escape(subtitle)
    return filled(TEMPLATE, heading=heading, subtitle=subtitle, content=content)


def changes(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The change of each head, ``[layers heads T S]`` twice to ``[layers heads]``.

    >>> changes(np.array([[[[1.0, 0.0]]]]), np.array([[[[0.25, 0.75]]]]))
    array([[0.75]])
    """
    return np.asarray(np.abs(after - before).sum(axis=-1).mean(axis=-1) / 2)


def _axes(view: AttentionView) -> tuple[str, list[str], list[str], tuple[int, ...]]:
    """What must be equal for two views to be comparable."""
    return view.title, list(view.queries), list(view.keys), np.shape(view.weights)


def _section(before: AttentionView, after: AttentionView) -> str:
    """The change of all heads of a view, and the heads that changed most."""
    p, q = (np.asarray(view.weights, np.float64) for view in (before, after))
    change = changes(p, q)
    order = np.argsort(-change, axis=None, kind="stable")[:HEADS]
    chosen = [divmod(int(i), change.shape[1]) for i in order]
    note = f"<p>{html.escape(after.note)}</p>" if after.note else ""
    if max(p.shape[2:]) > LABELED:
        note += f'<p class="quiet">{html.escape(" ".join(map(_shown, after.queries)))}</p>'
    panels = [_head(after, p[at], q[at], at, float(change[at])) for at in chosen]
    return f"""\
  <section class="panel">
    <h2>{html.escape(after.title)}</h2>
    {note}
    <p class="quiet">How much each head changed: the share of its attention that moved to other
    tokens, averaged over {len(after.queries)} queries. The mean of all heads is
    {change.mean():.2f}.</p>
    {_table(change)}
  </section>
{"".join(panels)}"""


def _table(change: np.ndarray) -> str:
    """The change of every head, a row for each layer."""
    top = max(float(change.max()), 1e-9)
    heads = "".join(f"<th>head {i}</th>" for i in range(change.shape[1]))
    rows = []
    for number, row in enumerate(change):
        cells = []
        for x in row:
            color = _mix(ORANGE, float(x) / top)
            ink = "#fff" if x > 0.85 * top else "inherit"
            cells.append(f'<td style="background:rgb{color};color:{ink}">{x:.2f}</td>')
        rows.append(f"<tr><th>layer {number}</th>{''.join(cells)}</tr>")
    return f'<table class="heads"><tr><th></th>{heads}</tr>{"".join(rows)}</table>'


def _head(
    view: AttentionView, p: np.ndarray, q: np.ndarray, at: tuple[int, int], change: float
) -> str:
    """Maps of one head, before, after and their difference, and its largest changes."""
    top = max(float(p.max()), float(q.max()), 1e-9)
    most = max(float(np.abs(q - p).max()), 1e-9)
    maps = [
        _map(view, _pixels(p / top), f"before; the darkest is {top:.2f}"),
        _map(view, _pixels(q / top), f"after; the darkest is {top:.2f}"),
        _map(view, _pixels((q - p) / most), f"blue: more; red: less, up to {most:.2f}"),
    ]
    pairs = np.argsort(-np.abs(q - p), axis=None, kind="stable")[:PAIRS]
    rows = []
    for i, j in (np.unravel_index(pair, p.shape) for pair in pairs):
        query, key = (html.escape(_shown(x)) for x in (view.queries[i], view.keys[j]))
        rows.append(
            f"<tr><td><b>{query}</b> ({i})</td><td><b>{key}</b> ({j})</td>"
            f'<td class="number">{p[i, j]:.2f}</td><td class="number">{q[i, j]:.2f}</td></tr>'
        )
    return f"""\
  <section class="panel">
    <h3>Layer {at[0]}, head {at[1]}: {change:.2f}</h3>
    <div class="maps">{"".join(maps)}
    <table class="pairs">
      <tr><th>query</th><th>key</th><th>before</th><th>after</th></tr>
      {"".join(rows)}
    </table></div>
  </section>
"""


def _map(view: AttentionView, pixels: np.ndarray, caption: str) -> str:
    """A picture of one head, a row for each query."""
    T, S = pixels.shape[:2]
    cell = min(max(WIDTH // max(T, S), CELL[0]), CELL[1])
    labels = ["", ""]
    if max(T, S) <= LABELED:
        labels = [
            "".join(f"<li>{html.escape(_shown(x))}</li>" for x in names)
            for names in (view.queries, view.keys)
        ]
    data = base64.b64encode(_png(pixels)).decode("ascii")
    return f"""\
<figure style="--cell:{cell}px"><figcaption>{html.escape(caption)}</figcaption>
<div class="map"><ol class="queries">{labels[0]}</ol>
<img width="{S * cell}" height="{T * cell}" alt="{html.escape(caption)}"
src="data:image/png;base64,{data}"><ol class="keys">{labels[1]}</ol></div></figure>"""


def _shown(token: str) -> str:
    """A token with its spaces and line breaks made visible."""
    named = {" ": "␣", "\n": "⏎", "\t": "⇥"}
    visible = "".join(named.get(x, x if x.isprintable() else f"[U+{ord(x):04X}]") for x in token)
    return visible or "∅"


def _pixels(x: np.ndarray) -> np.ndarray:
    """Colors ``[T S 3]`` of numbers from -1, red, over 0, white, to 1, blue."""
    strength = np.clip(np.abs(x), 0, 1)[..., None]
    color = np.where(x[..., None] < 0, RED, BLUE)
    return np.rint(255 + strength * (color - 255.0)).astype(np.uint8)


def _mix(color: tuple[int, int, int], strength: float) -> tuple[int, ...]:
    """A color between white and this one."""
    return tuple(round(255 + strength * (x - 255)) for x in color)


def _png(pixels: np.ndarray) -> bytes:
    """A PNG file of colors ``[height width 3]``, uint8."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return file.getvalue()
