"""One Arrow IPC file: whole or not at all, named by its sha256, memory-mapped without a copy.

Columns are fixed-size lists of uint16 or uint32 ids and packed uint8 bits; Arrow's bool cannot be mapped as bytes.
"""

import contextlib
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dllm_core.config.base import Frozen
from dllm_core.errors import DataError
from dllm_core.storage.store import Store, fetch_intact, sha256

_FETCHES = 8


class ShardInfo(Frozen):
    """What a manifest says of one shard. `unit` is the unit it was made from, `bytes` the size of its file."""

    key: str
    unit: int
    rows: int
    tokens: int
    bytes: int
    sha256: str


def id_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest type that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def to_arrow(columns: dict[str, NDArray[Any]], metadata: dict[str, str]) -> bytes:
    """An Arrow IPC file of one record batch. Columns [N] or [N K]; the bytes depend on the arguments alone."""
    arrays, fields = [], []
    for name, values in columns.items():
        flat = np.ascontiguousarray(values).reshape(-1)
        # Not `pa.array`: it copies, and imports pandas (1 s in every new worker) to ask whether this is a series.
        array = pa.Array.from_buffers(pa.from_numpy_dtype(flat.dtype), len(flat), [None, pa.py_buffer(flat)])
        if values.ndim == 2:
            array = pa.FixedSizeListArray.from_arrays(array, values.shape[1])
        arrays.append(array)
        fields.append(pa.field(name, array.type, nullable=False))
    schema = pa.schema(fields, metadata=metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return bytes(sink.getvalue())


def put_shard(store: Store, prefix: str, key: str, data: bytes, *, unit: int, rows: int, tokens: int) -> ShardInfo:
    """Write a shard whole; a rerun writes the same bytes over themselves."""
    store.put(f"{prefix}/{key}", data)
    return ShardInfo(key=key, unit=unit, rows=rows, tokens=tokens, bytes=len(data), sha256=sha256(data))


def map_shard(store: Store, prefix: str, info: ShardInfo) -> dict[str, NDArray[Any]]:
    """Read-only numpy views [N] or [N K] into the mapped file, after its sha256 has been checked."""
    return _views(_mapped(store, prefix, info)[0])


def map_with_metadata(store: Store, prefix: str, info: ShardInfo) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The views of `map_shard`, and what `to_arrow` was given beside them."""
    batch, _ = _mapped(store, prefix, info)
    return _views(batch), {key.decode(): value.decode() for key, value in (batch.schema.metadata or {}).items()}


def _mapped(store: Store, prefix: str, info: ShardInfo) -> tuple[pa.RecordBatch, Path]:
    """The one batch and the file. What another process drops from the cache before it is mapped is fetched again."""
    key, again = f"{prefix}/{info.key}", f"delete {store.url}/{prefix} and run `dllm preprocess` again"
    for attempt in range(_FETCHES):
        try:
            path = fetch_intact(store, key, info.sha256)
            if path is not None:
                return _batch(path), path
        except DataError as error:
            raise DataError(error.place, error.problem, remedy=error.remedy or again) from error
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, FileNotFoundError) and attempt < _FETCHES - 1:
                continue
            raise DataError(f"{store.url}/{key}", f"cannot be read ({error})", remedy=again) from error
        break
    raise DataError(f"{store.url}/{key}", "does not match its sha256 in the manifest", remedy=again)


class OpenShards:
    """Mapped shards of one corpus, of which the `most` stay: a process has 65,530 mappings (vm.max_map_count).

    Let go is what was not used for longest; uses from before there were as many do not count.

    A shard is hashed when it is first mapped. One that was let go and is mapped again is not, nor is S3 asked, where
    its file is still the very same: then it costs what opening a file does.
    """

    def __init__(self, store: Store, prefix: str, most: int = 1 << 14) -> None:
        self._store, self._prefix, self._most = store, prefix, most
        self._open: OrderedDict[str, dict[str, NDArray[Any]]] = OrderedDict()
        self._checked: dict[str, tuple[Path, tuple[int, ...]]] = {}
        self._turn = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def views(self, info: ShardInfo) -> dict[str, NDArray[Any]]:
        """The views of `map_shard`. Who keeps one keeps its mapping."""
        views = self._open.get(info.key)
        if views is not None and len(self._open) < self._most:
            return views  # as nearly always: a turn for each row would cost a sixth of reading it
        with self._turn:  # a prefetching thread may be at it
            views = self._open.get(info.key)
            if views is None:
                if len(self._open) >= self._most:
                    self._open.popitem(last=False)
                views = self._open[info.key] = self._again(info) or self._first(info)
            self._open.move_to_end(info.key)
            return views

    def _first(self, info: ShardInfo) -> dict[str, NDArray[Any]]:
        batch, path = _mapped(self._store, self._prefix, info)
        with contextlib.suppress(FileNotFoundError):  # dropped from the cache since: hashed again next time
            self._checked[info.key] = path, _identity(path)
        return _views(batch)

    def _again(self, info: ShardInfo) -> dict[str, NDArray[Any]] | None:
        path, identity = self._checked.get(info.key, (None, ()))
        try:
            return _views(_batch(path)) if path is not None and _identity(path) == identity else None
        except (OSError, pa.ArrowException):
            return None


def _identity(path: Path) -> tuple[int, ...]:
    """Changes when a file is replaced. Not its time: a use of the cache sets that."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size


def _batch(path: Path) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def _views(batch: pa.RecordBatch) -> dict[str, NDArray[Any]]:
    views: dict[str, NDArray[Any]] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        width = column.type.list_size if pa.types.is_fixed_size_list(column.type) else None
        flat = column if width is None else column.flatten()
        # Not `to_numpy`, which imports pandas. The view keeps the mapping open.
        view = np.frombuffer(flat.buffers()[1] or b"", flat.type.to_pandas_dtype(), len(flat), _offset_bytes(flat))
        views[name] = view if width is None else view.reshape(-1, width)
    return views


def _offset_bytes(array: Any) -> int:
    return int(array.offset * array.type.bit_width // 8)
