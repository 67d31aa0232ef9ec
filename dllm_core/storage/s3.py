"""The Store protocol over boto3. Endpoint, region and credentials come from the environment (AWS_ENDPOINT_URL, ...).

Credentials never enter a recipe, a fingerprint or a pickle: every process opens its own client.
"""

import contextlib
import hashlib
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from dllm_core.errors import ConfigError, DataError
from dllm_core.storage.store import LocalStore, StoredObject

_WRITER = "dllm-writer"  # metadata of `put_if_absent`: tells a retry that its own first try got through
_ATTEMPTS = 8
_CACHE_BYTES = 20 << 30


@cache
def _client() -> Any:
    """One client a process; `adaptive` retries 503 and timeouts with jitter and backs off under throttling."""
    return _new_client(_ATTEMPTS, connect_seconds=5, read_seconds=60)


def _new_client(attempts: int, connect_seconds: float, read_seconds: float) -> Any:
    retries: Any = {"mode": "adaptive", "total_max_attempts": attempts}
    return boto3.client(
        "s3", config=Config(retries=retries, connect_timeout=connect_seconds, read_timeout=read_seconds)
    )


def cache_folder() -> Path:
    """Where fetched objects are kept: $DLLM_CACHE, or ~/.cache/dllm."""
    return Path(os.path.abspath(os.environ.get("DLLM_CACHE") or Path.home() / ".cache" / "dllm"))


def _prune(cached: LocalStore, keep: str) -> None:
    """Drop what was used longest ago until the cache holds $DLLM_CACHE_BYTES (20 GiB) at most.

    A file that is mapped stays readable for who has it open.
    """
    limit = int(os.environ.get("DLLM_CACHE_BYTES") or _CACHE_BYTES)
    items = sorted(cached.list("objects"), key=lambda item: int(item.stamp))
    total = sum(item.size for item in items)
    for item in items:
        if total <= limit:
            return
        if item.key != keep:
            cached.delete(item.key)
            total -= item.size


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
        return self._call_with(_client, verb, key, **arguments)

    def _call_with(self, client: Callable[[], Any], verb: str, key: str, **arguments: Any) -> Any:
        try:
            return getattr(client(), verb)(Bucket=self.bucket, **arguments)
        except ClientError as error:
            raise DataError(f"{self.url}/{key}", f"{verb} failed ({_code(error)})") from error
        except (BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no URL
            remedy = "check AWS_ENDPOINT_URL and the credentials in the environment"
            raise DataError(f"{self.url}/{key}", f"{verb} failed ({error})", remedy=remedy) from error

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
        try:
            head = self._call("head_object", key, Key=self._key(key))
        except DataError as error:
            if isinstance(error.__cause__, ClientError) and _code(error.__cause__) in {"404", "NoSuchKey"}:
                return None
            raise
        return StoredObject(key, head["ContentLength"], head["ETag"].strip('"'))

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        return self.stat(key) is not None

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of an object; a short answer is an error, never a short read."""
        if stop is not None and stop <= start:
            return b""
        span = {} if start == 0 and stop is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        try:
            answer = self._call("get_object", key, Key=self._key(key), **span)
            data: bytes = answer["Body"].read()
        except DataError as error:
            if isinstance(error.__cause__, ClientError) and _code(error.__cause__) == "InvalidRange":
                return b""
            raise
        except (BotoCoreError, OSError) as error:
            raise DataError(f"{self.url}/{key}", f"read broke off ({error})") from error
        if len(data) != answer["ContentLength"]:
            raise DataError(f"{self.url}/{key}", f"read {len(data)} of {answer['ContentLength']} bytes")
        return data

    def fetch(self, key: str) -> Path:
        """A cached copy, named by the object's ETag, so that a changed object is fetched anew."""
        head = self._call("head_object", key, Key=self._key(key))
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        name = hashlib.sha256(f"{self.url}/{key}/{head['ETag']}/{endpoint}".encode()).hexdigest()
        cached, cache_key = LocalStore(cache_folder()), f"objects/{name}"
        stat = cached.stat(cache_key)
        if stat is None or stat.size != head["ContentLength"]:
            cached.put(cache_key, self.read(key))
            _prune(cached, cache_key)
        path = cached.path(cache_key)
        with contextlib.suppress(OSError):
            os.utime(path)  # the cache drops what was used longest ago
        return path

    def put(self, key: str, data: bytes) -> None:
        """One PUT: S3 shows an object whole or not at all."""
        self._call("put_object", key, Key=self._key(key), Body=data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """PUT with If-None-Match: *; 412 means that there is an object, 409 that another writer is at it now."""
        writer = uuid.uuid4().hex
        for attempt in range(_ATTEMPTS):
            try:
                self._call(
                    "put_object", key, Key=self._key(key), Body=data, IfNoneMatch="*", Metadata={_WRITER: writer}
                )
            except DataError as error:
                code = _code(error.__cause__) if isinstance(error.__cause__, ClientError) else ""
                if code in {"PreconditionFailed", "412"}:
                    return self._written_by(key) == writer
                if code not in {"ConditionalRequestConflict", "409"} or attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(random.uniform(0, 0.05 * 2**attempt))
            else:
                return True
        raise AssertionError("the last attempt returns or raises")

    def _written_by(self, key: str) -> str | None:
        """The `put_if_absent` call that made an object: a PUT whose answer was lost is retried, and meets itself."""
        head = self._call("head_object", key, Key=self._key(key))
        writer: str | None = head.get("Metadata", {}).get(_WRITER)
        return writer

    def put_file(self, key: str, path: Path) -> None:
        """Upload in parts where the file is large."""
        full = self._key(key)
        try:
            _client().upload_file(str(path), self.bucket, full)
        except (ClientError, BotoCoreError, Boto3Error, ValueError, OSError) as error:
            raise DataError(f"{self.url}/{key}", f"upload failed ({error})") from error

    def delete(self, key: str) -> None:
        """Remove the object."""
        self._call("delete_object", key, Key=self._key(key))

    def check_writable(self, place: str, need_bytes: int = 0) -> None:
        """Write and remove a small object, once and with short timeouts; S3 has no free space to compare."""
        key = f".dllm-probe-{uuid.uuid4().hex}"
        try:
            client = _new_client(1, connect_seconds=2, read_seconds=2)
            self._call_with(lambda: client, "put_object", key, Key=self._key(key), Body=b"")
            self._call_with(lambda: client, "delete_object", key, Key=self._key(key))
        except (BotoCoreError, ValueError) as error:
            raise DataError(place, f"no S3 client ({error})", self.url, "check AWS_*") from error
        except DataError as error:
            raise DataError(place, error.problem, self.url, "check the bucket, AWS_* and its policy") from error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
