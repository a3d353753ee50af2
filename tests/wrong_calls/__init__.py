"""Wrong calls: what is called, the error, and parts of its message, a module for each namespace.

The functions import the library when called: a script decides whether under the import hook.
"""

import numpy as np

B, T, S, N, K, H, D = 2, 5, 7, 4, 2, 3, 6


def f(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def i(*shape):
    return np.ones(shape, np.int32)


def b(*shape):
    return np.ones(shape, np.bool_)


def good():
    return {"query": f(B, T, N, H), "key": f(B, S, K, H), "value": f(B, S, K, D)}
