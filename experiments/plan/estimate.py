"""Bytes, FLOPs and seconds of a training step, by arithmetic."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx

from attention_jax.models import Decoder, DecoderConfig, Layers, sharding
from attention_jax.positions import Rotary
from experiments.training.layout import parse, rules_of

GB = 1e9
LENGTHS = {"8k": 8192, "128k": 131072, "1M": 1048576}


class Device(NamedTuple):
    """Stated peak rates of one device."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """bfloat16, dense, per second."""
    link: float
    """Bytes per second that it sends to its peers, all links together."""
    source: str


DEVICES = {
    "v5e": Device("TPU v5e", 16 * GB, 197e12, 200 * GB, "cloud.google.com/tpu/docs/v5e"),
    "v5p": Device("TPU v5p", 95 * GB, 459e12, 600 * GB, "cloud.google.com/tpu/docs/v5p"),
    "a100": Device("NVIDIA A100 80 GB SXM", 80 * GB, 312e12, 300 * GB, "NVIDIA's data sheet"),
    "h100": Device("NVIDIA H100 SXM", 80 * GB, 989e12, 450 * GB, "NVIDIA's data sheet"),
}


class Size(NamedTuple):
    """A decoder of the usual proportions."""

    layers: int
    features: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    tied: bool = False
    """Whether the logits are computed with the embedding's kernel."""


SIZES = {
    "124M": Size(12, 768, 12, 12, 2048, 50304, tied=True),
    "1.3B": Size(24, 2048, 16, 16, 5632, 32000),
    "8B": Size(32, 4096, 32, 8, 14336, 128256),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ``plan``."""

    size: Literal["124M", "1.3B", "8B"] = "1.3B"
    """The model: a Llama-like decoder of about this many parameters."""
    length: Literal["8k", "128k", "1M"] = "8k"
    """Tokens in a sequence."""
    device: Literal["v5e", "v5p", "a100", "h100"] = "v5e"
    """The kind of device."""
    mesh: str = "data=16"
    """The devices, and what is split among them: data, model, context."""
    fsdp: bool = False
    """Also shard parameters and optimizer state over data and context."""
    batch: int | None = None
    """Sequences in a batch; default one for each part along data."""
    compile: bool = False
    """Also compile the step ahead of time for TPU v5e; needs libtpu, and minutes."""
    table: bool = False
    """Write the published table of plans, experiments/results/PLAN.md, instead."""
    check: bool = False
    """With --table: only say whether the page is up to date."""


class Plan(NamedTuple):
    """What a training step needs, per device; bytes and seconds."""

    total: int
    """Parameters of the model."""
    parameters: float
    optimizer: float
    gradients: float
    activations: float
    temporary: float
    collectives: dict[str, float]
    """Bytes that each device sends, by kind and cause."""
    flops: float
    compute_seconds: float
    send_seconds: float

    @property
    def memory(self) -> float:
        """Bytes in all."""
        kept = self.parameters + self.optimizer + self.gradients
        return kept + self.activations + self.temporary

    @property
    def seconds(self) -> float:
        """Of a step without overlap."""
        return self.compute_seconds + self.send_seconds


def estimate(options: Options, state: Any = None) -> Plan:
    """The plan of a training step: AdamW in float32, the forward and backward pass in bfloat16.

    Args:
      options: what is planned.
      state: the parameters as shapes; default those of ``options.size``.

    With ``b`` sequences and ``t`` tokens of each on a device, ``L`` layers, width ``E`` and ``m``
    parts along model::

        activations   2 L b t E                      the input of each layer, in bfloat16
        temporary     one layer's intermediates, its gathered kernels, and the logits in float32
        FLOPs         8 P tokens + 8 L T E tokens    with recomputation; causal attention is half
    """
    z, axes, device = SIZES[options.size], parse(options.mesh), DEVICES[options.device]
    T = LENGTHS[options.length]
    data, m, c = (axes.get(name, 1) for name in ("data", "model", "context"))
    batch = data if options.batch is None else options.batch
    for name, size, parts in (("batch", batch, data), ("length", T, c), ("heads", z.heads, m)):
        if size % parts:
            raise ValueError(f"mesh {options.mesh} does not divide {name}, {size}")
    state = abstract(options.size) if state is None else state
    total = sum(x.size for x in jax.tree.leaves(state))
    here = _on_a_device(options, state)
    whole = _on_a_device(dataclasses.replace(options, fsdp=False), state)  # once gathered

    tokens = batch // data * T // c  # of this device
    E, kv, hidden = z.features, z.kv_heads * z.features // z.heads, z.hidden
    kv_parts = m if z.kv_heads % m == 0 else 1
    layer = tokens * (4 * E + (2 * E + 3 * hidden) / m + 2 * kv / kv_parts) * 2
    gathered_keys = 2 * (batch // data) * T * kv / kv_parts * 2 * (c > 1)
    logits = 2 * tokens * z.vocabulary / m * 4
    kernels = 2 * 2 * whole / z.layers if options.fsdp else 0.0

    sends: dict[str, float] = {}
    n = data * c
    if n > 1 and options.fsdp:  # gathered in both passes, in bfloat16; gradients in float32
        sends["all-gather of parameters"] = 2 * 2 * whole * (n - 1) / n
        sends["reduce-scatter of gradients"] = 4 * whole * (n - 1) / n
    elif n > 1:
        sends["all-reduce of gradients"] = 2 * 4 * here * (n - 1) / n
    if m > 1:  # two forward, two recomputed, two backward
        sends["all-reduce of activations"] = 6 * z.layers * 2 * tokens * E * 2 * (m - 1) / m
    if c > 1:  # forward, recomputed; their gradients are scattered in float32
        once = gathered_keys * (c - 1) / c * z.layers
        sends["all-gather of keys and values"] = 2 * once
        sends["reduce-scatter of their gradients"] = 2 * once
    multiplied = total - (0 if z.tied else z.vocabulary * E)  # look-ups are not
    flops = (8 * multiplied + 8 * z.layers * T * E) * batch * T / (data * m * c)
    return Plan(
        total=total,
        parameters=4.0 * here,
        optimizer=8.0 * here,
        gradients=4.0 * here,
        activations=2.0 * z.layers * tokens * E,
        temporary=max(layer * 2 + gathered_keys * 2, logits) + kernels,
        collectives=sends,
        flops=flops,
        compute_seconds=flops / device.flops,
        send_seconds=sum(sends.values()) / device.link,
    )


def model_of(size: str) -> Any:
    """The decoder, abstract: no memory is allocated."""
    z = SIZES[size]
    layers = Layers(
        features=z.features,
        num_layers=z.layers,
        num_heads=z.heads,
        num_kv_heads=z.kv_heads,
        hidden=z.hidden,
        rotary=Rotary(),
        norm="rms",
        gated=True,
        activation="silu",
        bias=False,
        feed_forward_bias=False,
        dtype="bfloat16",
        remat=True,
        scan=True,
    )
    config = DecoderConfig(z.vocabulary, layers, tied=z.tied)
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def abstract(size: str) -> Any:
    """The parameters as shapes."""
    return nnx.state(model_of(size), nnx.Param)


def _on_a_device(options: Options, state: Any) -> int:
    """The number of parameters on each device."""
    axes = parse(options.mesh)
    mesh = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))
    rules = rules_of(axes, fsdp=options.fsdp)
    placed = sharding.shardings(state, mesh, rules)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) for x, s in pairs)


def lines(options: Options) -> list[str]:
    """The plan as text."""
    plan, device = estimate(options), DEVICES[options.device]
    fits = "fits" if plan.memory <= device.memory else "does not fit"
    rows = [
        f"{options.size} ({plan.total / 1e9:.2f} G parameters), {options.length} tokens, "
        f"{options.mesh}{', fsdp' if options.fsdp else ''}, {device.name}",
        "bytes per device:",
    ]
    for name in ("parameters", "optimizer", "gradients", "activations", "temporary", "memory"):
        rows.append(f"  {name:12} {getattr(plan, name) / GB:10.2f} GB")
    rows.append(f"  {fits} in {device.memory / GB:.0f} GB")
    rows.append("sent by each device:")
    rows += [f"  {name:34} {x / GB:8.2f} GB" for name, x in plan.collectives.items()] or ["  none"]
    rows.append(f"FLOPs per device: {plan.flops:.3g}")
    rows.append(
        f"step: {plan.seconds:.3g} s = {plan.compute_seconds:.3g} s at {device.flops / 1e12:.0f} "
        f"TFLOP/s + {plan.send_seconds:.3g} s at {device.link / GB:.0f} GB/s "
        f"(peak rates, {device.source})"
    )
    return rows
