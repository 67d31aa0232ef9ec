"""RunDir: `<root>/runs/<name>-<fingerprint>/`, on disk or on S3, and the logs that grow in it."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_core.errors import ConfigError, DataError
from dllm_core.storage.claim import claimed
from dllm_core.storage.store import LocalStore, Store, check_name, local_path, open_store

FOLDER = "runs"


@dataclass(frozen=True)
class RunDir:
    """One run below a storage root."""

    store: Store
    name: str

    @classmethod
    def at(cls, url: str) -> "RunDir":
        """The run in a folder: `.../runs/<name>` or `s3://.../runs/<name>`."""
        is_s3 = url.startswith("s3://")
        trimmed = url.rstrip("/") if is_s3 else _located(local_path("run", url))
        root, _, folder_and_name = trimmed.rpartition(f"/{FOLDER}/")
        if not folder_and_name or "/" in folder_and_name or (is_s3 and len(root) <= len("s3:/")):
            raise ConfigError(url, "is not a run", remedy="a run is <storage.root>/runs/<name>-<fingerprint>")
        return cls(open_store("storage.root", root or "/"), check_name("run", folder_and_name))

    @property
    def prefix(self) -> str:
        """The run's folder as a key prefix."""
        return f"{FOLDER}/{self.name}"

    @property
    def url(self) -> str:
        """The run's folder as a user writes it."""
        return f"{self.store.url.rstrip('/')}/{self.prefix}"

    def key(self, name: str) -> str:
        """Full key of something in the run's folder."""
        return f"{self.prefix}/{name}"

    @contextlib.contextmanager
    def locked(self) -> Iterator[Callable[[], bool]]:
        """Refuse a second driver on one run: both would train in one folder. On disk a lock, which dies with its
        process; on S3 a claim, which may be lost to another driver: yields whether it is (`storage/claim.py`).
        """
        if not isinstance(self.store, LocalStore):
            with claimed(self.store, self.key(".claims"), self.url) as is_lost:
                yield is_lost
            return
        path = self.store.path(self.key(".lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab", buffering=0)
        except OSError as error:
            raise DataError(str(path), f"cannot be written ({error.strerror})") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                named = path.read_text(encoding="utf-8", errors="replace") or "not known which"
                problem = f"another dllm is at work on this run ({named})"
                raise DataError(self.url, problem, remedy="wait for it, or end it") from None
            with contextlib.suppress(OSError):  # a disk that is full has no room for a name
                file.truncate(0)
                file.write(f"{socket.gethostname()}, pid {os.getpid()}".encode())
            yield lambda: False

    def read_json(self, name: str) -> Any:
        """A JSON file of the run, or None if there is none; a damaged one is an error."""
        key = self.key(name)
        if not self.store.exists(key):
            return None
        try:
            return json.loads(self.store.read(key))
        except ValueError:
            raise DataError(f"{self.url}/{name}", "is not JSON", remedy="delete it and run again") from None

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole."""
        self.store.put(self.key(name), json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def _located(path: Path) -> str:
    """Where links lead; of one below `runs/` to a folder on another disk, which is below none, where it stands."""
    found, beside = path.resolve(), path.parent.resolve() / path.name
    return str(beside if beside.parent.name == FOLDER and found.parent.name != FOLDER else found)


class JsonLines:
    """A growing log: one JSON object a line. On S3, which cannot append, a local mirror is uploaded by `sync`.

    One thread may `sync` while another appends.
    """

    def __init__(self, run: RunDir, name: str) -> None:
        self._run, self._key, self._mended = run, run.key(name), False
        if isinstance(run.store, LocalStore):
            self._path, self._mirrored = run.store.path(self._key), False
            self._path.parent.mkdir(parents=True, exist_ok=True)
        else:
            self._scratch = tempfile.TemporaryDirectory(prefix="dllm-log-")  # goes with this object
            self._path, self._mirrored = Path(self._scratch.name, "log.jsonl"), True
            if run.store.exists(self._key):
                self._path.write_bytes(run.store.read(self._key))

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a line that a kill cut short is not there. Raises DataError for one that is damaged."""
        if not self._path.exists():
            return []
        lines = self._path.read_bytes().split(b"\n")[:-1]
        return [self._record(number, line) for number, line in enumerate(lines, 1) if line]

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                return record
        raise DataError(f"{self._run.store.url}/{self._key}", f"line {number} is not JSON", remedy="delete that line")

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; one write call, so that two writers do not mix."""
        if not self._mended:
            self._drop_cut_line()
        self._mended = False  # a disk that fills up cuts a line short as a kill does
        with self._path.open("ab") as file:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._mended = True

    def _drop_cut_line(self) -> None:
        """A line that was cut short would swallow the next one."""
        if self._path.exists():
            data = self._path.read_bytes()
            if data and not data.endswith(b"\n"):
                os.truncate(self._path, data.rfind(b"\n") + 1)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop lines: after a restart, those of steps that will be taken again, and one that was cut short."""
        kept = [record for record in self.read() if wanted(record)]
        data = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in kept)
        if self._mirrored:
            self._path.write_bytes(data)
        else:
            self._run.store.put(self._key, data)

    def sync(self) -> None:
        """Make what was appended visible to others."""
        if self._mirrored and self._path.exists():
            still = self._path.with_name("upload.jsonl")  # a file that grows while it is sent would not be as promised
            shutil.copyfile(self._path, still)
            self._run.store.put_file(self._key, still)
