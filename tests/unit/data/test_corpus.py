"""However a corpus is cut into units, every record is read once, whole, from the unit in which it starts."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dllm_core.data import corpus as corpus_module
from dllm_core.data.corpus import (
    BadRecord,
    CorpusBase,
    Document,
    JsonlCorpus,
    Segment,
    TextCorpus,
    Unit,
    list_sources,
    plan_units,
    read_unit,
)
from dllm_core.data.sources import find_sources, unicode_names
from dllm_core.errors import DataError
from dllm_core.storage.store import LocalStore, StoredObject

PARTS = {"line": rb"(?:\r?\n)+", "paragraph": rb"(?:\r?\n){2,}"}
pieces = st.sampled_from([b"a", b"bc", "é€".encode(), b" ", b"\n", b"\n\n", b"\r\n", b"\r", b"\xff", b"\xef\xbb\xbf"])
texts = st.lists(pieces, max_size=40).map(b"".join)
kinds = st.sampled_from(["line", "paragraph"])


@pytest.fixture
def store(tmp_path) -> LocalStore:
    return LocalStore(tmp_path)


@pytest.fixture(scope="module")
def new_store(tmp_path_factory):
    """A function that makes a folder with these files."""

    def make(**files: bytes) -> LocalStore:
        store = LocalStore(tmp_path_factory.mktemp("files"))
        for name, data in files.items():
            store.root.joinpath(name).write_bytes(data)
        return store

    return make


def read(corpus: CorpusBase, store: LocalStore, units: list[Unit]) -> list[Document | BadRecord]:
    return [record for unit in units for record in read_unit(corpus, store, unit)]


def whole(key: str, data: bytes) -> list[Unit]:
    return [Unit(index=0, segments=(Segment(key=key, start=0, stop=len(data)),))]


@settings(max_examples=300, deadline=None)
@given(data=texts, kind=kinds)
@example(data=b"a\r\n\r\n\r\nb", kind="paragraph")
def test_records_are_what_stands_between_line_ends(new_store, data, kind):
    store = new_store(x=data)
    found = read(TextCorpus(path="x", document=kind), store, whole("x", data))
    expected, begin = [], 0
    for gap in [*re.finditer(PARTS[kind], data), None]:
        end = gap.start() if gap else len(data)
        if end > begin:
            expected.append((begin, data[begin:end].rstrip(b"\r\n")))
        begin = gap.end() if gap else end
    assert [_start(record) for record in found] == [start for start, _ in expected]
    for record, (start, raw) in zip(found, expected, strict=True):
        if isinstance(record, BadRecord):
            assert record.raw == raw
            assert b"\xff" in raw or start > 0 or len(data)
        else:
            mark = b"\xef\xbb\xbf" if start == 0 and raw.startswith(b"\xef\xbb\xbf") else b""
            assert mark + record.text.encode() == raw
