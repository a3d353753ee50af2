"""The probabilities of all the attention in a model, for looking at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

from attention_jax.api import attention_weights
from attention_jax.mechanisms.as_attention import check_weights
from attention_jax.nn.attention import MultiHeadAttention

OF_WEIGHTS = ("mask", "score", "sinks", "scale")


def record_weights(model: nnx.Module, *args: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Calls a model, and says who attended to whom: ``softmax(scale * q k^T)`` of each module.

    The probabilities are computed anew by ``attention_weights``, whatever ran: a fused kernel does
    not have them. They take memory of ``T * S``. The model is left as it is.

    Args:
      model: what holds ``MultiHeadAttention`` somewhere.
      *args, **options: of its call.

    Returns:
      What the model returned, and for the path to each attention that was called its probabilities
      ``[*B N T S]``, without dropout, in the order of the paths.

    Raises:
      ValueError: there is no ``MultiHeadAttention`` in the model.
      NotImplementedError: one that was called has a mechanism (``mechanisms.as_attention``) in the
        place of attention, which is no softmax over all keys.

    >>> import numpy as np
    >>> from attention_jax.models import Decoder, DecoderConfig, Layers
    >>> layers = Layers(features=8, num_layers=2, num_heads=2)
    >>> model = Decoder(DecoderConfig(10, layers), rngs=nnx.Rngs(0))
    >>> logits, weights = record_weights(model, np.array([[3, 1, 4]]))
    >>> [(path, x.shape) for path, x in weights.items()]  # doctest: +NORMALIZE_WHITESPACE
    [('stack.blocks.0.attention.sublayer', (1, 2, 3, 3)),
     ('stack.blocks.1.attention.sublayer', (1, 2, 3, 3))]
    """
    copy = nnx.merge(*nnx.split(model))
    copy.eval()
    # What is kept below would be out of reach outside of a computation that is done again.
    copy.set_attributes(remat=False, scan=False, raise_if_not_found=False)
    found: dict[str, Any] = {}

    def recorded(path: str, attend: Callable[..., Any]) -> Callable[..., Any]:
        def attend_and_keep(query: Any, key: Any, value: Any, **options: Any) -> Any:
            check_weights(attend)
            asked = {name: x for name, x in options.items() if name in OF_WEIGHTS}
            found[path] = attention_weights(query, key, **asked)
            return attend(query, key, value, **options)

        return attend_and_keep

    for path, module in nnx.iter_modules(copy):
        if isinstance(module, MultiHeadAttention):
            name = ".".join(map(str, path))
            found[name] = None  # their order is that of the model
            module.attention = recorded(name, module.attention)
    if not found:
        raise ValueError("model must hold a MultiHeadAttention: it has none to record")
    result = copy(*args, **options)
    return result, {path: weights for path, weights in found.items() if weights is not None}
