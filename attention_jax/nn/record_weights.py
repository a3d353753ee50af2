"""``record_weights``: the attention weights of every module of a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from flax import nnx

from attention_jax.api import attention_weights
from attention_jax.mechanisms.as_attention import check_weights
from attention_jax.nn.attention import MultiHeadAttention

WEIGHT_OPTIONS = ("mask", "score", "sinks", "scale")


def record_weights(model: nnx.Module, *args: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Calls a model in evaluation mode and returns the attention weights of each module too.

    The weights ``softmax(scale * q k^T)`` are computed by ``attention_weights`` in addition to the
    call, since a fused kernel never forms them. They take ``T * S`` memory. The model is not
    changed.

    Args:
      model: holds ``MultiHeadAttention`` modules.
      *args, **options: of its call.

    Returns:
      The result of the model, and a dict from the path of each attention module that was called to
      its weights ``[*B N T S]``, without dropout, in the order of the model, also under
      ``nnx.jit``.

    Raises:
      ValueError: the model has no ``MultiHeadAttention``.
      NotImplementedError: a module that was called uses a mechanism (``mechanisms.as_attention``)
        without softmax weights.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import Decoder, DecoderConfig, Layers
    >>> from attention_jax.nn import record_weights
    >>> layers = Layers(features=8, num_layers=2, num_heads=2)
    >>> model = Decoder(DecoderConfig(10, layers), rngs=nnx.Rngs(0))
    >>> logits, weights = record_weights(model, np.array([[3, 1, 4]]))
    >>> [(path, x.shape) for path, x in weights.items()]  # doctest: +NORMALIZE_WHITESPACE
    [('stack.blocks.0.attention.sublayer', (1, 2, 3, 3)),
     ('stack.blocks.1.attention.sublayer', (1, 2, 3, 3))]
    """
    copy = nnx.merge(*nnx.split(model))
    copy.eval()
    # Weights recorded inside a rematerialized or scanned layer would be leaked tracers.
    copy.set_attributes(remat=False, scan=False, raise_if_not_found=False)
    found: OrderedDict[str, Any] = OrderedDict()  # jit returns the keys of a dict sorted

    def recorded(path: str, attend: Callable[..., Any]) -> Callable[..., Any]:
        def attend_and_record(query: Any, key: Any, value: Any, **options: Any) -> Any:
            check_weights(attend)
            used = {name: x for name, x in options.items() if name in WEIGHT_OPTIONS}
            found[path] = attention_weights(query, key, **used)
            return attend(query, key, value, **options)

        return attend_and_record

    for path, module in nnx.iter_modules(copy):
        if isinstance(module, MultiHeadAttention):
            name = ".".join(map(str, path))
            found[name] = None  # fixes the order to that of the model
            module.attention = recorded(name, module.attention)
    if not found:
        raise ValueError("model must hold a MultiHeadAttention, got a model without")
    result = copy(*args, **options)
    called = ((path, weights) for path, weights in found.items() if weights is not None)
    return result, OrderedDict(called)
