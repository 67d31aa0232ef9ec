"""Readers: the records that start in a unit, in order, from bytes of every format.

A bad record is returned as such, with its offset and reason; it never costs its neighbours.
"""

import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from dllm_core.data.arrow_index import batch_rows
from dllm_core.data.corpus import (
    AnyRecord,
    ArrowSource,
    CorpusBase,
    HubSource,
    JsonlSource,
    ParquetSource,
    SourceBase,
    TextSource,
)
from dllm_core.data.hub import hub_records
from dllm_core.data.records import BadRecord, Document, decoded, fields_of, from_fields, from_json
from dllm_core.data.units import COMPRESSED, Segment, Unit
from dllm_core.errors import DataError, first_line
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
# What pyarrow raises of a value that Python cannot hold: no UTF-8, a date after the year 9999, a zone without a name.
_NO_VALUE = (ArithmeticError, LookupError, ValueError)
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


def _separators(newlines: int, data: bytes) -> Iterator[tuple[int, int]]:
    """Where runs of at least so many line ends begin and end."""
    # From a line feed on: 20 times as fast as what may begin with a carriage return, which was most of a reader's time.
    for match in re.finditer(rb"\n(?:\r?\n){%d,}" % (newlines - 1), data):
        start, stop = match.span()
        yield start - data.endswith(b"\r", 0, start), stop


def _split_records(store: Store, segment: Segment, newlines: int) -> Iterator[RawRecord]:
    """(offset, bytes) of the records that start in [start, stop): runs of >= `newlines` line ends part them.

    Read in pieces, of which no more stays than the record that is not closed yet.
    """
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
        for end, after in _separators(newlines, data):
            if not is_end and _may_go_on(after, data):
                open_end = at + after
                break
            if begins_here and at + begin >= segment.start and end > begin:
                yield at + begin, data[begin:end].rstrip(b"\r\n")
            begin, begins_here = after, True
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
    offset, data = 0, b""
    waiting: list[bytes] = []
    num_waiting, broken = 0, None
    try:
        for piece in _inflate(store, segment):
            waiting.append(piece)
            num_waiting += len(piece)
            # As much as there is already: then a record of any length is looked through twice in the mean.
            if not whole and num_waiting >= max(_INFLATE_BYTES, len(data)):
                records, offset, data = _closed_records(newlines, offset, b"".join((data, *waiting)))
                waiting, num_waiting = [], 0
                yield from records
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        broken = error
    data = b"".join((data, *waiting))
    if not whole:
        records, offset, data = _closed_records(newlines, offset, data, is_end=broken is not None)
        yield from records
        data = data if broken else data.rstrip(b"\r\n")
    if broken:
        yield BadRecord(segment.key, offset + len(data), f"cannot be inflated ({broken})", data)
    elif data:
        yield offset, data


def _closed_records(
    newlines: int, offset: int, data: bytes, *, is_end: bool = False
) -> tuple[list[RawRecord], int, bytes]:
    """Records of data that begins at `offset`, and (offset, bytes) of what goes on behind it. is_end: nothing does."""
    records, begin = [], 0
    for end, after in _separators(newlines, data):
        if not is_end and _may_go_on(after, data):
            break
        if end > begin:
            records.append((offset + begin, data[begin:end].rstrip(b"\r\n")))
        begin = after
    return records, offset + begin, data[begin:]


def _may_go_on(after: int, data: bytes) -> bool:
    """Whether the next piece may begin with more of a separator, so that the record behind it is not begun yet."""
    return data[after : after + 2] in {b"", b"\r"}


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
    next_row = segment.first_rows[0]
    with StoredFile(store, stat) as file:
        try:
            for part in _parts(source, file, segment):
                if isinstance(part, BadRecord):
                    yield part
                    continue
                next_row = part.first_row + part.fields.num_rows
                for row, values in _rows_in_parts(part.fields, part.first_row):
                    if isinstance(values, UnicodeDecodeError):
                        yield BadRecord(segment.key, row, f"not UTF-8 ({values.reason})", values.object)
                        continue
                    if isinstance(values, Exception):
                        yield BadRecord(segment.key, row, _why(values), b"")
                        continue
                    record = from_fields(source.record, values, segment.key, row, b"")
                    yield replace(record, raw=part.raw(row, values)) if isinstance(record, BadRecord) else record
        except (pa.ArrowException, OSError) as error:
            yield BadRecord(segment.key, next_row, _why(error), b"")


@dataclass(frozen=True)
class _Part:
    """A row group or record batch. fields: the columns that records are made of; whole: reads all."""

    first_row: int
    fields: Any
    whole: Callable[[], Any]

    def raw(self, row: int, values: Any) -> bytes:
        """A bad row as it goes to the quarantine: all that it holds, or its `values` where others cannot be read."""
        with contextlib.suppress(pa.ArrowException, OSError, *_NO_VALUE):
            [values] = self.whole().slice(row - self.first_row, 1).to_pylist()
        return _as_raw(values)


def _as_raw(values: Any) -> bytes:
    return repr(values).encode("utf-8", "backslashreplace")


def _why(error: Exception) -> str:
    return f"cannot be read ({first_line(error)})"


def _rows_in_parts(table: Any, first_row: int) -> Iterator[tuple[int, Any]]:
    """`_rows`, some at a time: as Python objects they take many times the memory of the table."""
    for start in range(0, table.num_rows, _ROWS_AT_ONCE):
        size = min(_ROWS_AT_ONCE, table.num_rows - start)  # of a table without columns a slice has what it is asked for
        yield from _rows(table.slice(start, size), first_row + start)


def _rows(table: Any, first_row: int) -> Iterator[tuple[int, Any]]:
    """(row number, its fields, or why they are none): what holds a bad row is halved until that row stands alone."""
    try:
        values = table.to_pylist()
    except _NO_VALUE as error:
        if table.num_rows == 1:
            yield first_row, error
            return
        half = table.num_rows // 2
        yield from _rows(table.slice(0, half), first_row)
        yield from _rows(table.slice(half), first_row + half)
    else:
        yield from enumerate(values, first_row)


def _parts(source: ParquetSource | ArrowSource, file: Any, segment: Segment) -> Iterator[_Part | BadRecord]:
    if isinstance(source, ParquetSource):
        return _row_groups(source.record, file, segment)
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    return _batches(source.record, file, segment) if is_file else _stream(source.record, file)


def _row_groups(record: AnyRecord, file: Any, segment: Segment) -> Iterator[_Part | BadRecord]:
    parquet = pq.ParquetFile(file)
    for number, first_row in zip(range(segment.start, segment.stop), segment.first_rows, strict=True):
        if number >= parquet.num_row_groups:
            return  # a file without any
        try:
            fields = parquet.read_row_group(number, columns=list(fields_of(record)))
        except (pa.ArrowException, OSError) as error:
            for row in range(first_row, first_row + parquet.metadata.row_group(number).num_rows):
                yield BadRecord(segment.key, row, _why(error), b"")
        else:
            yield _Part(first_row, fields, cache(partial(parquet.read_row_group, number)))


def _batches(record: AnyRecord, file: Any, segment: Segment) -> Iterator[_Part | BadRecord]:
    reader = pa.ipc.open_file(file)
    for number, first_row in zip(range(segment.start, segment.stop), segment.first_rows, strict=True):
        if number >= reader.num_record_batches:
            return  # a file without any
        try:
            batch = reader.get_batch(number)
        except (pa.ArrowException, OSError) as error:
            rows = max(1, batch_rows(file, file.size())[number])  # of a head that makes no sense it is 0
            for row in range(first_row, first_row + rows):
                yield BadRecord(segment.key, row, _why(error), b"")
        else:
            yield _of_batch(record, batch, first_row)


def _stream(record: AnyRecord, file: Any) -> Iterator[_Part]:
    """Of one stream, and of those that follow it where files were put end to end."""
    first_row, size = 0, file.size()
    while file.tell() < size:
        for batch in pa.ipc.open_stream(file):
            yield _of_batch(record, batch, first_row)
            first_row += batch.num_rows


def _of_batch(record: AnyRecord, batch: Any, first_row: int) -> _Part:
    names = fields_of(record)
    fields = batch.select([at for at, name in enumerate(batch.schema.names) if name in names])
    return _Part(first_row, fields, lambda: batch)


def _read_hub(source: HubSource, segment: Segment) -> Iterator[Record]:
    for row, record in enumerate(hub_records(source, segment.start, segment.stop)):
        yield from_fields(source.record, record, f"{segment.key}/{segment.start}", row, _as_raw(record))
