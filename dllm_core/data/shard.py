"""One Arrow IPC file: whole or not at all, named by its sha256, memory-mapped without a copy.

Columns are fixed-size lists of uint16 or uint32 ids and packed uint8 bits; Arrow's bool cannot be mapped as bytes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dllm_core.config.base import Frozen
from dllm_core.errors import DataError
from dllm_core.storage.store import Store, fetch_intact, sha256


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
    key, again = f"{prefix}/{info.key}", f"delete {store.url}/{prefix} and run `dllm preprocess` again"
    try:
        path = fetch_intact(store, key, info.sha256)
        if path is not None:
            return _views(path)
    except DataError as error:
        raise DataError(error.place, error.problem, remedy=error.remedy or again) from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{store.url}/{key}", f"cannot be read ({error})", remedy=again) from error
    raise DataError(f"{store.url}/{key}", "does not match its sha256 in the manifest", remedy=again)


def _views(path: Path) -> dict[str, NDArray[Any]]:
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
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
