"""Continuous batching: requests join and leave a running batch.

    batch = Batch(model, rows=8, capacity=1024)
    number = batch.submit(Request(prompt, max_new_tokens=100))
    while batch.running or batch.waiting:
        for event in batch.step(): ...

``Batch`` keeps the books on the host. Keys, values and logits stay on the device, where two pure
functions run, each compiled once for every shape that it needs:

- ``append``: some tokens of one prompt, or the last token of every row that generates;
- ``choose``: the next tokens, from the logits that these leave behind.

The tokens of a request are those of ``generate`` for it alone, whatever else is in the batch and
whenever it joins. (Sums of floating-point numbers are in another order: where two tokens are
equally likely to the last digit, either may come.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.core.axes import int_at_least, is_int, kind
from attention_jax.models.decoder import Decoder
from attention_jax.models.requests import End, Event, Request, Running, checked, most_tokens
from attention_jax.models.serving_steps import (
    Draws,
    State,
    Structure,
    append,
    choose,
    share,
)

SMALLEST = 16  # tokens of the smallest program that reads prompts
LEAST_ROWS = 2  # rows of the smallest program that decodes


@dataclasses.dataclass(eq=False)
class _Row:
    """A row.

    Attributes:
      tokens: that it holds, also after their request has ended.
      request: that runs in it.
      reserved: how many pages no other row may use while it runs.
      used: when it was last given to a request or given back.
    """

    tokens: np.ndarray
    request: Running | None = None
    reserved: int = 0
    used: int = 0


class Batch:
    """Requests that share a model and a batch of ``rows`` rows. Not thread-safe.

    A request waits until there is a row and enough pages for it, first come, first served, so a
    request that runs never lacks pages. Where prompts begin alike, the pages of their common tokens
    are read once and shared, also with requests that have ended, as long as no other needs their
    pages.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import Batch, Decoder, DecoderConfig, Layers, Request, generate
    >>> config = DecoderConfig(10, Layers(features=8, num_layers=1, num_heads=2))
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> batch = Batch(model, rows=2, capacity=16)
    >>> numbers = [batch.submit(Request(prompt, 3)) for prompt in ([3, 1], [4], [1, 5, 9])]
    >>> tokens = {number: [] for number in numbers}
    >>> while batch.waiting or batch.running:
    ...     for event in batch.step():
    ...         tokens[event.request].append(event.token)
    >>> tokens[2] == generate(model, np.array([[1, 5, 9]]), max_new_tokens=3).tokens[0].tolist()
    True

    Source: Yu et al. 2022, "Orca" (iteration-level scheduling); Kwon et al. 2023, "Efficient Memory
    Management for Large Language Model Serving with PagedAttention".
    """

    def __init__(
        self,
        model: Decoder,
        *,
        rows: int,
        capacity: int,
        page_size: int = 16,
        pages: int | None = None,
        chunk: int = 256,
        dtype: Any = None,
        quantize: str | None = None,
    ) -> None:
        """An empty batch.

        Args:
          model: a ``Decoder``.
          rows: how many requests can run at a time (R).
          capacity: the largest number of tokens of a request, prompt included, that its row holds;
            the last token it generates needs no place.
          page_size, pages, quantize: of the caches, see ``cache.init_paged``.
          chunk: the largest number of prompt tokens that are read in a step, which bounds how long
            the rows that generate wait for new ones.
          dtype: of keys and values; default that of the layers.

        Raises:
          TypeError, ValueError: another model; sizes that do not fit.
          NotImplementedError: a prefix-LM, or another model whose prompt must be read at once.
        """
        _check_decoder(model)
        if model.config.layers.prefix_lm:
            raise NotImplementedError(
                "a prefix-LM cannot be served: its prompt must be read in one call, and here it is "
                "read in chunks"
            )
        self.rows = int_at_least("rows", rows, 1)
        self.chunk = int_at_least("chunk", chunk, 1)
        int_at_least("page_size", page_size, 1)
        self.capacity, self.vocabulary = capacity, model.vocabulary
        options = {"page_size": page_size, "pages": pages, "dtype": dtype, "quantize": quantize}
        caches: Any = model.init_caches((rows,), capacity, **options)
        self._page_size, self._num_pages = page_size, caches[0].pages.num_pages
        graph, self._weights = nnx.split(model)
        self._model = Structure(graph)
        pools = tuple((cache.key, cache.value) for cache in caches)
        empty = State(caches[0].pages, pools, jnp.zeros((rows, model.vocabulary), jnp.float32))
        rows_of_one = np.zeros(1, np.int32)  # tracing it raises for models that cannot be served
        after = jax.eval_shape(
            functools.partial(append, self._model),
            self._weights,
            empty,
            rows_of_one,
            rows_of_one[:, None],
            rows_of_one,
        )
        self._state = empty._replace(logits=jnp.zeros(after.logits.shape, after.logits.dtype))
        self._sizes = _sizes(rows)
        self._slots = [_Row(np.zeros(0, np.int32)) for _ in range(rows)]
        self._queue: deque[Running] = deque()
        self._submitted = self._clock = 0

    @property
    def waiting(self) -> int:
        """How many requests wait for a row."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """How many requests have a row."""
        return sum(slot.request is not None for slot in self._slots)

    def submit(self, request: Any) -> int:
        """Adds a request; returns its number, by which events refer to it.

        Raises:
          ValueError, TypeError: not a ``Request``, or one that can never run; the message names the
            argument.
        """
        number = self._submitted
        running = checked(
            request,
            number,
            vocabulary=self.vocabulary,
            capacity=min(self.capacity, self._num_pages * self._page_size),
            page_size=self._page_size,
        )
        self._submitted += 1
        self._queue.append(running)
        return number

    def cancel(self, request: Any) -> None:
        """Ends a request without a further event; one that has ended already stays as it is.

        Raises:
          ValueError: no request has this number.
        """
        if not is_int(request) or not 0 <= request < self._submitted:
            raise ValueError(f"request must be a number from submit, got {request!r}")
        self._queue = deque(x for x in self._queue if x.number != request)
        for slot in self._slots:
            if slot.request is not None and slot.request.number == request:
                self._end(slot)

    def step(self) -> list[Event]:
        """Admits requests, reads up to ``chunk`` tokens of prompts, and decodes one token per row.

        Returns:
          A token for each row whose prompt is read.
        """
        self._admit()
        decoding = [i for i, x in enumerate(self._slots) if x.request and x.request.made]
        complete = self._read_prompts()
        if decoding:
            self._decode(decoding)
        ready = sorted(decoding + complete)
        return self._choose(ready) if ready else []

    def _request(self, row: int) -> Running:
        """The request of a row that has one."""
        request = self._slots[row].request
        if request is None:
            raise RuntimeError(f"row {row} has no request")
        return request

    # --- Rows and pages.

    def _admit(self) -> None:
        """Gives rows to waiting requests, in order, while there are rows and pages.

        Rows without a request keep their tokens while pages allow, the last used ones longest.
        """
        while self._queue:
            request = self._queue[0]
            free = [slot for slot in self._slots if slot.request is None]
            reserved = sum(slot.reserved for slot in self._slots if slot.request is not None)
            if not free or reserved + request.needed > self._num_pages:
                return
            slot = max(free, key=lambda x: (self._common(request, x), -x.used))
            others = sorted((x for x in free if x is not slot), key=lambda x: x.used)
            for other in (*others, slot):
                slot.reserved = max(request.needed, self._held(slot))
                if reserved + slot.reserved + sum(map(self._held, others)) <= self._num_pages:
                    break
                self._forget(other)
            slot.reserved = max(request.needed, self._held(slot))
            slot.request, slot.used = self._queue.popleft(), self._tick()

    def _held(self, slot: _Row) -> int:
        """How many pages a row holds."""
        return -(-len(slot.tokens) // self._page_size)

    def _forget(self, slot: _Row) -> None:
        """Makes a row empty and its pages free."""
        self._share(slot, slot, 0)

    def _share(self, source: _Row, target: _Row, length: int) -> None:
        rows = self._slots.index(source), self._slots.index(target)
        self._state = self._state._replace(pages=share(self._state.pages, *rows, length))
        target.tokens = source.tokens[:length]

    def _common(self, request: Running, slot: _Row) -> int:
        """How many tokens of whole pages a row has in common with the beginning of a prompt.

        The last token of the prompt is not among them, since its logits are needed.
        """
        most = min(request.prompt - 1, len(slot.tokens))
        same = request.tokens[:most] == slot.tokens[:most]
        common = most if same.all() else int(same.argmin())
        return common // self._page_size * self._page_size

    def _end(self, slot: _Row) -> None:
        """Frees a row for other requests; its tokens stay until their pages are needed."""
        slot.tokens = slot.tokens.copy()
        slot.request, slot.used = None, self._tick()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    # --- Steps.

    def _read_prompts(self) -> list[int]:
        """Reads up to ``chunk`` tokens of prompts; returns the rows whose prompts are complete."""
        left, complete = self.chunk, []
        rows = [i for i, x in enumerate(self._slots) if x.request and not x.request.made]
        for row in sorted(rows, key=lambda i: self._request(i).number):
            request = self._request(row)
            if left and not request.begun:
                self._begin(self._slots[row], request)
            while left and request.read < request.prompt:
                count = min(left, request.prompt - request.read)
                self._read(row, count)
                left -= count
            if request.read == request.prompt:
                complete.append(row)
        return complete

    def _begin(self, slot: _Row, request: Running) -> None:
        """Starts a prompt with the tokens that some row already holds, if there are any."""
        source = max(self._slots, key=lambda x: self._common(request, x))
        request.read, request.begun = self._common(request, source), True
        self._share(source, slot, request.read)

    def _read(self, row: int, count: int) -> None:
        """Reads the next tokens of a prompt, with the smallest program that takes so many."""
        request = self._request(row)
        size = min(self.chunk, max(SMALLEST, 1 << (count - 1).bit_length()))
        tokens = np.zeros((1, size), np.int32)
        tokens[0, :count] = request.tokens[request.read : request.read + count]
        self._append([row], tokens, [count])

    def _decode(self, rows: list[int]) -> None:
        """Appends the last token of each of these rows, with the smallest program for so many."""
        size = min(x for x in self._sizes if x >= len(rows))
        tokens = np.zeros((size, 1), np.int32)
        tokens[: len(rows), 0] = [self._request(i).last for i in rows]
        idle = size - len(rows)
        self._append(rows + [self.rows] * idle, tokens, [1] * len(rows) + [0] * idle)

    def _append(self, rows: list[int], tokens: np.ndarray, count: list[int]) -> None:
        given = np.array(rows, np.int32), tokens, np.array(count, np.int32)
        self._state = append(self._model, self._weights, self._state, *given)
        for row, n in zip(rows, count, strict=True):
            if n:
                self._took(row, n)

    def _took(self, row: int, count: int) -> None:
        """Notes that a row holds ``count`` more tokens of its request."""
        request = self._request(row)
        request.read += count
        self._slots[row].tokens = request.tokens[: request.read]

    def _choose(self, ready: list[int]) -> list[Event]:
        """Chooses the next token of these rows, with one program for each kind of choice."""
        tokens: Any = jnp.zeros(self.rows, jnp.int32)  # like the results of choose
        for choice, impl in dict.fromkeys(self._request(i).kind for i in ready):
            rows = [i for i in ready if self._request(i).kind == (choice, impl)]
            tokens = choose(choice, impl, self._state.logits, self._draws(rows), tokens)
        found = np.asarray(tokens)
        return [self._event(i, int(found[i])) for i in ready]

    def _draws(self, rows: list[int]) -> Draws:
        some = [self._request(i) for i in rows]
        keys = None if some[0].key is None else [x.key for x in some]
        return Draws(
            self._of_rows(rows, [True for _ in rows], bool),
            self._of_rows(rows, [x.numbers for x in some], self._state.logits.dtype),
            None if keys is None else self._of_rows(rows, keys, np.uint32),
            self._of_rows(rows, [x.made for x in some], np.int32),
            self._of_rows(rows, [x.tokens for x in some], np.int32),
        )

    def _of_rows(self, rows: list[int], values: Sequence[Any], dtype: Any) -> np.ndarray:
        """An array ``[R ...]`` with these values in these rows, and zeros elsewhere."""
        given = np.asarray(values, dtype)
        array = np.zeros((self.rows, *given.shape[1:]), dtype)
        array[rows] = given
        return array

    def _event(self, row: int, token: int) -> Event:
        request = self._request(row)
        request.add(token)
        ended: End | None = None
        if token < 0:
            ended = "invalid"
        elif token in request.stop:
            ended = "stop"
        elif request.made == request.limit:
            ended = request.at_limit
        if ended is not None:
            self._end(self._slots[row])
        return Event(request.number, token, ended)


def _check_decoder(model: Any) -> None:
    if not isinstance(model, Decoder):
        raise TypeError(f"model must be a Decoder, got {kind(model)}")


def _sizes(rows: int) -> list[int]:
    """For how many rows there are programs that decode, so that the last ones need not wait."""
    sizes = [rows]
    while sizes[-1] >= 4 * LEAST_ROWS:
        sizes.append(sizes[-1] // 4)
    return sizes


def serve(model: Decoder, requests: Iterable[Request], **options: Any) -> Iterator[Event]:
    """The events of requests, all of which are submitted at once, until the last one ends.

    Args:
      model: a ``Decoder``.
      requests: numbered from 0 in the events.
      **options: of ``Batch``; by default ``rows`` is 8, or fewer if there are fewer requests, and
        ``capacity`` what the longest request needs.

    Raises:
      ValueError, TypeError: as ``Batch`` and ``Batch.submit``, before the first event.

    >>> from flax import nnx
    >>> from attention_jax.models import Decoder, DecoderConfig, Layers, Request, serve
    >>> config = DecoderConfig(10, Layers(features=8, num_layers=1, num_heads=2))
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> events = list(serve(model, [Request([3, 1], 2), Request([4], 1)]))
    >>> [(event.request, event.ended) for event in events]
    [(0, None), (1, 'length'), (0, 'length')]
    """
    requests = list(requests)
    _check_decoder(model)
    lengths = [most_tokens(x, model.vocabulary) for x in requests]
    batch = Batch(
        model,
        **{"rows": max(1, min(8, len(requests))), "capacity": max(lengths, default=1), **options},
    )
    for request in requests:
        batch.submit(request)
    return _all_events(batch)


def _all_events(batch: Batch) -> Iterator[Event]:
    while batch.waiting or batch.running:
        yield from batch.step()
