"""Every format holds the same documents: compressed or not, in lines, rows or batches, in units of any size."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_core.data import readers
from dllm_core.data.corpus import ArrowCorpus, CorpusBase, JsonlCorpus, MixtureCorpus, ParquetCorpus, TextCorpus
from dllm_core.data.readers import read_unit
from dllm_core.data.records import BadRecord
from dllm_core.data.sources import find_files
from dllm_core.data.units import plan_units
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
    else:
        (folder / "a.jsonl").write_bytes(lines)
    return JsonlCorpus(path=str(folder))


@pytest.mark.parametrize("unit_bytes", [1, 3000, 1 << 20])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow file", "arrow stream"])
def test_every_format_in_units_of_any_size_holds_every_document_once(tmp_path, kind, unit_bytes):
    (tmp_path / "in").mkdir()
    units, found = read(write(tmp_path / "in", kind), tmp_path, unit_bytes)
    assert [record.text for record in found] == TEXTS
    if unit_bytes == 1 and kind in {"jsonl", "parquet", "arrow file"}:
        assert len(units) > 8


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(st.sampled_from([b"a", b"bc", b" ", b"\n", b"\n\n", b"\r\n", b"\xff"]), max_size=40).map(b"".join),
    kind=st.sampled_from(["line", "paragraph", "file"]),
    piece=st.integers(1, 9),
)
def test_a_compressed_text_is_read_like_the_plain_one(tmp_path_factory, data, kind, piece):
    root = tmp_path_factory.mktemp("zip")
    (root / "plain").mkdir()
    (root / "zipped").mkdir()
    (root / "plain" / "x").write_bytes(data + b"end")
    (root / "zipped" / "x.gz").write_bytes(gzip.compress(data + b"end"))
    _, plain = read(TextCorpus(path=str(root / "plain"), document=kind), root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_INFLATE_BYTES", piece)
        _, zipped = read(TextCorpus(path=str(root / "zipped"), document=kind), root)
    strip = [(type(r), r.offset, getattr(r, "text", None)) for r in plain]
    assert [(type(r), r.offset, getattr(r, "text", None)) for r in zipped] == strip


def test_a_file_that_breaks_off_gives_what_was_readable_and_a_bad_record(tmp_path):
    (tmp_path / "in").mkdir()
    corpus = write(tmp_path / "in", "jsonl.gz")
    path = tmp_path / "in" / "a.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-40])
    _, found = read(corpus, tmp_path)
    assert [record.text for record in found[:-1]] == TEXTS[: len(found) - 1]
    assert isinstance(found[-1], BadRecord)
    assert "cannot be inflated" in found[-1].reason


def test_what_is_no_table_is_refused_by_its_name_before_anything_runs(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(DataError, match=r"is not a parquet file .*a\.parquet"):
        read(ParquetCorpus(path=str(tmp_path / "in")), tmp_path)


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
