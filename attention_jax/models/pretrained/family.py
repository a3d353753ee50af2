"""What a family of checkpoints provides: the interface that ``load`` and ``save`` work with.

A family is a module of this package that satisfies ``Family``, such as ``gpt2``, or a value that
does: ``bert.BERT`` is an ``encoders.EncoderFamily``, which describes an encoder by what differs
from BERT. To add one, write the module and list it in ``families.FAMILIES``::

    config.json  --HFConfig-->  from_hf  -->  our configuration  -->  model
    tensors of the files  <-->  Tensor(name, path, form)  <-->  parameters of the model
    our configuration  -->  to_hf  -->  config.json

``load`` calls ``from_hf`` and refuses every entry of ``config.json`` that it has not used and that
is not known to be harmless; builds the ``model``; and matches the files' tensors with ``tensors``
by name, refusing those that are missing, unexpected, of another shape, or not equal to the tensor
they should be a copy of. ``save`` tries ``to_hf`` of each family, and accepts the first whose
result ``from_hf`` reads back as the same configuration: a family need not list what it cannot
express.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from flax import nnx

from attention_jax.models.pretrained.hf_config import HFConfig
from attention_jax.models.pretrained.tensors import Tensor


@runtime_checkable
class Family(Protocol):
    """A family of checkpoints: constants and functions of its module, or of a value.

    Names of tensors are Hugging Face's. Patterns are regular expressions that match a whole name.
    """

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]:
        """The values of ``model_type`` in ``config.json`` that this family reads."""

    @property
    def PREFIX(self) -> str:
        """Prefix of the model's tensors in a checkpoint with a head, ``"bert."`` for example.

        Tensors are matched with and without it.
        """

    @property
    def IGNORED(self) -> tuple[str, ...]:
        """Patterns of tensors that are not parameters, such as stored masks."""

    @property
    def COPIES(self) -> Mapping[str, str]:
        """Tensors that repeat another one (tied heads), and which. Files may store any of them."""

    @property
    def RENAMED(self) -> Mapping[str, str]:
        """Parts of names in older files, and the parts that replace them."""

    def from_hf(self, hf: HFConfig, names: set[str]) -> Any:
        """Our configuration from Hugging Face's.

        Args:
          hf: the entries of ``config.json``. Each method that reads an entry marks it as used and
            notes what is wrong with it; nothing is raised here.
          names: of the stored tensors, without copies, for what ``config.json`` does not say.
        """

    def to_hf(self, config: Any) -> dict[str, Any]:
        """The entries of ``config.json`` from our configuration.

        For a configuration that is not of this family it may raise AttributeError, KeyError,
        TypeError, ValueError, NotImplementedError, or an ArithmeticError such as a division by 0.
        """

    def model(self, config: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The model that the configuration describes."""

    def tensors(self, config: Any) -> Iterator[Tensor]:
        """Every tensor of a checkpoint, and where it belongs in the model."""

    def optional(self, config: Any) -> tuple[str, ...]:
        """Patterns of tensors of heads that this model does not have, left out with a warning."""
