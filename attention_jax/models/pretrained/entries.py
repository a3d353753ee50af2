"""The entries of a ``config.json``: each is used, known to change nothing, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attention_jax.positions import DynamicNTK, Linear, Llama3, Rotary, Scaling, YaRN

# What says how a model was made, saved or is trained and sampled from, not what it computes.
HARMLESS = {
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "_attn_implementation",
    "bos_token_id",
    "cache_implementation",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "label2id",
    "max_length",
    "model_type",
    "n_ctx",
    "n_positions",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}

# Hugging Face's names of activations.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "silu": "silu",
}

_MISSING = object()


class Entries:
    """The entries not yet used, and what is wrong with those that were."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.left = dict(config)
        self.wrong: list[str] = []

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """The entry; None where it is missing and has no default, which is wrong."""
        if name in self.left:
            return self.left.pop(name)
        if default is _MISSING:
            self.wrong.append(f"{name} is missing")
            return None
        return default

    def number(self, name: str, default: Any = _MISSING) -> Any:
        """An entry that must be a positive number."""
        x = self.take(name, default)
        good = isinstance(x, int | float) and not isinstance(x, bool) and x > 0
        if x is not None and not good:
            self.wrong.append(f"{name} must be a positive number, got {x!r}")
        return x if good else (None if default is None else 1)

    def rate(self, name: str, default: float) -> float:
        """A probability of dropping."""
        x = self.take(name, default)
        if not (isinstance(x, int | float) and 0 <= x < 1):
            self.wrong.append(f"{name} must be in [0, 1), got {x!r}")
            return 0.0
        return float(x)

    def flag(self, name: str, default: bool) -> bool:
        """A bool."""
        x = self.take(name, default)
        if not isinstance(x, bool):
            self.wrong.append(f"{name} must be true or false, got {x!r}")
        return bool(x)

    def only(self, name: str, *allowed: Any) -> None:
        """An entry of which other values are not supported."""
        x = self.take(name, allowed[0])
        if x not in allowed:
            self.wrong.append(f"{name} = {x!r} is not supported, only {allowed[0]!r}")

    def activation(self, name: str, default: str) -> str:
        """Ours for Hugging Face's name."""
        x = self.take(name, default)
        if x not in ACTIVATIONS:
            self.wrong.append(f"{name} = {x!r} is not supported, only {sorted(ACTIVATIONS)}")
            return "gelu"
        return ACTIVATIONS[x]

    def classes(self) -> int:
        """How many labels there are; Hugging Face leaves two unsaid."""
        return len(self.take("id2label", None) or range(self.take("num_labels", 2)))

    def rotary(self, longest: int) -> Rotary:
        """From ``rope_parameters``, or ``rope_theta`` and ``rope_scaling`` as they were before."""
        theta = self.take("rope_theta", 10_000.0)
        before = self.take("rope_scaling", None) or {}
        parameters = dict(self.take("rope_parameters", None) or before)
        theta = parameters.pop("rope_theta", theta)
        kind = parameters.pop("rope_type", parameters.pop("type", "default"))
        parameters.pop("type", None)
        if self.take("partial_rotary_factor", 1.0) != 1.0:
            self.wrong.append("partial_rotary_factor is not supported, only 1.0")
        self.left.pop("original_max_position_embeddings", None)
        scaling: Scaling | None = None
        try:
            scaling = _scaling(kind, parameters, longest)
        except (KeyError, TypeError, ValueError) as e:
            what = f"{e.args[0]} is missing" if isinstance(e, KeyError) else e
            self.wrong.append(f"rope type {kind!r}: {what}")
        if parameters:
            self.wrong.append(f"rope type {kind!r}: entries {sorted(parameters)} are not supported")
        return Rotary(theta=float(theta), scaling=scaling)

    def finish(self, family: str) -> None:
        """Raises for all that was wrong, and for what nobody used."""
        unknown = sorted(
            name for name, x in self.left.items() if name not in HARMLESS and x is not None
        )
        more = [f"{name} = {self.left[name]!r} is unknown" for name in unknown]
        if self.wrong or more:
            raise self.refusal(family, *more)

    def refusal(self, family: str, *more: str) -> ValueError:
        """The error that lists all that was wrong so far, and more."""
        wrong = "; ".join([*self.wrong, *more])
        return ValueError(f"config.json of a {family} cannot be loaded: {wrong}")


def labels(classes: int | None) -> dict[str, Any]:
    """Names for classes, which is how Hugging Face counts them."""
    if classes is None:
        return {}
    names = [f"LABEL_{i}" for i in range(classes)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _scaling(kind: str, parameters: dict[str, Any], longest: int) -> Scaling | None:
    """Takes what it uses out of ``parameters``."""
    take = parameters.pop
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(float(take("factor")))
    if kind == "dynamic":
        take("original_max_position_embeddings", None)
        return DynamicNTK(float(take("factor")), longest)
    if kind == "yarn":
        return YaRN(
            float(take("factor")),
            int(take("original_max_position_embeddings", None) or longest),
            fast=float(take("beta_fast", None) or 32.0),
            slow=float(take("beta_slow", None) or 1.0),
            attention_factor=take("attention_factor", None),
            truncate=take("truncate", True),
        )
    if kind == "llama3":
        return Llama3(
            float(take("factor")),
            int(take("original_max_position_embeddings")),
            low=float(take("low_freq_factor")),
            high=float(take("high_freq_factor")),
        )
    raise ValueError("not supported, only 'default', 'linear', 'dynamic', 'yarn', 'llama3'")


def rope_parameters(rotary: Rotary) -> dict[str, Any]:
    """The other way round; raises ``NotImplementedError`` for what has no name there."""
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
            x |= {"original_max_position_embeddings": original}
            x |= {"beta_fast": fast, "beta_slow": slow}
            return x if attention_factor is None else x | {"attention_factor": attention_factor}
        case Llama3(factor, original, low, high):
            x |= {"rope_type": "llama3", "factor": factor}
            x |= {"original_max_position_embeddings": original}
            return x | {"low_freq_factor": low, "high_freq_factor": high}
    raise NotImplementedError(f"{type(rotary.scaling).__name__} has no name in a config.json")
