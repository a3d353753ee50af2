"""Data files, and text as batches of tokens."""
