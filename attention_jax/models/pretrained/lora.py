"""Low-rank adapters in a file of their own, without the model they belong to."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from attention_jax.models.pretrained import safetensors
from attention_jax.nn import low_rank_state, with_low_rank


def save_adapters(model: Any, file: str | PathLike[str]) -> None:
    """Writes what ``nn.low_rank`` added to a model: a safetensors file, small beside the model's.

    Names are ours, the paths to the parameters in the model: other libraries do not know them.

    Args:
      model: as ``nn.low_rank`` returned it, or that trained.
      file: to write, ``adapters.safetensors`` say.

    Raises:
      ValueError: the model has no adapters.
      IsADirectoryError: ``file`` is a folder.

    >>> import tempfile
    >>> from flax import nnx
    >>> from attention_jax.nn import MultiHeadAttention, low_rank
    >>> module = MultiHeadAttention(8, num_heads=2, rngs=nnx.Rngs(0))
    >>> file = Path(tempfile.mkdtemp()) / "adapters.safetensors"
    >>> save_adapters(low_rank(module, rank=1, where=("query",), rngs=nnx.Rngs(1)), file)
    >>> sorted(safetensors.File(file))
    ['query.lora_a', 'query.lora_b']
    """
    file = Path(file)
    if file.is_dir():
        raise IsADirectoryError(f"file must be a file to write, got the folder {str(file)!r}")
    state = low_rank_state(model)
    safetensors.write(file, state, state.values())


def load_adapters(model: Any, file: str | PathLike[str]) -> Any:
    """A model with the adapters of a file.

    Args:
      model: as ``nn.low_rank`` returned it, called with the same ``rank``, ``where`` and ``train``
        as for the model that was saved; it is left as it is.
      file: that ``save_adapters`` wrote.

    Returns:
      A copy of the model.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not what it should be, or its adapters do not fit the model.

    >>> import tempfile
    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import MultiHeadAttention, low_rank
    >>> module = MultiHeadAttention(8, num_heads=2, rngs=nnx.Rngs(0))
    >>> trained, fresh = (low_rank(module, rank=1, rngs=nnx.Rngs(i)) for i in (1, 2))
    >>> trained.query.lora_b[...] += 1
    >>> file = Path(tempfile.mkdtemp()) / "adapters.safetensors"
    >>> save_adapters(trained, file)
    >>> x = np.ones((1, 5, 8), np.float32)
    >>> bool((load_adapters(fresh, file)(x) == trained(x)).all())
    True
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"file must be one that save_adapters wrote, got {str(file)!r}")
    stored = safetensors.File(Path(file))
    return with_low_rank(model, {name: stored[name] for name in stored})
