"""Training tasks, comparisons and benchmarks on ``attention_jax``: ``python -m experiments``."""
