"""An S3 that listens on loopback (moto's), and how a test says which S3 is meant."""

import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from dllm_core.storage.s3 import _client


def new_bucket() -> str:
    """The name of an empty bucket."""
    name = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=name)  # with a patience that some tests take from `_client`
    return name


class S3Server:
    """The server's application: requests take turns, since moto checks a precondition and writes in two steps.

    `requests` counts them.
    """

    new_bucket = staticmethod(new_bucket)

    def __init__(self) -> None:
        self._moto, self._turn = DomainDispatcherApplication(create_backend_app), threading.Lock()
        self.requests, self.endpoint = 0, ""

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._turn:
            self.requests += 1
            return list(self._moto(environ, start_response))


@contextmanager
def s3_environment(endpoint: str, cache: Path, access_key: str = "x", secret_key: str = "x") -> Iterator[None]:
    """The environment names this server, account and cache folder, and no other, until the end."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, str(cache / "no-such-file"))
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", access_key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", secret_key)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("DLLM_CACHE", str(cache))
        patch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers an account
        _client.cache_clear()
        try:
            yield
        finally:
            _client.cache_clear()


@contextmanager
def s3_server(cache: Path) -> Iterator[S3Server]:
    """Serve until the end, as the S3 of the environment."""
    application = S3Server()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request would hide what a test prints
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    application.endpoint = f"http://127.0.0.1:{server.server_port}"
    serving = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)  # looks for its end often
    serving.start()
    try:
        with s3_environment(application.endpoint, cache):
            yield application
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
