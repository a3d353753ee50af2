"""BERT."""

from __future__ import annotations

from attention_jax.models.pretrained.encoders import ARCHITECTURES, EncoderFamily

BERT = EncoderFamily(
    NAMES={"bert": "Bert"},
    PREFIX="bert.",
    COPIES={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    RENAMED={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    architectures={"ForPreTraining": "tokens", **ARCHITECTURES},
    heads={
        "tokens": {
            "cls.predictions.transform.dense": "transform",
            "cls.predictions.transform.LayerNorm": "transform_norm",
            "cls.predictions.bias": "token_bias",
        },
        "classes": {"bert.pooler.dense": "pooler", "classifier": "classify"},
        "tags": {"classifier": "classify"},
        "spans": {"qa_outputs": "spans"},
    },
    left_out=(r"cls\.seq_relationship\..*",),
    # Entries of the original release, which had only these values.
    only={"directionality": ("bidi", None), "pooler_type": ("first_token_transform", None)},
    unread=(
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
    ),
)
