"""ELECTRA: BERT with embeddings of another width; its discriminator, and the generator."""

from __future__ import annotations

from attention_jax.models.encoder import Pooler
from attention_jax.models.pretrained.encoders import ARCHITECTURES, ENTRIES, EncoderFamily

ELECTRA = EncoderFamily(
    NAMES={"electra": "Electra"},
    PREFIX="electra.",
    COPIES={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    architectures={"ForPreTraining": "replaced", **ARCHITECTURES},
    entries={**ENTRIES, "embedding_features": "embedding_size"},
    heads={
        "replaced": {
            "discriminator_predictions.dense": "transform",
            "discriminator_predictions.dense_prediction": "replaced",
        },
        "tokens": {
            "generator_predictions.dense": "transform",
            "generator_predictions.LayerNorm": "transform_norm",
            "generator_lm_head.bias": "token_bias",
        },
        "classes": {"classifier.dense": "pooler", "classifier.out_proj": "classify"},
        "tags": {"classifier": "classify"},
        "spans": {"qa_outputs": "spans"},
    },
    # Of the head of multiple choice.
    unread=(
        "summary_activation",
        "summary_first_dropout",
        "summary_last_dropout",
        "summary_type",
        "summary_use_proj",
    ),
    pooler=Pooler("gelu", dropout=True),
    head_activation="gelu",
)
