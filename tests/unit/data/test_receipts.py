"""What is done is found by listing, on S3 in a request for a thousand files and one for each receipt, some at once."""

import threading
from collections import Counter

import pytest
from conftest import small_recipe, small_text
from s3_server import new_bucket, s3_server

from dllm_core.data.receipts import DECISIONS, SIGNATURES, TOKENS, noise_step
from dllm_core.storage.s3 import S3Store
from dllm_core.storage.store import READERS, LocalStore, open_store, read_each
from workflows.fan_out import serially
from workflows.preprocess.flow import Preprocessing, plan_corpus


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("cache")) as server:
        yield server


def preprocessing(tmp_path, root: str) -> Preprocessing:
    """Of some units, with duplicates and two epochs of noise."""
    if not (tmp_path / "corpus").exists():
        (tmp_path / "corpus").mkdir()
        (tmp_path / "corpus" / "names.txt").write_text(small_text(120))
    section = {"dedup": {}, "unit_bytes": 1024 if "://" not in root else 2048}
    recipe = small_recipe(tmp_path, corpus=section, storage={"root": root})
    return Preprocessing(plan_corpus(recipe, open_store("storage.root", root)), serially)


def calls_of(monkeypatch) -> Counter:
    """Counts what is asked of every S3 store from now on, by verb."""
    calls: Counter = Counter()
    inner = S3Store._call
    read = S3Store._get

    def call(self, verb, key, **arguments):
        calls[verb] += 1
        return inner(self, verb, key, **arguments)

    def get(self, key, **arguments):
        calls["get_object"] += 1
        return read(self, key, **arguments)

    monkeypatch.setattr(S3Store, "_call", call)
    monkeypatch.setattr(S3Store, "_get", get)
    return calls


def test_a_rerun_reads_each_receipt_and_asks_for_no_file(server, tmp_path, monkeypatch):
    root = f"s3://{new_bucket()}/some/where"
    first = preprocessing(tmp_path, root)
    manifest = first.run()
    store, prefix = first.plan.store, f"corpora/{first.plan.fingerprint}"
    store.delete(f"{prefix}/manifest.json")
    before, calls = server.requests, calls_of(monkeypatch)
    again = preprocessing(tmp_path, root)
    assert again.run() == manifest
    assert again.ran == 0
    receipts = 5 * manifest.units  # signatures, decisions, tokens and two epochs of noise
    listings = 8  # five folders of receipts, of which two share their files' folder
    assert manifest.units > 3
    assert calls["list_objects_v2"] <= listings + 1
    assert calls["get_object"] <= receipts + 2
    assert calls["head_object"] <= 2
    assert server.requests - before <= receipts + listings + 15


def test_a_first_run_asks_nothing_unit_by_unit_before_its_first_task(server, tmp_path, monkeypatch):
    work, calls = preprocessing(tmp_path, f"s3://{new_bucket()}"), calls_of(monkeypatch)
    for steps in ((TOKENS,), (SIGNATURES, DECISIONS), (noise_step(0), noise_step(1))):
        assert work.plan.job().receipts.all_finished(*steps) == [{} for _ in steps]
    assert calls == {"list_objects_v2": 5}


def test_all_are_found_as_one_by_one_also_where_receipts_and_files_are_damaged(tmp_path):
    work = preprocessing(tmp_path, str(tmp_path / "storage"))
    manifest, receipts, store = work.run(), work.plan.job().receipts, work.plan.store
    shards = manifest.train.shards
    for index, change in enumerate(
        (
            lambda key: store.delete(key),
            lambda key: store.put(key, store.read(key)[:-1]),
            lambda key: store.put(key, store.read(key) + b"x"),
        )
    ):
        change(f"{receipts.prefix}/{shards[index].key}")
        change(f"{receipts.prefix}/{noise_step(1).key(shards[index + 3].unit)}")
    store.put(f"{receipts.prefix}/receipts/tokens/notes.txt", b"of no unit")
    for step in (TOKENS, SIGNATURES, DECISIONS, noise_step(0), noise_step(1)):
        units = range(manifest.units)
        for found, one in (
            (receipts.of_all(step), receipts.of),
            (receipts.all_finished(step)[0], receipts.finished),
        ):
            assert found == {u: receipt for u in units if (receipt := one(step, u)) is not None}
            assert len(found) == manifest.units - 3 * ((step, one) == (TOKENS, receipts.finished)) - 3 * (
                step == noise_step(1)
            )


def test_objects_are_read_in_order_so_many_at_once_and_one_that_went_is_none(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    keys = [f"{i:03d}" for i in range(3 * READERS)]
    for key in keys:
        store.put(key, key.encode())
    store.delete(keys[5])
    together, most, turn = 0, 0, threading.Lock()
    all_in = threading.Barrier(READERS)
    read = LocalStore.read

    def slow(self, key, *span):
        nonlocal together, most
        with turn:
            together += 1
            most = max(most, together)
        all_in.wait(timeout=20)  # none goes on before so many are at it
        try:
            return read(self, key, *span)
        finally:
            with turn:
                together -= 1

    monkeypatch.setattr(LocalStore, "read", slow)
    monkeypatch.setattr("dllm_core.storage.store._KEYS_AT_ONCE", 2 * READERS)
    found = list(read_each(store, keys))
    assert found == [None if i == 5 else key.encode() for i, key in enumerate(keys)]
    assert most == READERS
