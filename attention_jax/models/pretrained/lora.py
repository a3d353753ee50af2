"""Saves and loads low-rank adapters (LoRA) without the model they belong to."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from attention_jax.models.pretrained import tensor_files
from attention_jax.nn import low_rank_state, with_low_rank


def save_adapters(model: Any, file: str | PathLike[str]) -> None:
    """Writes the parameters that ``nn.low_rank`` added to a model, as a small safetensors file.

    Names are the paths to the parameters in the model, which other libraries do not know.

    Args:
      model: returned by ``nn.low_rank``, trained or not.
      file: to write, for example ``adapters.safetensors``.

    Raises:
      ValueError: the model has no adapters.
      IsADirectoryError: ``file`` is a folder.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from flax import nnx
    >>> from attention_jax.models.pretrained import save_adapters, tensor_files
    >>> from attention_jax.nn import MultiHeadAttention, low_rank
    >>> module = MultiHeadAttention(8, num_heads=2, rngs=nnx.Rngs(0))
    >>> file = Path(tempfile.mkdtemp()) / "adapters.safetensors"
    >>> save_adapters(low_rank(module, rank=1, where=("query",), rngs=nnx.Rngs(1)), file)
    >>> sorted(tensor_files.File(file))
    ['query.lora_a', 'query.lora_b']
    """
    file = Path(file)
    if file.is_dir():
        raise IsADirectoryError(f"file must not be a folder, got {str(file)!r}")
    state = low_rank_state(model)
    tensor_files.write(file, state, state.values())


def load_adapters(model: Any, file: str | PathLike[str]) -> Any:
    """Loads adapters into a copy of a model.

    Args:
      model: returned by ``nn.low_rank`` with the same ``rank``, ``where`` and ``train`` as the
        model that was saved. It is not changed.
      file: written by ``save_adapters``.

    Returns:
      A copy of the model with the adapters of the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is invalid, or its adapters do not fit the model.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models.pretrained import load_adapters, save_adapters
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
        raise FileNotFoundError(f"file must exist, written by save_adapters, got {str(file)!r}")
    stored = tensor_files.File(Path(file))
    return with_low_rank(model, {name: stored[name] for name in stored})
