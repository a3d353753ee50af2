"""Speed of calls of attention in bfloat16: ours, JAX's, torch's and others', side by side.

A record has the time of a call, TFLOP/s of the visible pairs, their share of the measured matrix
rate, memory besides arguments, and the time of the first call: trace, lowering and compilation.
The programs of one call compile side by side, in threads; they are timed one after the other.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from experiments.card import timing
from experiments.card.calls import Call, calls
from experiments.card.contenders import (
    gradients,
    missing,
    of_jax,
    of_torch,
    torch_arrays,
    torch_gradients,
)
from experiments.card.environment import pace
from experiments.card.parts import Fields, Item, Setting, Skipped
from experiments.card.worker import RECORDS, failure, fatal

COMPILERS = 8  # threads
PATIENCE = 45.0  # seconds for the compilation of one program, beside the others
LIMIT = 150.0  # seconds for a call, all contenders


def items(setting: Setting) -> Iterator[Item]:
    """An item for each call, those of JAX apart from those of torch."""
    names = [*of_jax(setting.dry), *of_torch()]
    yield Item("packages", functools.partial(_packages, names))
    rate = matrix_rate(setting.out)
    for call in calls(setting.dry):
        yield Item(f"{call}", functools.partial(of_call, call, setting.dry, rate), LIMIT)
        if missing("torch, SDPA") is None:
            run = functools.partial(of_call_in_torch, call, setting.dry, rate)
            yield Item(f"{call}, torch", run, LIMIT)


def _packages(names: list[str]) -> Iterator[Fields]:
    for package in dict.fromkeys(filter(None, map(missing, names))):
        left_out = [name for name in names if missing(name) == package]
        yield {"implementations": left_out, "skipped": f"{package} is not installed"}


def matrix_rate(out: Path) -> float | None:
    """TFLOP/s of the best matrix product that this run measured."""
    file = out / RECORDS
    if not file.exists():
        return None
    rows = map(json.loads, file.read_text().splitlines())
    return max((row["matrix_tflops"] for row in rows if "matrix_tflops" in row), default=None)


def directions(call: Call) -> tuple[bool, ...]:
    """Whether backward too; decoding has no backward pass."""
    return (False,) if call.kind == "decode" else (False, True)


def results(call: Call, name: str, backward: bool, timed: timing.Timed, rate: Any) -> Fields:
    """The fields of a record."""
    tflops = call.flops(backward=backward) / timed.each / 1e12
    found: Fields = {
        "implementation": name,
        "kind": call.kind,
        "call": str(call),
        "T": call.T,
        "H": call.H,
        "direction": direction(backward),
        "tflops": tflops,
        "share": None if rate is None else tflops / rate,
        **timed.fields(),
    }
    if call.kind == "decode":
        found["gb_per_s"] = call.cache_bytes / timed.each / 1e9
    return found


def direction(backward: bool) -> str:
    """As in the records."""
    return "forward + backward" if backward else "forward"


# --- JAX.


def of_call(call: Call, dry: bool, rate: float | None) -> Iterator[Fields]:
    """All contenders of JAX on one call."""
    arrays = call.arrays()
    (q, k, v, cotangent), rest = arrays[:4], arrays[4:]
    jobs: dict[tuple[str, bool], tuple[Callable[..., Any], list[Any]]] = {}
    for name, make in of_jax(dry).items():
        if missing(name):
            continue
        try:
            attend = make(call)
        except (NotImplementedError, Skipped, ImportError) as reason:
            yield {"implementation": name, "call": str(call), "refused": str(reason)[:300]}
            continue
        for backward in directions(call):
            # The interpreter takes seconds to compile a backward pass.
            if dry and backward and call.kind != "causal":
                continue
            given = [q, k, v, *([cotangent] if backward else []), *rest]
            jobs[name, backward] = gradients(attend) if backward else attend, given
    pool = concurrent.futures.ThreadPoolExecutor(2 if dry else COMPILERS)
    compiling = {job: pool.submit(compile_program, *what) for job, what in jobs.items()}
    begun = time.monotonic()
    for (name, backward), future in compiling.items():
        same = {"implementation": name, "call": str(call), "direction": direction(backward)}
        try:
            left = max(0.1, begun + (LIMIT if dry else PATIENCE) - time.monotonic())
            program, first, extra = future.result(timeout=left)
            concurrent.futures.wait(compiling.values(), timeout=left)  # none disturbs the clock
            _, given = jobs[name, backward]
            run = functools.partial(program, *given)
            timed = timing.queued(run, jax.block_until_ready, **pace(dry))
        except NotImplementedError as reason:
            yield same | {"refused": str(reason)[:300]}
        except concurrent.futures.TimeoutError:
            yield same | {"error": f"compiling took longer than {PATIENCE:.0f} s"}
        except Exception as problem:  # noqa: BLE001 - recorded, and the next contender runs
            failed = failure(problem)
            yield same | failed
            if fatal(failed):
                break
        else:
            found = results(call, name, backward, timed, rate)
            yield found | {"first_s": first, "extra_mib": extra}
    pool.shutdown(wait=False, cancel_futures=True)


def compile_program(fn: Callable[..., Any], given: list[Any]) -> tuple[Any, float, float]:
    """The compiled program, the seconds that it took, and MiB besides arguments."""
    start = time.perf_counter()
    compiled = jax.jit(fn).lower(*given).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    extra = 0 if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes
    return compiled, seconds, extra / 2**20


# --- torch.


def of_call_in_torch(call: Call, dry: bool, rate: float | None) -> Iterator[Fields]:
    """All contenders of torch on one call."""
    import torch

    q, k, v, cotangent = torch_arrays(call)
    for name, make in of_torch().items():
        same = {"implementation": name, "call": str(call)}
        try:
            attend = make(call, dry)
        except NotImplementedError as reason:
            yield same | {"refused": str(reason)}
            continue
        for backward in directions(call):
            same["direction"] = direction(backward)
            leaves = [x.clone().requires_grad_() for x in (q, k, v)] if backward else [q, k, v]
            run = functools.partial(attend, *leaves)
            if backward:
                run = torch_gradients(attend, leaves, cotangent)  # type: ignore[assignment]
            try:
                with torch.set_grad_enabled(backward):
                    start = time.perf_counter()
                    run()
                    _synchronize(torch)
                    first = time.perf_counter() - start
                    timed = timing.by_events(run, **pace(dry))
                    extra = _peak_mib(torch, run)
            except NotImplementedError as reason:
                yield same | {"refused": str(reason)[:300]}
            except Exception as problem:  # noqa: BLE001 - recorded, and the next contender runs
                failed = failure(problem)
                yield same | failed
                if fatal(failed):
                    return
            else:
                found = results(call, name, backward, timed, rate)
                yield found | {"first_s": first, "extra_mib": extra}


def _synchronize(torch: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_mib(torch: Any, run: Callable[[], Any]) -> float | None:
    """MiB that a call takes besides its arguments, at the most."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / 2**20
