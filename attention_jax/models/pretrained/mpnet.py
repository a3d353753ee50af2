"""MPNet: RoBERTa without types, with a relative position bias beside learned positions."""

from __future__ import annotations

from attention_jax.models.encoder import Pooler
from attention_jax.models.pretrained.encoders import ENTRIES, EncoderFamily
from attention_jax.models.pretrained.roberta import ROBERTA

MPNET = EncoderFamily(
    NAMES={"mpnet": "MPNet"},
    PREFIX="mpnet.",
    COPIES={
        "lm_head.decoder.weight": "mpnet.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    entries={ours: name for ours, name in ENTRIES.items() if ours != "types"},
    layer={
        "attention.attn.q": "attention.query",
        "attention.attn.k": "attention.key",
        "attention.attn.v": "attention.value",
        "attention.attn.o": "attention.out",
        "attention.LayerNorm": "attention_norm",
        "intermediate.dense": "feed_forward.up",
        "output.dense": "feed_forward.down",
        "output.LayerNorm": "feed_forward_norm",
    },
    heads=ROBERTA.heads,
    # Hugging Face computes with 32 buckets whatever the entry says.
    only={"relative_attention_num_buckets": (32,)},
    pooler=Pooler(dropout=True),
    head_activation="gelu",
    head_dropout={},
    padding=1,  # whatever pad_token_id says
    relative=True,
    after={"encoder.relative_attention_bias": "relative"},
)
