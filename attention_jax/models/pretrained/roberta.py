"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT with positions that count from that of padding.

The three differ in nothing but their tokenizers. All are written as RoBERTa, unless ``save`` is
given another ``model_type``.
"""

from __future__ import annotations

from attention_jax.models.encoder import Pooler
from attention_jax.models.pretrained.encoders import EncoderFamily

ROBERTA = EncoderFamily(
    NAMES={"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"},
    PREFIX="roberta.",
    COPIES={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    heads={
        "tokens": {
            "lm_head.dense": "transform",
            "lm_head.layer_norm": "transform_norm",
            "lm_head.bias": "token_bias",
        },
        "classes": {"classifier.dense": "pooler", "classifier.out_proj": "classify"},
        "tags": {"classifier": "classify"},
        "spans": {"qa_outputs": "spans"},
    },
    pooler=Pooler(dropout=True),
    head_activation="gelu",
    padding=1,
    padding_entry=True,
)
