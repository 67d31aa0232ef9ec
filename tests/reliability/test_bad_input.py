"""One record in a hundred is poison: every good one is out, every bad one in quarantine by its byte, all adds up."""

import base64
import json
import random
import subprocess
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SmallCorpus, small_recipe
from survival import SERIAL, corpus_folder, hashes, write_recipe

from dllm_core.data import build
from dllm_core.data.loader import split_rows
from dllm_core.data.manifest import read_tokenizer
from dllm_core.errors import DataError
from dllm_core.storage.store import LocalStore
from workflows.fan_out import serially
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.recipe import Recipe

DEEP = b"[" * 20_000 + b"]" * 20_000
MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Case:
    """A record as it stands in a file. text: what is read of it; of a bad one the reason, and where in it that is."""

    raw: bytes
    text: str | None = None
    reason: str = ""
    bad_at: int = 0


def spelled(text: str) -> Case:
    return Case(json.dumps({"text": text}, ensure_ascii=False).encode(), text)


def bad(raw: bytes, reason: str, bad_at: int = 0) -> Case:
    return Case(raw, None, reason, bad_at)


START, CONTINUATION = "not UTF-8 (invalid start byte)", "not UTF-8 (invalid continuation byte)"
NO_FIELD, NO_STRING, NO_UNICODE = "no field 'text'", "'text' is not a string", "'text' is not Unicode"
JSONL = [
    bad(b'{"text": "a\xff"}', START, 11),
    bad(b'{"text": "\xc0\x80"}', START, 10),  # an overlong NUL
    bad(b'{"text": "\xed\xa0\x80"}', CONTINUATION, 10),  # a surrogate
    bad(b'{"text": "\xf4\x90\x80\x80"}', CONTINUATION, 10),  # beyond U+10FFFF
    bad(b'{"text": "ab\xe2\x82', "not UTF-8 (unexpected end of data)", 12),
    bad(rb'{"text": "\ud800 x"}', NO_UNICODE),
    bad(rb'{"text": "\ude00\ud83d"}', NO_UNICODE),
    bad(b'{"text": "a\x00b"}', "not JSON"),  # JSON wants \u0000
    bad(b'{"text": "a\tb"}', "not JSON"),
    bad(b'{"text": "cut', "not JSON"),
    bad(b'{"text": "a"} {"text": "b"}', "not JSON"),
    bad(b'{"text": ' + DEEP + b"}", "not JSON"),
    bad(b'{"text": "a", "more": ' + DEEP + b"}", "not JSON"),
    bad(b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
    bad(MARK + b'{"text": "a"}', "not JSON"),  # a byte order mark that opens no file
    bad(b"{'text': 'a'}", "not JSON"),
    bad(b"plain words", "not JSON"),
    bad(b'{"text": 3}', NO_STRING),
    bad(b'{"text": NaN}', NO_STRING),
    bad(b'{"text": null}', NO_STRING),
    bad(b'{"text": ["a"]}', NO_STRING),
    bad(b'{"text": {"text": "a"}}', NO_STRING),
    bad(b'{"text": "first", "text": "last"}', "'text' is there twice"),
    bad(b'{"other": "a"}', NO_FIELD),
    bad(b"{}", NO_FIELD),
    bad(b'["text"]', NO_FIELD),
    bad(b'"text"', NO_FIELD),
    bad(b"null", NO_FIELD),
]
ODD_JSONL = [  # odd, and what the format allows
    Case(b'{"text": "beside two", "more": 1, "more": 2}', "beside two"),
    Case(rb'{"text": "a\u0000b"}', "a\0b"),
    Case(rb'{"text": "\ud83d\ude00"}', "\U0001f600"),
    Case(b'{"text": "beside NaN", "score": NaN}', "beside NaN"),
    Case(rb'{"text": "beside half a pair", "more": "\ud800"}', "beside half a pair"),
    Case(b'  {"text" : "spaces"}\t ', "spaces"),
    spelled("a\u2028b\u2029c\x85d\x0be\x0cf"),
    spelled("a\nb\r\nc\r"),
    spelled("<|mask|><|eos|><|pad|>"),
    spelled("\ufffe\uffff\U0010ffff\ufffd\u202e\u200b"),
    spelled(""),
    spelled(" \t\u3000"),
    Case(b" \t ", " \t "),
]
TEXT = [
    bad(b"one \xfe two", START, 4),
    bad(b"\x80 begins", START),
    bad(b"one \xc0\xaf", START, 4),
    bad(b"one \xed\xbf\xbf", CONTINUATION, 4),
    bad(b"one \xf4\x90\x80\x80", CONTINUATION, 4),
    bad(b"ends in \xf0\x9f\x98", "not UTF-8 (unexpected end of data)", 8),
]
ODD_TEXT = [
    Case(raw, raw.decode()) for raw in (b"a\x00b", "a\u2028b\x85c".encode(), b"{", b" x ", MARK + b"y", b" \t ")
]


@dataclass(frozen=True)
class File:
    """What stands in one file: (offset, record) in order."""

    name: str
    cases: list[tuple[int, Case]]
    data: bytes

    @classmethod
    def of(cls, name: str, cases: list[Case], rng: random.Random) -> "File":
        """The records in random order behind a byte order mark, with line ends of every kind."""
        order = [cases[0], *rng.sample(cases[1:], len(cases) - 1)]
        order[0] = Case(MARK + order[0].raw, order[0].text)
        data, placed = bytearray(), []
        for case in order:
            placed.append((len(data), case))
            data += case.raw + rng.choice([b"\n", b"\r\n", b"\n\n", b"\n\r\n"])
        return cls(name, placed, bytes(data))


def mixture(kind: str, name: str, size: int, seed: int, extra: tuple[Case, ...] = ()) -> File:
    """`size` good records, of which some come twice, one in a hundred bad."""
    rng = random.Random(seed)
    texts = [f"{name} record {i} é {rng.getrandbits(64):x}" for i in range(size)]
    texts += [texts[rng.randrange(size)] for _ in range(size // 50)]
    poison, odd = (JSONL, ODD_JSONL) if kind == "jsonl" else (TEXT, ODD_TEXT)
    cases = [spelled(text) if kind == "jsonl" else Case(text.encode(), text) for text in texts]
    bad_ones = [poison[(i + seed * (size // 100)) % len(poison)] for i in range(size // 100)]
    return File.of(name, [*cases, *odd, *bad_ones, *extra], rng)


def recipe_over(root: Path, files: list[File], **corpus: object) -> Recipe:
    (root / "corpus").mkdir(exist_ok=True)
    for file in files:
        (root / "corpus" / file.name).write_bytes(file.data)
    section = {"path": str(root / "corpus"), "unit_bytes": 1 << 16, "heldout_fraction": 0.1, "dedup": {}, **corpus}
    values = {**small_recipe(root).model_dump(mode="json"), "corpus": section, "noise": {"epochs": 1}}
    return Recipe.checked(values)


def made(recipe: Recipe) -> SmallCorpus:
    store = LocalStore(Path(recipe.storage.root))
    manifest = Preprocessing(plan_corpus(recipe, store), serially).run()
    return SmallCorpus(recipe, store, manifest, read_tokenizer(store, manifest))


def texts_in(corpus: SmallCorpus) -> Counter[str]:
    """Every document that made tokens, spelled from the shards."""
    found: Counter[str] = Counter()
    for split in (corpus.manifest.train, corpus.manifest.heldout):
        rows = split_rows(corpus.store, corpus.manifest, split, np.arange(split.rows))
        start = 0
        for shard in split.shards:  # documents do not cross units
            at = slice(start, start := start + shard.rows)
            stream = rows.x0[at][rows.is_real[at]]
            ends = np.flatnonzero(stream == corpus.tokenizer.eos_id)
            found.update(corpus.tokenizer.decode(part) for part in np.split(stream, ends + 1)[:-1])
    return found


def quarantined(corpus: SmallCorpus) -> list[dict]:
    """What is in quarantine as bad."""
    files = sorted(corpus_folder(corpus.store.root).glob("quarantine/*.jsonl"))
    kept = [json.loads(line) for path in files for line in path.open("rb")]
    return [item for item in kept if item["kind"] == "quarantined"]


def check(corpus: SmallCorpus, files: list[File]) -> str:
    """All that is promised of these records, unit by unit, from what is on disk; a line that says so."""
    folder = corpus_folder(corpus.store.root)
    receipts = [json.loads(path.read_bytes())["accounting"] for path in sorted(folder.glob("receipts/tokens/*.json"))]
    units = plan_corpus(corpus.recipe, corpus.store).units()
    places: list[tuple[str, int, str, bytes]] = []
    seen: Counter[str] = Counter()
    for unit, count in zip(units, receipts, strict=True):
        expected: dict[str, Counter[str]] = {kind: Counter() for kind in ("filtered", "duplicates", "quarantined")}
        records = kept = 0
        for segment in unit.segments:
            [file] = [file for file in files if file.name == segment.key]
            first, last = (bisect_left(file.cases, at, key=itemgetter(0)) for at in (segment.start, segment.stop))
            records += last - first
            for offset, case in file.cases[first:last]:
                if case.text is None:
                    places.append((file.name, offset + case.bad_at, case.reason, case.raw))
                    expected["quarantined"][case.reason.partition(" (")[0]] += 1
                elif not case.text.strip():
                    expected["filtered"]["empty"] += 1
                elif case.text in seen:
                    expected["duplicates"]["exact"] += 1
                else:
                    seen[case.text] += 1
                    kept += 1
        assert (
            count["documents_in"]
            == records
            == count["train"] + count["heldout"] + sum(sum(count[kind].values()) for kind in expected)
        )
        assert count["train"] + count["heldout"] == kept
        assert {kind: Counter(count[kind]) for kind in expected} == expected
    assert texts_in(corpus) == seen
    found = [(r["key"], r["offset"], r["reason"], base64.b64decode(r["raw"])) for r in quarantined(corpus)]
    assert sorted(found) == sorted(places)
    records = sum(len(file.cases) for file in files)
    assert corpus.manifest.accounting.documents_in == records
    kinds = len({raw for *_, raw in places})
    return f"{records} records in {len(units)} units, {len(places)} bad of {kinds} kinds: every one where it belongs"


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_every_good_record_is_out_and_every_bad_one_in_quarantine_by_its_byte(tmp_path, kind):
    long = Case(b"x" * 2_000_000 + b"\xff", None, START, 2_000_000)
    files = [mixture(kind, f"{name}.jsonl", 1400, seed, (long,) * seed) for seed, name in enumerate("ab")]
    section = {"type": kind} if kind == "jsonl" else {"type": kind, "document": "line"}
    check(made(recipe_over(tmp_path, files, max_bad_fraction=0.02, **section)), files)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_row_of_a_table_that_is_no_text_costs_no_neighbour(tmp_path, kind):
    values: list[bytes | None] = [b"row %d of a table" % i for i in range(400)]
    places = {5: b"one \xff", 150: b"\x80", 151: b"\xed\xa0\x80", 399: b"two \xc0\x80"}
    for row, raw in places.items():
        values[row] = raw
    values[77] = None
    unchecked = pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())
    table = pa.table({"text": unchecked})
    (tmp_path / "corpus").mkdir()
    if kind == "parquet":
        pq.write_table(table, tmp_path / "corpus" / "a.parquet", row_group_size=150)
    else:
        with pa.ipc.new_file(tmp_path / "corpus" / "a.arrow", table.schema) as sink:
            sink.write_table(table, max_chunksize=150)
    corpus = made(recipe_over(tmp_path, [], type=kind, max_bad_fraction=0.02))
    kept = {item["offset"]: item for item in quarantined(corpus)}
    assert {row: base64.b64decode(kept[row]["raw"]) for row in places} == places
    assert kept.keys() == {*places, 77}
    good = [value.decode() for row, value in enumerate(values) if value is not None and row not in places]
    assert texts_in(corpus) == Counter(good)
    assert corpus.manifest.accounting.documents_in == len(values)


def test_a_row_group_that_cannot_be_read_counts_with_all_its_rows(tmp_path):
    texts, path = [f"row {i} of a table" for i in range(400)], tmp_path / "corpus" / "a.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100)
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    data, begin = bytearray(path.read_bytes()), column.dictionary_page_offset
    data[begin : begin + 64] = bytes(64)
    path.write_bytes(data)
    recipe = recipe_over(tmp_path, [], type="parquet")
    with pytest.raises(DataError, match="100 of 400 records are bad"):
        made(recipe)
    corpus = made(recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"max_bad_fraction": 1})}))
    assert [item["offset"] for item in quarantined(corpus)] == list(range(200, 300))
    assert texts_in(corpus) == Counter([*texts[:200], *texts[300:]])


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_lines_of_fifty_megabytes_and_one_percent_of_poison_cost_no_neighbour(tmp_path, kind):
    words = "fifty megabytes " * 3_200_000
    lines = (bad(b"9" * 50_000_000, "not JSON"), spelled(words)) if kind == "jsonl" else (
        bad(b"x" * 50_000_000 + b"\xff", START, 50_000_000), Case(words.encode(), words)
    )  # fmt: skip
    files = [mixture(kind, f"{name}.jsonl", 20_000, seed, lines * seed) for seed, name in enumerate("ab")]
    section = {"type": kind} if kind == "jsonl" else {"type": kind, "document": "line"}
    section |= {"unit_bytes": 1 << 16, "max_bad_fraction": 0.02}
    print(f"\nbad {kind}: {check(made(recipe_over(tmp_path, files, **section)), files)}")


def test_too_many_bad_records_end_with_exit_3_and_one_line_and_cost_no_task_when_they_are_allowed(tmp_path):
    file = mixture("jsonl", "a.jsonl", 1000, 0)
    recipe = recipe_over(tmp_path, [file], type="jsonl", max_bad_fraction=0.001)
    words = [*SERIAL, write_recipe(tmp_path / "strict.yaml", recipe)]
    told = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr.count("\n")) == (3, 1)
    assert told.stderr.startswith(f"dllm: corpus.max_bad_fraction: 10 of {len(file.cases)} records are bad, ")
    folder = corpus_folder(tmp_path / "storage")
    assert not (folder / "manifest.json").exists()
    tokens = hashes(folder / "tokens")
    allowed = recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"max_bad_fraction": 1})})
    assert made(allowed).manifest.accounting.num_quarantined == 10
    assert hashes(folder / "tokens") == tokens


def test_a_sum_that_is_broken_ends_with_exit_3_before_there_is_a_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_counted", lambda removed, kind: {})  # what was removed is forgotten
    recipe = recipe_over(tmp_path, [mixture("jsonl", "a.jsonl", 200, 0)], type="jsonl")
    with pytest.raises(DataError, match=r"unit 0: \d+ records in but \d+ accounted for") as caught:
        made(recipe)
    assert caught.value.exit_code == 3
    assert not (corpus_folder(tmp_path / "storage") / "manifest.json").exists()
