"""Rotary positions in a ``config.json``: ``rope_parameters``, or the older ``rope_scaling``."""

from __future__ import annotations

import math
from typing import Any

from attention_jax.models.pretrained.hf_config import HFConfig
from attention_jax.positions import DynamicNTK, Linear, Llama3, Rotary, Scaling, YaRN

ORIGINAL = "original_max_position_embeddings"


def rotary(hf: HFConfig, longest: int) -> Rotary:
    """Reads ``rope_scaling``, the older entry, or else ``rope_parameters``.

    If a file has both, ``rope_scaling`` is used, as in Hugging Face. A value inside one of them
    takes precedence over the same entry at the top level, except for the original length.
    """
    parameters: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        given = hf.take(name, None) or {}
        if not isinstance(given, dict):
            hf.errors.append(f"{name} must be an object, got {given!r}")
            given = {}
        parameters = dict(given) or parameters
    theta = parameters.pop("rope_theta", hf.take("rope_theta", 10_000.0))
    before = parameters.pop("type", "default")
    kind = parameters.pop("rope_type", before)
    if not (isinstance(theta, int | float) and theta > 0):
        hf.errors.append(f"rope_theta must be a positive number, got {theta!r}")
        theta = 10_000.0
    partial = hf.take("partial_rotary_factor", None)
    partial = parameters.pop("partial_rotary_factor", partial)
    if partial not in (None, 1.0):
        hf.errors.append(f"partial_rotary_factor = {partial!r} is not supported, only 1.0")
    parameters.pop("finetuned", None)  # informational
    original = hf.take(ORIGINAL, None)
    if original is not None and kind in ("yarn", "llama3"):
        parameters[ORIGINAL] = original
    scaling: Scaling | None = None
    try:
        scaling = _scaling(kind, parameters, longest)
    except (KeyError, TypeError, ValueError) as e:
        reason = f"{e.args[0]} is missing" if isinstance(e, KeyError) else e
        hf.errors.append(f"rope type {kind!r}: {reason}")
    if parameters:
        hf.errors.append(f"rope type {kind!r}: entries {sorted(parameters)} are not supported")
    return Rotary(theta=float(theta), scaling=scaling)


def _scaling(kind: Any, parameters: dict[str, Any], longest: int) -> Scaling | None:
    """Pops the parameters that it uses."""
    take = parameters.pop
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(float(take("factor")))
    if kind == "dynamic":
        take(ORIGINAL, None)
        return DynamicNTK(float(take("factor")), longest)
    if kind == "yarn":
        original = int(take(ORIGINAL, None) or longest)
        given = take("factor")
        factor = longest / original if given is None else float(given)
        # Hugging Face uses them only if both are given.
        scales = take("mscale", None), take("mscale_all_dim", None)
        attention_factor = take("attention_factor", None)
        if attention_factor is None and all(scales):
            attention_factor = _growth(factor, scales[0]) / _growth(factor, scales[1])
        truncate = take("truncate", True)
        if not isinstance(truncate, bool):
            raise ValueError(f"truncate must be true or false, got {truncate!r}")
        return YaRN(
            factor,
            original,
            fast=float(take("beta_fast", None) or 32.0),
            slow=float(take("beta_slow", None) or 1.0),
            attention_factor=None if attention_factor is None else float(attention_factor),
            truncate=truncate,
        )
    if kind == "llama3":
        return Llama3(
            float(take("factor")),
            int(take(ORIGINAL, None) or longest),
            low=float(take("low_freq_factor")),
            high=float(take("high_freq_factor")),
        )
    raise ValueError("not supported, only 'default', 'linear', 'dynamic', 'yarn', 'llama3'")


def _growth(factor: float, mscale: Any) -> float:
    """``0.1 mscale ln(factor) + 1``, YaRN's temperature correction of the softmax."""
    return 0.1 * float(mscale) * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_parameters(rotary: Rotary) -> dict[str, Any]:
    """The entry ``rope_parameters``; raises NotImplementedError for scalings without a name."""
    x: dict[str, Any] = {"rope_theta": rotary.theta, "rope_type": "default"}
    match rotary.scaling:
        case None:
            return x
        case Linear(factor):
            return x | {"rope_type": "linear", "factor": factor}
        case DynamicNTK(factor, _):
            return x | {"rope_type": "dynamic", "factor": factor}
        case YaRN(factor, original, fast, slow, attention_factor, truncate):
            x |= {"rope_type": "yarn", "factor": factor, "truncate": truncate}
            x |= {ORIGINAL: original, "beta_fast": fast, "beta_slow": slow}
            return x if attention_factor is None else x | {"attention_factor": attention_factor}
        case Llama3(factor, original, low, high):
            x |= {"rope_type": "llama3", "factor": factor, ORIGINAL: original}
            return x | {"low_freq_factor": low, "high_freq_factor": high}
    raise NotImplementedError(f"config.json has no name for {type(rotary.scaling).__name__}")
