"""Copies of remote objects on this machine, for libraries that map a file: each is whole, the oldest are dropped."""

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from dllm_core.storage.store import LocalStore

_CACHE_BYTES = 20 << 30


def cache_folder() -> Path:
    """Where fetched objects are kept: $DLLM_CACHE, or ~/.cache/dllm."""
    return Path(os.path.abspath(os.environ.get("DLLM_CACHE") or Path.home() / ".cache" / "dllm"))


def cached_copy(name: str, size: int, pieces: Callable[[], Iterable[bytes]]) -> Path:
    """The copy named `name`, of `size` bytes; `pieces` is asked for its content only where it is not there yet."""
    cached, key = LocalStore(cache_folder()), f"objects/{name}"
    stat = cached.stat(key)
    if stat is None or stat.size != size:
        cached.put_pieces(key, pieces())
        _prune(cached, key)
    path = cached.path(key)
    with contextlib.suppress(OSError):
        os.utime(path)  # the cache drops what was used longest ago
    return path


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
