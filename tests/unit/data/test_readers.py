"""Every format holds the same documents: compressed or not, in lines, rows or batches, in units of any size."""

import gzip
import json
import re
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_core.data import readers
from dllm_core.data.corpus import ArrowCorpus, CorpusBase, JsonlCorpus, MixtureCorpus, ParquetCorpus, TextCorpus
from dllm_core.data.readers import read_unit
from dllm_core.data.records import BadRecord
from dllm_core.data.sources import find_files
from dllm_core.data.units import Segment, plan_units
from dllm_core.errors import DataError
from dllm_core.storage.store import LocalStore

TEXTS = [f"text {i} é\U0001f600" + "x" * (i % 50) for i in range(200)]


def read(corpus: CorpusBase, root: Path, unit_bytes: int = 1 << 20):
    corpus = corpus.model_copy(update={"unit_bytes": unit_bytes})
    listed = find_files(corpus, LocalStore(root / "storage"))
    units = plan_units(corpus, listed)
    stores = tuple(files.store for files in listed)
    return units, [record for unit in units for record in read_unit(corpus, stores, unit)]


def write(folder: Path, kind: str) -> CorpusBase:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    table = pa.table({"text": TEXTS})
    if kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines[:4000]) + gzip.compress(lines[4000:]))  # two members
    elif kind == "jsonl.zst":
        (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    elif kind == "parquet":
        pq.write_table(table, folder / "a.parquet", row_group_size=17)
        return ParquetCorpus(path=str(folder))
    elif kind == "arrow file":
        with pa.ipc.new_file(folder / "a.arrow", table.schema) as sink:
            sink.write_table(table, max_chunksize=23)
        return ArrowCorpus(path=str(folder))
    elif kind == "arrow stream":
        with pa.ipc.new_stream(folder / "a.arrow", table.schema) as sink:
            sink.write_table(table, max_chunksize=23)
        return ArrowCorpus(path=str(folder))
    elif kind == "arrow streams":
        with (folder / "a.arrow").open("wb") as file:  # end to end, as `cat` puts them
            for half in (table.slice(0, 50), table.slice(50)):
                with pa.ipc.new_stream(file, table.schema) as sink:
                    sink.write_table(half, max_chunksize=23)
        return ArrowCorpus(path=str(folder))
    else:
        (folder / "a.jsonl").write_bytes(lines)
    return JsonlCorpus(path=str(folder))


@pytest.mark.parametrize("unit_bytes", [1, 3000, 1 << 20])
@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow file", "arrow stream", "arrow streams"]
)
def test_every_format_in_units_of_any_size_holds_every_document_once(tmp_path, kind, unit_bytes):
    (tmp_path / "in").mkdir()
    units, found = read(write(tmp_path / "in", kind), tmp_path, unit_bytes)
    assert [record.text for record in found] == TEXTS
    if kind not in {"jsonl", "jsonl.gz", "jsonl.zst"}:
        assert [record.offset for record in found] == list(range(len(TEXTS)))
    if unit_bytes == 1 and kind in {"jsonl", "parquet", "arrow file"}:
        assert len(units) > 8


def test_where_a_stream_of_arrow_breaks_off_is_told_by_the_row(tmp_path):
    (tmp_path / "in").mkdir()
    corpus = write(tmp_path / "in", "arrow streams")
    path = tmp_path / "in" / "a.arrow"
    path.write_bytes(path.read_bytes()[:-40])
    *documents, bad = read(corpus, tmp_path)[1]
    assert isinstance(bad, BadRecord)
    assert bad.offset == len(documents) > 50


@pytest.mark.parametrize(("kind", "data"), [("line", b"a\nb\n"), ("paragraph", b"a\n\nb\r\n\n")])
def test_a_record_that_ends_before_its_file_breaks_off_is_a_document(tmp_path, kind, data):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.gz").write_bytes(gzip.compress(data)[:-1])
    *documents, bad = read(TextCorpus(path=str(tmp_path / "in"), document=kind), tmp_path)[1]
    assert [document.text for document in documents] == ["a", "b"]
    assert (bad.offset, bad.raw) == (len(data), b"")


@settings(max_examples=draws(60), deadline=None)
@given(
    data=st.lists(st.sampled_from([b"a", b"bc", b" ", b"\n", b"\n\n", b"\r\n", b"\xff"]), max_size=40).map(b"".join),
    kind=st.sampled_from(["line", "paragraph", "file"]),
    suffix=st.sampled_from([".gz", ".zst"]),
    piece=st.integers(1, 9),
)
def test_a_compressed_text_is_read_like_the_plain_one(tmp_path_factory, data, kind, suffix, piece):
    root = tmp_path_factory.mktemp("zip")
    (root / "plain").mkdir()
    (root / "zipped").mkdir()
    (root / "plain" / "x").write_bytes(data + b"end")
    (root / "zipped" / f"x{suffix}").write_bytes(compressed(suffix, data + b"end"))
    _, plain = read(TextCorpus(path=str(root / "plain"), document=kind), root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_INFLATE_BYTES", piece)
        patch.setattr(readers, "_FRAME_BYTES", piece)
        _, zipped = read(TextCorpus(path=str(root / "zipped"), document=kind), root)
    strip = [(type(r), r.offset, getattr(r, "text", None)) for r in plain]
    assert [(type(r), r.offset, getattr(r, "text", None)) for r in zipped] == strip


def compressed(suffix: str, data: bytes) -> bytes:
    return gzip.compress(data) if suffix == ".gz" else zstandard.compress(data)


def inflated(suffix: str, data: bytes) -> bytes:
    """What can be inflated of one member or frame that breaks off."""
    return (zlib.decompressobj(31) if suffix == ".gz" else zstandard.ZstdDecompressor().decompressobj()).decompress(
        data
    )


@settings(max_examples=draws(150), deadline=None)
@given(
    members=st.lists(
        st.lists(st.sampled_from([b"a", b"bc" * 30, b"\n", b"\n\n", b"\r\n", b"\xff"]), max_size=40).map(
            lambda parts: b"".join([*parts, b"end"])
        ),
        min_size=1,
        max_size=3,
    ),
    suffix=st.sampled_from([".gz", ".zst"]),
    kind=st.sampled_from(["line", "paragraph", "file"]),
    piece=st.sampled_from([1, 7, 1 << 20]),
    cut=st.floats(0, 1),
)
def test_a_file_that_breaks_off_gives_what_was_readable_and_a_bad_record(
    tmp_path_factory, members, suffix, kind, piece, cut
):
    root = tmp_path_factory.mktemp("cut")
    blobs = [compressed(suffix, member) for member in members]
    whole = b"".join(blobs)
    size = max(1, int(cut * len(whole)))
    ends = [sum(map(len, blobs[:count])) for count in range(len(blobs) + 1)]
    intact = max(count for count, end in enumerate(ends) if end <= size)
    is_cut = size > ends[intact]
    readable = b"".join(members[:intact]) + (inflated(suffix, whole[ends[intact] : size]) if is_cut else b"")
    for name, data in {f"whole/x{suffix}": whole, f"cut/x{suffix}": whole[:size]}.items():
        (root / name).parent.mkdir()
        (root / name).write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_INFLATE_BYTES", piece)
        patch.setattr(readers, "_FRAME_BYTES", piece)
        _, every = read(TextCorpus(path=str(root / "whole"), document=kind), root)
        _, found = read(TextCorpus(path=str(root / "cut"), document=kind), root)
    if is_cut:
        last = found.pop()
        assert isinstance(last, BadRecord)
        assert "cannot be inflated" in last.reason
        assert (last.offset, last.raw) == (len(readable), readable[len(readable) - len(last.raw) :])
        assert found == every[: len(found)]
    else:  # between two members: nobody can tell that there was one more
        (root / "plain").mkdir()
        (root / "plain" / "x").write_bytes(readable)
        _, plain = read(TextCorpus(path=str(root / "plain"), document=kind), root)
        assert [record.offset for record in found] == [record.offset for record in plain]


@given(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"a"])).map(b"".join), st.integers(1, 3))
def test_a_separator_is_a_run_of_line_ends_of_either_kind(data, newlines):
    meant = re.compile(rb"(?:\r?\n){%d,}" % newlines)
    assert list(readers._separators(newlines, data)) == [match.span() for match in meant.finditer(data)]


def test_frames_that_hold_no_text_are_passed_over(tmp_path):
    (tmp_path / "in").mkdir()
    skipped = b"\x50\x2a\x4d\x18" + (600).to_bytes(4, "little") + bytes(600)  # RFC 8878, section 3.1.2
    frames = [
        skipped,
        zstandard.compress(b"one\ntw"),
        skipped,
        zstandard.compress(b""),
        zstandard.compress(b"o\n"),
        skipped,
    ]
    (tmp_path / "in" / "a.zst").write_bytes(b"".join(frames))
    _, found = read(TextCorpus(path=str(tmp_path / "in"), document="line"), tmp_path)
    assert [record.text for record in found] == ["one", "two"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_is_inflated_at_once_is_bounded_however_dense_a_file_is(tmp_path, suffix):
    store, size = LocalStore(tmp_path), 48 << 20
    store.put(f"a{suffix}", compressed(suffix, bytes(size)))
    lengths = [len(piece) for piece in readers._inflate(store, Segment(key=f"a{suffix}", start=0, stop=1))]
    assert sum(lengths) == size
    assert max(lengths) <= 16 << 20


def test_what_is_no_table_is_refused_by_its_name_before_anything_runs(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(DataError, match=r"is not a parquet file .*a\.parquet"):
        read(ParquetCorpus(path=str(tmp_path / "in")), tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
def test_two_columns_of_the_name_that_is_read_are_refused_before_anything_runs(tmp_path, kind):
    corpus = write(tmp_path, kind)
    [path] = tmp_path.glob("a.*")
    table = pa.table([["first"], ["last"], ["other"], ["other"]], ["text", "text", "b", "b"])
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with (pa.ipc.new_file if kind == "arrow file" else pa.ipc.new_stream)(path, table.schema) as sink:
            sink.write_table(table)
    with pytest.raises(DataError, match=rf"^corpus.path: has 2 columns named 'text', got '{path.name}'"):
        read(corpus, tmp_path)
    one = type(corpus)(path=str(tmp_path), record={"type": "text", "field": "missing"})  # what is not read may be twice
    assert all(isinstance(record, BadRecord) for record in read(one, tmp_path)[1])


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("beside", [True, False], ids=["beside the text", "in its place"])
def test_a_date_that_python_has_not_costs_its_own_row_alone(tmp_path, kind, beside):
    days = pa.array([1, 10**7, 3], pa.date32())  # the second in the year 29349
    texts = pa.array(["one", None, "three"])
    table = pa.table({"text": texts, "day": days} if beside else {"text": days})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as sink:
            sink.write_table(table)
    _, found = read((ParquetCorpus if kind == "parquet" else ArrowCorpus)(path=str(tmp_path)), tmp_path)
    bad = [(record.offset, record.reason) for record in found if isinstance(record, BadRecord)]
    no_text = "'text' is not a string"
    if beside:
        assert [record.text for record in found if not isinstance(record, BadRecord)] == ["one", "three"]
        assert bad == [(1, no_text)]
    else:
        assert bad == [(0, no_text), (1, "cannot be read (date value out of range)"), (2, no_text)]


def test_a_mixture_reads_its_sources_one_after_the_other_in_units_of_their_own(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    write(tmp_path / "one", "jsonl")
    (tmp_path / "two" / "b.txt").write_text("plain\nlines\n")
    corpus = MixtureCorpus.checked(
        {
            "type": "mixture",
            "sources": [
                {"type": "jsonl", "path": str(tmp_path / "one")},
                {"type": "text", "path": str(tmp_path / "two"), "document": "line", "weight": 2},
            ],
        }
    )
    units, found = read(corpus, tmp_path)
    assert [unit.source for unit in units] == [0, 1]
    assert [record.text for record in found] == [*TEXTS, "plain", "lines"]
