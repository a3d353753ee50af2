"""How time and memory grow with length, for every mask and every mechanism.

    python -m experiments bench --scaling

One head of width 64, forward, float32. Memory is what the compiled program plans in addition to
arguments and results. A kind is measured up to the length at which a call would take longer than
``LONGEST``, and if it is linear, up to 262,144 tokens. Slopes are those of log time against log
length from 4,096 to 65,536: 1 is linear, 2 is quadratic.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax import attention, masks, mechanisms
from experiments.bench.contenders import in_turns
from experiments.bench.shapes import WINDOW

H = 64
LENGTHS = (256, 1024, 4096, 16_384, 65_536)
LINEAR_LENGTHS = (*LENGTHS, 262_144)  # of kinds that are linear
FROM, TO = 4096, 65_536  # lengths between which slopes are measured
STEEPEST = 1.15  # slope up to which growth counts as linear
FILE = "scaling.json"
LONGEST = 20.0  # seconds that one call may take


class Kind(NamedTuple):
    """A mask or mechanism whose cost is measured."""

    group: str
    make: Callable[[int], Callable[..., Any]]
    """From a length to a function of query, key and value ``[T 1 H]``."""
    linear: bool
    """Whether its cost should grow linearly."""


class Point(NamedTuple):
    """One measurement."""

    length: int
    seconds: float
    bytes: int


def _mask(make: Callable[[int], masks.Mask | None]) -> Callable[[int], Callable[..., Any]]:
    return lambda T: functools.partial(attention, mask=make(T))


def _segments(T: int) -> masks.Mask:
    return masks.segments(jnp.arange(T, dtype=jnp.int32) // WINDOW)


def _global(T: int) -> masks.Mask:
    flags = np.arange(T) % (T // 4) == 0  # four tokens attend to all and are attended to by all
    return masks.window(WINDOW // 2, WINDOW // 2) | masks.global_tokens(flags)


def _neighborhood(T: int) -> masks.Mask:
    side = math.isqrt(T)
    return masks.neighborhood((side, side), 9)


def _blocks(T: int) -> masks.Mask:
    n = T // WINDOW
    band = abs(np.subtract.outer(np.arange(n), np.arange(n))) <= 1
    return masks.block_sparse(band, WINDOW)


def _gated(width: int) -> Callable[..., Any]:
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        gates = jnp.broadcast_to(-jnp.abs(k[..., :1]), (*k.shape[:-1], width)) / 100
        return mechanisms.gated_linear_attention(q, k, v, gates)

    return run


def _delta(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    return mechanisms.delta_rule(q, k, v, jax.nn.sigmoid(v[..., 0]))


def _linformer(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    mixing = jnp.ones((WINDOW, k.shape[0])) / k.shape[0]
    return mechanisms.linformer_attention(q, k, v, mixing, mixing)


def _routing(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    C = math.isqrt(k.shape[0])
    centroids = jax.random.normal(jax.random.key(1), (1, C, H))
    return mechanisms.routing_attention(q, k, v, centroids)


def _differential(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    q, k = (jnp.concatenate([x, x[..., ::-1]], axis=-2) for x in (q, k))
    return mechanisms.differential_attention(q, k, v, 0.5, mask=masks.causal())


def _latent(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    up = jnp.eye(H)[:, None]
    some = slice(0, 16)
    return mechanisms.latent_attention(
        q, q[..., some], k[:, 0], k[:, 0, some], up, up, mask=masks.causal()
    )


def _additive(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return mechanisms.additive_attention(q, k, v, jnp.ones((1, H)))


def _performer(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    features = mechanisms.performer_features(jax.random.key(0), H, 2 * H)
    return mechanisms.linear_attention(q, k, v, mask=masks.causal(), features=features)


def _plain(function: Callable[..., Any], **options: Any) -> Callable[[int], Callable[..., Any]]:
    return lambda T: functools.partial(function, **options)


KINDS: dict[str, Kind] = {
    "all": Kind("masks", _mask(lambda T: None), False),
    "causal": Kind("masks", _mask(lambda T: masks.causal()), False),
    "prefix": Kind("masks", _mask(lambda T: masks.causal() | masks.prefix(T // 8)), False),
    "dilated": Kind("masks", _mask(lambda T: masks.dilated(4)), False),
    "lengths": Kind("masks", _mask(lambda T: masks.lengths(key=T // 2)), False),
    "function": Kind("masks", _mask(lambda T: masks.mask_fn(_same_parity)), False),
    "window": Kind("masks", _mask(lambda T: masks.window(WINDOW - 1, 0)), True),
    "segments": Kind("masks", _mask(_segments), True),
    "chunked": Kind("masks", _mask(lambda T: masks.chunked(WINDOW)), True),
    "window, 4 global": Kind("masks", _mask(_global), False),
    "neighborhood": Kind("masks", _mask(_neighborhood), False),
    "block sparse": Kind("masks", _mask(_blocks), False),
    "additive": Kind("mechanisms", _plain(_additive), False),
    "inverted": Kind("mechanisms", _plain(mechanisms.inverted_attention), False),
    "slot": Kind("mechanisms", _plain(mechanisms.slot_attention), False),
    "top 8": Kind("mechanisms", _plain(mechanisms.topk_attention, k=8), False),
    "differential": Kind("mechanisms", _plain(_differential), False),
    "latent": Kind("mechanisms", _plain(_latent), False),
    "routing": Kind("mechanisms", _plain(_routing), False),
    "linformer": Kind("mechanisms", _plain(_linformer), True),
    "linear": Kind("mechanisms", _plain(mechanisms.linear_attention), True),
    "linear, causal": Kind(
        "mechanisms", _plain(mechanisms.linear_attention, mask=masks.causal()), True
    ),
    "performer": Kind("mechanisms", _plain(_performer), True),
    "retention": Kind("mechanisms", _plain(mechanisms.retention), True),
    "gated": Kind("mechanisms", _plain(_gated(H)), True),
    "gated, one a token": Kind("mechanisms", _plain(_gated(1)), True),
    "delta rule": Kind("mechanisms", _plain(_delta), True),
}


def _same_parity(b: jax.Array, n: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
    return (q + k) % 2 == 0


def grow(kind: Kind, repeats: int, lengths: tuple[int, ...] | None = None) -> list[Point]:
    """Measures one length after the other until a call would take too long."""
    points: list[Point] = []
    default = LINEAR_LENGTHS if kind.linear else LENGTHS
    for T in default if lengths is None else lengths:
        if points:  # quadratic at worst
            expected = points[-1].seconds * (T / points[-1].length) ** (1 if kind.linear else 2)
            if expected > LONGEST or points[-1].bytes * (T / points[-1].length) ** 2 > 8e9:
                break
        keys = jax.random.split(jax.random.key(0), 3)
        arrays = [jax.random.normal(key, (T, 1, H)) for key in keys]
        compiled = jax.jit(kind.make(T)).lower(*arrays).compile()
        planned: Any = compiled.memory_analysis()
        run = {"ours": lambda: jax.block_until_ready(compiled(*arrays))}  # noqa: B023
        points.append(Point(T, in_turns(run, repeats)["ours"], planned.temp_size_in_bytes))
    return points


def slope(points: list[Point]) -> float | None:
    """The slope of log seconds against log length, from ``FROM`` to ``TO``."""
    measured = [point for point in points if FROM <= point.length <= TO]
    if len(measured) < 2:
        return None
    x, y = np.log([p.length for p in measured]), np.log([p.seconds for p in measured])
    return float(np.polyfit(x, y, 1)[0])


def line(name: str, kind: Kind, points: list[Point]) -> str:
    """The measurements of a kind in a line of text."""
    cells = [f"{p.length}: {p.seconds * 1e3:.1f} ms {p.bytes / 2**20:.1f} MiB" for p in points]
    steep = slope(points)
    growth = "too slow to tell" if steep is None else f"slope {steep:.2f}"
    if kind.linear and steep is not None:
        growth += f" (at most {STEEPEST}: {'ok' if steep <= STEEPEST else 'MISSED'})"
    return f"{name:20} {growth:32} " + ", ".join(cells)


def draw(found: dict[str, list[Point]], file: Path) -> None:
    """A log-log plot for each group: time above, memory below."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 9), layout="constrained", sharex=True)
    styles = itertools.product(("-", "--", ":"), plt.get_cmap("tab10").colors)  # type: ignore[attr-defined]
    style = dict(zip(found, itertools.cycle(styles), strict=False))
    for column, group in enumerate(("masks", "mechanisms")):
        for name, points in found.items():
            if KINDS[name].group != group:
                continue
            x = [p.length for p in points]
            dashes, color = style[name]
            steep = slope(points)
            label = name if steep is None else f"{name} ({steep:.2f})"
            axes[0, column].plot(
                x, [p.seconds for p in points], dashes, color=color, marker="o", ms=3, label=label
            )
            mebibytes = [max(p.bytes, 1024) / 2**20 for p in points]
            axes[1, column].plot(x, mebibytes, dashes, color=color, marker="o", ms=3)
        axes[0, column].set_title(f"{group} (slope from {FROM:,} to {TO:,})")
        axes[0, column].set_ylabel("seconds")
        axes[1, column].set_ylabel("MiB in addition to arguments and results")
        axes[1, column].set_xlabel("length")
        lines, names = axes[0, column].get_legend_handles_labels()
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
        axes[1, column].legend(lines, names, fontsize=8, frameon=False, ncols=4, **below)
    for axis in axes.ravel():
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def table(record: dict[str, Any]) -> list[str]:
    """The lines of a Markdown table, from the record that ``main`` wrote."""
    lines = [
        f"| | slope | {FROM:,} tokens, ms | {TO:,} tokens, ms | {TO:,} tokens, MiB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, written in record["kinds"].items():
        points = [Point(**point) for point in written]
        at = {point.length: point for point in points}
        steep = slope(points)
        cells = ["" if steep is None else f"{steep:.2f}"]
        cells += [f"{1e3 * at[T].seconds:,.1f}" if T in at else "" for T in (FROM, TO)]
        cells.append(f"{at[TO].bytes / 2**20:,.1f}" if TO in at else "")
        if name in KINDS and KINDS[name].linear and steep is not None:
            cells[0] = f"**{cells[0]}**" if steep <= STEEPEST else f"{cells[0]} (aim {STEEPEST})"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main(out: Path, repeats: int) -> int:
    """Measures every kind, prints it, and writes ``scaling.json`` and ``scaling.png``."""
    found = {}
    for name, kind in KINDS.items():
        found[name] = grow(kind, repeats)
        print(line(name, kind, found[name]), flush=True)
    missed = [
        name
        for name, points in found.items()
        if KINDS[name].linear and ((steep := slope(points)) is None or steep > STEEPEST)
    ]
    print("all slopes reached" if not missed else f"missed: {', '.join(missed)}")
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "time": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "kinds": {name: [point._asdict() for point in points] for name, points in found.items()},
    }
    (out / FILE).write_text(json.dumps(record, indent=1) + "\n")
    draw(found, out / "scaling.png")
    for name in (FILE, "scaling.png"):
        print(f"wrote {out / name}")
    return 0
