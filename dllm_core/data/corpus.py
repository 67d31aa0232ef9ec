"""A corpus as units: byte ranges of files that workers read on their own, split at record ends.

Unit ids come from sorted names, sizes and `unit_bytes` alone, never from workers. A record belongs to the unit in
which it starts. A bad record is returned as such, with its offset and reason; it never costs its neighbours.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from dllm_core.config.base import Frozen
from dllm_core.errors import DataError
from dllm_core.storage.store import Store, StoredObject

_NEWLINES = {"line": 1, "paragraph": 2}
_READ_AHEAD = 1 << 16
_BYTE_ORDER_MARK = "\ufeff"


class CorpusBase(Frozen):
    """What every kind of corpus has."""

    path: str = Field(min_length=1, description="folder, file, s3://bucket/prefix, python:stdlib, python:unicode-names")
    glob: str = Field("**/*", description="which files below `path`")
    unit_bytes: int = Field(4 << 20, ge=1 << 10, le=1 << 32, description="bytes of input a task reads")
    heldout_fraction: float = Field(0.02, gt=0, lt=0.5)
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="more bad records than this end the run")


class TextCorpus(CorpusBase):
    """Plain text: a document is a file, a paragraph (after a blank line) or a line."""

    type: Literal["text"] = "text"
    document: Literal["file", "paragraph", "line"] = "file"


class JsonlCorpus(CorpusBase):
    """One JSON object a line, its text in `text_field`."""

    type: Literal["jsonl"] = "jsonl"
    glob: str = "**/*.jsonl"
    text_field: str = "text"


class HubCorpus(CorpusBase):
    """Anything that `datasets.load_dataset(path, ...)` streams: a hub name or a local builder such as `json`."""

    type: Literal["hub"] = "hub"
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    data_files: str | None = None


AnyCorpus = Annotated[TextCorpus | JsonlCorpus | HubCorpus, Field(discriminator="type")]


class Segment(Frozen):
    """Bytes [start, stop) of one file; for a hub corpus, row shard `start` of `stop`."""

    key: str
    start: int
    stop: int


class Unit(Frozen):
    """The work of one task."""

    index: int
    segments: tuple[Segment, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of input; a hub corpus has none that are known beforehand."""
        return sum(segment.stop - segment.start for segment in self.segments)


@dataclass(frozen=True)
class Document:
    """A clean text and where it came from."""

    text: str
    key: str
    offset: int


@dataclass(frozen=True)
class BadRecord:
    """Bytes that are no document, kept for the quarantine."""

    key: str
    offset: int
    reason: str
    raw: bytes


def list_sources(corpus: CorpusBase, store: Store, prefix: str) -> list[StoredObject]:
    """The corpus's files in the order of their names; an empty corpus is an error."""
    named = store.stat(prefix) if prefix else None
    if named is not None:
        if not named.size:
            raise DataError("corpus.path", "is an empty file", corpus.path, "name a file with text")
        return [named]
    pattern = re.compile(_glob_regex(corpus.glob))
    found = [item for item in store.list(prefix) if item.size and pattern.fullmatch(_below(item.key, prefix))]
    found = [item for item in found if not any(part.startswith(".") for part in _below(item.key, prefix).split("/"))]
    if not found:
        raise DataError("corpus.path", f"no file matches {corpus.glob!r}", corpus.path, "check the path and the glob")
    return found


def plan_units(corpus: CorpusBase, sources: list[StoredObject]) -> list[Unit]:
    """Cut the files into units of about `unit_bytes`. Files that are one document each are never cut."""
    whole = isinstance(corpus, TextCorpus) and corpus.document == "file"
    units: list[Unit] = []
    segments: list[Segment] = []
    filled = 0
    for source in sources:
        start = 0
        while start < source.size:
            stop = source.size if whole else min(source.size, start + corpus.unit_bytes - filled)
            segments.append(Segment(key=source.key, start=start, stop=stop))
            filled += stop - start
            start = stop
            if filled >= corpus.unit_bytes:
                units.append(Unit(index=len(units), segments=tuple(segments)))
                segments, filled = [], 0
    if segments:
        units.append(Unit(index=len(units), segments=tuple(segments)))
    return units


def read_unit(corpus: CorpusBase, store: Store, unit: Unit) -> Iterator[Document | BadRecord]:
    """The records that start in a unit, in order."""
    for segment in unit.segments:
        if isinstance(corpus, HubCorpus):
            yield from _read_hub(corpus, segment)
        elif isinstance(corpus, TextCorpus):
            for offset, raw in _raw_records(corpus, store, segment):
                yield _decoded(segment.key, offset, raw)
        elif isinstance(corpus, JsonlCorpus):
            for offset, raw in _split_records(store, segment, newlines=1):
                yield _parsed(segment.key, offset, raw, corpus.text_field)


def hub_units(corpus: HubCorpus) -> list[Unit]:
    """One unit for each shard that the data set streams in."""
    shards = _load_hub(corpus).num_shards
    return [Unit(index=i, segments=(Segment(key=f"hub:{corpus.path}", start=i, stop=shards),)) for i in range(shards)]


def _raw_records(corpus: TextCorpus, store: Store, segment: Segment) -> Iterator[tuple[int, bytes]]:
    if corpus.document == "file":
        yield segment.start, store.read(segment.key, segment.start, segment.stop)
    else:
        yield from _split_records(store, segment, _NEWLINES[corpus.document])


def _split_records(store: Store, segment: Segment, newlines: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the records that start in [start, stop): runs of >= `newlines` line ends part them."""
    separator = re.compile(rb"(?:\r?\n){%d,}" % newlines)
    base = max(0, segment.start - 4 * newlines)  # enough to see whether a record starts exactly at `start`
    data = store.read(segment.key, base, segment.stop)
    ended = len(data) < segment.stop - base
    starts_here = segment.start == 0 or any(
        segment.start <= base + match.end() < segment.stop for match in separator.finditer(data)
    )
    if not starts_here:
        return
    ahead = _READ_AHEAD
    while not ended and not _closed(separator, data, segment.stop - base):
        more = store.read(segment.key, base + len(data), base + len(data) + ahead)
        ended = len(more) < ahead
        data += more
        ahead *= 2  # a record longer than the unit costs a logarithmic number of reads
    begin = 0
    for match in [*separator.finditer(data), None]:
        end = match.start() if match else len(data)
        offset = base + begin
        owned = segment.start <= offset < segment.stop and (begin > 0 or base == 0)
        if owned and end > begin:
            yield offset, data[begin:end].rstrip(b"\r\n")
        if match:
            begin = match.end()


def _closed(separator: re.Pattern[bytes], data: bytes, stop: int) -> bool:
    """Whether the record that crosses `stop` ends inside `data` (a separator at its very end may still go on)."""
    return any(match.end() >= stop and match.end() < len(data) for match in separator.finditer(data, max(0, stop - 8)))


def _decoded(key: str, offset: int, raw: bytes) -> Document | BadRecord:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRecord(key, offset + error.start, f"not UTF-8 ({error.reason})", raw)
    return Document(text.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else text, key, offset)


def _parsed(key: str, offset: int, raw: bytes, field: str) -> Document | BadRecord:
    line = _decoded(key, offset, raw)
    if isinstance(line, BadRecord) or not line.text.strip():
        return line
    try:
        text = json.loads(line.text)[field]
        if not isinstance(text, str):
            return BadRecord(key, offset, f"{field!r} is not a string", raw)
        if not _is_unicode(text):  # a lone surrogate is legal JSON and no text
            return BadRecord(key, offset, f"{field!r} is not Unicode", raw)
    except (ValueError, RecursionError):
        return BadRecord(key, offset, "not JSON", raw)
    except (KeyError, TypeError, IndexError):
        return BadRecord(key, offset, f"no field {field!r}", raw)
    return Document(text, key, offset)


def _load_hub(corpus: HubCorpus) -> Any:
    import datasets  # 0.8 s and pandas: only who names a hub corpus pays

    try:
        return datasets.load_dataset(
            corpus.path, corpus.subset, split=corpus.split, data_files=corpus.data_files, streaming=True
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError("corpus.path", f"cannot be loaded ({reason})", corpus.path) from error


def _read_hub(corpus: HubCorpus, segment: Segment) -> Iterator[Document | BadRecord]:
    shard = _load_hub(corpus).shard(num_shards=segment.stop, index=segment.start)
    for row, record in enumerate(shard):
        text = record.get(corpus.text_field)
        if isinstance(text, str) and _is_unicode(text):
            yield Document(text, f"{segment.key}/{segment.start}", row)
        else:
            raw = repr(record).encode("utf-8", "backslashreplace")
            yield BadRecord(f"{segment.key}/{segment.start}", row, f"no text in {corpus.text_field!r}", raw)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _below(key: str, prefix: str) -> str:
    return key.removeprefix(f"{prefix}/") if prefix else key


def _glob_regex(glob: str) -> str:
    """`**/` crosses folders, `*` and `?` do not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(meaning.get(part, re.escape(part)) for part in parts)
