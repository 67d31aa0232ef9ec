"""Units: a corpus cut into work that tasks do on their own.

Unit ids come from sorted names, sizes and `unit_bytes` alone, never from workers. A byte range is split at record ends:
a record belongs to the unit in which it starts.
"""

import contextlib
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dllm_core.config.base import Frozen
from dllm_core.data.arrow_index import batch_rows
from dllm_core.data.corpus import ArrowSource, CorpusBase, HubSource, ParquetSource, SourceBase, TextSource
from dllm_core.data.hub import num_shards
from dllm_core.data.records import fields_of, is_unicode
from dllm_core.errors import DataError, first_line
from dllm_core.storage.file import StoredFile
from dllm_core.storage.store import READERS, Store, StoredObject

COMPRESSED = (".gz", ".zst")


class Segment(Frozen):
    """Part [start, stop) of a file: bytes; row groups or record batches of a table. A hub's: part `start` of `stop`.

    first_rows: of a table, which row of the file each of them begins with.
    """

    key: str
    start: int
    stop: int
    first_rows: tuple[int, ...] = ()


class Unit(Frozen):
    """The work of one task: segments of one source. num_bytes: of input, as far as known beforehand."""

    index: int
    source: int = 0
    segments: tuple[Segment, ...]
    num_bytes: int = 0


@dataclass(frozen=True)
class SourceFiles:
    """One source's files, listed: `store` reads their keys."""

    store: Store
    files: tuple[StoredObject, ...]


def list_files(source: SourceBase, store: Store, prefix: str) -> list[StoredObject]:
    """The source's files in the order of their names; a source without any is an error."""
    found = _found(source, store, prefix)
    for item in found:
        if not is_unicode(item.key):  # what a corpus is, and where its records are from, is told in UTF-8
            remedy = "rename it, or narrow corpus.glob"
            raise DataError("corpus.path", "a file's name is not UTF-8", item.key, remedy)
    return found


def _found(source: SourceBase, store: Store, prefix: str) -> list[StoredObject]:
    named = store.stat(prefix) if prefix else None
    if named is not None:
        if not named.size:
            raise DataError("corpus.path", "is an empty file", source.path, "name a file with text")
        return [named]
    pattern = re.compile(_glob_regex(source.glob))
    found = [item for item in store.list(prefix) if item.size and pattern.fullmatch(_below(item.key, prefix))]
    found = [item for item in found if not any(part.startswith(".") for part in _below(item.key, prefix).split("/"))]
    if not found:
        raise DataError("corpus.path", f"no file matches {source.glob!r}", source.path, "check the path and the glob")
    return found


def plan_units(corpus: CorpusBase, listed: Sequence[SourceFiles]) -> list[Unit]:
    """Cut every source's files into units of about `unit_bytes`; a unit never holds two sources.

    Reads the index of every table file and the heads of Arrow's batches; a hub source is asked for its parts.
    """
    units: list[Unit] = []
    for index, (source, files) in enumerate(zip(corpus.all_sources, listed, strict=True)):
        if isinstance(source, HubSource):
            parts = num_shards(source)
            for part in range(parts):
                segment = Segment(key=f"hub:{source.path}", start=part, stop=parts)
                units.append(Unit(index=len(units), source=index, segments=(segment,)))
            continue
        segments: list[Segment] = []
        filled = 0
        for segment, num_bytes, is_last in _segments(source, files, corpus.unit_bytes):
            _append(segments, segment)
            filled += num_bytes
            if filled >= corpus.unit_bytes or is_last:
                units.append(Unit(index=len(units), source=index, segments=tuple(segments), num_bytes=filled))
                segments, filled = [], 0
    return units


def _append(segments: list[Segment], segment: Segment) -> None:
    """Parts of one file are one segment: for each its footer, which names all parts, is read again."""
    if segments and segments[-1].key == segment.key:
        last = segments.pop()
        rows = last.first_rows + segment.first_rows
        segment = Segment(key=segment.key, start=last.start, stop=segment.stop, first_rows=rows)
    segments.append(segment)


def _segments(source: SourceBase, listed: SourceFiles, unit_bytes: int) -> Iterable[tuple[Segment, int, bool]]:
    """(segment, bytes, whether it is the source's last). A byte range ends where its unit is full."""
    if isinstance(source, ParquetSource | ArrowSource):
        with ThreadPoolExecutor(READERS, thread_name_prefix="indexes") as pool:  # an index is two requests of a store
            for number, parts in enumerate(pool.map(partial(_table_parts, source, listed.store), listed.files)):
                item, is_last_file = listed.files[number], number == len(listed.files) - 1
                first_row = 0
                for part, (size, rows) in enumerate(parts):
                    is_last = is_last_file and part == len(parts) - 1
                    yield Segment(key=item.key, start=part, stop=part + 1, first_rows=(first_row,)), size, is_last
                    first_row += rows
        return
    filled = 0
    for number, item in enumerate(listed.files):
        is_last_file = number == len(listed.files) - 1
        whole = item.key.endswith(COMPRESSED) or (isinstance(source, TextSource) and source.document == "file")
        start = 0
        while start < item.size:
            stop = item.size if whole else min(item.size, start + unit_bytes - filled)
            filled += stop - start
            yield Segment(key=item.key, start=start, stop=stop), stop - start, is_last_file and stop == item.size
            filled = 0 if filled >= unit_bytes else filled
            start = stop


def _table_parts(source: ParquetSource | ArrowSource, store: Store, item: StoredObject) -> list[tuple[int, int]]:
    """(bytes, rows) of each row group or record batch; only the table's own index is read, and the batches' heads."""
    try:
        with StoredFile(store, item) as file:
            if isinstance(source, ParquetSource):
                parquet = pq.ParquetFile(file)
                _check_columns(source, item, parquet.schema_arrow)
                footer = parquet.metadata
                groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
                return [(group.total_byte_size, group.num_rows) for group in groups] or [(0, 0)]
            if file.read(6) != b"ARROW1":
                file.seek(0)
                with contextlib.suppress(pa.ArrowException):  # what is wrong with it is a bad record's reason
                    _check_columns(source, item, pa.ipc.open_stream(file).schema)
                return [(item.size, 0)]  # the stream format has no index: one part
            _check_columns(source, item, pa.ipc.open_file(file).schema)
            rows = batch_rows(file, item.size)
            return [(item.size // len(rows), number) for number in rows] or [(0, 0)]
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = first_line(error)
        raise DataError("corpus.path", f"is not a {source.type} file ({reason})", item.key) from error


def _check_columns(source: ParquetSource | ArrowSource, item: StoredObject, schema: Any) -> None:
    """Refuse two columns of a record field's name: the last one's text would be taken, and nobody would be told."""
    for name in fields_of(source.record):
        if schema.names.count(name) > 1:
            raise DataError("corpus.path", f"has {schema.names.count(name)} columns named {name!r}", item.key)


def _below(key: str, prefix: str) -> str:
    return key.removeprefix(f"{prefix}/") if prefix else key


def _glob_regex(glob: str) -> str:
    """`**/` crosses folders, `*` and `?` do not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(meaning.get(part, re.escape(part)) for part in parts)
