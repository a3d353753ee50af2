"""Checks any attention function against the float64 oracle, forward and backward.

>>> import attention_jax as aj
>>> from attention_jax import testing
>>> some = testing.cases(name="empty rows by mask") + testing.cases(name="causal end, T < S")
>>> report = testing.check(aj.attention, cases=some, gradients=False)
>>> print(report)  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
case                what  error    allowed  verdict
empty rows by mask  ...  ok
causal end, T < S   ...  ok
2 cases: 2 right, 0 refused, 0 failed

Without ``cases``, ``check`` runs the whole catalogue: every option paired with every other, and
these guarantees, which hold for every backend:

- Order of operations: ``scale * q.k``, the scores in the given order, the mask, sinks join the
  denominator, softmax, dropout on the probabilities, times ``value``.
- A query without a visible key (masked, a bias of ``-inf``, ``S == 0``, length 0) gives output 0,
  lse ``-inf`` and zero gradients, never NaN. With sinks its lse is the sink.
- ``T == 0`` or an empty batch gives an empty result and zero gradients.
- Keys that no query may attend to do not affect results or gradients, even if they are NaN or inf.
- The output has the dtype of the query. Softmax, lse and sums are in float32 or wider, and float64
  stays float64 throughout.
- Large logits neither overflow nor lose accuracy, whatever the dtype.
- The lse is float32 or wider, and differentiable.
- Where ``T != S``, ``causal()`` is aligned top-left, ``causal(align="end")`` bottom-right, and
  ``causal(offset)`` anywhere, per example too.
- Whether dropout keeps pair ``(b, n, i, j)`` depends on a hash of the random key and the four
  indices: it is the same for every backend, block size and sharding.
- The result for an example does not depend on the rest of the batch: for equal shapes it is bitwise
  the same.

For example, with NaN in the padding:

>>> import jax, jax.numpy as jnp
>>> x = jax.random.normal(jax.random.key(0), (2, 5, 1, 8))  # B T N H
>>> padded = x.at[1, 3:].set(jnp.nan)  # the second example has three tokens
>>> mask = aj.masks.lengths(query=jnp.array([5, 3]), key=jnp.array([5, 3]))
>>> out, lse = aj.attention(padded, padded, padded, mask=mask, return_lse=True)
>>> out[1, 3:].any().item(), lse[1, 3:].ravel().tolist()
(False, [-inf, -inf])
>>> loss = lambda x: aj.attention(x, x, x, mask=mask).sum()
>>> bool(jnp.isfinite(jax.grad(loss)(padded)).all())
True
"""

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
