"""An S3 that listens on loopback (moto's), for the laws that both kinds of store keep."""

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from dllm_core.storage.s3 import _client


class S3Server:
    """The server's application: requests take turns, since moto checks a precondition and writes in two steps.

    `requests` counts them; `is_down` answers all of them with 503; `answers_to_lose` PUTs are done and answered 500.
    """

    def __init__(self) -> None:
        self._moto, self._turn = DomainDispatcherApplication(create_backend_app), threading.Lock()
        self.requests, self.is_down, self.answers_to_lose = 0, False, 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._turn:
            self.requests += 1
            if self.is_down:
                start_response("503 Service Unavailable", [("Content-Length", "0")])
                return []
            if environ["REQUEST_METHOD"] == "PUT" and self.answers_to_lose:
                self.answers_to_lose -= 1
                list(self._moto(environ, lambda *_: None))
                start_response("500 Internal Server Error", [("Content-Length", "0")])
                return []
            return list(self._moto(environ, start_response))

    def new_bucket(self) -> str:
        """The name of an empty bucket."""
        name = f"bucket-{uuid.uuid4().hex}"
        _client().create_bucket(Bucket=name)
        return name


@contextmanager
def s3_server(cache: Path) -> Iterator[S3Server]:
    """Serve; the environment names this server and the cache folder, and no other account, until the end."""
    application = S3Server()
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    serving = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)  # looks for its end often
    serving.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, str(cache / "no-such-file"))
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "x")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("DLLM_CACHE", str(cache))
        _client.cache_clear()
        try:
            yield application
        finally:
            _client.cache_clear()
            server.shutdown()
            serving.join()
            server.server_close()
