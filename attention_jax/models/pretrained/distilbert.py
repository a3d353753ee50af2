"""DistilBERT: BERT without types, and without dropout of the attention's output."""

from __future__ import annotations

from attention_jax.models.encoder import Pooler
from attention_jax.models.pretrained.encoders import EncoderFamily

DISTILBERT = EncoderFamily(
    NAMES={"distilbert": "DistilBert"},
    PREFIX="distilbert.",
    COPIES={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    entries={
        "vocabulary": "vocab_size",
        "features": "dim",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "hidden": "hidden_dim",
        "activation": "activation",
        "dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "max_length": "max_position_embeddings",
    },
    stack="transformer.layer",
    layer={
        "attention.q_lin": "attention.query",
        "attention.k_lin": "attention.key",
        "attention.v_lin": "attention.value",
        "attention.out_lin": "attention.out",
        "sa_layer_norm": "attention_norm",
        "ffn.lin1": "feed_forward.up",
        "ffn.lin2": "feed_forward.down",
        "output_layer_norm": "feed_forward_norm",
    },
    heads={
        "tokens": {
            "vocab_transform": "transform",
            "vocab_layer_norm": "transform_norm",
            "vocab_projector.bias": "token_bias",
        },
        "classes": {"pre_classifier": "pooler", "classifier": "classify"},
        "tags": {"classifier": "classify"},
        "spans": {"qa_outputs": "spans"},
    },
    # Sinusoidal positions only start the table, which is stored in any case.
    only={"sinusoidal_pos_embds": (False, True), "tie_weights_": (True,)},
    pooler=Pooler("relu"),
    attention_output_dropout=False,
    head_dropout={"classes": ("seq_classif_dropout", 0.2), "spans": ("qa_dropout", 0.1)},
)
