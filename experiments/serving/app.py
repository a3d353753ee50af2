"""The server as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from attention_jax.models import Event
from experiments.serving import api
from experiments.serving.api import CHAT, COMPLETION, Form, Limits, RequestError, Wanted
from experiments.serving.checkpoint import Checkpoint
from experiments.serving.engine import BusyError, Engine, StoppedError
from experiments.serving.text import TextStream

BODY_SECONDS = 30  # for a body to arrive
CLOSED = 499  # nobody reads this response: the client has left


class Piece(NamedTuple):
    """New text of an answer; with the last one why it ends, and how many tokens it has."""

    text: str
    reason: str | None = None
    tokens: int = 0


def make_app(checkpoint: Checkpoint, engine: Engine, limits: Limits, grace: float) -> Starlette:
    """The application; it starts the engine, and stops it within ``grace`` seconds."""
    started = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.stop, grace)

    async def health(request: Request) -> Response:
        if not engine.alive:
            return _error(503, "the engine has stopped")
        return JSONResponse({"status": "ok", "requests": engine.active})

    async def models(request: Request) -> Response:
        model = {"id": checkpoint.name, "object": "model", "created": started, "owned_by": "local"}
        return JSONResponse({"object": "list", "data": [model]})

    async def complete(request: Request) -> Response:
        return await _complete(request, COMPLETION, checkpoint, engine, limits)

    async def chat(request: Request) -> Response:
        if checkpoint.template is None:
            raise RequestError(404, f"{checkpoint.name} has no chat template: use /v1/completions")
        return await _complete(request, CHAT, checkpoint, engine, limits)

    handlers: Any = {
        RequestError: lambda request, e: _error(e.status, e.message, e.field),
        BusyError: lambda request, e: _error(429, str(e), retry=True),
        StoppedError: lambda request, e: _error(503, str(e)),
        HTTPException: lambda request, e: _error(e.status_code, f"{e.detail}: {_of(request)}"),
        Exception: lambda request, e: _error(500, f"error of the server: {type(e).__name__}"),
    }
    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


async def _complete(
    request: Request, form: Form, checkpoint: Checkpoint, engine: Engine, limits: Limits
) -> Response:
    body = await _body(request, limits.body)
    seed = secrets.randbits(32)
    wanted = await run_in_threadpool(form.parse, body, checkpoint, limits, seed)
    head = api.head(form, checkpoint.name, secrets.token_hex(12))
    pieces = _pieces(wanted, checkpoint, engine)
    if not wanted.stream:
        found = await _unless_gone(request, _all(pieces))
        if found is None:
            return Response(status_code=CLOSED)
        text, reason, tokens = found
        usage = api.usage(len(wanted.prompt), tokens)
        return JSONResponse(form.answer(head, text, str(reason), usage))
    first = await _unless_gone(request, anext(pieces))
    if first is None:
        await pieces.aclose()
        return Response(status_code=CLOSED)
    sent = _events(form, head, wanted, first, pieces)
    return StreamingResponse(
        sent, media_type="text/event-stream", headers={"cache-control": "no-store"}
    )


async def _events(
    form: Form, head: Any, wanted: Wanted, first: Piece, pieces: AsyncGenerator[Piece, None]
) -> AsyncIterator[str]:
    """The answer as server-sent events."""

    def event(x: Any) -> str:
        return f"data: {json.dumps(x, ensure_ascii=False)}\n\n"

    async with contextlib.aclosing(pieces):
        if form.chat:
            yield event(form.piece(head, None))
        piece = first
        try:
            while True:
                if piece.text or piece.reason:
                    yield event(form.piece(head, piece.text, piece.reason))
                if piece.reason:
                    break
                piece = await anext(pieces)
        except (RequestError, StoppedError) as problem:  # too late for another status
            yield event(api.error(getattr(problem, "status", 503), str(problem)))
            return
        if wanted.usage:
            yield event(form.last(head, api.usage(len(wanted.prompt), piece.tokens)))
        yield "data: [DONE]\n\n"


async def _pieces(
    wanted: Wanted, checkpoint: Checkpoint, engine: Engine
) -> AsyncGenerator[Piece, None]:
    """The pieces of an answer; if they are not read to the end, the request is cancelled."""
    loop, found = asyncio.get_running_loop(), asyncio.Queue[Event | Exception]()

    def listener(x: Event | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
            loop.call_soon_threadsafe(found.put_nowait, x)

    ticket = engine.submit(wanted.request, listener)
    stream, tokens = TextStream(checkpoint.tokenizer, wanted.prompt, wanted.stop), 0
    try:
        while True:
            event = await found.get()
            if isinstance(event, StoppedError):
                raise event
            if isinstance(event, ValueError | TypeError):
                raise RequestError(400, str(event))
            if isinstance(event, Exception):
                raise RequestError(500, f"error of the server: {type(event).__name__}")
            if event.ended == "invalid":
                raise RequestError(500, "the model's logits are NaN: there is no token to choose")
            tokens += 1
            text = "" if event.ended == "stop" else stream.add(event.token)
            if stream.stopped:
                yield Piece(text, "stop", tokens)
                return
            if event.ended is not None:
                rest = text + stream.finish()
                reason = "stop" if event.ended == "stop" or stream.stopped else "length"
                yield Piece(rest, reason, tokens)
                return
            yield Piece(text)
    finally:
        engine.cancel(ticket)


async def _all(pieces: AsyncGenerator[Piece, None]) -> Piece:
    """All pieces as one."""
    texts = []
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            texts.append(piece.text)
    return piece._replace(text="".join(texts))


async def _unless_gone(request: Request, work: Awaitable[Piece]) -> Piece | None:
    """The result of ``work``; None, and the work is cancelled, if the client leaves before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks: list[asyncio.Task[Any]] = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _body(request: Request, most: int) -> bytes:
    """The body, of no more than so many bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page of another site cannot send unasked
        raise RequestError(415, f"content-type must be application/json, got {kind or 'none'}")
    message = f"the body must have at most {most} bytes"
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 15 or int(length) > most:
        raise RequestError(413, message)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise RequestError(413, message)
    except TimeoutError:
        raise RequestError(408, f"the body must arrive within {BODY_SECONDS} seconds") from None
    except ClientDisconnect:
        raise RequestError(CLOSED, "the client has left") from None
    return bytes(body)


def _error(status: int, message: str, field: str | None = None, *, retry: bool = False) -> Response:
    headers = {"retry-after": "1"} if retry else None
    return JSONResponse(api.error(status, message, field), status, headers)


def _of(request: Request) -> str:
    return f"{request.method} {request.url.path}"
