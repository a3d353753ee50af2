"""Attention on a CPU in C++, called through ``jax.ffi``. See ``run``."""
