"""Measurements of time, memory and errors, ours beside those of other libraries."""
