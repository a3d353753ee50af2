"""Attention that is no softmax of products: one file each, with the axes and rules of the rest."""

from attention_jax.mechanisms.additive import additive_attention as additive_attention
from attention_jax.mechanisms.additive import additive_weights as additive_weights
from attention_jax.mechanisms.as_attention import NAMED as NAMED
from attention_jax.mechanisms.as_attention import as_attention as as_attention
from attention_jax.mechanisms.differential import differential_attention as differential_attention
from attention_jax.mechanisms.differential import differential_weight as differential_weight
from attention_jax.mechanisms.gated_linear import delta_rule as delta_rule
from attention_jax.mechanisms.gated_linear import (
    gated_linear_attention as gated_linear_attention,
)
from attention_jax.mechanisms.gated_linear import retention as retention
from attention_jax.mechanisms.inverted import inverted_attention as inverted_attention
from attention_jax.mechanisms.inverted import slot_attention as slot_attention
from attention_jax.mechanisms.latent import absorbed_latent_attention as absorbed_latent_attention
from attention_jax.mechanisms.latent import latent_attention as latent_attention
from attention_jax.mechanisms.linear import Features as Features
from attention_jax.mechanisms.linear import linear_attention as linear_attention
from attention_jax.mechanisms.linear import performer_features as performer_features
from attention_jax.mechanisms.linformer import linformer_attention as linformer_attention
from attention_jax.mechanisms.packing import PackedState as PackedState
from attention_jax.mechanisms.routing import clusters as clusters
from attention_jax.mechanisms.routing import routing_attention as routing_attention
from attention_jax.mechanisms.routing import update_centroids as update_centroids
from attention_jax.mechanisms.topk import topk_attention as topk_attention

__all__ = [
    "NAMED",
    "Features",
    "PackedState",
    "absorbed_latent_attention",
    "additive_attention",
    "additive_weights",
    "as_attention",
    "clusters",
    "delta_rule",
    "differential_attention",
    "differential_weight",
    "gated_linear_attention",
    "inverted_attention",
    "latent_attention",
    "linear_attention",
    "linformer_attention",
    "performer_features",
    "retention",
    "routing_attention",
    "slot_attention",
    "topk_attention",
    "update_centroids",
]
