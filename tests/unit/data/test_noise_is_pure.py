"""A pre-noised file is a pure function written down: for any workers, order, restart or recomputation."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import SmallCorpus, make_small_corpus

from dllm_core.data.loader import Loader
from dllm_core.data.manifest import corpus_prefix
from dllm_core.errors import DataError
from workflows.fan_out import serially
from workflows.preprocess.flow import Preprocessing, plan_corpus


def scrambled_by_four(function, items, *, workers, on_done=lambda done, result: None, demand=None):
    """Four workers at once, last item first."""
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(function, list(items)[::-1]))[::-1]
    for done, result in enumerate(results, 1):
        on_done(done, result)
    return results


def shard_bytes(corpus: SmallCorpus) -> dict[str, bytes]:
    prefix = corpus_prefix(corpus.manifest.fingerprint)
    return {
        item.key.removeprefix(prefix): corpus.store.read(item.key)
        for item in corpus.store.list(prefix)
        if item.key.endswith((".arrow", "manifest.json"))
    }


def test_shards_from_one_and_from_four_workers_are_byte_identical(tmp_path):
    corpus = make_small_corpus(tmp_path)
    alone = shard_bytes(corpus)
    for item in list(corpus.store.list(corpus_prefix(corpus.manifest.fingerprint))):
        corpus.store.delete(item.key)
    Preprocessing(plan_corpus(corpus.recipe, corpus.store), scrambled_by_four).run()
    assert shard_bytes(corpus) == alone
    assert len(alone) > 10


def test_a_batch_recomputed_on_the_fly_equals_the_stored_one_bit_for_bit(small_corpus):
    manifest, mask_id = small_corpus.manifest, small_corpus.tokenizer.mask_id
    stored = Loader.open(small_corpus.store, manifest, mask_id)
    computed = Loader.open(small_corpus.store, manifest.model_copy(update={"noise_epochs": ()}), mask_id)
    assert len(manifest.noise_epochs) == 2
    for counter in range(0, 2 * manifest.train.rows, 16):
        left, right = stored.batch(counter, 16), computed.batch(counter, 16)
        assert np.array_equal(left.xt, right.xt)
        assert np.array_equal(left.t, right.t)


def test_the_next_epoch_has_noise_of_its_own(small_corpus):
    loader = Loader.open(small_corpus.store, small_corpus.manifest, small_corpus.tokenizer.mask_id)
    noise = loader._noise
    ids = np.arange(small_corpus.manifest.train.rows)
    x0 = np.zeros((len(ids), 32), np.int64) + 5
    drawn = [noise.corrupt(epoch, ids, x0) for epoch in range(3)]
    for (left, left_t), (right, right_t) in itertools.combinations(drawn, 2):
        assert (left != right).mean() > 0.2
        assert (left_t == right_t).mean() < 0.05


def test_more_epochs_of_noise_read_no_token_and_leave_earlier_files_as_they_are(tmp_path):
    corpus = make_small_corpus(tmp_path, noise={"epochs": 1})
    before = {key: data for key, data in shard_bytes(corpus).items() if key.endswith(".arrow")}
    grown = corpus.recipe.model_copy(update={"noise": corpus.recipe.noise.model_copy(update={"epochs": 3})})
    tokens = {key: data for key, data in before.items() if "/tokens/" in key}
    prefix = corpus_prefix(corpus.manifest.fingerprint)
    for key, data in tokens.items():  # as long as they were, and nothing that could be read
        corpus.store.put(f"{prefix}{key}", bytes(len(data)))
    work = Preprocessing(plan_corpus(grown, corpus.store), serially)
    manifest = work.run()
    for key, data in tokens.items():
        corpus.store.put(f"{prefix}{key}", data)
    after = shard_bytes(corpus)
    assert manifest.fingerprint == corpus.manifest.fingerprint
    assert before.items() <= after.items()
    assert work.ran == 2 * len(manifest.train.shards)


def test_a_finished_corpus_runs_no_task_again(tmp_path):
    corpus = make_small_corpus(tmp_path)
    work = Preprocessing(plan_corpus(corpus.recipe, corpus.store), serially)
    work.run()
    assert work.ran == 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_shard_is_refused_by_name(tmp_path, damage):
    corpus = make_small_corpus(tmp_path)
    path = corpus.store.path(f"{corpus_prefix(corpus.manifest.fingerprint)}/{corpus.manifest.train.shards[0].key}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-8])
    loader = Loader.open(corpus.store, corpus.manifest, corpus.tokenizer.mask_id)
    with pytest.raises(DataError, match=path.name):
        loader.batch(0, corpus.manifest.train.rows)


def test_every_record_is_accounted_for_and_the_splits_are_disjoint(small_corpus):
    accounting = small_corpus.manifest.accounting
    accounting.check("all")
    assert accounting.documents_in == 120
    assert accounting.heldout > 2
