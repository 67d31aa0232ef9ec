"""Copies of remote objects on this machine, for libraries that map a file: each is whole, the oldest are dropped.

`objects/` has each under a name of its own; in `bundles/` are folders of links to them, for who wants some together.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO

from dllm_core.errors import ConfigError, DataError
from dllm_core.storage.progress import progressed
from dllm_core.storage.store import LocalStore, is_temporary

_CACHE_BYTES = 20 << 30
_LOCK_POLL_S = 0.05
_ABANDONED = 3600.0  # seconds since a temporary file was last written to
_GATHERED = "bundles"
_TRIES = 8  # of several processes that gather the same, of which one alone has its folder in place
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


def gather(name: str, files: Mapping[str, Path], is_good: Callable[[str, Path], bool]) -> Path:
    """A folder of copies that are held, under names of their own; the same one for all processes that ask for `name`.

    They are links, so that they take no room; where there are none, copies of which `is_good` tells, and held too.
    """
    folder = cache_folder() / _GATHERED / name

    def is_whole() -> bool:
        return all(_is_linked(folder / each, path, partial(is_good, each)) for each, path in files.items())

    for _ in range(_TRIES):
        if is_whole():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".x.tmp-", ignore_cleanup_errors=True) as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            new.mkdir()
            for each, path in files.items():
                try:
                    os.link(path, new / each)
                except OSError:
                    shutil.copyfile(path, new / each)
            with contextlib.suppress(OSError):  # another process was first, or what is there is damaged
                os.replace(new, folder)
            if not is_whole():
                with contextlib.suppress(OSError):
                    os.replace(folder, old)
    raise DataError(str(folder), "is taken away again and again", remedy="run it again")


def _is_linked(link: Path, path: Path, is_good: Callable[[Path], bool]) -> bool:
    try:
        return link.samefile(path) or (hold(link) and is_good(link))
    except OSError:
        return False


def _drop(cached: LocalStore, key: str) -> bool:
    """Remove a copy; False if a process holds it."""
    with _alone_with(cached.path(key)) as is_alone:
        if is_alone:
            cached.delete(key)
    return is_alone


@contextlib.contextmanager
def _alone_with(path: Path) -> Iterator[bool]:
    """Whether no process holds a copy. None begins to in the block: that waits for the lock, and looks again.

    Over NFS a lock that is no other's beside it asks for a file that may be written to.
    """
    with contextlib.ExitStack() as stack:
        is_alone = True
        try:
            file = stack.enter_context(path.open("r+b" if os.access(path, os.W_OK) else "rb"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_alone = False
        except OSError:
            pass  # it is gone, or nothing can be locked and so nothing is held
        yield is_alone


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
        if total > limit and item.key != keep and _drop(cached, item.key):
            total -= item.size
    _sweep_gathered(cached.path(_GATHERED))


def _limit() -> int:
    """$DLLM_CACHE_BYTES, or 20 GiB."""
    told = os.environ.get("DLLM_CACHE_BYTES") or str(_CACHE_BYTES)
    if not told.isascii() or not told.isdigit():
        raise ConfigError("DLLM_CACHE_BYTES", f"{told!r} is not a number of bytes; 20 GiB are {20 << 30}")
    return int(told)


def _sweep(folder: Path) -> None:
    """Remove what killed writers left: nobody lists it, so the limit would not count it."""
    for path in folder.iterdir():
        if _is_abandoned(path):
            path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return is_temporary(path.name) and path.stat().st_mtime < time.time() - _ABANDONED
    return False


def _sweep_gathered(top: Path) -> None:
    """Remove folders whose files are neither links to what is cached still nor held, and what killed gatherers left."""
    for folder in top.iterdir() if top.is_dir() else ():
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            if is_temporary(folder.name):
                is_left = _is_abandoned(folder)
            else:
                files = list(folder.iterdir())
                is_left = all([stack.enter_context(_alone_with(path)) for path in files])
                is_left = is_left and all(path.stat().st_nlink == 1 for path in files)
            if is_left:
                shutil.rmtree(folder, ignore_errors=True)
