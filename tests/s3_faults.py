"""A network on a bad day: a forwarder on loopback in front of an S3 that breaks some of the requests that pass.

    with faulty_s3(server.endpoint, at_random(seed=1, share=0.1)) as faults: ...  # S3 is now at faults.endpoint

What is done with a request is chosen when it has come in, by a function of its method, path and headers: `None` lets it
pass. So do all requests about a bucket itself, which only tests make.
"""

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

from dllm_core.storage import s3

# What S3 says, what the network does, and silence, which costs a client its patience.
SLOW_DOWN, INTERNAL, CONFLICT = "503 SlowDown", "500 InternalError", "409 ConditionalRequestConflict"
RESET, LOST, CUT = "reset before it was forwarded", "done, its answer lost", "the answer's body cut in its middle"
HANG, LATE = "no answer, and not forwarded", "done, no answer"
TOO_MANY, TOO_SLOW, GONE = "429 TooManyRequests", "400 RequestTimeout", "404 NoSuchUpload"
QUICK = (SLOW_DOWN, INTERNAL, CONFLICT, RESET, LOST, CUT)
FAULTS = (*QUICK, HANG, LATE)
Choice = Callable[[str, str, Message], str | None]
_ANSWERS = (SLOW_DOWN, INTERNAL, CONFLICT, TOO_MANY, TOO_SLOW, GONE)
_HANG_SECONDS = 20.0  # longer than any client of these tests waits


def at_random(seed: int, share: float, kinds: tuple[str, ...] = FAULTS) -> Choice:
    """Each request is broken with probability `share`, in any of these ways."""
    generator, turn = random.Random(seed), threading.Lock()

    def choose(method: str, path: str, headers: Message) -> str | None:
        del path
        with turn:
            is_hit, kind = generator.random() < share, generator.choice(kinds)
        may_conflict = method == "PUT" and "If-None-Match" in headers
        return kind if is_hit and (kind != CONFLICT or may_conflict) else None

    return choose


def first(number: int, kind: str, method: str, part_of_path: str = "") -> Choice:
    """The first requests of this method whose path holds this are broken."""
    left, turn = [number], threading.Lock()

    def choose(got: str, path: str, headers: Message) -> str | None:
        del headers
        with turn:
            is_hit = got == method and part_of_path in path and left[0] > 0
            left[0] -= is_hit
        return kind if is_hit else None

    return choose


class Faults(ThreadingHTTPServer):
    """The forwarder. `injected` counts what was done by kind, `requests` all that came in."""

    daemon_threads, block_on_close = True, False  # a thread that hangs is not waited for
    request_queue_size = 64

    def __init__(self, upstream: str, choose: Choice) -> None:
        super().__init__(("127.0.0.1", 0), _Forwarder)
        self.upstream, self.choose = urlsplit(upstream).netloc, choose
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.closing, self.requests = threading.Event(), 0
        self.injected: Counter[str] = Counter()

    def shutdown_request(self, request: Any) -> None:
        """Only close: `shutdown` would end the stream in good order before a reset."""
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no error of ours."""


class _Forwarder(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Faults

    def log_message(self, *_: Any) -> None:
        pass

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        is_bucket = self.command == "PUT" and "/" not in self.path.strip("/")
        fault = None if is_bucket else self.server.choose(self.command, self.path, self.headers)
        self.server.requests += 1
        if fault is not None:
            self.server.injected[fault] += 1
        if fault in _ANSWERS:
            status, _, code = fault.partition(" ")
            error = f"<Error><Code>{code}</Code></Error>".encode()
            self._answer(int(status), [], b"" if self.command == "HEAD" else error, len(error))
            return
        if fault == HANG:
            self.server.closing.wait(_HANG_SECONDS)
        if fault in {RESET, HANG}:
            self._reset()
            return
        upstream = http.client.HTTPConnection(self.server.upstream)
        upstream.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k != "Expect"})
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        if fault == LATE:
            self.server.closing.wait(_HANG_SECONDS)
        if fault in {LOST, LATE} or (fault == CUT and len(data) < 2):
            self._reset()
            return
        size = int(answer.headers.get("Content-Length", 0)) if self.command == "HEAD" else len(data)
        self._answer(answer.status, answer.getheaders(), data[: len(data) // 2] if fault == CUT else data, size)
        self.close_connection = self.close_connection or fault == CUT

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward  # noqa: N815

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, size: int) -> None:
        """`size` is promised, `data` sent."""
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in {"connection", "content-length", "transfer-encoding"}:
                self.send_header(name, value)
        if status != http.client.NO_CONTENT:
            self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(data)

    def _reset(self) -> None:
        """No goodbye: the close that follows is an RST."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextmanager
def faulty_s3(upstream: str, choose: Choice, read_seconds: float = 1.0) -> Iterator[Faults]:
    """Forward until the end, as the S3 of the environment; the account stays. The client waits short meanwhile."""
    with Faults(upstream, choose) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        patch.setattr(s3, "_FIRST_WAIT", 0.005)
        patch.setattr(s3, "_READ_SECONDS", read_seconds)
        serving = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        serving.start()
        s3._client.cache_clear()
        try:
            yield server
        finally:
            s3._client.cache_clear()
            server.closing.set()
            server.shutdown()
            serving.join()
