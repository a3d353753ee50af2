"""Relative terms that need more than a score: Transformer-XL."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from attention_jax.core.axes import AnyArray, PerExample, same_rank
from attention_jax.scores import Score, relative_embedding


def transformer_xl(
    query: Float[AnyArray, "*B T N H"],
    table: Float[AnyArray, "R N H"],
    *,
    content_bias: Float[AnyArray, "N H"],
    position_bias: Float[AnyArray, "N H"],
    scale: float | None = None,
    offset: PerExample = 0,
    align: str = "start",
) -> tuple[Float[Array, "*B T N H"], Score]:
    """Transformer-XL's logits as a query and a score; ``r`` is row ``j - i - offset`` of table::

        s_ij = scale * ((q_i + content_bias) . k_j + (q_i + position_bias) . r)

    Args:
      query: ``[*B T N H]``.
      table: ``[R N H]``, rows for distances ``-c .. c``; larger distances take the last row.
      content_bias: ``u [N H]``.
      position_bias: ``v [N H]``.
      scale: the one passed to ``attention``; default ``1 / sqrt(H)``.
      offset, align: as for ``alibi``.

    Returns:
      The ``query`` and the ``score`` to pass to ``attention``.

    >>> import numpy as np
    >>> from attention_jax.positions import transformer_xl
    >>> q, zero = np.ones((1, 1, 1), np.float32), np.zeros((1, 1), np.float32)
    >>> table = np.array([1.0, 2.0, 3.0], np.float32)[:, None, None]
    >>> query, score = transformer_xl(q, table, content_bias=zero, position_bias=zero)
    >>> score.score(np.zeros(3, np.float32), 0, 0, 0, np.arange(3)).tolist()
    [2.0, 3.0, 3.0]

    Source: Dai et al. 2019, "Transformer-XL", section 3.3.
    """
    query = jnp.asarray(query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, content, position = same_rank(query, content_bias, position_bias)
    score = relative_embedding(scale * (query + position), table, offset=offset, align=align)
    return query + content, score
