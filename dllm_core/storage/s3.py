"""The Store protocol over boto3. Endpoint, region and credentials come from the environment (AWS_ENDPOINT_URL, ...).

Credentials never enter a recipe, a fingerprint or a pickle: every process opens its own client.
What may pass (a reset, a timeout, 503, a body that breaks off) is tried again, a bounded number of times, then told.
"""

import contextlib
import hashlib
import math
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
)
from botocore.exceptions import ConnectionError as ConnectError
from urllib3.exceptions import HTTPError

from dllm_core.errors import ConfigError, DataError
from dllm_core.storage.cache import cached_copy
from dllm_core.storage.progress import progressed
from dllm_core.storage.store import READERS, StoredObject, in_order

Answer = TypeVar("Answer")
_WRITER = "dllm-writer"  # metadata by which a retry that finds the object there knows it as its own
_ATTEMPTS, _FIRST_WAIT, _LONGEST_WAIT = 10, 0.1, 10.0  # seconds; all waits together outlast about 25 s without a server
_READ_SECONDS, _PROBE_SECONDS = 60.0, 2.0
_PASSING_STATUS = {408, 409, 429, 500, 502, 503, 504}  # 409: another writer is at the object now
_CREDENTIALS = (CredentialRetrievalError, RuntimeError)  # botocore's where it was given new ones that have expired
_PASSING_ERRORS = (ConnectError, HTTPClientError, IncompleteReadError, HTTPError)  # the last: TLS breaks in a body
_NOT_FOUND, _PRECONDITION_FAILED, _NO_SUCH_RANGE = 404, 412, 416
_PIECE_BYTES, _PIECE_THREADS = 16 << 20, 8  # read at once by `fetch`
_PART_BYTES, _MAX_PARTS, _PART_THREADS = 8 << 20, 10_000, 8  # of an upload; S3 takes no more parts than this


@cache
def _client() -> Any:
    """One client a process."""
    return _new_client(connect_seconds=5, read_seconds=_READ_SECONDS)


def _new_client(connect_seconds: float, read_seconds: float) -> Any:
    """A client that tries once: botocore's own retries end at a request's headers and share one quota a process.

    Checksums only where S3 demands them: some servers refuse them, and without one a body's sha256 is in its signature.
    """
    once: Any = {"mode": "standard", "total_max_attempts": 1}
    config = Config(
        retries=once,
        connect_timeout=connect_seconds,
        read_timeout=read_seconds,
        max_pool_connections=READERS,
        request_checksum_calculation="when_required",
    )
    return boto3.client("s3", config=config)


@dataclass(frozen=True)
class S3Store:
    """Objects of one bucket below one prefix."""

    bucket: str
    prefix: str

    @classmethod
    def from_url(cls, place: str, url: str) -> "S3Store":
        """Parse `s3://bucket/prefix`."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not bucket:
            raise ConfigError(place, "no bucket", url, "write s3://bucket/prefix")
        return cls(bucket, prefix.strip("/"))

    @property
    def url(self) -> str:
        """`s3://bucket/prefix`."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def _key(self, key: str) -> str:
        if key.startswith("/") or ".." in key.split("/"):
            raise DataError(key, "leaves the storage root", remedy=f"keys are relative to {self.url}")
        return "/".join(filter(None, [self.prefix, key]))

    def _call(self, verb: str, key: str, **arguments: Any) -> Any:
        return self._tried(verb, key, lambda: getattr(_client(), verb)(Bucket=self.bucket, **arguments))

    def _tried(self, verb: str, key: str, call: Callable[[], Answer], until: float = math.inf) -> Answer:
        """The answer of a call that may be made again, at the latest at `until` on the monotonic clock."""
        for attempt in range(_ATTEMPTS):
            try:
                return call()
            except (ClientError, BotoCoreError, HTTPError, ValueError, *_CREDENTIALS) as error:
                if attempt < _ATTEMPTS - 1 and time.monotonic() < until and _may_pass(error):
                    time.sleep(random.uniform(0.5, 1) * min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt))
                    continue
                times = f" {attempt + 1} times" if attempt else ""
                if isinstance(error, ClientError):
                    raise DataError(f"{self.url}/{key}", f"{verb} failed{times} ({_client_code(error)})") from error
                # ValueError: an endpoint that is no URL
                remedy = "check AWS_ENDPOINT_URL and the credentials in the environment"
                raise DataError(f"{self.url}/{key}", f"{verb} failed{times} ({error})", remedy=remedy) from error
        raise AssertionError("the last attempt returns or raises")

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """All objects below a folder; S3 lists in the order of keys. A console's folder markers are no objects."""
        full = self._key(prefix)
        full = f"{full}/" if full else ""
        token: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", prefix, Prefix=full, **token)
            for item in page.get("Contents", []):
                key = item["Key"].removeprefix(f"{self.prefix}/" if self.prefix else "")
                if not key.endswith("/"):
                    yield StoredObject(key, item["Size"], item["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def stat(self, key: str) -> StoredObject | None:
        """Size and ETag of an object."""
        head = self._head(key)
        return None if head is None else StoredObject(key, head["ContentLength"], head["ETag"].strip('"'))

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            head: dict[str, Any] = self._call("head_object", key, Key=self._key(key))
        except DataError as error:
            if _status(error) == _NOT_FOUND:
                return None
            raise
        return head

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        return self.stat(key) is not None

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of an object; a body that breaks off is asked for again, never returned."""
        if stop is not None and stop <= start:
            return b""
        span = {} if start == 0 and stop is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        try:
            return self._get(key, **span)
        except DataError as error:
            if _status(error) == _NO_SUCH_RANGE:
                return b""
            raise

    def _get(self, key: str, **arguments: Any) -> bytes:
        full = self._key(key)

        def get() -> bytes:
            data: bytes = _client().get_object(Bucket=self.bucket, Key=full, **arguments)["Body"].read()
            return data

        return self._tried("get_object", key, get)

    def fetch(self, key: str) -> Path:
        """A cached copy, named by the object's ETag, so that a changed object is fetched anew."""
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        for _ in range(_ATTEMPTS):
            head = self._head(key)
            if head is None:
                raise DataError(f"{self.url}/{key}", "no such object")
            name = hashlib.sha256(f"{self.url}/{key}/{head['ETag']}/{endpoint}".encode()).hexdigest()
            try:
                return cached_copy(name, head["ContentLength"], partial(self._pieces, key, head))
            except DataError as error:
                if _status(error) != _PRECONDITION_FAILED:  # replaced since it was looked at
                    raise
        raise DataError(f"{self.url}/{key}", "is replaced again and again while it is fetched")

    def _pieces(self, key: str, head: dict[str, Any]) -> Iterator[bytes]:
        """One version of an object, piece by piece: what breaks off costs a piece, and no object must fit in memory.

        Some are on their way at once: S3 gives a connection some 90 MB/s, and a host a hundred times that.
        """

        def piece(start: int) -> bytes:
            return self._get(key, Range=f"bytes={start}-{start + _PIECE_BYTES - 1}", IfMatch=head["ETag"])

        starts = range(0, head["ContentLength"], _PIECE_BYTES)
        return in_order(piece, starts, threads=_PIECE_THREADS, ahead=_PIECE_THREADS)

    def put(self, key: str, data: bytes) -> None:
        """One PUT: S3 shows an object whole or not at all."""
        self._call("put_object", key, Key=self._key(key), Body=data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """PUT with If-None-Match: *; 412: there is an object, perhaps by a try of ours whose answer was lost."""
        writer = uuid.uuid4().hex
        condition = {"IfNoneMatch": "*", "Metadata": {_WRITER: writer}}
        try:
            self._call("put_object", key, Key=self._key(key), Body=data, **condition)
        except DataError as error:
            if _status(error) != _PRECONDITION_FAILED:
                raise
            return self._is_written_by(writer, key)
        return True

    def _is_written_by(self, writer: str, key: str) -> bool:
        head = self._head(key)
        return head is not None and head.get("Metadata", {}).get(_WRITER) == writer

    def put_file(self, key: str, path: Path) -> None:
        """One PUT, or parts where the file is large; the object shows when the last step is done."""
        full = self._key(key)
        try:
            size = path.stat().st_size
            if size <= _PART_BYTES:
                self.put(key, path.read_bytes())
            else:
                self._put_parts(key, full, path, size)
        except OSError as error:
            raise DataError(f"{self.url}/{key}", f"upload failed ({error})") from error

    def _put_parts(self, key: str, full: str, path: Path, size: int) -> None:
        writer, step = uuid.uuid4().hex, max(_PART_BYTES, -(-size // _MAX_PARTS))
        begun = self._call("create_multipart_upload", key, Key=full, Metadata={_WRITER: writer})
        upload = {"Key": full, "UploadId": begun["UploadId"]}

        def put_part(number: int) -> dict[str, Any]:
            with path.open("rb") as file:
                file.seek((number - 1) * step)
                body = file.read(step)
            answer = self._call("upload_part", key, **upload, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            with ThreadPoolExecutor(_PART_THREADS) as pool:
                parts = []
                for part in pool.map(put_part, range(1, -(-size // step) + 1)):
                    parts.append(part)
                    progressed()
            self._complete(key, writer, **upload, MultipartUpload={"Parts": parts})
        except BaseException:  # parts of an upload that will not end are not seen, but kept and paid for
            with contextlib.suppress(DataError):
                abort = partial(_client().abort_multipart_upload, Bucket=self.bucket, **upload)
                self._tried("abort_multipart_upload", key, abort, until=0)
            raise

    def _complete(self, key: str, writer: str, **upload: Any) -> None:
        try:
            self._call("complete_multipart_upload", key, **upload)
        except DataError as error:  # a try whose answer was lost has ended the upload
            if _status(error) != _NOT_FOUND or not self._is_written_by(writer, key):
                raise

    def delete(self, key: str) -> None:
        """Remove the object."""
        self._call("delete_object", key, Key=self._key(key))

    def check_writable(self, place: str, need_bytes: int = 0) -> None:
        """Write and remove a small object, within seconds; S3 has no free space to compare."""
        key = f".dllm-probe-{uuid.uuid4().hex}"
        where = {"Bucket": self.bucket, "Key": self._key(key)}
        try:
            client, until = _new_client(connect_seconds=2, read_seconds=2), time.monotonic() + _PROBE_SECONDS
            self._tried("put_object", key, partial(client.put_object, **where, Body=b""), until)
            self._tried("delete_object", key, partial(client.delete_object, **where), until)
        except (BotoCoreError, ValueError) as error:
            raise DataError(place, f"no S3 client ({error})", self.url, "check AWS_*") from error
        except DataError as error:
            raise DataError(place, error.problem, self.url, "check the bucket, AWS_* and its policy") from error


def _may_pass(error: Exception) -> bool:
    """Whether the same request may get through later."""
    if not isinstance(error, ClientError):
        return isinstance(error, (*_PASSING_ERRORS, *_CREDENTIALS))
    return _client_status(error) in _PASSING_STATUS or _client_code(error) == "RequestTimeout"  # 400: a slow upload


def _client_code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _client_status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _status(error: DataError) -> int:
    """The status of a failed call, 0 without an answer. It stands before the code, which a broken body may not hold."""
    return _client_status(error.__cause__) if isinstance(error.__cause__, ClientError) else 0
