"""The engine: one thread that owns the batch, and steps while there are requests."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable
from typing import TypeAlias

from attention_jax.models import Batch, Event, Request

Listener: TypeAlias = Callable[[Event | Exception], None]


class BusyError(Exception):
    """As many requests run and wait as may."""


class StoppedError(Exception):
    """The engine has stopped, or has lost the request in an error."""


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request, and who hears of its tokens.

    Attributes:
      request: what to generate.
      listener: called in the thread of the engine, with every event or at last an error.
      number: of the request in the batch, None before it is there.
      ended: whether the last event is out.
    """

    request: Request
    listener: Listener
    number: int | None = None
    ended: bool = False


class Engine:
    """Runs requests of any threads in one batch.

    Args:
      make_batch: called at once, and again after an error in a step, which ends all requests.
      most: how many requests may run and wait.
    """

    def __init__(self, make_batch: Callable[[], Batch], *, most: int) -> None:
        self._make_batch, self._batch, self._most = make_batch, make_batch(), most
        self._commands: queue.SimpleQueue[Callable[[Batch], None] | None] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # those in the batch; only in the engine's thread
        self._lock, self._active, self._closed = threading.Lock(), 0, False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """Ends all requests and the thread; whether it ended within this time."""
        with self._lock:
            self._closed = True
            self._commands.put(None)  # the last command
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def active(self) -> int:
        """How many requests run or wait."""
        return self._active

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Adds a request.

        Raises:
          BusyError: too many run and wait.
          StoppedError: the engine has stopped.
        """
        ticket = Ticket(request, listener)
        with self._lock:
            if self._closed or not self.alive:
                raise StoppedError("the server is stopping")
            if self._active >= self._most:
                raise BusyError(f"{self._active} requests run and wait already: try again later")
            self._active += 1
            self._commands.put(lambda batch: self._submit(batch, ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Frees the row of a request; its listener hears nothing more. One that ended stays so."""
        self._commands.put(lambda batch: self._cancel(batch, ticket))

    # --- In the thread of the engine.

    def _run(self) -> None:
        batch = self._batch
        while self._obey(batch):
            try:
                events = batch.step()
            except Exception as error:  # noqa: BLE001 - told to all requests; others may follow
                self._lose(error)
                batch = self._make_batch()
                continue
            for event in events:
                ticket = self._tickets.get(event.request)
                if ticket is not None:
                    if event.ended is not None:
                        self._end(ticket)
                    ticket.listener(event)
        self._lose(StoppedError("the server has stopped"))

    def _obey(self, batch: Batch) -> bool:
        """Runs commands, waiting for one if there is nothing else to do; False for stop."""
        while True:
            idle = not (batch.running or batch.waiting)
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command(batch)

    def _submit(self, batch: Batch, ticket: Ticket) -> None:
        try:
            ticket.number = batch.submit(ticket.request)
        except (TypeError, ValueError) as error:
            self._end(ticket)
            ticket.listener(error)
            return
        self._tickets[ticket.number] = ticket

    def _cancel(self, batch: Batch, ticket: Ticket) -> None:
        if not ticket.ended and ticket.number is not None:
            batch.cancel(ticket.number)
            self._end(ticket)

    def _end(self, ticket: Ticket) -> None:
        ticket.ended = True
        if ticket.number is not None:
            self._tickets.pop(ticket.number, None)
        with self._lock:
            self._active -= 1

    def _lose(self, error: Exception) -> None:
        """Ends all requests with an error, also those that are still to be submitted at the end."""
        for ticket in list(self._tickets.values()):
            self._end(ticket)
            ticket.listener(error)
