"""Readers: the records that start in a unit, in order, from bytes of every format.

A bad record is returned as such, with its offset and reason; it never costs its neighbours.
"""

import gzip
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from dllm_core.data.corpus import (
    ArrowSource,
    CorpusBase,
    HubSource,
    JsonlSource,
    ParquetSource,
    SourceBase,
    TextSource,
)
from dllm_core.data.hub import hub_records
from dllm_core.data.records import BadRecord, Document, decoded, from_fields, from_json
from dllm_core.data.units import COMPRESSED, Segment, Unit
from dllm_core.errors import DataError
from dllm_core.storage.file import StoredFile
from dllm_core.storage.store import Store

_NEWLINES = {"line": 1, "paragraph": 2}
_READ_AHEAD = 1 << 16
_PIECE_BYTES = 16 << 20  # of a unit at once: two of these are held, and 30 ms for each are a twentieth of a task's time
_INFLATE_BYTES = 1 << 20
# Of Zstandard at once: 4 bytes can be a block of 128 KiB, so what they inflate to is 16 MiB at most. 1.5x over pieces
# of 16 KiB, at 290 MB/s of text.
_FRAME_BYTES = 1 << 9
_ROWS_AT_ONCE = 1 << 10
Record = Document | BadRecord
RawRecord = tuple[int, bytes]


def read_unit(corpus: CorpusBase, stores: Sequence[Store], unit: Unit) -> Iterator[Record]:
    """The records that start in a unit, in order. stores: one for each source."""
    source, store = corpus.all_sources[unit.source], stores[unit.source]
    for segment in unit.segments:
        if isinstance(source, HubSource):
            yield from _read_hub(source, segment)
        elif isinstance(source, ParquetSource | ArrowSource):
            yield from _read_table(source, store, segment)
        else:
            yield from _read_bytes(source, store, segment)


def _read_bytes(source: SourceBase, store: Store, segment: Segment) -> Iterator[Record]:
    is_text = isinstance(source, TextSource)
    whole = isinstance(source, TextSource) and source.document == "file"
    newlines = _NEWLINES[source.document] if isinstance(source, TextSource) and not whole else 1
    raw: Iterator[RawRecord | BadRecord]
    if segment.key.endswith(COMPRESSED):
        raw = _inflated_records(store, segment, newlines, whole=whole)
    elif whole:
        raw = iter([(segment.start, store.read(segment.key, segment.start, segment.stop))])
    else:
        raw = _split_records(store, segment, newlines)
    for item in raw:
        if isinstance(item, BadRecord):
            yield item
        elif is_text:
            yield decoded(segment.key, *item)
        else:
            assert isinstance(source, JsonlSource)
            yield from_json(source.record, segment.key, *item)


def _separator(newlines: int) -> re.Pattern[bytes]:
    """Runs of at least so many line ends."""
    return re.compile(rb"(?:\r?\n){%d,}" % newlines)


def _split_records(store: Store, segment: Segment, newlines: int) -> Iterator[RawRecord]:
    """(offset, bytes) of the records that start in [start, stop): runs of >= `newlines` line ends part them.

    Read in pieces, of which no more stays than the record that is not closed yet.
    """
    separator = _separator(newlines)
    at = max(0, segment.start - 4 * newlines)  # of data[0]: enough to see whether a record starts exactly at `start`
    data, begins_here = b"", at == 0  # whether data[0] begins a record
    open_end = -1  # where a record may start, if the separator before it does not go on in the next piece
    ahead = _READ_AHEAD
    while True:
        stop = min(segment.stop, at + len(data) + max(_PIECE_BYTES, len(data)))
        if at + len(data) >= segment.stop:
            if not ((begins_here and at >= segment.start) or segment.start <= open_end < segment.stop):
                return  # what goes on is no record of this unit
            stop = at + len(data) + ahead
            ahead *= 2  # a record longer than the unit costs a logarithmic number of reads
        more = store.read(segment.key, at + len(data), stop)
        is_end = len(more) < stop - at - len(data)
        data += more
        begin, open_end = 0, -1
        for match in separator.finditer(data):
            if not is_end and data[match.end() : match.end() + 2] in {b"", b"\r"}:
                open_end = at + match.end()
                break
            if begins_here and at + begin >= segment.start and match.start() > begin:
                yield at + begin, data[begin : match.start()].rstrip(b"\r\n")
            begin, begins_here = match.end(), True
            if at + begin >= segment.stop:
                return
        if is_end:
            if begins_here and at + begin >= segment.start and begin < len(data):
                yield at + begin, data[begin:].rstrip(b"\r\n")
            return
        data, at = data[begin:], at + begin


def _inflated_records(store: Store, segment: Segment, newlines: int, *, whole: bool) -> Iterator[RawRecord | BadRecord]:
    """Records of a compressed file, inflated piece by piece; offsets are those of the inflated text.

    A file that breaks off yields what was readable, then a bad record.
    """
    separator = _separator(newlines)
    offset, data = 0, b""
    try:
        for piece in _inflate(store, segment):
            data += piece
            if whole:
                continue
            # The last separator may go on in the next piece, so the record behind it is not begun yet.
            cuts = [match for match in separator.finditer(data) if data[match.end() :] not in {b"", b"\r"}]
            begin = 0
            for match in cuts:
                if match.start() > begin:
                    yield offset + begin, data[begin : match.start()].rstrip(b"\r\n")
                begin = match.end()
            offset, data = offset + begin, data[begin:]
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        yield BadRecord(segment.key, offset + len(data), f"cannot be inflated ({error})", data)
        return
    body = data if whole else data.rstrip(b"\r\n")
    if body:
        yield offset, body


def _inflate(store: Store, segment: Segment) -> Iterator[bytes]:
    stat = store.stat(segment.key)
    if stat is None:
        raise DataError(segment.key, "no such file")
    with StoredFile(store, stat) as file:
        buffered = io.BufferedReader(file, _INFLATE_BYTES)
        if segment.key.endswith(".zst"):
            yield from _inflate_frames(buffered)
            return
        stream = gzip.GzipFile(fileobj=buffered)
        while piece := stream.read1(_INFLATE_BYTES):  # `read` would lose what it has where the file breaks off
            yield piece


def _inflate_frames(file: io.BufferedIOBase) -> Iterator[bytes]:
    """Not `stream_reader`, to which the end of the file is the end of a frame; EOFError where it is not."""
    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    while data := file.read(_FRAME_BYTES):
        while data:
            if frame.eof:
                frame = decompressor.decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
    if not frame.eof:
        raise EOFError("Compressed file ended inside a frame")


def _read_table(source: ParquetSource | ArrowSource, store: Store, segment: Segment) -> Iterator[Record]:
    """Rows of row groups or record batches; offsets are row numbers in the file."""
    stat = store.stat(segment.key)
    if stat is None:
        raise DataError(segment.key, "no such file")
    with StoredFile(store, stat) as file:
        try:
            for first_row, table in _tables(source, file, segment):
                if isinstance(table, _Lost):
                    for row in range(first_row, first_row + table.num_rows):
                        yield BadRecord(segment.key, row, table.reason, b"")
                    continue
                for row, values in _rows_in_parts(table, first_row):
                    if isinstance(values, UnicodeDecodeError):
                        yield BadRecord(segment.key, row, f"not UTF-8 ({values.reason})", values.object)
                    else:
                        raw = repr(values).encode("utf-8", "backslashreplace")
                        yield from_fields(source.record, values, segment.key, row, raw)
        except (pa.ArrowException, OSError) as error:
            yield BadRecord(segment.key, segment.start, _why(error), b"")


@dataclass(frozen=True)
class _Lost:
    """A row group that cannot be read, of so many rows."""

    num_rows: int
    reason: str


def _why(error: Exception) -> str:
    return f"cannot be read ({str(error).splitlines()[0]})"


def _rows_in_parts(table: Any, first_row: int) -> Iterator[tuple[int, Any]]:
    """`_rows`, some at a time: as Python objects they take many times the memory of the table."""
    for start in range(0, table.num_rows, _ROWS_AT_ONCE):
        yield from _rows(table.slice(start, _ROWS_AT_ONCE), first_row + start)


def _rows(table: Any, first_row: int) -> Iterator[tuple[int, Any]]:
    """(row number, its fields, or why they are no text): what holds a bad row is halved until that row stands alone."""
    try:
        values = table.to_pylist()
    except UnicodeDecodeError as error:
        if table.num_rows == 1:
            yield first_row, error
            return
        half = table.num_rows // 2
        yield from _rows(table.slice(0, half), first_row)
        yield from _rows(table.slice(half), first_row + half)
    else:
        yield from enumerate(values, first_row)


def _tables(source: ParquetSource | ArrowSource, file: Any, segment: Segment) -> Iterator[tuple[int, Any]]:
    if isinstance(source, ParquetSource):
        parquet = pq.ParquetFile(file)
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
        for part in range(segment.start, min(segment.stop, len(sizes))):
            try:
                table = parquet.read_row_group(part)
            except (pa.ArrowException, OSError) as error:
                table = _Lost(sizes[part], _why(error))
            yield sum(sizes[:part]), table
        return
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_file:
        reader = pa.ipc.open_file(file)
        first = sum(reader.get_batch(i).num_rows for i in range(segment.start))
        for part in range(segment.start, min(segment.stop, reader.num_record_batches)):
            batch = reader.get_batch(part)
            yield first, batch
            first += batch.num_rows
        return
    first = 0
    for batch in pa.ipc.open_stream(file):
        yield first, batch
        first += batch.num_rows


def _read_hub(source: HubSource, segment: Segment) -> Iterator[Record]:
    for row, record in enumerate(hub_records(source, segment.start, segment.stop)):
        raw = repr(record).encode("utf-8", "backslashreplace")
        yield from_fields(source.record, record, f"{segment.key}/{segment.start}", row, raw)
