"""The entries of a ``config.json``: each is used, known to change nothing, or refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# What says how a model was made, saved or is trained and sampled from, not what it computes.
HARMLESS = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "_num_labels",
    "architectures",
    "attn_implementation",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",  # the same in parts
    "cls_token_id",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "keys_to_ignore_at_inference",
    "label2id",
    "mask_token_id",
    "model_type",
    "n_ctx",
    "n_positions",
    "neftune_noise_alpha",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pad_token_id",
    "predict_special_tokens",
    "prefix",
    "problem_type",
    "return_dict",
    "sbert_ce_default_activation_function",  # applied to the logits, by another library
    "sentence_transformers",  # likewise
    "sep_token_id",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
}

# Of generation; older configurations hold them beside the model's own.
GENERATION = {
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
}

# What would change the model at any other value, and is not supported there.
ONLY: dict[str, Any] = {
    "add_cross_attention": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}

# Hugging Face's names of activations.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
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


class HFConfig:
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
        """An entry that must be a positive number; or null, where the default is None."""
        missing = name not in self.left
        x = self.take(name, default)
        if x is None and (missing or default is None):
            return None if default is None else 1  # where it is missing, that has been noted
        good = isinstance(x, int | float) and not isinstance(x, bool) and x > 0
        if not good:
            self.wrong.append(f"{name} must be a positive number, got {x!r}")
        return x if good else 1

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

    def same(self, name: str, value: Any) -> None:
        """An entry that repeats another."""
        x = self.take(name, value)
        if x != value:
            self.wrong.append(f"{name} = {x!r} contradicts {value!r}, which is used")

    def architecture(self, known: Collection[str], default: str) -> str:
        """The class that the checkpoint was saved from; its head is what matters here."""
        x = self.take("architectures", None) or [default]
        if isinstance(x, list) and x[0] in known:
            return str(x[0])
        self.wrong.append(
            f"architectures = {x!r} is not supported, only {sorted(known)} "
            f"(load(folder, config={{'architectures': [...]}}) reads it as one of them)"
        )
        return default

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

    def finish(self, family: str) -> None:
        """Raises for all that was wrong, and for what nobody used."""
        for name in ONLY.keys() & self.left.keys():
            if self.left[name] is not None:
                self.only(name, ONLY[name])
        unknown = sorted(
            name
            for name, x in self.left.items()
            if name not in HARMLESS | GENERATION and x is not None
        )
        more = [
            f"{name} = {self.left[name]!r} is unknown (config={{{name!r}: None}} leaves it out)"
            for name in unknown
        ]
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
