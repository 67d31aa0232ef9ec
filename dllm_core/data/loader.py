"""Loader: manifest + order -> Batch. Its whole state is one sample counter, so resuming is passing a number.

Rank r of W reads rows [r B/W, (r+1) B/W) of every batch: world size changes who reads a row, never which.
"""

from bisect import bisect_right
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dllm_core.data.batch import Batch
from dllm_core.data.manifest import CorpusManifest, Split, corpus_prefix
from dllm_core.data.noising import CorpusNoise, unpack_bits
from dllm_core.data.order import SampleOrder
from dllm_core.data.shard import ShardInfo, map_shard
from dllm_core.seeding import Ints
from dllm_core.storage.store import Store


class SplitReader:
    """Random access to the rows of one split; a shard is mapped and its sha256 checked when first touched."""

    def __init__(self, store: Store, prefix: str, shards: tuple[ShardInfo, ...]) -> None:
        self._store, self._prefix, self._shards = store, prefix, shards
        self._first_rows = [0, *accumulate(shard.rows for shard in shards)]
        self._mapped: dict[int, dict[str, NDArray[Any]]] = {}

    def read(self, columns: tuple[str, ...], rows: Ints) -> tuple[NDArray[Any], ...]:
        """The named columns at global row ids [N], each [N] or [N K], in the order asked for."""
        parts = [self._row(int(row)) for row in rows]
        return tuple(np.stack([views[column][at] for views, at in parts]) for column in columns)

    def _row(self, row: int) -> tuple[dict[str, NDArray[Any]], int]:
        shard = bisect_right(self._first_rows, row) - 1
        if shard not in self._mapped:
            self._mapped[shard] = map_shard(self._store, self._prefix, self._shards[shard])
        return self._mapped[shard], row - self._first_rows[shard]


def heldout_rows(store: Store, manifest: CorpusManifest) -> tuple[Ints, NDArray[np.bool_]]:
    """All held-out rows: ids int64 [N L] and which tokens count, bool [N L]; N may be 0."""
    if not manifest.heldout.rows:
        nothing = np.empty((0, manifest.seq_len), dtype=np.int64)
        return nothing, nothing.astype(bool)
    return _read_tokens(reader(store, manifest, manifest.heldout), np.arange(manifest.heldout.rows), manifest.seq_len)


def reader(store: Store, manifest: CorpusManifest, split: Split) -> SplitReader:
    """Row access to one split of a corpus."""
    return SplitReader(store, corpus_prefix(manifest.fingerprint), split.shards)


def _read_tokens(source: SplitReader, rows: Ints, seq_len: int) -> tuple[Ints, NDArray[np.bool_]]:
    ids, counts = source.read(("ids", "num_tokens"), rows)
    return ids.astype(np.int64), np.arange(seq_len) < counts[:, None]


class Loader:
    """Batches of the training split with their noise, read where it was written down and computed where not."""

    def __init__(self, store: Store, manifest: CorpusManifest, noise: CorpusNoise) -> None:
        self._tokens = reader(store, manifest, manifest.train)
        prefix = corpus_prefix(manifest.fingerprint)
        self._written = [SplitReader(store, prefix, shards) for shards in manifest.noise_epochs]
        self._noise, self._seq_len = noise, manifest.seq_len

    @classmethod
    def open(cls, store: Store, manifest: CorpusManifest, mask_id: int) -> "Loader":
        """The loader of a finished corpus."""
        return cls(store, manifest, corpus_noise(manifest, mask_id))

    def batch(self, counter: int, rows: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Rank's share of the global batch of `rows` rows that starts at sample `counter`."""
        counters = counter + np.arange(rank * rows // world_size, (rank + 1) * rows // world_size, dtype=np.int64)
        epochs, ids = self._noise.order.samples(counters)
        x0, loss_mask = _read_tokens(self._tokens, ids, self._seq_len)
        xt = np.empty_like(x0)
        t = np.empty(len(ids), dtype=np.float32)
        for epoch in np.unique(epochs):
            at = epochs == epoch
            xt[at], t[at] = self._noised(int(epoch), ids[at], x0[at])
        return Batch(x0=x0, xt=xt, t=np.repeat(t[:, None], self._seq_len, axis=1), loss_mask=loss_mask)

    def _noised(self, epoch: int, ids: Ints, x0: Ints) -> tuple[Ints, NDArray[np.float32]]:
        if epoch >= len(self._written):
            return self._noise.corrupt(epoch, ids, x0)
        t, bits = self._written[epoch].read(("t", "is_noised"), ids)
        return np.where(unpack_bits(bits, self._seq_len), self._noise.process.prior(x0), x0), t


def corpus_noise(manifest: CorpusManifest, mask_id: int) -> CorpusNoise:
    """The noise function of a corpus."""
    order = SampleOrder(manifest.seed, manifest.train.rows)
    return CorpusNoise(manifest.process.bind(mask_id), order, manifest.t_min)
