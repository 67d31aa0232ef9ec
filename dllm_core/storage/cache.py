"""Copies of remote objects on this machine, for libraries that map a file: each is whole, the oldest are dropped."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from dllm_core.errors import ConfigError
from dllm_core.storage.progress import progressed
from dllm_core.storage.store import LocalStore, is_temporary

_CACHE_BYTES = 20 << 30
_LOCK_POLL_S = 0.05
_ABANDONED = 3600.0  # seconds since a temporary file was last written to
_LOOKS = 64  # of a process through the cache while it fetches its limit: each is 0.2 s for 10,000 objects
_HELD: dict[Path, BinaryIO] = {}
_unseen: dict[Path, int] = {}  # bytes that this process has fetched since it last looked through a cache


def cache_folder() -> Path:
    """Where fetched objects are kept: $DLLM_CACHE, or ~/.cache/dllm."""
    return Path(os.path.abspath(os.environ.get("DLLM_CACHE") or Path.home() / ".cache" / "dllm"))


def cached_copy(name: str, size: int, pieces: Callable[[], Iterable[bytes]]) -> Path:
    """The copy named `name`, of `size` bytes; `pieces` is asked for its content only where it is not there yet.

    Of processes that want the same at once, one asks and the others wait for it: the workers of a node that all restart
    from one checkpoint fetch it once. Each piece is told as progress, and so is waiting: a fetch that stands still is
    ended by the limits of its requests, or by who watches over it.
    """
    cached, key = LocalStore(cache_folder()), f"objects/{name}"
    if not _is_there(cached, key, size):
        with _alone(cached.path(f"locks/{name[:2]}")):
            if not _is_there(cached, key, size):
                limit = _limit()
                cached.put_pieces(key, pieces())
                _prune(cached, key, size, limit)
    path = cached.path(key)
    with contextlib.suppress(OSError):
        os.utime(path)  # the cache drops what was used longest ago
    return path


def hold(path: Path) -> bool:
    """Keep a copy for as long as this process lives, whatever the cache's limit: a checkpoint may be larger than it.

    False: another process has dropped it already. For files that are few: each stays open, with a shared lock that
    whoever prunes finds.
    """
    held = _HELD.get(path)
    if held is None or not _is_at(path, held):
        try:
            held = path.open("rb")
        except OSError:
            return False
        with contextlib.suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_SH)
        if not _is_at(path, held):
            held.close()
            return False
        _HELD[path] = held
    return True


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether the open file is the one of that name still."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


def _drop(cached: LocalStore, key: str) -> bool:
    """Remove a copy; False if a process holds it. None begins to in between: that waits for the lock, and looks again.

    Over NFS a lock that is no other's beside it asks for a file that may be written to.
    """
    path = cached.path(key)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("r+b" if os.access(path, os.W_OK) else "rb"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # it is gone, or nothing can be locked and so nothing is held
        cached.delete(key)
    return True


def _is_there(cached: LocalStore, key: str, size: int) -> bool:
    stat = cached.stat(key)
    return stat is not None and stat.size == size


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process or thread at a time, on this machine; a killed one lets go. Where nothing can be locked, all at once:
    that costs time and is right too.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(lock.open("wb"))
            while not _is_locked(file):
                progressed()
                time.sleep(_LOCK_POLL_S)
        yield


def _is_locked(file: BinaryIO) -> bool:
    """Whether it is ours alone from now on, until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _prune(cached: LocalStore, keep: str, size: int, limit: int) -> None:
    """Drop what was used longest ago until the cache holds `limit` bytes at most, or what is held.

    `size` bytes have just come. Each process looks at its first fetch and after each 64th part of the limit: that much
    more may be there for each. A file that is mapped stays readable for who has it open.
    """
    folder = cached.path("objects")
    unseen = _unseen.get(folder, limit) + size
    _unseen[folder] = unseen if unseen < limit // _LOOKS else 0
    if _unseen[folder]:
        return
    _sweep(folder)
    items = sorted(cached.list("objects"), key=lambda item: int(item.stamp))
    total = sum(item.size for item in items)
    for item in items:
        if total <= limit:
            return
        if item.key != keep and _drop(cached, item.key):
            total -= item.size


def _limit() -> int:
    """$DLLM_CACHE_BYTES, or 20 GiB."""
    told = os.environ.get("DLLM_CACHE_BYTES") or str(_CACHE_BYTES)
    if not told.isascii() or not told.isdigit():
        raise ConfigError("DLLM_CACHE_BYTES", f"{told!r} is not a number of bytes; 20 GiB are {20 << 30}")
    return int(told)


def _sweep(folder: Path) -> None:
    """Remove what killed writers left: nobody lists it, so the limit would not count it."""
    oldest = time.time() - _ABANDONED
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if is_temporary(path.name) and path.stat().st_mtime < oldest:
                path.unlink()
