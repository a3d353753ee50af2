"""What the run is on: card, driver, versions, clocks, and the rates all else is compared to."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.card import timing
from experiments.card.parts import Fields, Item, Setting, Skipped

# By the name in the records; torch and cuDNN come in more than one distribution.
PACKAGES = {
    "jax": ("jax",),
    "jaxlib": ("jaxlib",),
    "cudnn": ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
    "torch": ("torch",),
    "triton": ("triton",),
    "flax": ("flax",),
    "fa4-jax": ("fa4-jax",),
    "tokamax": ("tokamax",),
}
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,memory.total"


def items(setting: Setting) -> Iterator[Item]:
    """Identity first: the other parts put it into their records."""
    yield Item("identity", identity)
    yield Item("clocks", clocks)
    yield Item("copy", lambda: copy(setting.dry))
    yield Item("matrix", lambda: matrix(setting.dry))
    yield Item("clocks after", clocks)


def identity() -> Iterator[Fields]:
    """Card, driver and versions."""
    device = jax.devices()[0]
    yield {
        "card": device.device_kind,
        "platform": jax.default_backend(),
        "driver": next(iter(_nvidia_smi("driver_version")), "none"),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name, distributions in PACKAGES.items():
        for distribution in distributions:
            try:
                found[name] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def clocks() -> Iterator[Fields]:
    """Clocks, power limit and temperature."""
    found = _nvidia_smi(CLOCKS)
    if not found:
        raise Skipped("there is no nvidia-smi")
    yield dict(zip(CLOCKS.split(","), found, strict=True))


def _nvidia_smi(fields: str) -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    lines = found.stdout.splitlines()
    return [x.strip() for x in lines[0].split(",")] if found.returncode == 0 and lines else []


def copy(dry: bool) -> Iterator[Fields]:
    """Bytes read and written per second by a copy that changes each number."""
    n = 2**16 if dry else 2**29
    x = jnp.zeros((n,), jnp.bfloat16)
    step: Any = jax.jit(lambda x: x + jnp.bfloat16(1))
    timed = timing.queued(lambda: step(x), jax.block_until_ready, **pace(dry))
    yield {"gb_per_s": 2 * x.nbytes / timed.each / 1e9, **timed.fields()}


def matrix(dry: bool) -> Iterator[Fields]:
    """TFLOP/s of a product of random square matrices in bfloat16."""
    for n in (64,) if dry else (8192, 4096):
        a, b = (
            jax.random.normal(jax.random.key(i), (n, n), jnp.float32).astype(jnp.bfloat16)
            for i in range(2)
        )
        product: Any = jax.jit(jnp.matmul)
        timed = timing.queued(lambda: product(a, b), jax.block_until_ready, **pace(dry))  # noqa: B023
        yield {"n": n, "matrix_tflops": 2 * n**3 / timed.each / 1e12, **timed.fields()}


def pace(dry: bool) -> dict[str, Any]:
    """How long to measure: in a dry run only once."""
    return {"least": 0.0, "rounds": 1} if dry else {}
