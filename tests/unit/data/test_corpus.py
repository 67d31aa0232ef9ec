"""However a corpus is cut into units, every record is read once, whole, from the unit in which it starts."""

import json
import re
import unicodedata
from pathlib import Path

import pytest
from conftest import draws
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dllm_core.data import readers
from dllm_core.data.corpus import CorpusBase, JsonlCorpus, TextCorpus, TextRecord
from dllm_core.data.readers import read_unit
from dllm_core.data.records import BadRecord, Document
from dllm_core.data.sources import find_source, unicode_names
from dllm_core.data.units import Segment, SourceFiles, Unit, list_files, plan_units
from dllm_core.errors import DataError
from dllm_core.storage.store import LocalStore, StoredObject

GAPS = {"line": rb"(?:\r?\n)+", "paragraph": rb"(?:\r?\n){2,}"}
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
    return [record for unit in units for record in read_unit(corpus, (store,), unit)]


def planned(corpus: CorpusBase, files: list[StoredObject]) -> list[Unit]:
    return plan_units(corpus, [SourceFiles(LocalStore(Path("/nowhere")), tuple(files))])


def as_one_unit(**files: bytes) -> list[Unit]:
    segments = [Segment(key=key, start=0, stop=len(data)) for key, data in files.items()]
    return [Unit(index=0, segments=tuple(segments))]


def records_of(key: str, kind: str, data: bytes) -> list[Document | BadRecord]:
    """The records of a file by definition: what stands between runs of line ends."""
    found: list[Document | BadRecord] = []
    begin = 0
    for gap in [*re.finditer(GAPS[kind], data), None]:
        raw = data[begin : gap.start() if gap else len(data)]
        if raw:
            raw = raw.rstrip(b"\r\n")
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                found.append(BadRecord(key, begin + error.start, f"not UTF-8 ({error.reason})", raw))
            else:
                found.append(Document(text.removeprefix("\ufeff") if begin == 0 else text, key, begin))
        begin = gap.end() if gap else len(data)
    return found


@settings(max_examples=draws(200), deadline=None)
@given(data=texts, kind=kinds)
def test_a_record_is_what_stands_between_line_ends(new_store, data, kind):
    found = read(TextCorpus(path="x", document=kind), new_store(x=data), as_one_unit(x=data))
    assert found == records_of("x", kind, data)


@settings(max_examples=draws(300), deadline=None)
@given(
    one=texts,
    two=texts,
    kind=kinds,
    unit_bytes=st.integers(1, 30),
    ahead=st.integers(1, 9),
    piece=st.sampled_from([1, 2, 3, 5, 100]),
)
@example(one=b"a\r\n\r\n\r\nb\n\n\n\nc", two=b"", kind="paragraph", unit_bytes=2, ahead=1, piece=100)
@example(one=b"a\n\r", two=b"\nb", kind="line", unit_bytes=1, ahead=1, piece=100)
@example(one=b"a\n\rb", two=b"", kind="line", unit_bytes=3, ahead=1, piece=100)
@example(one=b"a\n\n\r\nb\n\n\rc", two=b"", kind="paragraph", unit_bytes=30, ahead=1, piece=1)
def test_units_of_any_size_hold_every_record_once_as_it_is_in_the_whole_file(
    new_store, one, two, kind, unit_bytes, ahead, piece
):
    store = new_store(one=one, two=two)
    corpus = TextCorpus(path="x", document=kind).model_copy(update={"unit_bytes": unit_bytes})
    units = planned(corpus, [item for item in store.list() if item.size])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_READ_AHEAD", ahead)
        patch.setattr(readers, "_PIECE_BYTES", piece)
        found = read(corpus, store, units)
    assert found == [*records_of("one", kind, one), *records_of("two", kind, two)]


@settings(max_examples=draws(60), deadline=None)
@given(lines=st.lists(st.text(max_size=5), max_size=12), unit_bytes=st.integers(1, 60), crlf=st.booleans())
def test_jsonl_of_any_text_comes_back_whatever_the_units(new_store, lines, unit_bytes, crlf):
    end = "\r\n" if crlf else "\n"
    data = "".join(json.dumps({"text": line}, ensure_ascii=False) + end for line in lines).encode()
    store = new_store(x=data)
    corpus = JsonlCorpus(path="x").model_copy(update={"unit_bytes": unit_bytes})
    found = read(corpus, store, planned(corpus, list(store.list())))
    assert [record.text for record in found] == lines


@settings(max_examples=draws(100), deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), max_size=8),
    unit_bytes=st.integers(1, 40),
    kind=st.sampled_from(["file", "line", "paragraph"]),
)
def test_units_hold_every_byte_once_and_have_the_size_that_was_asked_for(sizes, unit_bytes, kind):
    corpus = TextCorpus(path="x", document=kind).model_copy(update={"unit_bytes": unit_bytes})
    sources = [StoredObject(f"f{i}", size, "") for i, size in enumerate(sizes)]
    units = planned(corpus, sources)
    assert [unit.index for unit in units] == list(range(len(units)))
    segments = [segment for unit in units for segment in unit.segments]
    covered = [(segment.key, at) for segment in segments for at in range(segment.start, segment.stop)]
    assert covered == [(source.key, at) for source in sources for at in range(source.size)]
    for unit in units[:-1]:
        assert unit.num_bytes >= unit_bytes
    if kind == "file":
        assert len(segments) == len(sizes)
    else:
        assert all(unit.num_bytes == unit_bytes for unit in units[:-1])


def test_a_record_longer_than_its_unit_and_the_read_ahead_is_whole(new_store):
    long = b"x" * 300_000
    data = b"first\n" + long + b"\nlast"
    store, corpus = new_store(x=data), TextCorpus(path="x", document="line", unit_bytes=1024)
    found = read(corpus, store, planned(corpus, list(store.list())))
    assert [(record.offset, len(record.text)) for record in found] == [(0, 5), (6, 300_000), (300_007, 4)]


def test_a_file_that_is_one_document_is_never_cut_and_loses_its_byte_order_mark(new_store):
    text = "\ufeffone\r\n\n" + "two\n" * 2000
    store, corpus = new_store(x=text.encode(), y=b"other"), TextCorpus(path="x", unit_bytes=1024)
    found = read(corpus, store, planned(corpus, list(store.list())))
    assert found == [Document(text.removeprefix("\ufeff"), "x", 0), Document("other", "y", 0)]


def test_a_bad_byte_costs_its_own_record_only_and_is_told_by_its_place(new_store):
    data = b"good\nbad \xff one\nalso good\n"
    found = read(TextCorpus(path="x", document="line"), new_store(x=data), as_one_unit(x=data))
    assert [type(record) for record in found] == [Document, BadRecord, Document]
    assert data[found[1].offset] == 0xFF
    assert found[1].raw == b"bad \xff one"
    assert "UTF-8" in found[1].reason


BAD_LINES = [
    (rb'{"text": "\ud800"}', "not Unicode"),
    (b'{"text": 3}', "not a string"),
    (b'{"text": null}', "not a string"),
    (b'{"text": ["a"]}', "not a string"),
    (b'{"other": "a"}', "no field 'text'"),
    (b'["text"]', "no field 'text'"),
    (b'"text"', "no field 'text'"),
    (b"3", "no field 'text'"),
    (b"null", "no field 'text'"),
    (b'{"text": "cut', "not JSON"),
    (b"{", "not JSON"),
    (b"plain", "not JSON"),
    (b'{"text": "a"} {"text": "b"}', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"text": "\xff"}', "not UTF-8"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[line[:16].decode("latin1") for line, _ in BAD_LINES])
def test_a_bad_line_of_json_is_kept_with_its_reason_and_its_neighbours_are_read(new_store, line, reason):
    before_it = b'{"text": "before"}\n'
    data = before_it + line + b'\n{"text": "after", "more": 1}'
    before, bad, after = read(JsonlCorpus(path="x"), new_store(x=data), as_one_unit(x=data))
    assert (before.text, after.text) == ("before", "after")
    assert isinstance(bad, BadRecord)
    assert reason in bad.reason
    assert bad.raw == line
    assert len(before_it) <= bad.offset < len(before_it) + len(line)


def test_the_text_field_is_the_one_that_was_named_and_a_pair_of_surrogates_is_a_character(new_store):
    data = rb'{"text": "no", "body": "\ud83d\ude00"}'
    [found] = read(JsonlCorpus(path="x", record=TextRecord(field="body")), new_store(x=data), as_one_unit(x=data))
    assert found.text == "\U0001f600"


FILES = ["a.txt", "b.md", "[x].txt", "sub/a.txt", "sub/deep/a.txt", "sub/deep/c.txtx", ".hidden/a.txt", "sub/.a.txt"]
VISIBLE = [name for name in FILES if "/." not in f"/{name}"]


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("**/*", VISIBLE),
        ("**", VISIBLE),
        ("*", ["a.txt", "b.md", "[x].txt"]),
        ("*.txt", ["a.txt", "[x].txt"]),
        ("?.txt", ["a.txt"]),
        ("?.*", ["a.txt", "b.md"]),
        ("[x].txt", ["[x].txt"]),
        ("**/*.txt", ["a.txt", "[x].txt", "sub/a.txt", "sub/deep/a.txt"]),
        ("**/a.txt", ["a.txt", "sub/a.txt", "sub/deep/a.txt"]),
        ("sub/*", ["sub/a.txt"]),
        ("sub/**/*.txt", ["sub/a.txt", "sub/deep/a.txt"]),
        ("sub/**", ["sub/a.txt", "sub/deep/a.txt", "sub/deep/c.txtx"]),
        ("*/a.txt", ["sub/a.txt"]),
    ],
)
@pytest.mark.parametrize("prefix", ["", "below/here"])
def test_a_glob_chooses_files_below_the_path_and_stars_do_not_cross_folders(store, glob, expected, prefix):
    for name in FILES:
        store.put(f"{prefix}/{name}".lstrip("/"), b"x")
    store.put("below/beside.txt" if prefix else "empty.txt", b"")
    found = [
        item.key.removeprefix(f"{prefix}/" if prefix else "") for item in list_files(corpus_at(glob), store, prefix)
    ]
    assert found == sorted(expected)


def corpus_at(glob: str) -> TextCorpus:
    return TextCorpus(path="x", glob=glob)


def test_a_corpus_without_text_is_refused_by_its_path(store):
    store.put("empty.txt", b"")
    store.put("folder/.hidden", b"x")
    for glob, prefix in (("**/*", ""), ("*.md", ""), ("**/*", "folder"), ("**/*", "nowhere")):
        with pytest.raises(DataError, match=r"corpus\.path: no file matches"):
            list_files(corpus_at(glob), store, prefix)
    with pytest.raises(DataError, match=r"corpus\.path: is an empty file"):
        list_files(corpus_at("**/*"), store, "empty.txt")


def test_a_single_file_is_a_corpus_whatever_its_name_and_the_glob(store):
    store.put("folder/.notes", b"text")
    path = str(store.path("folder/.notes"))
    sources = find_source(TextCorpus(path=path, glob="*.txt"), store)
    [item] = sources.files
    assert sources.store.read(item.key) == b"text"


@pytest.mark.parametrize(("path", "problem"), [("no/such", "no such file or folder"), ("python:x", "no such text")])
def test_a_path_that_is_not_there_is_refused(store, path, problem):
    with pytest.raises(DataError, match=rf"corpus\.path: {problem}.*{path}"):
        find_source(TextCorpus(path=path), store)


def test_the_names_of_characters_are_those_not_made_from_the_code_point_in_columns_of_at_most_sixteen():
    columns = [column.split("\n") for column in unicode_names().rstrip("\n").split("\n\n")]
    assert max(len(column) for column in columns) == 16
    named = [(point, unicodedata.name(chr(point), "")) for point in range(0x110000)]
    own = [name for point, name in named if name and not name.endswith(f"-{point:X}")]
    assert [name for column in columns for name in column] == [
        name for name in own if not name.startswith("HANGUL SYLLABLE ")
    ]


def test_a_corpus_that_python_carries_is_made_once(store):
    corpus = TextCorpus(path="python:unicode-names", document="paragraph")
    first, second = find_source(corpus, store), find_source(corpus, store)
    assert first == second
    assert first.store.read(first.files[0].key).decode() == unicode_names()
