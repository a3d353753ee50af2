"""Checks any attention-like function against the float64 oracle, on a catalogue of cases."""

from attention_jax.testing.cases import Case as Case
from attention_jax.testing.cases import cases as cases
from attention_jax.testing.check import Report as Report
from attention_jax.testing.check import Row as Row
from attention_jax.testing.check import Trial as Trial
from attention_jax.testing.check import check as check
from attention_jax.testing.check import trial as trial
from attention_jax.testing.peers import flax_linen as flax_linen
from attention_jax.testing.peers import flax_nnx as flax_nnx
from attention_jax.testing.peers import jax_nn as jax_nn

__all__ = [
    "Case",
    "Report",
    "Row",
    "Trial",
    "cases",
    "check",
    "flax_linen",
    "flax_nnx",
    "jax_nn",
    "trial",
]
