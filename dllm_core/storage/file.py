"""StoredFile: an object of any store as a seekable file, read by ranges, for libraries that want one."""

import io
from typing import Any

from dllm_core.storage.store import Store, StoredObject


class StoredFile(io.RawIOBase):
    """Read-only. `read(n)` is one ranged read of the store; wrap it in a BufferedReader where reads are small."""

    def __init__(self, store: Store, item: StoredObject) -> None:
        self._store, self._item, self._at = store, item, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._at

    def size(self) -> int:
        """Bytes of the object; pyarrow asks."""
        return self._item.size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; nothing is read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._item.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes from here; fewer at the end only."""
        stop = self._item.size if size is None or size < 0 else min(self._item.size, self._at + size)
        if stop <= self._at:
            return b""
        data = self._store.read(self._item.key, self._at, stop)
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
