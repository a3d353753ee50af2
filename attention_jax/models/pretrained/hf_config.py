"""``HFConfig``: reads a ``config.json``, of which no entry is silently ignored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# Entries about how a model was made, saved, trained or sampled from, not about what it computes.
HARMLESS = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "_num_labels",
    "architectures",
    "attn_implementation",
    "auto_map",  # of code beside the file, which is not run
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",  # does not change the result
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
    "tf_legacy_loss",
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

# Options of generation, which older files keep in config.json.
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

# Entries that would change the model at any other value, which is not supported.
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
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}

_MISSING = object()


class HFConfig:
    """The entries of a ``config.json``, each read through a method that checks it.

    An entry is used, known to be harmless, or refused. Errors are collected, so that ``finish``
    reports all of them at once.

    Attributes:
      unused: entries that no method has read yet.
      errors: what is wrong with those that were read.

    >>> from attention_jax.models.pretrained.hf_config import HFConfig
    >>> hf = HFConfig({"vocab_size": 10, "n_layer": -1, "new_feature": True})
    >>> hf.number("vocab_size")
    10
    >>> _ = hf.number("n_layer")
    >>> hf.finish("gpt2")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: config.json of gpt2 is not supported: n_layer must be a positive number, got -1; ...
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.unused = dict(config)
        self.errors: list[str] = []

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """The entry, or the default; an error, and None, if it is missing without a default."""
        if name in self.unused:
            return self.unused.pop(name)
        if default is _MISSING:
            self.errors.append(f"{name} is missing")
            return None
        return default

    def number(self, name: str, default: Any = _MISSING) -> Any:
        """A positive number; null is allowed if the default is None."""
        missing = name not in self.unused
        x = self.take(name, default)
        if x is None and (missing or default is None):
            return None if default is None else 1  # a missing entry is already an error
        good = isinstance(x, int | float) and not isinstance(x, bool) and x > 0
        if not good:
            self.errors.append(f"{name} must be a positive number, got {x!r}")
        return x if good else 1

    def rate(self, name: str, default: float) -> float:
        """A dropout rate."""
        x = self.take(name, default)
        if not (isinstance(x, int | float) and 0 <= x < 1):
            self.errors.append(f"{name} must be in [0, 1), got {x!r}")
            return 0.0
        return float(x)

    def flag(self, name: str, default: bool) -> bool:
        """A bool."""
        x = self.take(name, default)
        if not isinstance(x, bool):
            self.errors.append(f"{name} must be true or false, got {x!r}")
        return bool(x)

    def only(self, name: str, *allowed: Any) -> None:
        """Reads an entry that must have one of these values, the first by default."""
        x = self.take(name, allowed[0])
        if x not in allowed:
            self.errors.append(f"{name} = {x!r} is not supported, only {allowed[0]!r}")

    def same(self, name: str, value: Any) -> None:
        """Reads an entry that must repeat a value already known."""
        x = self.take(name, value)
        if x != value:
            self.errors.append(f"{name} = {x!r} contradicts {value!r}")

    def architecture(self, known: Collection[str], default: str) -> str:
        """The class that the checkpoint was saved from, which tells its head."""
        x = self.take("architectures", None) or [default]
        if isinstance(x, list) and x[0] in known:
            return str(x[0])
        self.errors.append(
            f"architectures = {x!r} is not supported, only {sorted(known)} "
            f"(load(folder, config={{'architectures': [...]}}) reads it as one of them)"
        )
        return default

    def activation(self, name: str, default: str) -> str:
        """Our name of an activation."""
        x = self.take(name, default)
        if x not in ACTIVATIONS:
            self.errors.append(f"{name} = {x!r} is not supported, only {sorted(ACTIVATIONS)}")
            return "gelu"
        return ACTIVATIONS[x]

    def classes(self) -> int:
        """The number of labels; Hugging Face omits the default of 2."""
        return len(self.take("id2label", None) or range(self.take("num_labels", 2)))

    def labels(self) -> tuple[str, ...]:
        """The names of the labels, in the order of their logits."""
        given = self.take("id2label", None)
        if not given:
            return _default_labels(self.take("num_labels", 2))
        names: Any = given if isinstance(given, dict) else {}
        ids = {str(i): name for i, name in names.items()}
        right = ids.keys() == {str(i) for i in range(len(ids))}
        if not ids or not right or not all(isinstance(name, str) for name in ids.values()):
            self.errors.append(f"id2label must name the labels 0, 1, ..., got {given!r}")
            return _default_labels(2)
        result = tuple(ids[str(i)] for i in range(len(ids)))
        inverse = self.take("label2id", None)
        if inverse and inverse != {name: i for i, name in enumerate(result)}:
            self.errors.append(
                f"label2id = {inverse!r} contradicts id2label = {given!r} "
                f"(config={{'label2id': None}} ignores it)"
            )
        if self.take("num_labels", None) not in (None, len(result)):
            self.errors.append(f"num_labels contradicts id2label, which has {len(result)} labels")
        return result

    def finish(self, family: str) -> None:
        """Raises for all errors, and for entries that were not used and are not harmless."""
        for name in ONLY.keys() & self.unused.keys():
            if self.unused[name] is not None:
                self.only(name, ONLY[name])
        unknown = sorted(
            name
            for name, x in self.unused.items()
            if name not in HARMLESS | GENERATION and x is not None
        )
        unknown_errors = [
            f"{name} = {self.unused[name]!r} is unknown (config={{{name!r}: None}} ignores it)"
            for name in unknown
        ]
        if self.errors or unknown_errors:
            raise self.refusal(family, *unknown_errors)

    def refusal(self, family: str, *more: str) -> ValueError:
        """The exception that lists all errors so far, and more."""
        errors = "; ".join([*self.errors, *more])
        return ValueError(f"config.json of {family} is not supported: {errors}")


def labels(names: int | tuple[str, ...] | None) -> dict[str, Any]:
    """The entries of labels: of their names, or of their number."""
    if names is None:
        return {}
    if isinstance(names, int):
        names = _default_labels(names)
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _default_labels(number: int) -> tuple[str, ...]:
    """Hugging Face's names of labels that have no other."""
    return tuple(f"LABEL_{i}" for i in range(number))
