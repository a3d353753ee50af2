"""Benchmarks of time, memory and numerical errors, ours beside other libraries."""
