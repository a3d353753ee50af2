"""GPT-NeoX and Pythia: parallel sublayers, rotary positions for a part of each head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx

from attention_jax.models.decoder import Decoder, DecoderConfig
from attention_jax.models.layers import Layers
from attention_jax.models.pretrained.hf_config import ACTIVATION_NAMES, HFConfig
from attention_jax.models.pretrained.rope import partial_factor, rope_parameters, rotary
from attention_jax.models.pretrained.tensors import Form, Tensor, block, linear, norm

MODEL_TYPES = ("gpt_neox",)
PREFIX = "gpt_neox."
RENAMED = {"lm_head.": "embed_out."}  # its name in Hugging Face's newer models, not in files
IGNORED = (r".*\.attention\.(masked_)?bias", r".*rotary_emb\.inv_freq")  # masks, in older files
COPIES = {"embed_out.weight": "gpt_neox.embed_in.weight"}


def from_hf(hf: HFConfig, names: set[str]) -> DecoderConfig:
    """Our configuration from Hugging Face's."""
    hf.architecture(("GPTNeoXForCausalLM",), "GPTNeoXForCausalLM")
    E, num_heads = hf.number("hidden_size"), hf.number("num_attention_heads")
    longest = hf.number("max_position_embeddings", 2048)
    dropout = hf.rate("hidden_dropout", 0.0)
    for name in ("attention_probs_dropout_prob", "hidden_dropout_prob"):  # the first code's names
        hf.only(name, 0, None)
    hf.take("classifier_dropout", None)  # of a head that we do not have
    hf.take("is_decoder", None)  # the model is causal in any case
    layers = Layers(
        features=E,
        num_layers=hf.number("num_hidden_layers"),
        num_heads=num_heads,
        head_dim=E // num_heads,
        hidden=hf.number("intermediate_size"),
        activation=hf.activation("hidden_act", "gelu"),
        norm_epsilon=hf.number("layer_norm_eps", 1e-5),
        parallel=hf.flag("use_parallel_residual", True),
        bias=hf.flag("attention_bias", True),
        fused=True,
        rotary=rotary(
            hf,
            longest,
            theta_name="rotary_emb_base",
            partial=0.25,
            partial_name="rotary_pct",
            head_dim=E // num_heads,
        ),
        dropout_rate=dropout,
        attention_dropout_rate=hf.rate("attention_dropout", 0.0),
    )
    return DecoderConfig(
        vocabulary=hf.number("vocab_size"),
        layers=layers,
        max_length=longest,
        tied=hf.flag("tie_word_embeddings", False),
        dropout_rate=dropout,
    )


def optional(config: DecoderConfig) -> tuple[str, ...]:
    """Tensors of heads that this model does not have."""
    return ()


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Hugging Face's configuration from ours."""
    layers = config.layers
    positions: Any = layers.rotary
    partial = {"partial_rotary_factor": partial_factor(positions, _head_dim(layers))}
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": config.vocabulary,
        "hidden_size": layers.features,
        "intermediate_size": layers.hidden,
        "num_hidden_layers": layers.num_layers,
        "num_attention_heads": layers.num_heads,
        "max_position_embeddings": config.max_length or 2048,
        "hidden_act": ACTIVATION_NAMES[layers.activation],
        "layer_norm_eps": layers.norm_epsilon,
        "use_parallel_residual": layers.parallel,
        "attention_bias": layers.bias,
        "rope_parameters": rope_parameters(positions) | partial,
        "hidden_dropout": layers.dropout_rate,
        "attention_dropout": layers.attention_dropout_rate,
        "tie_word_embeddings": config.tied,
    }


def model(config: DecoderConfig, rngs: nnx.Rngs) -> Decoder:
    """The model that the configuration describes."""
    return Decoder(config, rngs=rngs)


def tensors(config: DecoderConfig) -> Iterator[Tensor]:
    """Every tensor of a checkpoint, and where it belongs in the model."""
    layers = config.layers
    heads = _by_head(layers.num_heads, _head_dim(layers))
    yield Tensor(f"{PREFIX}embed_in.weight", ("embed", "tokens"))
    for i in range(layers.num_layers):
        at, paths = f"{PREFIX}layers.{i}", block(("stack",), i)
        attention, feed_forward = paths["attention"], paths["feed_forward"]
        name, path = f"{at}.attention.query_key_value", (*attention, "query_key_value")
        yield Tensor(f"{name}.weight", (*path, "kernel"), heads)
        if layers.bias:
            yield Tensor(f"{name}.bias", (*path, "bias"), heads)
        yield from linear(f"{at}.attention.dense", (*attention, "out"), bias=bool(layers.bias))
        yield from linear(f"{at}.mlp.dense_h_to_4h", (*feed_forward, "up"))
        yield from linear(f"{at}.mlp.dense_4h_to_h", (*feed_forward, "down"))
        yield from norm(f"{at}.input_layernorm", paths["attention_norm"])
        yield from norm(f"{at}.post_attention_layernorm", paths["feed_forward_norm"])
    yield from norm(f"{PREFIX}final_layer_norm", ("stack", "norm"))
    if not config.tied:
        yield from linear("embed_out", ("head",), bias=False)


def _by_head(num_heads: int, head_dim: int) -> Form:
    """Files have query, key and value of a head side by side: ``[N, 3, H]``, ours ``[3, N, H]``."""

    def swapped(x: Any, a: int, b: int) -> Any:  # of the first axis, which has all three
        parts = x.reshape(a, b, head_dim, *x.shape[1:])
        return parts.swapaxes(0, 1).reshape(x.shape)

    def into(x: np.ndarray) -> np.ndarray:
        result: np.ndarray = swapped(x, num_heads, 3).T
        return result

    return Form(into, lambda x: swapped(x.T, 3, num_heads))


def _head_dim(layers: Layers) -> int:
    return layers.features // layers.num_heads
