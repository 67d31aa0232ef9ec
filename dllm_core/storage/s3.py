"""The Store protocol over boto3. Endpoint, region and credentials come from the environment (AWS_ENDPOINT_URL, ...).

Credentials never enter a recipe, a fingerprint or a pickle: every process opens its own client.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from dllm_core.errors import ConfigError, DataError
from dllm_core.storage.store import StoredObject


@cache
def _client() -> Any:
    """One client a process; `adaptive` retries 503 and timeouts with jitter and backs off under throttling."""
    retries: Any = {"mode": "adaptive", "total_max_attempts": 8}
    return boto3.client("s3", config=Config(retries=retries, connect_timeout=5, read_timeout=60))


def cache_folder() -> Path:
    """Where fetched objects are kept: $DLLM_CACHE, or ~/.cache/dllm."""
    return Path(os.environ.get("DLLM_CACHE", Path.home() / ".cache" / "dllm"))


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
        if ".." in key.split("/"):
            raise DataError(key, "leaves the storage root", remedy=f"keys are relative to {self.url}")
        return "/".join(filter(None, [self.prefix, key]))

    def _call(self, verb: str, key: str, **arguments: Any) -> Any:
        try:
            return getattr(_client(), verb)(Bucket=self.bucket, **arguments)
        except ClientError as error:
            raise DataError(f"s3://{self.bucket}/{key}", f"{verb} failed ({_code(error)})") from error
        except BotoCoreError as error:
            remedy = "check AWS_ENDPOINT_URL and the credentials in the environment"
            raise DataError(f"s3://{self.bucket}/{key}", f"{verb} failed ({error})", remedy=remedy) from error

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """All objects below a folder; S3 lists in the order of keys."""
        full = self._key(prefix)
        full = f"{full}/" if full else ""
        token: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", full, Prefix=full, **token)
            for item in page.get("Contents", []):
                key = item["Key"].removeprefix(f"{self.prefix}/" if self.prefix else "")
                yield StoredObject(key, item["Size"], item["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        try:
            self._call("head_object", key, Key=self._key(key))
        except DataError as error:
            if isinstance(error.__cause__, ClientError) and _code(error.__cause__) in {"404", "NoSuchKey"}:
                return False
            raise
        return True

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
        name = hashlib.sha256(f"{self.url}/{key}/{head['ETag']}/{os.environ.get('AWS_ENDPOINT_URL')}".encode())
        path = cache_folder() / "objects" / name.hexdigest()
        if not path.is_file() or path.stat().st_size != head["ContentLength"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
            with os.fdopen(handle, "wb") as file:
                file.write(self.read(key))
            Path(temporary).replace(path)
        return path

    def put(self, key: str, data: bytes) -> None:
        """One PUT: S3 shows an object whole or not at all."""
        self._call("put_object", key, Key=self._key(key), Body=data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """PUT with If-None-Match: *; 412 means another writer was first, 409 that one is writing now."""
        for _ in range(8):
            try:
                self._call("put_object", key, Key=self._key(key), Body=data, IfNoneMatch="*")
            except DataError as error:
                code = _code(error.__cause__) if isinstance(error.__cause__, ClientError) else ""
                if code in {"PreconditionFailed", "412"}:
                    return False
                if code in {"ConditionalRequestConflict", "409"}:
                    continue
                raise
            return True
        return False

    def put_file(self, key: str, path: Path) -> None:
        """Upload in parts where the file is large."""
        try:
            _client().upload_file(str(path), self.bucket, self._key(key))
        except (ClientError, BotoCoreError, OSError) as error:
            raise DataError(f"{self.url}/{key}", f"upload failed ({error})") from error

    def delete(self, key: str) -> None:
        """Remove the object."""
        self._call("delete_object", key, Key=self._key(key))

    def check_writable(self, place: str, need_bytes: int = 0) -> None:
        """Write and remove a small object."""
        probe = f".dllm-probe-{os.getpid()}"
        try:
            self.put(probe, b"")
            self.delete(probe)
        except DataError as error:
            raise DataError(place, error.problem, self.url, "check the bucket, AWS_* and its policy") from error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
