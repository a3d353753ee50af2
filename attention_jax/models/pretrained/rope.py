"""Rotary positions in a ``config.json``: ``rope_parameters``, or the older ``rope_scaling``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from attention_jax.models.pretrained.hf_config import HFConfig
from attention_jax.positions import DynamicNTK, Linear, Llama3, LongRoPE, Rotary, Scaling, YaRN

ORIGINAL = "original_max_position_embeddings"


def rotary(
    hf: HFConfig,
    longest: int,
    *,
    theta: float = 10_000.0,
    theta_name: str = "rope_theta",
    partial: float | None = None,
    partial_name: str = "partial_rotary_factor",
    head_dim: int,
) -> Rotary:
    """Reads ``rope_scaling``, the older entry, or else ``rope_parameters``.

    If a file has both, ``rope_scaling`` is used, as in Hugging Face. A value inside one of them
    takes precedence over the same entry at the top level, except for the original length.

    Args:
      hf: the entries.
      longest: the length that the model is for.
      theta: the default.
      theta_name, partial_name: of the entries at the top level.
      partial: the default share of a head that is rotated; None for a model that always rotates
        whole heads.
      head_dim: width of a head.
    """
    parameters: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        parameters = an_object(hf, name) or parameters
    parameters.setdefault("rope_theta", hf.take(theta_name, theta))
    parameters.setdefault("partial_rotary_factor", hf.take(partial_name, partial))
    original = hf.take(ORIGINAL, None)
    kind = parameters.get("rope_type", parameters.get("type"))
    if original is not None and kind in ("yarn", "llama3", "longrope"):
        parameters[ORIGINAL] = original
    width = None
    if partial is not None:
        width = _width(hf, parameters.pop("partial_rotary_factor"), head_dim)
    return of_parameters(hf, parameters, longest, head_dim, width)


def of_parameters(
    hf: HFConfig,
    parameters: Mapping[str, Any],
    longest: int,
    head_dim: int,
    width: int | None = None,
) -> Rotary:
    """Rotary positions from the entries of one object; errors are added to those of ``hf``."""
    parameters = dict(parameters)
    theta = parameters.pop("rope_theta", None)
    before = parameters.pop("type", "default")
    kind = parameters.pop("rope_type", before)
    if not (isinstance(theta, int | float) and theta > 0):
        hf.errors.append(f"rope_theta must be a positive number, got {theta!r}")
        theta = 10_000.0
    partial = parameters.pop("partial_rotary_factor", None)
    if partial not in (None, 1.0):
        hf.errors.append(f"partial_rotary_factor = {partial!r} is not supported, only 1.0")
    parameters.pop("finetuned", None)  # informational
    scaling: Scaling | None = None
    try:
        scaling = _scaling(kind, parameters, longest)
    except (KeyError, TypeError, ValueError) as e:
        reason = f"{e.args[0]} is missing" if isinstance(e, KeyError) else e
        hf.errors.append(f"rope type {kind!r}: {reason}")
    pairs = (width or head_dim) // 2
    if isinstance(scaling, LongRoPE) and len(scaling.short) != pairs:
        hf.errors.append(f"short_factor must have {pairs} numbers, got {len(scaling.short)}")
    if parameters:
        hf.errors.append(f"rope type {kind!r}: entries {sorted(parameters)} are not supported")
    return Rotary(theta=float(theta), width=width, scaling=scaling)


def of_layer_type(
    hf: HFConfig, kind: str, parameters: Mapping[str, Any], longest: int, head_dim: int
) -> Rotary:
    """``of_parameters`` for one type of layer, which its errors name."""
    each = HFConfig({})
    found = of_parameters(each, parameters, longest, head_dim)
    hf.errors += [f"{kind}: {error}" for error in each.errors]
    return found


def an_object(hf: HFConfig, name: str) -> dict[str, Any]:
    """A copy of an entry that is an object; empty if it is missing or null."""
    given = hf.take(name, None) or {}
    if not isinstance(given, dict):
        hf.errors.append(f"{name} must be an object, got {given!r}")
        return {}
    return dict(given)


def _width(hf: HFConfig, partial: Any, head_dim: int) -> int | None:
    """The number of features that are rotated; None for all."""
    if not isinstance(partial, int | float) or not 0 < partial <= 1:
        hf.errors.append(f"partial_rotary_factor must be in (0, 1], got {partial!r}")
        return None
    width = int(head_dim * partial)
    if width < 2 or width % 2:
        hf.errors.append(
            f"partial_rotary_factor = {partial!r} must give an even number of rotated features, "
            f"got {width} of {head_dim}"
        )
        return None
    return None if width == head_dim else width


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
            attention_factor = growth(factor, scales[0]) / growth(factor, scales[1])
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
    if kind == "longrope":
        original, factor = int(take(ORIGINAL, None) or longest), take("factor", None)
        scale = take("attention_factor", None)
        if scale is None:
            if original < 2:
                raise ValueError(f"{ORIGINAL} must be at least 2, got {original}")
            ratio = longest / original if factor is None else float(factor)
            scale = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        short, long = (tuple(take(name)) for name in ("short_factor", "long_factor"))
        return LongRoPE(short, long, original, float(scale))
    raise ValueError(
        "not supported, only 'default', 'linear', 'dynamic', 'yarn', 'llama3', 'longrope'"
    )


def growth(factor: float, mscale: Any) -> float:
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
        case LongRoPE(short, long, original, attention_factor):
            x |= {"rope_type": "longrope", ORIGINAL: original, "attention_factor": attention_factor}
            return x | {"short_factor": list(short), "long_factor": list(long)}
    raise NotImplementedError(f"config.json has no name for {type(rotary.scaling).__name__}")


def partial_factor(rotary: Rotary, head_dim: int) -> float:
    """The entry ``partial_rotary_factor``: the width is its product with ``head_dim``."""
    width = head_dim if rotary.width is None else rotary.width
    factor = width / head_dim
    return factor if int(head_dim * factor) == width else math.nextafter(factor, 1.0)
