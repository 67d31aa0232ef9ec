"""Of any number of shards a bounded number is mapped, and the rows are the same."""

from pathlib import Path

import numpy as np
import pytest

from dllm_core.data import shard as shard_module
from dllm_core.data.loader import Loader, SplitReader
from dllm_core.data.manifest import corpus_prefix
from dllm_core.data.shard import OpenShards, map_shard
from dllm_core.errors import DataError


def mapped(root: Path) -> int:
    """Mappings of this process below a folder."""
    return sum(str(root) in line for line in Path("/proc/self/maps").read_text().splitlines())


def open_shards(corpus, most: int) -> OpenShards:
    return OpenShards(corpus.store, corpus_prefix(corpus.manifest.fingerprint), most)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_more_are_mapped_than_may_be_and_batches_are_the_same(small_corpus, most):
    store, manifest, mask_id = small_corpus.store, small_corpus.manifest, small_corpus.tokenizer.mask_id
    assert len(manifest.train.shards) > 5
    whole = Loader.open(store, manifest, mask_id)
    batches = [whole.batch(8 * step, 8) for step in range(2 * manifest.train.rows // 8)]
    bounded, before = Loader.open(store, manifest, mask_id), mapped(store.root)
    shards = bounded._tokens._shards
    assert all(written._shards is shards for written in bounded._written), "tokens and noise share the bound"
    shards._most = most
    for step, expected in enumerate(batches):
        batch = bounded.batch(8 * step, 8)
        assert len(shards) == most
        assert mapped(store.root) - before == most
        for name in ("x0", "xt", "t", "loss_mask"):
            assert np.array_equal(getattr(batch, name), getattr(expected, name)), name


def test_a_shard_is_hashed_once_unless_its_file_was_replaced(small_corpus, tmp_path, monkeypatch):
    hashed = []
    inner = shard_module.fetch_intact
    monkeypatch.setattr(shard_module, "fetch_intact", lambda *a: hashed.append(a[1]) or inner(*a))
    shards, infos = open_shards(small_corpus, 1), small_corpus.manifest.train.shards[:3]
    reader = SplitReader(small_corpus.store, "", infos, shards)
    rows = np.arange(sum(info.rows for info in infos))
    for _ in range(3):
        reader.read(("ids",), rows)
    assert len(hashed) == 3
    monkeypatch.setattr(shard_module, "_identity", lambda path: (0,))
    reader.read(("ids",), rows)
    assert len(hashed) == 6


def test_a_copy_that_is_dropped_before_it_is_mapped_is_fetched_again(small_corpus, tmp_path, monkeypatch):
    prefix, info = corpus_prefix(small_corpus.manifest.fingerprint), small_corpus.manifest.train.shards[0]
    data, lost = small_corpus.store.read(f"{prefix}/{info.key}"), []

    def fetched(store, key, sha256):
        """As from a cache of which another process drops the copy at once, twice."""
        copy = tmp_path / f"copy-{len(lost)}"
        if len(lost) == 2:
            copy.write_bytes(data)
        lost.append(copy)
        return copy

    monkeypatch.setattr(shard_module, "fetch_intact", fetched)
    views = map_shard(small_corpus.store, prefix, info)
    assert len(views["ids"]) == info.rows
    assert len(lost) == 3
    monkeypatch.setattr(shard_module, "fetch_intact", lambda *a: tmp_path / "never there")
    with pytest.raises(DataError, match="cannot be read"):
        map_shard(small_corpus.store, prefix, info)
