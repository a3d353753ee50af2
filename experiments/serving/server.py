"""``python -m experiments serve FOLDER``: completions over HTTP."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import signal
import socket
import sys

import uvicorn

from attention_jax.models import Batch
from experiments.serving.api import Limits
from experiments.serving.app import make_app
from experiments.serving.checkpoint import Checkpoint, LoadOptions, load_checkpoint
from experiments.serving.engine import Engine


@dataclasses.dataclass(frozen=True)
class Options(LoadOptions):
    """Options of ``serve``."""

    port: int = 8000
    """To listen on; 0: a free one, which is printed."""
    host: str = "127.0.0.1"
    """To listen on. There are no passwords: let only machines that you trust reach it."""
    rows: int = 8
    """The largest number of requests that run at a time."""
    queue: int = 32
    """The largest number of requests that wait for a row; more are refused (429)."""
    context: int = 2048
    """The largest number of tokens of a request, prompt and answer."""
    max_prompt: int | None = None
    """The largest number of tokens of a prompt; default all but one of the context."""
    max_new_tokens: int = 1024
    """The largest number of tokens of an answer."""
    max_body: int = 1_000_000
    """The largest number of bytes of a request (413)."""
    grace: int = 10
    """Seconds that running requests have to end when the server is stopped."""

    def __post_init__(self) -> None:
        least = {
            "rows": 1,
            "queue": 0,
            "context": 2,
            "max_new_tokens": 1,
            "max_body": 1,
            "grace": 0,
        }
        for name, x in least.items():
            if getattr(self, name) < x:
                raise ValueError(f"{name} must be at least {x}, got {getattr(self, name)}")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be from 0 to 65535, got {self.port}")
        if self.max_prompt is not None and not 1 <= self.max_prompt < self.context:
            raise ValueError(
                f"max_prompt must be from 1 to context - 1 = {self.context - 1}, got "
                f"{self.max_prompt}"
            )


class Server(uvicorn.Server):
    """Uvicorn's server, which says where it listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        for each in sockets or () if self.started else ():
            host, port = each.getsockname()[:2]
            print(f"listening on http://{host}:{port}, stop with Ctrl-C", flush=True)


def make_engine(checkpoint: Checkpoint, options: Options) -> tuple[Engine, Limits]:
    """The engine, not started, and the limits of its requests."""
    capacity = checkpoint.capacity(options.context)
    if capacity < 2:
        raise ValueError(f"the model reads {capacity} token, too few to serve")
    batch = functools.partial(Batch, checkpoint.model, rows=options.rows, capacity=capacity)
    prompt = capacity - 1 if options.max_prompt is None else min(options.max_prompt, capacity - 1)
    limits = Limits(options.max_body, prompt, min(options.max_new_tokens, capacity))
    return Engine(batch, most=options.rows + options.queue), limits


def main(folder: str, options: Options) -> int:
    """Serves until SIGTERM or Ctrl-C."""
    with _bound(options.host, options.port) as listener:
        checkpoint = load_checkpoint(folder, options)
        engine, limits = make_engine(checkpoint, options)
        if not _is_loopback(options.host):
            print(
                f"warning: {options.host} may be reached from other machines, and anyone who "
                f"reaches it can use the model",
                file=sys.stderr,
            )
        app = make_app(checkpoint, engine, limits, options.grace)
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=options.grace, lifespan="on"
        )
        server = Server(config)
        # After a graceful stop Uvicorn sends itself the signal again, which would be an error.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listener])
    if not server.started:
        return 1  # Uvicorn has said why
    print("stopped", flush=True)
    return 0


def _bound(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address, and does not listen yet."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with contextlib.ExitStack() as undo:
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            undo.pop_all()
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
