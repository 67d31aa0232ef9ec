"""What a reader takes is in proportion to what it gives: bytes of tables, text that is looked through."""

import io
import os
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dllm_core.data import readers
from dllm_core.data.arrow_index import _blocks, batch_rows
from dllm_core.data.corpus import ArrowCorpus, ParquetCorpus, TextCorpus
from dllm_core.data.readers import read_unit
from dllm_core.data.records import BadRecord, Document
from dllm_core.data.sources import find_files
from dllm_core.data.units import plan_units
from dllm_core.storage.store import LocalStore

ROWS = 1000


class CountingStore:
    """A store that counts the bytes read of it."""

    def __init__(self, inner: LocalStore) -> None:
        self._inner, self.num_bytes = inner, 0

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def read(self, key, start=0, stop=None):
        data = self._inner.read(key, start, stop)
        self.num_bytes += len(data)
        return data


def counted(corpus, root):
    """(units, records, bytes read to plan, bytes read for the records)."""
    [files] = find_files(corpus, LocalStore(root / "storage"))
    store = CountingStore(files.store)
    units = plan_units(corpus, [replace(files, store=store)])
    to_plan, store.num_bytes = store.num_bytes, 0
    return units, [r for unit in units for r in read_unit(corpus, [store], unit)], to_plan, store.num_bytes


def write_arrow(path, table, rows_a_batch, **options):
    with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as sink:
        sink.write_table(table, max_chunksize=rows_a_batch)


@pytest.mark.parametrize("unit_bytes", [1 << 10, 1 << 14, 1 << 20])
def test_an_arrow_file_is_read_once_whatever_its_units_and_rows_keep_their_numbers(tmp_path, unit_bytes):
    texts = [None if i % 7 == 3 else f"{i} " + os.urandom(500).hex() for i in range(ROWS)]
    (tmp_path / "in").mkdir()
    write_arrow(tmp_path / "in" / "a.arrow", pa.table({"text": texts}), 5)
    size = (tmp_path / "in" / "a.arrow").stat().st_size
    corpus = ArrowCorpus(path=str(tmp_path / "in")).model_copy(update={"unit_bytes": unit_bytes})
    units, found, to_plan, to_read = counted(corpus, tmp_path)
    assert [record.offset for record in found] == list(range(ROWS))
    assert [getattr(record, "text", None) for record in found] == texts
    index = 1 << 14  # the footer, which each unit reads
    assert to_plan <= 1.1 * size
    assert to_read <= size + index * len(units)
    assert all(len(unit.segments) == 1 for unit in units)


@pytest.mark.parametrize("unit_bytes", [1 << 14, 1 << 20])
def test_of_a_parquet_file_the_fields_of_the_record_are_read(tmp_path, unit_bytes):
    texts = [os.urandom(50).hex() for _ in range(ROWS)]
    table = pa.table({"text": texts, "vector": [os.urandom(2000) for _ in range(ROWS)]})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "a.parquet", row_group_size=10, write_statistics=False)
    corpus = ParquetCorpus(path=str(tmp_path / "in")).model_copy(update={"unit_bytes": unit_bytes})
    footer = pq.ParquetFile(tmp_path / "in" / "a.parquet").metadata
    columns = sum(footer.row_group(i).column(0).total_compressed_size for i in range(footer.num_row_groups))
    units, found, to_plan, to_read = counted(corpus, tmp_path)
    assert [(record.text, record.offset) for record in found] == [(text, row) for row, text in enumerate(texts)]
    index = footer.serialized_size + (1 << 16)  # pyarrow asks for so much of the file's end
    assert to_plan <= index
    assert to_read <= columns + index * len(units)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_bad_row_is_kept_with_the_fields_that_no_record_needs(tmp_path, kind):
    table = pa.table({"id": list(range(9)), "text": ["a", "b", None, "d", None, "f", "g", "h", "i"], "x": ["\n"] * 9})
    (tmp_path / "in").mkdir()
    if kind == "parquet":
        pq.write_table(table, tmp_path / "in" / "a.parquet", row_group_size=4)
    else:
        write_arrow(tmp_path / "in" / "a.arrow", table, 4)
    corpus = {"parquet": ParquetCorpus, "arrow": ArrowCorpus}[kind](path=str(tmp_path / "in"))
    _, found, _, _ = counted(corpus, tmp_path)
    bad = {record.offset: record.raw for record in found if isinstance(record, BadRecord)}
    assert bad == {row: b"{'id': %d, 'text': None, 'x': '\\n'}" % row for row in (2, 4)}
    assert sum(isinstance(record, Document) for record in found) == 7
    lost = corpus.model_copy(update={"record": corpus.record.model_copy(update={"field": "body"})})
    _, found, _, _ = counted(lost, tmp_path)
    assert [(record.offset, record.reason) for record in found] == [(row, "no field 'body'") for row in range(9)]
    assert found[0].raw == b"{'id': 0, 'text': 'a', 'x': '\\n'}"


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_batch_that_cannot_be_read_costs_no_other(tmp_path, part):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.arrow"
    texts = [f"row {i} of a table" for i in range(60)]
    write_arrow(path, pa.table({"text": texts}), 10, compression="zstd")
    data = bytearray(path.read_bytes())
    begin, length = _blocks(io.BytesIO(data), len(data))[2]
    after = slice(begin + 8, begin + length) if part == "head" else slice(begin + length, begin + length + 64)
    data[after] = b"\x7f" * (after.stop - after.start)
    path.write_bytes(data)
    units, found, _, _ = counted(ArrowCorpus(path=str(tmp_path / "in")), tmp_path)
    assert len(units) == 1
    assert [record.text for record in found if isinstance(record, Document)] == texts[:20] + texts[30:]
    bad = [record.offset for record in found if isinstance(record, BadRecord)]
    assert bad == ([20] if part == "head" else list(range(20, 30)))  # of a damaged head nobody knows how many


@given(
    rows=st.lists(st.integers(0, 300), max_size=30),
    columns=st.integers(0, 40),
    options=st.sampled_from([{}, {"compression": "zstd"}, {"use_legacy_format": True}]),
)
def test_the_rows_of_batches_are_those_that_pyarrow_reads(rows, columns, options):
    fields = {"text": pa.array([], pa.string()), **{f"column {i}": pa.array([], pa.int64()) for i in range(columns)}}
    schema, sink = pa.table(fields).schema, io.BytesIO()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for number in rows:
            writer.write_batch(pa.record_batch([["é"] * number, *([range(number)] * columns)], schema=schema))
    reader = pa.ipc.open_file(sink.getvalue())
    assert [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)] == rows
    assert batch_rows(io.BytesIO(sink.getvalue()), len(sink.getvalue())) == rows


def test_a_record_of_many_pieces_is_looked_through_twice_in_the_mean(tmp_path, monkeypatch):
    separators, looked = readers._separators, []

    def watched(newlines: int, data: bytes):
        looked.append(len(data))
        return separators(newlines, data)

    text = os.urandom(1 << 19).hex()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.zst").write_bytes(zstandard.compress(f"one\n{text}\ntwo\n".encode()))
    monkeypatch.setattr(readers, "_INFLATE_BYTES", 1 << 12)
    monkeypatch.setattr(readers, "_separators", watched)
    _, found, _, _ = counted(TextCorpus(path=str(tmp_path / "in"), document="line"), tmp_path)
    assert [record.text for record in found] == ["one", text, "two"]
    assert len(text) < sum(looked) <= 4 * len(text)
