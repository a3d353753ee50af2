"""``python -m experiments serve``: answers, streams, limits, clients that leave, and its end."""

import asyncio
import contextlib
import functools
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest
import tiny_llama
from helpers import mostly_slow
from starlette.testclient import TestClient

from attention_jax.models import Batch, Request, Sampling, generate
from experiments.serving import api, server
from experiments.serving.app import make_app
from experiments.serving.checkpoint import LoadOptions, load_checkpoint
from experiments.serving.engine import BusyError, Engine, StoppedError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY = {"temperature": 0, "max_tokens": 8}
MESSAGES = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama.write(tmp_path_factory.mktemp("llama") / "tiny")


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A checkpoint whose answers only end where they must."""
    return tiny_llama.write(tmp_path_factory.mktemp("endless"), max_length=8192, ends=False)


@functools.cache
def loaded(folder):
    return load_checkpoint(str(folder), LoadOptions())


@contextlib.contextmanager
def running(folder, **options):
    """The application and its engine, which the caller starts, by a ``TestClient`` for example."""
    made = server.Options(**{"rows": 2, "context": 128, "max_new_tokens": 100, **options})
    checkpoint = loaded(folder)
    engine, limits = server.make_engine(checkpoint, made)
    try:
        yield make_app(checkpoint, engine, limits, 5), engine
    finally:
        if engine.alive:
            engine.stop(10)


@pytest.fixture(scope="module")
def client(folder):
    with running(folder, max_body=2000) as (app, engine), TestClient(app) as client:
        client.engine = engine
        yield client


def events(response):
    """The data of server-sent events."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def of_generate(folder, tokens, **options):
    """The text that ``generate`` continues with, and the number of its tokens."""
    checkpoint = loaded(folder)
    made = generate(checkpoint.model, np.array([tokens]), stop=checkpoint.end, **options)
    found = made.tokens[0, : int(made.count[0])].tolist()
    return checkpoint.tokenizer.decode(found), len(found)


# --- Answers.


def test_a_completion_is_that_of_generate(client, folder):
    response = client.post(COMPLETIONS, json={"prompt": "hello", "model": "tiny", **GREEDY})
    assert response.status_code == 200
    found, tokens = response.json(), loaded(folder).tokens("hello")
    text, new = of_generate(folder, tokens, max_new_tokens=8)
    (choice,) = found["choices"]
    assert choice["text"] == text
    assert choice["finish_reason"] in ("stop", "length")
    assert found["object"] == "text_completion"
    assert found["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": new,
        "total_tokens": 5 + new,
    }
    of_tokens = client.post(COMPLETIONS, json={"prompt": tokens, **GREEDY}).json()
    assert of_tokens["choices"] == found["choices"]


def test_draws_are_those_of_the_seed(client, folder):
    asked = {"prompt": "hello", "max_tokens": 8, "temperature": 0.9, "top_p": 0.8, "seed": 5}
    text, _ = of_generate(
        folder,
        loaded(folder).tokens("hello"),
        max_new_tokens=8,
        sampling=Sampling(temperature=0.9, top_p=0.8),
        key=jax.random.key(5),
    )
    for _ in range(2):
        assert client.post(COMPLETIONS, json=asked).json()["choices"][0]["text"] == text
    without = {x: asked[x] for x in ("prompt", "max_tokens")}
    several = {client.post(COMPLETIONS, json=without).text.partition('"text"')[2] for _ in range(3)}
    assert len(several) > 1


def test_a_stream_is_the_answer_in_pieces(client):
    asked = {"prompt": "hello", "temperature": 0, "max_tokens": 20}
    whole = client.post(COMPLETIONS, json=asked).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = client.post(COMPLETIONS, json={**asked, **options})
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, last = events(response)
    choices = [piece["choices"][0] for piece in pieces]
    assert "".join(x["text"] for x in choices) == whole["choices"][0]["text"]
    assert [x["finish_reason"] for x in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert len({piece["id"] for piece in pieces}) == 1


def test_a_chat_follows_the_template(client, folder):
    text, _ = of_generate(folder, loaded(folder).conversation(MESSAGES), max_new_tokens=8)
    found = client.post(CHAT, json={"messages": MESSAGES, **GREEDY}).json()
    assert found["choices"][0]["message"] == {"role": "assistant", "content": text}
    assert found["object"] == "chat.completion"
    response = client.post(CHAT, json={"messages": MESSAGES, "stream": True, **GREEDY})
    first, *deltas = (piece["choices"][0]["delta"] for piece in events(response))
    assert first == {"role": "assistant", "content": ""}
    assert "".join(x.get("content", "") for x in deltas) == text


def test_a_stop_string_ends_the_answer(client):
    asked = {"prompt": "hello", "temperature": 0, "max_tokens": 20}
    text = client.post(COMPLETIONS, json=asked).json()["choices"][0]["text"]
    stop = text[3:5]
    found = client.post(COMPLETIONS, json={**asked, "stop": [stop, "never"]}).json()["choices"][0]
    assert (found["text"], found["finish_reason"]) == (text[: text.index(stop)], "stop")
    pieces = events(client.post(COMPLETIONS, json={**asked, "stop": stop, "stream": True}))
    assert "".join(x["choices"][0]["text"] for x in pieces) == text[: text.index(stop)]
    wait_until_idle(client.engine)


def test_models_and_health(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert client.get("/health").json() == {"status": "ok", "requests": 0}


def test_the_example_of_the_readme_runs(client):
    readme = (pathlib.Path(server.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    path, body = re.search(r"curl http://[\d.:]+(\S+) .*?-d '(.*?)'", readme, re.DOTALL).groups()
    assert events(client.post(path, content=body.encode(), headers=JSON))


# --- Bad input.

PLAIN = {"prompt": "x"}
WRONG = {
    "no JSON": (b"{", "the body must be JSON"),
    "no UTF-8": (b'{"prompt": "\xff"}', "the body must be JSON"),
    "deep": (b"[" * 1900, "the body must be JSON"),
    "no object": (b"[1]", "must be a JSON object, got [1]"),
    "NaN": (b'{"prompt": "x", "temperature": NaN}', "the body has NaN"),
    "infinite": (b'{"prompt": "x", "temperature": 1e999}', "temperature must be a number"),
    "huge": (b'{"prompt": "x", "seed": %d}' % 10**400, "seed must be an integer"),
    "huge number": (b'{"prompt": "x", "top_p": %d}' % 10**400, "top_p must be a number"),
    "no prompt": ({}, "prompt must be given"),
    "null": ({"prompt": None}, "prompt must be given"),
    "unknown": ({**PLAIN, "temprature": 1}, 'field "temprature"; did you mean temperature?'),
    "text": ({**PLAIN, "max_tokens": "5"}, 'max_tokens must be an integer from 1 to 100, got "5"'),
    "bool": ({**PLAIN, "max_tokens": True}, "max_tokens must be an integer"),
    "float": ({**PLAIN, "max_tokens": 2.0}, "max_tokens must be an integer"),
    "many": ({**PLAIN, "max_tokens": 101}, "max_tokens must be an integer from 1 to 100, got 101"),
    "none": ({**PLAIN, "max_tokens": 0}, "from 1 to 100"),
    "temperature": ({**PLAIN, "temperature": -1}, "temperature must be a number from 0 to 2"),
    "top_p": ({**PLAIN, "top_p": 0}, "top_p must be a number above 0 to 1, got 0"),
    "n": ({**PLAIN, "n": 2}, "n is not supported: leave it out or give 1, got 2"),
    "best_of": ({**PLAIN, "best_of": 3}, "best_of is not supported"),
    "echo": ({**PLAIN, "echo": True}, "echo is not supported"),
    "logprobs": ({**PLAIN, "logprobs": 1}, "logprobs is not supported"),
    "several prompts": ({"prompt": ["x", "y"]}, "prompt must be one text"),
    "empty prompt": ({"prompt": ""}, "at least one token"),
    "empty tokens": ({"prompt": []}, "prompt must be one text"),
    "tokens": ({"prompt": [3, 258]}, "prompt must hold tokens from 0 to 257, got 258"),
    "negative tokens": ({"prompt": [-1]}, "prompt must hold tokens from 0 to 257"),
    "token kinds": ({"prompt": [1, "x"]}, "prompt must be one text"),
    "surrogate": (b'{"prompt": "\\ud800"}', "prompt must be valid Unicode"),
    "long": ({"prompt": "x" * 128}, "prompt must have at most 127 tokens, got 128"),
    "stop": ({**PLAIN, "stop": [1]}, "stop must be a text"),
    "empty stop": ({**PLAIN, "stop": ""}, "stop must have texts of 1 to 200 characters"),
    "stops": ({**PLAIN, "stop": list("abcde")}, "at most 4 texts"),
    "stream": ({**PLAIN, "stream": 1}, "stream must be true or false, got 1"),
    "usage": ({**PLAIN, "stream_options": {"include_usage": True}}, "left out without stream"),
}
WRONG_CHATS = {
    "none": ({"messages": []}, "messages must be a list of at least one message"),
    "texts": ({"messages": ["hi"]}, "messages[0] must have a role and content"),
    "role": ({"messages": [{"role": "king", "content": ""}]}, "role must be one of system, user"),
    "content": ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content must be a"),
    "more": ({"messages": [{**MESSAGES[0], "name": "x"}]}, "and nothing else"),
    "prompt": ({"messages": MESSAGES, "prompt": "x"}, 'unknown field "prompt"'),
    "both": ({"messages": MESSAGES, "max_tokens": 1, "max_completion_tokens": 1}, "left out with"),
    "long": ({"messages": [{"role": "user", "content": "x" * 128}]}, "messages must have at most"),
}


def refused(response, status, message):
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 250
    return error


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_completion_is_one_clear_error(name, client):
    body, message = WRONG[name]
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    refused(client.post(COMPLETIONS, content=body, headers=JSON), 400, message)
    assert client.engine.active == 0


@pytest.mark.parametrize("name", WRONG_CHATS)
def test_a_wrong_chat_is_one_clear_error(name, client):
    body, message = WRONG_CHATS[name]
    refused(client.post(CHAT, json=body), 400, message)


def test_errors_of_http(client):
    refused(client.get("/nowhere"), 404, "Not Found: GET /nowhere")
    refused(client.get(COMPLETIONS), 405, "Method Not Allowed")
    error = refused(client.post(COMPLETIONS, json={**PLAIN, "model": "gpt-9"}), 404, "'gpt-9'")
    assert error["param"] == "model"
    text = {"content-type": "text/plain"}
    refused(client.post(COMPLETIONS, content=b"{}", headers=text), 415, "application/json")
    large = json.dumps({"prompt": "x" * 3000}).encode()
    refused(client.post(COMPLETIONS, content=large, headers=JSON), 413, "at most 2000 bytes")

    def chunks():  # without a content-length
        yield large[:1500]
        yield large[1500:]

    refused(client.post(COMPLETIONS, content=chunks(), headers=JSON), 413, "at most 2000 bytes")


def test_neutral_fields_change_nothing(client):
    neutral = {"n": 1, "best_of": 1, "logprobs": None, "presence_penalty": 0, "echo": False}
    assert client.post(COMPLETIONS, json={**PLAIN, **GREEDY, **neutral}).status_code == 200
    assert client.post(COMPLETIONS, json={**PLAIN, "n": True}).status_code == 400


def test_without_a_template_there_is_no_chat(tmp_path):
    bare = tiny_llama.write(tmp_path, template=None)
    with running(bare) as (app, _), TestClient(app) as client:
        refused(client.post(CHAT, json={"messages": MESSAGES}), 404, "has no chat template")


# --- The queue.


def wait_until_idle(engine, seconds=20):
    end = time.monotonic() + seconds
    while engine.active and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.active == 0


def long_request():
    return Request([1], 100, Sampling(), jax.random.key(0))


def test_a_full_queue_is_refused_and_drains(folder):
    with running(folder, rows=1, queue=1) as (app, engine), TestClient(app) as client:
        tickets = [engine.submit(long_request(), lambda x: None) for _ in range(2)]
        response = client.post(COMPLETIONS, json=PLAIN)
        refused(response, 429, "2 requests run and wait already")
        assert response.headers["retry-after"] == "1"
        with pytest.raises(BusyError):
            engine.submit(long_request(), lambda x: None)
        for ticket in tickets:
            engine.cancel(ticket)
        wait_until_idle(engine)
        assert client.post(COMPLETIONS, json={**PLAIN, **GREEDY}).status_code == 200


def test_an_error_in_a_step_ends_its_requests_and_the_server_goes_on(folder, monkeypatch):
    with running(folder) as (app, engine), TestClient(app, raise_server_exceptions=False) as client:
        step = Batch.step

        def broken(batch):
            monkeypatch.setattr(Batch, "step", step)
            raise RuntimeError("out of memory")

        monkeypatch.setattr(Batch, "step", broken)
        refused(client.post(COMPLETIONS, json=PLAIN), 500, "error of the server: RuntimeError")
        assert client.post(COMPLETIONS, json={**PLAIN, **GREEDY}).status_code == 200
        assert engine.active == 0


def test_a_stopped_engine_says_so(folder):
    heard = []
    with running(folder) as (app, engine), TestClient(app) as client:
        engine.submit(long_request(), heard.append)
        assert engine.stop(20)
        assert isinstance(heard[-1], StoppedError)
        refused(client.post(COMPLETIONS, json=PLAIN), 503, "the server is stopping")
        refused(client.get("/health"), 503, "the engine has stopped")


def test_nan_logits_are_an_error_of_the_server(folder, monkeypatch):
    broken = load_checkpoint(str(folder), LoadOptions())
    kernel = broken.model.head.kernel
    kernel[...] = kernel[...] * np.nan
    engine, limits = server.make_engine(broken, server.Options(rows=1, context=32))
    with TestClient(make_app(broken, engine, limits, 5)) as client:
        refused(client.post(COMPLETIONS, json=PLAIN), 500, "logits are NaN")


# --- Clients that leave.


async def call(app, body, until):
    """Calls the application; the client leaves once ``until`` is set. Returns what was sent."""
    scope = {
        "type": "http", "method": "POST", "path": COMPLETIONS, "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
        "asgi": {"version": "3.0", "spec_version": "2.3"}, "scheme": "http",
    }  # fmt: skip
    asked, sent = [{"type": "http.request", "body": json.dumps(body).encode()}], []

    async def receive():
        if asked:
            return asked.pop()
        await until.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if message.get("body"):
            until.set()

    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(stream, endless, monkeypatch):
    step = Batch.step
    slow = lambda batch: (time.sleep(0.01), step(batch))[1]  # noqa: E731
    monkeypatch.setattr(Batch, "step", slow)  # so that the answer would take 40 seconds
    with running(endless, rows=1, context=4096, max_new_tokens=4000) as (app, engine):
        engine.start()

        async def leave():
            until = asyncio.Event()
            body = {**PLAIN, "max_tokens": 4000, "stream": stream, "seed": 1}
            if not stream:
                asyncio.get_running_loop().call_later(0.5, until.set)
            return await call(app, body, until)

        sent = asyncio.run(leave())
        assert sent[0]["status"] == (200 if stream else 499)
        wait_until_idle(engine)
        after = asyncio.run(call(app, {**PLAIN, **GREEDY}, asyncio.Event()))
        assert after[0]["status"] == 200


# --- The whole, over a socket.


@contextlib.contextmanager
def started(folder, *options):
    """The server in a process of its own, and its address."""
    command = [sys.executable, "-m", "experiments", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), process.stderr.read()
        yield process, line.split()[2].rstrip(",")
    finally:
        process.kill()
        process.communicate()


def post(address, body, timeout=60):
    data = json.dumps(body).encode()
    return urllib.request.urlopen(
        urllib.request.Request(f"{address}{COMPLETIONS}", data, JSON), timeout=timeout
    )


@pytest.mark.parametrize("number", mostly_slow([signal.SIGTERM, signal.SIGINT], [signal.SIGTERM]))
def test_over_a_socket_it_answers_survives_and_stops(number, endless):
    with started(endless, "--context", "4096", "--max-new-tokens", "4000", "--grace", "1") as (
        process,
        address,
    ):
        assert json.load(post(address, {**PLAIN, **GREEDY}))["usage"]["completion_tokens"] > 0
        with pytest.raises(urllib.error.HTTPError, match="400"):
            post(address, {"prompt": 1})
        stream = post(address, {**PLAIN, "max_tokens": 4000, "stream": True, "seed": 1})
        assert stream.readline().startswith(b"data: ")
        stream.close()  # the client leaves
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"nonsense\r\n\r\n")
            assert b"400" in connection.recv(100)
        end = time.monotonic() + 30
        health = None
        while time.monotonic() < end and health != {"status": "ok", "requests": 0}:
            health = json.load(urllib.request.urlopen(f"{address}/health", timeout=60))
        assert health == {"status": "ok", "requests": 0}

        running = post(address, {**PLAIN, "max_tokens": 4000, "stream": True, "seed": 1})
        assert running.readline().startswith(b"data: ")
        process.send_signal(number)
        before = time.monotonic()
        assert process.wait(30) == 0, process.stderr.read()
        assert time.monotonic() - before < 10
        assert process.stdout.read() == "stopped\n"


def test_a_port_that_is_taken_is_one_line(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1, port {port}: Address"):
            server.main(str(folder), server.Options(port=port))


def test_limits_follow_the_model(tmp_path):
    short = loaded(tiny_llama.write(tmp_path, max_length=64))
    _, limits = server.make_engine(short, server.Options(rows=1))
    assert limits == api.Limits(body=1_000_000, prompt=63, new=64)
    assert Engine(lambda: Batch(short.model, rows=1, capacity=64), most=1).active == 0
