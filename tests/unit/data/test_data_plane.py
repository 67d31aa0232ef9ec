"""The whole data plane in one process: filters, duplicates, bad records, packings, mixtures, all accounted for."""

import gzip
import json
from collections import Counter
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from conftest import SmallCorpus, make_small_corpus, small_recipe, small_text

from dllm_core.data.build import is_heldout, sample_texts
from dllm_core.data.loader import Loader, Prefetcher, all_rows, split_rows
from dllm_core.data.manifest import Accounting, corpus_prefix, read_tokenizer
from dllm_core.data.readers import read_unit
from dllm_core.errors import ConfigError, DataError
from dllm_core.storage.store import LocalStore, open_store
from workflows.fan_out import serially
from workflows.preprocess import inspect
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.recipe import Recipe

POISON = (
    *(b'{"text": "\xff\xfe"}', rb'{"text": "\ud800"}', b'{"text": "cut', b'{"text": 3}', b'{"other": "x"}', b"null"),
    *(b"[" * 5000, b'{"text": ["a"]}', b'{"text": "a"} {"text": "b"}', b"plain words", b'{"text": null}', b"{}"),
)


def made(root: Path, **sections) -> SmallCorpus:
    values = small_recipe(root).model_dump(mode="json")
    corpus = sections.pop("corpus")
    values["corpus"] = {"heldout_fraction": 0.1, "unit_bytes": 2048, **corpus}
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) else section
    recipe = Recipe.checked(values)
    store = open_store("storage.root", recipe.storage.root)
    assert isinstance(store, LocalStore)
    manifest = Preprocessing(plan_corpus(recipe, store), serially).run()
    return SmallCorpus(recipe, store, manifest, read_tokenizer(store, manifest))


def quarantine_of(corpus: SmallCorpus) -> list[dict]:
    prefix = f"{corpus_prefix(corpus.manifest.fingerprint)}/quarantine"
    files = [item.key for item in corpus.store.list(prefix) if item.key.endswith(".jsonl")]
    return [json.loads(line) for key in files for line in corpus.store.read(key).splitlines()]


def texts_of(corpus: SmallCorpus) -> Counter:
    """Every document that made tokens, spelled from the shards."""
    found: Counter = Counter()
    for split in (corpus.manifest.train, corpus.manifest.heldout):
        rows = split_rows(corpus.store, corpus.manifest, split, np.arange(split.rows))
        start = 0
        for shard in split.shards:  # documents do not cross units
            at = slice(start, start + shard.rows)
            stream = rows.x0[at][rows.is_real[at]]
            start += shard.rows
            ends = np.flatnonzero(stream == corpus.tokenizer.eos_id)
            found.update(corpus.tokenizer.decode(part) for part in np.split(stream, ends + 1)[:-1])
    return found


def jsonl(folder: Path, texts: list[str], poison: tuple[bytes, ...] = ()) -> list[tuple[int, bytes]]:
    """Write the texts with the poison spread among them; the poison's offsets."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}).encode() for text in texts]
    for i, bad in enumerate(poison):
        lines.insert((i + 1) * len(lines) // (len(poison) + 2), bad)
    data = b"\n".join(lines) + b"\n"
    (folder / "a.jsonl").write_bytes(data)
    return [(data.index(b"\n" + bad + b"\n") + 1, bad) for bad in poison]


TEXTS = [f"{block} number {i}" for i, block in enumerate(small_text(300).split("\n\n"))]


def test_every_good_record_is_out_and_every_bad_one_in_quarantine_with_its_place(tmp_path):
    places = jsonl(tmp_path / "in", TEXTS, POISON)
    corpus = made(tmp_path, corpus={"type": "jsonl", "path": str(tmp_path / "in"), "max_bad_fraction": 0.1})
    assert texts_of(corpus) == Counter(TEXTS)
    kept = quarantine_of(corpus)
    assert len(kept) == len(POISON)
    for record, (offset, bad) in zip(kept, places, strict=True):
        assert offset <= record["offset"] < offset + len(bad)
        assert record["kind"] == "quarantined"
    count = corpus.manifest.accounting
    assert count.num_quarantined == len(POISON)
    assert count.documents_in == len(TEXTS) + len(POISON)


def test_too_many_bad_records_end_the_run_with_exit_3(tmp_path):
    jsonl(tmp_path / "in", TEXTS[:50], POISON)
    with pytest.raises(DataError, match=r"corpus\.max_bad_fraction: 12 of 62 records are bad") as caught:
        made(tmp_path, corpus={"type": "jsonl", "path": str(tmp_path / "in")})
    assert caught.value.exit_code == 3


def test_a_finished_corpus_is_held_to_the_bad_records_that_this_recipe_allows(tmp_path):
    jsonl(tmp_path / "in", TEXTS[:50], POISON)
    corpus = made(tmp_path, corpus={"type": "jsonl", "path": str(tmp_path / "in"), "max_bad_fraction": 0.5})
    assert plan_corpus(corpus.recipe, corpus.store).existing() == corpus.manifest
    strict = corpus.recipe.model_copy(
        update={"corpus": corpus.recipe.corpus.model_copy(update={"max_bad_fraction": 0.01})}
    )
    with pytest.raises(DataError, match=r"corpus\.max_bad_fraction: 12 of 62 records are bad, 1% are allowed"):
        plan_corpus(strict, corpus.store).existing()
    border = corpus.recipe.model_copy(
        update={"corpus": corpus.recipe.corpus.model_copy(update={"max_bad_fraction": 0.29})}
    )
    plan = plan_corpus(border, corpus.store)
    plan.check_bad(Accounting(documents_in=100, train=71, quarantined={"not JSON": 29}))
    with pytest.raises(DataError, match="30 of 100 records are bad, 29% are allowed"):
        plan.check_bad(Accounting(documents_in=100, train=70, quarantined={"not JSON": 30}))


def test_removed_records_are_shown_whatever_line_ends_their_texts_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, "axes", lambda *asked: (None, [MagicMock()]))  # a plot takes seconds to import
    monkeypatch.setattr(inspect, "svg", lambda *asked: "")
    jsonl(tmp_path / "in", [*TEXTS[:80], "a\u2028b"])
    with (tmp_path / "in" / "a.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(f'{{"text": "{text}"}}\n' for text in ("c\u2029d", "e\x85f", "g"))
    section = {"type": "jsonl", "path": str(tmp_path / "in"), "filters": [{"type": "length", "min_chars": 6}]}
    corpus = made(tmp_path, corpus={**section, "unit_bytes": 1 << 20})
    assert corpus.manifest.accounting.filtered == {"length.too_short": 4}
    assert inspect._removed(corpus.store, corpus.manifest).count("<tr>") == 4


def test_filters_and_duplicates_take_what_they_say_and_everything_is_accounted_for(tmp_path):
    near = "the quick brown fox jumps over the lazy dog and runs far away into the deep dark green forest at night " * 2
    texts = [*TEXTS, "tiny", "x", TEXTS[3], TEXTS[7], TEXTS[7], near, near + "again"]
    jsonl(tmp_path / "in", texts)
    corpus = made(
        tmp_path,
        corpus={
            "type": "jsonl",
            "path": str(tmp_path / "in"),
            "filters": [{"type": "length", "min_chars": 6}],
            "dedup": {"near": {"threshold": 0.8}},
        },
    )
    found, count = texts_of(corpus), corpus.manifest.accounting
    assert max(found.values()) == 1
    assert found[near] == 1
    assert found[near + "again"] == 0
    assert "tiny" not in found
    assert sum(count.filtered.values()) == 2
    assert count.duplicates["exact"] == 3
    assert count.duplicates["near"] >= 1
    count.check("corpus")
    assert sum(record["kind"] == "duplicates" for record in quarantine_of(corpus)) == sum(count.duplicates.values())


def test_duplicates_are_the_same_for_any_cut_into_units(tmp_path):
    jsonl(tmp_path / "in", [*TEXTS, *TEXTS[::3], *TEXTS[::5]])
    sections = {"type": "jsonl", "path": str(tmp_path / "in"), "dedup": {}}
    small, large = (made(tmp_path, corpus={**sections, "unit_bytes": n}) for n in (1024, 1 << 20))
    assert small.manifest.units > 5 > large.manifest.units
    assert texts_of(small) == texts_of(large) == Counter(set(TEXTS))


def test_a_weight_is_how_often_a_training_document_is_taken(tmp_path):
    jsonl(tmp_path / "in", TEXTS)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text("\n".join(f"line {i} of another source" for i in range(300)))
    sources = [
        {"type": "jsonl", "path": str(tmp_path / "in"), "weight": 0.5},
        {"type": "text", "document": "line", "path": str(tmp_path / "more"), "weight": 2.5},
    ]
    corpus = made(tmp_path, corpus={"type": "mixture", "sources": sources})
    found, count = texts_of(corpus), corpus.manifest.accounting
    halves = sum(found[text] for text in TEXTS)
    doubles = [n for text, n in found.items() if text.startswith("line ")]
    assert 120 < halves < 210
    assert set(doubles) <= {1, 2, 3}  # 1: held out
    assert 2.2 < np.mean([n for n in doubles if n > 1]) < 2.8
    assert count.filtered["weight"] == len(TEXTS) - halves
    count.check("corpus")


@pytest.mark.parametrize("files", ["a source each", "taking turns"])
@pytest.mark.parametrize("documents", [4, 20, 57])
def test_a_tokenizer_learns_from_all_sources_however_long_their_documents_are(tmp_path, files, documents):
    size = 5000  # bytes of a document, each a unit of its own
    for i in range(120):
        script, letters = ("latin", "abcd") if i % 2 else ("greek", "αβγδ")
        path = tmp_path / script / f"{i:03}.txt" if files == "a source each" else tmp_path / "all" / f"{i:03}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text((letters * size).encode()[:size].decode() + str(i), encoding="utf-8")
    sources = [{"type": "text", "path": str(path)} for path in sorted(tmp_path.iterdir())]
    corpus = {"type": "mixture", "unit_bytes": 2048, "heldout_fraction": 0.01, "sources": sources}
    recipe = small_recipe(tmp_path).model_dump(mode="json") | {"corpus": corpus}
    planned = plan_corpus(Recipe.checked(recipe), LocalStore(tmp_path / "storage"))
    texts = sample_texts(planned.job(), planned.units(), documents * size)
    assert len(texts) == documents
    assert abs(sum(text.startswith("a") for text in texts) - documents / 2) <= max(1, 0.1 * documents)
    every = sample_texts(planned.job(), planned.units(), 1 << 30)
    assert [text for text in every if text in set(texts)] == texts


def test_a_tokenizer_learns_from_every_document_in_their_order_if_there_are_no_more_than_it_takes(small_corpus):
    planned = plan_corpus(small_corpus.recipe, small_corpus.store)
    units, job = planned.units(), planned.job()
    records = [record for unit in units for record in read_unit(job.corpus, job.stores, unit)]
    train = [record.text for record in records if not is_heldout(record.text, job.corpus.heldout_fraction)]
    assert sample_texts(job, units, 1 << 30) == train


def chats(folder: Path) -> None:
    folder.mkdir()
    lines = []
    for i in range(120):
        turns = [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} it is"}]
        lines.append(json.dumps({"messages": turns * (1 + i % 2)}))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))


@pytest.mark.parametrize("packing", ["padded", "isolated", "wrap"])
def test_a_prompt_is_never_noised_and_never_counted(tmp_path, packing):
    chats(tmp_path / "in")
    corpus = made(
        tmp_path,
        corpus={"type": "jsonl", "path": str(tmp_path / "in"), "record": {"type": "chat"}},
        tokenizer={"vocab_size": 320, "chat": {}},
        packing={"type": packing, "seq_len": 48},
    )
    stored = Loader.open(corpus.store, corpus.manifest, corpus.tokenizer.mask_id)
    batch = stored.batch(0, 64)
    assert (batch.xt != batch.x0).any()
    assert not ((batch.xt != batch.x0) & ~batch.loss_mask).any()
    learned = Counter(batch.x0[batch.loss_mask].tolist())
    assert corpus.tokenizer.role_id("user") not in learned
    assert corpus.tokenizer.end_of_turn_id in learned
    computed = Loader.open(
        corpus.store, corpus.manifest.model_copy(update={"noise_epochs": ()}), corpus.tokenizer.mask_id
    )
    again = computed.batch(0, 64)
    assert np.array_equal(batch.xt, again.xt)
    assert np.array_equal(batch.t, again.t)
    assert (batch.segment_ids is not None) == (packing == "isolated")


@pytest.mark.parametrize("order", ["forwards", "backwards"])
@pytest.mark.parametrize("packing", ["padded", "isolated", "wrap"])
def test_beside_conversations_plain_text_counts_whole(tmp_path, monkeypatch, packing, order):
    chats(tmp_path / "chats")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.txt").write_text("\n".join(f"line {i} is plain" for i in range(120)))
    plain, chat = (
        {"type": "text", "path": str(tmp_path / "plain"), "document": "line"},
        {"type": "jsonl", "path": str(tmp_path / "chats"), "record": {"type": "chat"}},
    )
    corpus = made(
        tmp_path,
        corpus={"type": "mixture", "sources": [plain, chat] if order == "forwards" else [chat, plain]},
        tokenizer={"vocab_size": 320, "chat": {}},
        packing={"type": packing, "seq_len": 48},
    )
    store, manifest, mask_id = corpus.store, corpus.manifest, corpus.tokenizer.mask_id
    # New memory holds anything: here nothing is set, so that what nobody fills shows.
    monkeypatch.setattr(np, "empty", np.zeros)
    rows = np.random.default_rng(0).permutation(manifest.train.rows)
    found = all_rows(store, manifest, manifest.train, rows)
    is_chat = (found.x0 == corpus.tokenizer.role_id("user")).any(1)
    assert 0 < is_chat.sum() < len(rows)
    assert np.array_equal(found.is_learned[~is_chat], found.is_real[~is_chat])
    assert (found.is_learned[is_chat].sum(1) < found.is_real[is_chat].sum(1)).all()
    stored = Loader.open(store, manifest, mask_id)
    computed = Loader.open(store, manifest.model_copy(update={"noise_epochs": ()}), mask_id)
    for left, right in ((stored.batch(k, n), computed.batch(k, n)) for k, n in ((0, 64), (5, 1), (6, 2), (90, 30))):
        assert np.array_equal(left.xt, right.xt)
        assert np.array_equal(left.loss_mask, right.loss_mask)


def test_conversations_without_markers_are_refused_by_the_recipe(tmp_path):
    chats(tmp_path / "in")
    with pytest.raises(ConfigError, match=r"tokenizer\.chat: missing.*tokenizer\.chat=\{\}"):
        made(tmp_path, corpus={"type": "jsonl", "path": str(tmp_path / "in"), "record": {"type": "chat"}})


def test_a_time_a_block_is_stored_and_computed_alike(tmp_path):
    objective = {"type": "block_diffusion"}
    corpus = make_small_corpus(tmp_path, noise={"block_length": 8, "epochs": 1}, objective=objective)
    stored = Loader.open(corpus.store, corpus.manifest, corpus.tokenizer.mask_id)
    computed = Loader.open(
        corpus.store, corpus.manifest.model_copy(update={"noise_epochs": ()}), corpus.tokenizer.mask_id
    )
    left, right = stored.batch(0, 16), computed.batch(0, 16)
    assert np.array_equal(left.xt, right.xt)
    assert np.array_equal(left.t, right.t)
    blocks = left.t.reshape(16, 4, 8)
    assert (blocks == blocks[:, :, :1]).all()
    assert len(np.unique(blocks[:, :, 0])) == 64


def test_noise_computed_stores_nothing_and_gives_the_same_batches(tmp_path, small_corpus):
    root = tmp_path / "computed"
    (root / "corpus").mkdir(parents=True)
    (root / "corpus" / "names.txt").write_text(small_text(), encoding="utf-8")
    values = {**small_recipe(root).model_dump(mode="json"), "noise": "computed"}
    recipe = Recipe.checked(values)
    store = LocalStore(root / "storage")
    manifest = Preprocessing(plan_corpus(recipe, store), serially).run()
    assert manifest.noise_epochs == ()
    assert not list(store.list(f"{corpus_prefix(manifest.fingerprint)}/noise"))
    mask_id = small_corpus.tokenizer.mask_id
    left = Loader.open(store, manifest, mask_id).batch(0, 32)
    right = Loader.open(small_corpus.store, small_corpus.manifest, mask_id).batch(0, 32)
    assert np.array_equal(left.xt, right.xt)


def test_reading_ahead_changes_no_batch(small_corpus):
    plain = Loader.open(small_corpus.store, small_corpus.manifest, small_corpus.tokenizer.mask_id)
    ahead = Prefetcher(plain)
    for counter in (0, 8, 16, 64, 72, 0):
        left, right = plain.batch(counter, 8, 1, 2), ahead.batch(counter, 8, 1, 2)
        assert np.array_equal(left.xt, right.xt)
        assert np.array_equal(left.x0, right.x0)
