"""Store: whole objects under keys, on local disk. An object is written beside its place, then renamed.

Keys are relative posix paths; a key that leaves the root is refused. `s3.py` keeps the same promises on S3.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Protocol, TypeVar

from dllm_core.errors import ConfigError, DataError
from dllm_core.storage.progress import progressed

READERS = 32  # requests at once where many objects are read: of 30 ms each they are a thousand a second
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_KEYS_AT_ONCE = 1 << 12
_HASHED_BYTES, _COPIED_BYTES = 1 << 18, 1 << 23
Item = TypeVar("Item")
Result = TypeVar("Result")


def check_name(place: str, name: str) -> str:
    """A name that may become a folder: letters, digits, `.`, `_`, `-`, and never `.` or `..`."""
    if not _NAME.fullmatch(name) or set(name) == {"."}:
        raise ConfigError(place, "must be 1-128 of A-Z a-z 0-9 . _ - and not only dots", name, "choose another name")
    return name


def local_path(place: str, text: str) -> Path:
    """An absolute path from what a user wrote; `~` is expanded, `..` folded, links are kept."""
    if text.startswith("s3:"):
        raise ConfigError(place, "is neither a path nor s3://bucket/prefix", text)
    try:
        if "\0" in text:
            raise ValueError("it holds a NUL")
        return Path(os.path.abspath(Path(text).expanduser()))
    except (RuntimeError, ValueError) as error:  # ~nobody: there is no such user
        raise ConfigError(place, f"is no path ({error})", text) from None


def sha256(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces; each is told as progress."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(_HASHED_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            digest.update(piece[:size])
            progressed()
    return digest.hexdigest()


@dataclass(frozen=True)
class StoredObject:
    """One listed object. `stamp` changes when the content may have (mtime on disk, ETag on S3)."""

    key: str
    size: int
    stamp: str


class Store(Protocol):
    """Objects under keys. Every failure is a DataError that names the key."""

    @property
    def url(self) -> str:
        """Where the root is, as `open_store` takes it."""

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """All objects below the folder `prefix`, sorted by key."""

    def stat(self, key: str) -> StoredObject | None:
        """What `list` would say of one object, or None if there is none."""

    def exists(self, key: str) -> bool:
        """Whether the object is there, whole."""

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of an object; fewer where it ends before."""

    def fetch(self, key: str) -> Path:
        """A local file with the object's bytes, to be memory-mapped: the object itself, or a cached copy."""

    def put(self, key: str, data: bytes) -> None:
        """Write an object whole, replacing what is there."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one; False if there was. Of several writers exactly one wins."""

    def put_file(self, key: str, path: Path) -> None:
        """Upload a local file whole."""

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""

    def check_writable(self, place: str, need_bytes: int = 0) -> None:
        """Fail now, in one line, if objects of `need_bytes` could not be written."""


def _stat_file(path: str, key: str) -> StoredObject | None:
    """Without pathlib, which took four fifths of the time of listing a folder of 50,000 files."""
    try:
        stat = os.stat(path)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
            return None
        raise DataError(path, f"cannot be looked at ({error.strerror})") from error
    return StoredObject(key, stat.st_size, str(stat.st_mtime_ns)) if S_ISREG(stat.st_mode) else None


@dataclass(frozen=True)
class LocalStore:
    """A folder. Writes are temp file + fsync + rename, so a kill leaves no partial object under a key."""

    root: Path

    @property
    def url(self) -> str:
        """The folder."""
        return str(self.root)

    def path(self, key: str) -> Path:
        """The file of a key, proven to lie below the root."""
        return Path(self._file(key))

    def _file(self, key: str) -> str:
        """`path` without pathlib, which would take a third of the time of reading a small file."""
        if "\0" in key or not _is_encodable(key):
            raise DataError(repr(key), "cannot be a file's name")
        root = str(self.root)
        if key and ".." not in key and not key.startswith("/"):
            return f"{root.rstrip('/')}/{key}"  # nothing in it leads out: reading a small file takes a fifth less
        path = os.path.normpath(os.path.join(root, key))
        if path != root and not path.startswith(os.path.join(root, "")):
            raise DataError(key, "leaves the storage root", remedy=f"keys are relative to {root}")
        return path

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """All files below a folder, sorted by key; temporary ones are not objects. Links are followed, in no circle."""
        top, root = self._file(prefix).rstrip("/") or "/", str(self.root).rstrip("/")
        found = []
        for folder, folders, names in os.walk(top, onerror=_raise_walk_error, followlinks=True):
            folders[:] = [name for name in folders if not _leads_back(f"{folder.rstrip('/')}/{name}", top)]
            for name in names:
                if not is_temporary(name):
                    path = f"{folder.rstrip('/')}/{name}"
                    item = _stat_file(path, path[len(root) + 1 :])
                    found += [item] if item is not None else []
        return iter(sorted(found, key=lambda item: item.key))

    def stat(self, key: str) -> StoredObject | None:
        """Size and modification time of a file; None for a folder, a broken link and a file that just went."""
        path = self.path(key)
        return _stat_file(str(path), path.relative_to(self.root).as_posix())

    def exists(self, key: str) -> bool:
        """Whether the file is there."""
        return self.stat(key) is not None

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of the file."""
        with _explained(key, "read"), open(self._file(key), "rb", buffering=0) as file:  # a buffer costs a quarter more
            if start:
                file.seek(start)
            if stop is None:
                return file.readall()
            data = file.read(max(stop - start, 0))
            while 0 < len(data) < stop - start and (more := file.read(stop - start - len(data))):
                data += more  # the system gives at most 2 GiB at once
            return data

    def fetch(self, key: str) -> Path:
        """The file itself."""
        path = self.path(key)
        if not path.is_file():
            raise DataError(str(path), "no such file")
        return path

    def put(self, key: str, data: bytes) -> None:
        """Temp file beside the place, fsync, rename."""
        self.put_pieces(key, [data])

    def put_pieces(self, key: str, pieces: Iterable[bytes]) -> None:
        """`put` of what need not be in memory at once; if `pieces` raises, nothing was written."""
        path = self.path(key)
        with _explained(str(path), "write"), _beside(path) as temporary:
            _write_synced(temporary, pieces)
            temporary.replace(path)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Temp file beside the place, fsync, hard link (which fails if the name exists)."""
        path = self.path(key)
        with _explained(str(path), "write"), _beside(path) as temporary:
            _write_synced(temporary, [data])
            try:
                os.link(temporary, path)
            except FileExistsError:
                return temporary.stat().st_nlink > 1  # over NFS the answer to a link that was made may be lost
        return True

    def put_file(self, key: str, path: Path) -> None:
        """Copy a file into place whole; a file that already stands in its place is only synced."""
        target = self.path(key)
        with _explained(str(target), "write"):
            if target.exists() and target.samefile(path):
                _sync(target)
                return
            with _beside(target) as temporary:
                with path.open("rb") as file:
                    _write_synced(temporary, iter(partial(file.read, _COPIED_BYTES), b""))
                temporary.replace(target)

    def delete(self, key: str) -> None:
        """Remove the file, and folders that became empty."""
        path = self.path(key)
        with _explained(str(path), "delete"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
            with contextlib.suppress(OSError):  # the first folder that is not empty, or that another process removed
                for folder in path.parents[: max(0, len(path.relative_to(self.root).parts) - 1)]:
                    folder.rmdir()

    def check_writable(self, place: str, need_bytes: int = 0) -> None:
        """Create and remove a file in the root; compare free space with what is needed."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
            free = shutil.disk_usage(self.root).free
        except OSError as error:
            raise DataError(place, f"cannot write ({error.strerror})", str(self.root), "name another folder") from None
        if free < need_bytes:
            problem = f"{free / 2**20:.0f} MiB free, {need_bytes / 2**20:.0f} MiB needed"
            raise DataError(place, problem, str(self.root), "free some space or name another folder")


def open_store(place: str, url: str) -> Store:
    """The store that a setting names: a folder, or `s3://bucket/prefix`."""
    if url.startswith("s3://"):
        from dllm_core.storage.s3 import S3Store  # boto3 costs 0.2 s; local users do not pay it

        return S3Store.from_url(place, url)
    if "://" in url:
        raise ConfigError(place, "unknown kind of storage", url, "a folder or s3://bucket/prefix")
    return LocalStore(local_path(place, url))


def check_scratch(need_bytes: int) -> None:
    """Fail now, in one line, if so many bytes have no room where files are put together before they are stored."""
    LocalStore(Path(tempfile.gettempdir())).check_writable("TMPDIR", need_bytes)


def fetch_intact(store: Store, key: str, sha256_hex: str) -> Path | None:
    """A local file with this sha256, or None. A cached copy that is damaged is fetched once more."""
    path = store.fetch(key)
    if file_sha256(path) == sha256_hex:
        return path
    if isinstance(store, LocalStore):
        return None
    path.unlink(missing_ok=True)  # another process may have seen it first
    path = store.fetch(key)
    return path if file_sha256(path) == sha256_hex else None


def read_each(store: Store, keys: Sequence[str]) -> Iterator[bytes | None]:
    """The objects of many keys in their order, some read at once; None for one that is gone."""

    def read(key: str) -> bytes | None:
        try:
            return store.read(key)
        except DataError:
            if store.exists(key):
                raise
            return None

    return in_order(read, keys, threads=READERS, ahead=_KEYS_AT_ONCE)


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Iterator[Result]:
    """What it makes of each item, in order, some at once; at most `ahead` are asked for and not yet taken."""
    waiting = deque[Future[Result]]()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                if len(waiting) == ahead:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(function, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _is_encodable(key: str) -> bool:
    try:
        os.fsencode(key)
    except UnicodeEncodeError:
        return False
    return True


def _leads_back(path: str, top: str) -> bool:
    """Whether a folder is a link to what holds it: to one of those that lead there from `top`, or to what is around."""
    if not os.path.islink(path):
        return False
    target, here = os.path.realpath(path), path
    while len(here) > len(top):
        here = os.path.dirname(here)
        if f"{os.path.realpath(here)}/".startswith(f"{target.rstrip('/')}/"):
            return True
    return False


def _raise_walk_error(error: OSError) -> None:
    if error.errno not in {errno.ENOENT, errno.ENOTDIR}:
        raise DataError(str(error.filename), f"cannot be listed ({error.strerror})") from error


@contextlib.contextmanager
def _explained(place: str, verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "free some space; what is complete is kept" if error.errno == errno.ENOSPC else ""
        raise DataError(place, f"cannot {verb} ({error.strerror})", remedy=remedy) from error


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    handle, name = _make_temporary(path)
    os.close(handle)
    temporary = Path(name)
    temporary.chmod(0o644)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _make_temporary(path: Path) -> tuple[int, str]:
    for _ in range(8):  # a `delete` beside us may remove the folder before the file is in it
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
    raise FileNotFoundError(errno.ENOENT, "the folder is removed again and again", str(path.parent))


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that a `LocalStore` is writing, or that a killed one left."""
    return name.startswith(".") and ".tmp-" in name


def _write_synced(path: Path, pieces: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            progressed()
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
