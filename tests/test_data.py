"""Data files: found and checked in a folder, or downloaded and cached, resuming if need be."""

import contextlib
import gzip
import hashlib
import http.server
import os
import random
import re
import socket
import threading

import pooch
import pytest

from experiments.datasets import files

BODY = random.Random(0).randbytes(10 * files.CHUNK)
HALF = len(BODY) // 2
NAME = "letters/a.bin"
REAL = os.environ.get(files.VARIABLE)


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves ranges of a file."""

    ranges = True
    body = BODY

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        self.reply(int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.ranges else 0)

    def reply(self, start):
        if start >= len(self.body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            last = len(self.body) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(self.body)}")
        self.send_header("Content-Length", str(len(self.body) - start))
        self.end_headers()
        self.server.sent.append(self.wfile.write(self.content(start)))

    def content(self, start):
        return self.body[start:]

    def log_message(self, *_):
        pass


class NoRanges(Ranges):
    ranges = False


class Breaks(Ranges):
    """Closes the connection half-way."""

    def content(self, start):
        return self.body[start:HALF]


class Other(Ranges):
    """Serves another file of the same size."""

    body = BODY[::-1]


class Shorter(Ranges):
    body = BODY[:100]


class Longer(Ranges):
    body = 3 * BODY


class Missing(Ranges):
    def reply(self, start):
        self.send_error(404)


@contextlib.contextmanager
def serving(handler):
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked, server.sent = [], []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """No environment variable, an empty cache, no proxy."""
    monkeypatch.delenv(files.VARIABLE, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    return tmp_path


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """Replaces data.tsv with a table of these files, at a port."""

    def write(contents, port=9):
        rows = ["file\tbytes\tsha256\turl"]
        for name, body in contents.items():
            sha256 = hashlib.sha256(body).hexdigest()
            rows.append(f"{name}\t{len(body)}\t{sha256}\thttp://127.0.0.1:{port}/{name}")
        table = tmp_path / "data.tsv"
        table.write_text("\n".join(rows) + "\n")
        monkeypatch.setattr(files, "TABLE", table)

    return write


@pytest.fixture
def fetch(listed):
    """Fetches a file from a server; returns it, or the error, and the server."""

    def fetched(handler):
        with serving(handler) as server:
            listed({NAME: BODY}, server.server_port)
            try:
                return files.path(NAME), server
            except files.DataError as problem:
                return problem, server

    return fetched


@pytest.fixture
def cached(tmp_path):
    """The cached file, and its partial download."""
    target = tmp_path / "cache" / "attention_jax" / NAME
    target.parent.mkdir(parents=True)
    return target, target.with_name("a.bin.part")


@pytest.fixture
def folder(tmp_path, monkeypatch, listed):
    """The folder that the environment variable names, with the file in it."""
    found = tmp_path / "folder"
    (found / NAME).parent.mkdir(parents=True)
    (found / NAME).write_bytes(BODY)
    listed({NAME: BODY})
    monkeypatch.setenv(files.VARIABLE, str(found))
    return found


def left(cached):
    return sorted(file.name for file in cached[0].parent.iterdir())


def tree(folder):
    return sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in folder.rglob("*"))


def assert_says(problem, *parts):
    assert isinstance(problem, files.DataError)
    assert isinstance(problem, OSError)
    for part in (NAME, f"http://127.0.0.1:9/{NAME}", files.VARIABLE, *parts):
        assert part in re.sub(r"127.0.0.1:\d+", "127.0.0.1:9", str(problem))


def test_file_is_downloaded_once(fetch, cached):
    found, server = fetch(Ranges)
    assert found == cached[0]
    assert found.read_bytes() == BODY
    assert files.path(NAME) == found  # the server has shut down
    assert server.asked == [None]
    assert left(cached) == ["a.bin"]


def test_pooch_is_quiet(fetch, monkeypatch):
    records = []
    monkeypatch.setattr(pooch.get_logger(), "handle", records.append)
    fetch(Ranges)
    assert records == []


def test_broken_download_is_resumed(fetch, cached):
    problem, _ = fetch(Breaks)
    assert_says(problem, "IncompleteRead")
    assert left(cached) == ["a.bin.part"]
    assert cached[1].read_bytes() == BODY[:HALF]
    found, server = fetch(Ranges)
    assert found.read_bytes() == BODY
    assert (server.asked, server.sent) == ([f"bytes={HALF}-"], [len(BODY) - HALF])
    assert left(cached) == ["a.bin"]


def test_server_without_ranges_sends_everything_again(fetch, cached):
    cached[1].write_bytes(BODY[:HALF])
    found, server = fetch(NoRanges)
    assert found.read_bytes() == BODY
    assert (server.asked, server.sent) == ([f"bytes={HALF}-"], [len(BODY)])


def test_complete_partial_download_needs_no_server(fetch, cached):
    cached[1].write_bytes(BODY)
    found, server = fetch(Missing)
    assert found.read_bytes() == BODY
    assert server.asked == []
    assert left(cached) == ["a.bin"]


@pytest.mark.parametrize("part", [BODY[::-1], BODY + b"more"], ids=["another", "too_long"])
def test_partial_download_of_full_length_with_other_bytes_is_dropped(fetch, cached, part):
    cached[1].write_bytes(part)
    found, server = fetch(Ranges)
    assert found.read_bytes() == BODY
    assert server.asked == [None]


def test_partial_download_longer_than_the_file_of_the_server_is_dropped(fetch, cached):
    cached[1].write_bytes(BODY[:HALF])
    problem, _ = fetch(Shorter)
    assert_says(problem, "416")
    assert left(cached) == []


def test_partial_download_of_another_file_is_noticed(fetch, cached):
    cached[1].write_bytes(BODY[::-1][:HALF])
    problem, _ = fetch(Ranges)
    assert_says(problem, "wrong checksum")
    assert left(cached) == []


@pytest.mark.parametrize(
    ("handler", "parts"),
    [
        (
            Other,
            (
                "wrong checksum",
                hashlib.sha256(BODY).hexdigest(),
                hashlib.sha256(Other.body).hexdigest(),
            ),
        ),
        (Shorter, ("wrong size", f"expected {len(BODY)} bytes, found 100")),
        (Longer, ("wrong size", f"expected {len(BODY)} bytes")),
        (Missing, ("404",)),
    ],
)
def test_wrong_download_is_not_kept(fetch, cached, handler, parts):
    problem, _ = fetch(handler)
    assert_says(problem, *parts)
    assert left(cached) == []
    found, server = fetch(Ranges)
    assert found.read_bytes() == BODY
    assert server.asked == [None]


def test_altered_cached_file_is_downloaded_again(fetch, cached):
    cached[0].write_bytes(BODY[::-1])
    found, server = fetch(Ranges)
    assert found.read_bytes() == BODY
    assert server.asked == [None]


def test_without_a_network_the_partial_download_is_kept(listed, cached):
    cached[1].write_bytes(BODY[:HALF])
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    listed({NAME: BODY}, port)
    with pytest.raises(files.DataError) as caught:
        files.path(NAME)
    assert_says(caught.value, "could not be downloaded", "refused")
    assert left(cached) == ["a.bin.part"]


def test_cache_that_cannot_be_created(listed, tmp_path):
    listed({NAME: BODY})
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(files.DataError) as caught:
        files.path(NAME)
    assert_says(caught.value, str(tmp_path / "cache"))


def test_file_of_the_folder_is_used(folder, place):
    assert files.path(NAME) == folder / NAME
    assert not (place / "cache").exists()


def test_empty_variable_counts_as_unset(fetch, cached, monkeypatch):
    monkeypatch.setenv(files.VARIABLE, "")
    assert fetch(Ranges)[0] == cached[0]


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (BODY[:-1], ("wrong size", f"expected {len(BODY)} bytes, found {len(BODY) - 1}")),
        (
            Other.body,
            (
                "wrong checksum",
                hashlib.sha256(BODY).hexdigest(),
                hashlib.sha256(Other.body).hexdigest(),
            ),
        ),
        (None, ("missing", "No such file")),
    ],
    ids=["truncated", "altered", "missing"],
)
def test_wrong_file_in_the_folder(folder, place, body, parts):
    if body is None:
        (folder / NAME).unlink()
    else:
        (folder / NAME).write_bytes(body)
    with pytest.raises(files.DataError) as caught:
        files.path(NAME)
    assert_says(caught.value, str(folder / NAME), *parts)
    assert not (place / "cache").exists()


@pytest.mark.parametrize("exists", [False, True], ids=["missing", "file"])
def test_variable_that_names_no_folder(folder, monkeypatch, tmp_path, exists):
    other = tmp_path / "other"
    if exists:
        other.write_text("a file")
    monkeypatch.setenv(files.VARIABLE, str(other))
    with pytest.raises(files.DataError) as caught:
        files.path(NAME)
    assert_says(caught.value, f"{other} is not a folder")


def test_folder_is_never_written_to(folder, listed):
    (folder / "letters/b.gz").write_bytes(gzip.compress(b"b\n"))
    listed({NAME: BODY, "letters/b.gz": (folder / "letters/b.gz").read_bytes(), "letters/c": b"c"})
    before = tree(folder)
    for file in (*folder.rglob("*"), folder):
        file.chmod(0o555 if file.is_dir() else 0o444)
    try:
        files.path(NAME)
        assert files.lines("letters/b.gz") == ["b"]
        with pytest.raises(files.DataError):
            files.path("letters/c")
        assert tree(folder) == before
    finally:
        for file in (folder, *folder.rglob("*")):
            file.chmod(0o755)


def test_unknown_name(listed):
    listed({NAME: BODY, "letters/b": b"b", "numbers/1": b"1"})
    with pytest.raises(ValueError, match=r"one of letters/a\.bin, letters/b, got 'letters/c'"):
        files.path("letters/c")
    with pytest.raises(ValueError, match=r"one of letters/a\.bin, letters/b, numbers/1, got 'c'"):
        files.path("c")


def test_lines_end_only_at_line_feeds(folder, listed):
    written = "a\x85b\x0bc\u2028\r\n\n d \ne"
    bodies = {
        "letters/latin": written.replace("\u2028", "").encode("latin-1"),
        "letters/utf.gz": gzip.compress((written + "\n").encode()),
        "letters/none": b"",
    }
    for name, body in bodies.items():
        (folder / name).write_bytes(body)
    listed(bodies)
    assert files.lines("letters/latin", encoding="latin-1") == ["a\x85b\x0bc\r", "", " d ", "e"]
    assert files.lines("letters/utf.gz") == ["a\x85b\x0bc\u2028\r", "", " d ", "e"]
    assert files.lines("letters/none") == []
    with pytest.raises(ValueError, match="encoding must be that of letters/latin, got 'utf-8'"):
        files.lines("letters/latin")


def test_every_line_of_the_table_is_valid():
    known = files.files()
    assert len(known) == len(files.TABLE.read_text().splitlines()) - 1
    for name, file in known.items():
        assert name == file.name
        assert file.bytes > 0
        assert re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.url.startswith("https://")
        assert file.url.endswith(name.rpartition("/")[2])


@pytest.mark.skipif(not REAL, reason=f"{files.VARIABLE} is not set")
def test_folder_of_this_machine_has_every_file(monkeypatch):
    monkeypatch.setenv(files.VARIABLE, REAL)
    names = [name for name in files.files() if not name.startswith("fashion_mnist/")]
    assert names
    for name in names:
        assert files.path(name).is_file()
