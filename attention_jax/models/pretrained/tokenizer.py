"""The tokenizer of a checkpoint: from texts to padded arrays, with the characters of each token.

It wraps the package ``tokenizers``, which reads ``tokenizer.json``; the extra ``pretrained``
installs it.
"""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attention_jax.core.axes import int_at_least
from attention_jax.models.pretrained import folders, hub
from attention_jax.models.pretrained.hf_config import HFConfig
from attention_jax.models.pretrained.mpnet import MPNET
from attention_jax.models.pretrained.roberta import ROBERTA

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
NO_LIMIT = 10**9  # Hugging Face's model_max_length of models without positions is 1e30
ROUND = 64  # tables of embeddings are padded to multiples of this, for speed
# Models that were distilled from XLM-RoBERTa have more rows than its vocabulary.
LARGER = {250_002: 250_037}
# Their positions count from that of padding.
FROM_PADDING = {kind: family for family in (ROBERTA, MPNET) for kind in family.MODEL_TYPES}


class Row(NamedTuple):
    """A text, a pair of texts or a window of it, as ``T`` tokens.

    Attributes:
      tokens: int32 ``[T]``, special ones included.
      types: int32 ``[T]``, for the model's ``types``.
      offsets: int32 ``[T 2]``, the first character of each token and the one after its last: of the
        text, or of the word if words were given. 0 for special tokens.
      text: int32 ``[T]``, 0 for tokens of the first text, 1 for the second, -1 for special tokens.
      words: int32 ``[T]``, the index of the word in its text, -1 for special tokens.
      example: index of the text or pair among those given.
    """

    tokens: np.ndarray
    types: np.ndarray
    offsets: np.ndarray
    text: np.ndarray
    words: np.ndarray
    example: int


class Tokenized(NamedTuple):
    """What a ``Tokenizer`` returns.

    Attributes:
      rows: one per example, or with ``stride`` one per window, in the order of the examples.
      cut: int32 ``[n]``, how many tokens each example lost.
    """

    rows: tuple[Row, ...]
    cut: np.ndarray


class Padded(NamedTuple):
    """Rows padded on the right: ``model(batch.tokens, real=batch.real, types=batch.types)``.

    Attributes:
      tokens, types, text, words: int32 ``[B T]`` of ``Row``.
      real: bool ``[B T]``, False for padding, where tokens and types are 0, text and words -1.
      offsets: int32 ``[B T 2]``, 0 for padding.
      example: int32 ``[B]``.
    """

    tokens: np.ndarray
    types: np.ndarray
    real: np.ndarray
    offsets: np.ndarray
    text: np.ndarray
    words: np.ndarray
    example: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """The tokenizer of a checkpoint, from ``load_tokenizer``.

    Calling it never changes it, so several threads may share one.

    Attributes:
      backend: the ``tokenizers.Tokenizer``, without truncation and padding of its own.
      vocabulary: one more than the largest token.
      max_length: the most tokens that the model reads, None for any number.
    """

    backend: Any
    vocabulary: int
    max_length: int | None = None

    def __call__(
        self,
        texts: Sequence[Any],
        others: Sequence[Any] | None = None,
        *,
        max_length: int | None = None,
        stride: int | None = None,
    ) -> Tokenized:
        """Splits texts, or pairs of texts, into tokens and adds the special ones.

        Args:
          texts: strings, or lists of words, for data that is already split into words.
          others: the second text of each pair, such as the passages of questions.
          max_length: the most tokens in a row, special ones included; default: the tokenizer's.
          stride: None: longer texts are cut at their end, of a pair the longer text first.
            Otherwise they are split into windows, each of which repeats the last ``stride`` tokens
            of the one before. Of a pair the second text is split, and every window has all of the
            first.

        Raises:
          TypeError: a text that is neither a string nor a list of words.
          ValueError: ``max_length`` is more than the model reads, or leaves no room for a window;
            another number of ``others`` than of ``texts``.

        Warns:
          UserWarning: says how many texts were cut, and by how many tokens.
        """
        limit = self._limit(max_length)
        firsts, seconds = self._encoded("texts", texts), [None] * len(texts)
        if others is not None:
            if len(others) != len(texts):
                raise ValueError(
                    f"others must have one text for each of texts, got {len(others)} and "
                    f"{len(texts)}"
                )
            seconds = self._encoded("others", others)
        room = limit - self.backend.num_special_tokens_to_add(others is not None)
        if room < 1:
            raise ValueError(f"max_length must leave room beside special tokens, got {limit}")
        if stride is not None:
            int_at_least("stride", stride, 0)

        rows, cut = [], np.zeros(len(firsts), np.int32)
        for i, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
            if stride is None:
                cut[i] = _cut(first, second, room)
                rows.append(self._row(i, first, second))
            else:
                windows = _windows(first, second, room, stride, i)
                rows += [self._row(i, *window) for window in windows]
        if number := int((cut > 0).sum()):
            warnings.warn(
                f"{number} of {len(cut)} texts were cut to max_length = {limit}: {cut.sum()} "
                f"tokens were lost (a tokenizer's stride= splits texts into windows instead)",
                stacklevel=2,
            )
        return Tokenized(tuple(rows), cut)

    def strings(self, tokens: Any) -> list[str]:
        """The tokens of a row as strings, as the vocabulary has them: ``"##ing"``."""
        return [str(self.backend.id_to_token(int(token))) for token in tokens]

    def decode(self, tokens: Any) -> str:
        """The text of tokens, without special ones."""
        return str(self.backend.decode([int(token) for token in tokens]))

    def save(self, folder: str | PathLike[str]) -> None:
        """Writes ``tokenizer.json``, into the folder of a fine-tuned model for example."""
        self.backend.save(str(Path(folder) / FILE))

    def _limit(self, max_length: int | None) -> int:
        if max_length is None:
            return NO_LIMIT if self.max_length is None else self.max_length
        int_at_least("max_length", max_length, 1)
        if self.max_length is not None and max_length > self.max_length:
            raise ValueError(
                f"max_length must be at most {self.max_length}, which the model reads, got "
                f"{max_length}"
            )
        return max_length

    def _encoded(self, name: str, texts: Sequence[Any]) -> list[Any]:
        """The encodings, without special tokens."""
        if isinstance(texts, str):
            raise TypeError(f"{name} must be a list of texts, got one string")
        texts = [x if isinstance(x, str) else _words(name, i, x) for i, x in enumerate(texts)]
        kinds = {isinstance(x, str) for x in texts}
        if len(kinds) > 1:
            raise TypeError(f"{name} must be all strings or all lists of words, got both")
        return self.backend.encode_batch(
            texts, is_pretokenized=kinds == {False}, add_special_tokens=False
        )

    def _row(self, example: int, first: Any, second: Any) -> Row:
        e = self.backend.post_process(first, second)
        # Its sequence_ids lose the first text of some pairs.
        text = np.array(e.special_tokens_mask, np.int32) * -1
        text[np.flatnonzero(text == 0)[len(first) :]] = 1
        return Row(
            np.array(e.ids, np.int32),
            np.array(e.type_ids, np.int32),
            np.array(e.offsets, np.int32).reshape(-1, 2),
            text,
            np.array([-1 if x is None else x for x in e.word_ids], np.int32),
            example,
        )


def load_tokenizer(folder: str | PathLike[str], *, revision: str | None = None) -> Tokenizer:
    """Reads the tokenizer of a checkpoint from ``tokenizer.json``.

    Args:
      folder: of a checkpoint, or ``"org/name"`` on the Hugging Face hub. Its ``config.json``, if
        there is one, says how many tokens the model knows and reads.
      revision: branch, tag or commit of that repository; default: its main branch.

    Raises:
      FileNotFoundError: no such folder or repository, or no ``tokenizer.json`` in it.
      ModuleNotFoundError: the package ``tokenizers`` is not installed.
      ValueError: the vocabulary is not that of the model; an invalid file.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from attention_jax.models.pretrained import load_tokenizer, pad
    >>> vocabulary = {"[UNK]": 0, "attention": 1, "is": 2, "all": 3}
    >>> backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> folder = Path(tempfile.mkdtemp())  # or the folder of a checkpoint
    >>> backend.save(str(folder / "tokenizer.json"))
    >>> tokenizer = load_tokenizer(folder)
    >>> batch = pad(tokenizer(["attention is all", "is it"]).rows)
    >>> batch.tokens.tolist(), batch.real.tolist()
    ([[1, 2, 3], [2, 0, 0]], [[True, True, True], [True, True, False]])
    >>> batch.offsets[0].tolist()
    [[0, 9], [10, 12], [13, 16]]
    """
    folder = hub.local(folder, revision)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must be that of a checkpoint, got {str(folder)!r}")
    if not (folder / FILE).exists():
        raise FileNotFoundError(
            f"{folder} must have {FILE}: a vocabulary alone is not read (in transformers, "
            f"AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes it)"
        )
    try:
        library = importlib.import_module("tokenizers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the package tokenizers is not installed: pip install -e '.[pretrained]'",
            name=error.name,
        ) from None
    if "model" not in folders.read_json(folder / FILE):
        raise ValueError(f"{folder / FILE} must be a tokenizer's: it has no entry model")
    backend = library.Tokenizer.from_file(str(folder / FILE))
    backend.no_truncation()
    backend.no_padding()
    vocabulary = 1 + max(backend.get_vocab(with_added_tokens=True).values())
    config, settings = (
        folders.read_json(folder / name) if (folder / name).exists() else {}
        for name in (folders.CONFIG, SETTINGS)
    )
    _check_vocabulary(vocabulary, config.get("vocab_size"), folder)
    return Tokenizer(backend, vocabulary, _positions(config, settings))


def pad(rows: Sequence[Row], length: int | None = None) -> Padded:
    """Pads rows on the right, to one length.

    Args:
      rows: of a ``Tokenized``, at least one.
      length: of the result; default: that of the longest row.

    Raises:
      ValueError: no rows, or a longer row.

    >>> import numpy as np
    >>> from attention_jax.models.pretrained import Row, pad
    >>> x = np.array([3, 1], np.int32)
    >>> row = Row(x, 0 * x, np.array([[0, 2], [3, 4]], np.int32), 0 * x, 0 * x, 0)
    >>> pad([row], length=3).real.tolist()
    [[True, True, False]]
    """
    if isinstance(rows, Tokenized):
        raise TypeError("rows must be a sequence of Row, got Tokenized: pass its rows")
    if not rows:
        raise ValueError("rows is empty, expected at least one Row")
    longest = max(len(row.tokens) for row in rows)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(
            f"length must be at least {longest}, the length of the longest row, got {length}"
        )

    def array(name: str, fill: int) -> np.ndarray:
        values = [getattr(row, name) for row in rows]
        out = np.full((len(rows), length, *values[0].shape[1:]), fill, np.int32)
        for i, x in enumerate(values):
            out[i, : len(x)] = x
        return out

    lengths = np.array([len(row.tokens) for row in rows])
    return Padded(
        array("tokens", 0),
        array("types", 0),
        np.arange(length) < lengths[:, None],
        array("offsets", 0),
        array("text", -1),
        array("words", -1),
        np.array([row.example for row in rows], np.int32),
    )


def _check_vocabulary(tokens: int, rows: Any, folder: Path) -> None:
    """Checks that the model has a row for each token, and no more but for padding of the table."""
    if rows is None or tokens == rows or rows == LARGER.get(tokens):
        return
    if not isinstance(rows, int) or tokens > rows or rows % ROUND or rows - tokens >= 2 * ROUND:
        raise ValueError(
            f"{folder}: {FILE} has {tokens} tokens, but {folders.CONFIG} has vocab_size = {rows}: "
            f"the tokenizer is not that of the model"
        )


def _positions(config: Mapping[str, Any], settings: Mapping[str, Any]) -> int | None:
    """The most tokens that the model reads."""
    of_gpt2 = config.get("n_positions") if config.get("model_type") == "gpt2" else None
    rows, kind = config.get("max_position_embeddings", of_gpt2), config.get("model_type")
    if kind in FROM_PADDING and isinstance(rows, int):  # the rows up to that are not used
        rows -= FROM_PADDING[kind].first_position(HFConfig(config))
    limits = rows, settings.get("model_max_length")
    numbers = [int(x) for x in limits if isinstance(x, int | float) and 0 < x < NO_LIMIT]
    return min(numbers, default=None)


def _words(name: str, i: int, words: Any) -> list[str]:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        pair = ": pass the second texts of pairs as others" if isinstance(words, tuple) else ""
        raise TypeError(
            f"{name} must be strings or lists of words, got {type(words).__name__} as "
            f"{name}[{i}]{pair}"
        )
    return words


def _cut(first: Any, second: Any, room: int) -> int:
    """Cuts two texts until they fit together, the longer one first; the number of lost tokens."""
    a, b = len(first), 0 if second is None else len(second)
    if a + b <= room:
        return 0
    short = min(a, b, room // 2)
    kept = (short, room - short) if a <= b else (room - short, short)
    first.truncate(kept[0])
    if second is not None:
        second.truncate(kept[1])
    return a + b - room


def _windows(
    first: Any, second: Any, room: int, stride: int, example: int
) -> Iterator[tuple[Any, Any]]:
    """Windows of the last text that overlap by ``stride`` tokens, each with all of the first."""
    pair = second is not None
    text, rest = (second, room - len(first)) if pair else (first, room)
    if len(text) > rest:
        if rest <= stride:
            raise ValueError(
                f"max_length - special tokens{' - the first text' if pair else ''} must be above "
                f"stride = {stride} for windows, got {rest} for texts[{example}]"
            )
        text.truncate(rest, stride=stride)
    for window in (text, *text.overflowing):
        yield (first, window) if pair else (window, None)
