"""Times of calls on a card, without the time that it takes to launch them.

Calls are queued and waited for once: while the queue is ahead of the card, what passes per call is
the time of its kernels. A call that takes longer to queue than to run is marked ``launch_bound``:
its time is that of the launch.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

LEAST = 0.15  # seconds that a round of queued calls takes, about
ROUNDS = 3
MOST_CALLS = 2000


class Timed(NamedTuple):
    """The time of a call, in seconds.

    Attributes:
      each: the median over rounds.
      spread: slowest less fastest round.
      queued: what it takes to queue a call.
      calls: in each round.
    """

    each: float
    spread: float
    queued: float
    calls: int

    def fields(self) -> dict[str, Any]:
        """For a record."""
        return {
            "ms": self.each * 1e3,
            "spread_ms": self.spread * 1e3,
            "calls": self.calls,
            "launch_bound": self.queued > 0.9 * self.each,
        }


def queued(
    call: Callable[[], Any],
    wait: Callable[[Any], Any],
    *,
    least: float = LEAST,
    rounds: int = ROUNDS,
) -> Timed:
    """Times a call by the clock of the host.

    Args:
      call: queues the work and returns what to wait for.
      wait: returns once that is done.
      least: seconds per round.
      rounds: how many are measured, after calls to warm up.
    """
    wait(call())
    start = time.perf_counter()
    wait(call())
    calls = _calls(time.perf_counter() - start, least)
    seconds, queue = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            last = call()
        queue.append((time.perf_counter() - start) / calls)
        wait(last)
        seconds.append((time.perf_counter() - start) / calls)
    return Timed(statistics.median(seconds), max(seconds) - min(seconds), min(queue), calls)


def by_events(call: Callable[[], Any], *, least: float = LEAST, rounds: int = ROUNDS) -> Timed:
    """Times a call of torch by CUDA's events; on a machine without a card by ``queued``."""
    import torch

    if not torch.cuda.is_available():
        return queued(call, lambda _: None, least=least, rounds=rounds)
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    calls = _calls(time.perf_counter() - start, least)
    seconds, queue = [], []
    for _ in range(rounds):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start = time.perf_counter()
        first.record()
        for _ in range(calls):
            call()
        last.record()
        queue.append((time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
        seconds.append(first.elapsed_time(last) / 1e3 / calls)
    return Timed(statistics.median(seconds), max(seconds) - min(seconds), min(queue), calls)


def _calls(seconds: float, least: float) -> int:
    return max(1, min(MOST_CALLS, math.ceil(least / max(seconds, 1e-6))))
