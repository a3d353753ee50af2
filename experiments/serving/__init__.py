"""Texts from the checkpoint of a decoder: a chat in the terminal, and a server of completions."""
