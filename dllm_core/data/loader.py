"""Loader: manifest + order -> Batch. Its whole state is one sample counter, so resuming is passing a number.

Rank r of W reads rows [r B/W, (r+1) B/W) of every batch: world size changes who reads a row, never which.
"""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dllm_core.data.batch import Batch
from dllm_core.data.manifest import CorpusManifest, Split, corpus_prefix, first_rows
from dllm_core.data.noising import CorpusNoise, token_flags
from dllm_core.data.order import SampleOrder
from dllm_core.data.packing import PairsPacking, WrapPacking
from dllm_core.data.shard import OpenShards, ShardInfo
from dllm_core.seeding import Bools, Floats, Ints
from dllm_core.storage.store import Store

_ORDER_AHEAD = 1 << 13
_LOOKED_THROUGH = 1 << 16  # tokens at once, for an end token among them
_ALL = 0xFF  # a byte of set flags


class SplitReader:
    """Random access to the rows of one split; of its shards the `shards.most` used last are mapped."""

    def __init__(
        self, store: Store, prefix: str, infos: tuple[ShardInfo, ...], shards: OpenShards | None = None
    ) -> None:
        self._infos, self._shards = infos, OpenShards(store, prefix) if shards is None else shards
        self._first_rows = np.array(first_rows(infos), np.int64)

    def read(self, columns: tuple[str, ...], rows: Ints) -> dict[str, NDArray[Any]]:
        """Those of the columns that are stored, at global row ids [N]: each [N] or [N K], in the order asked for.

        `is_learned` is all set in rows of shards without it: plain text that is mixed with conversations.
        """
        shard_of = np.searchsorted(self._first_rows, rows, side="right") - 1
        result: dict[str, NDArray[Any]] = {}
        for shard in np.unique(shard_of).tolist():
            views, at = self._shards.views(self._infos[shard]), shard_of == shard
            local = rows[at] - self._first_rows[shard]
            for name in columns:
                if name in views:
                    if name not in result:
                        shape, dtype = (len(rows), *views[name].shape[1:]), views[name].dtype
                        # Every other column stands in all shards of a corpus or in none.
                        result[name] = np.full(shape, _ALL, dtype) if name == "is_learned" else np.empty(shape, dtype)
                    result[name][at] = views[name][local]
        return result


class TokenRows:
    """Rows for a denoiser: x0 int64 [N L]; is_real, is_learned bool [N L]; segment_ids int32 [N L] or None.

    is_noisable: what noise may change, bool [N L], as the flags are stored: filler of plain text too. None: all.
    """

    def __init__(self, source: SplitReader, seq_len: int, rows: Ints) -> None:
        read = source.read(("ids", "num_tokens", "starts", "is_learned"), rows)
        self.x0: Ints = read["ids"].astype(np.int64) if len(rows) else np.empty((0, seq_len), np.int64)
        counts = read["num_tokens"] if len(rows) else np.empty(0, np.int32)
        self.is_real: Bools = np.arange(seq_len) < counts[:, None]
        flags = token_flags(read, seq_len)
        self.is_noisable = flags.get("is_learned")
        self.has_prompt = self.is_noisable is not None
        self.is_learned: Bools = self.is_real if self.is_noisable is None else self.is_real & self.is_noisable
        self.starts = flags.get("starts")
        self.segment_ids: NDArray[np.int32] | None = None
        if self.starts is not None:
            self.segment_ids = np.cumsum(self.starts, axis=1, dtype=np.int32)


def split_rows(store: Store, manifest: CorpusManifest, split: Split, rows: Ints) -> TokenRows:
    """Rows [N] of a split, as they are scored: of pairs the rejected answers, with their prompts, are filler."""
    tokens = all_rows(store, manifest, split, rows)
    if isinstance(manifest.packing, PairsPacking):
        assert tokens.segment_ids is not None
        tokens.is_real &= tokens.segment_ids == tokens.segment_ids[:, :1]
        tokens.is_learned &= tokens.is_real
    return tokens


def all_rows(store: Store, manifest: CorpusManifest, split: Split, rows: Ints) -> TokenRows:
    """Rows [N] of a split as they are stored."""
    return TokenRows(reader(store, manifest, split), manifest.seq_len, rows)


def documents_of(store: Store, manifest: CorpusManifest, split: Split, rows: Ints, eos_id: int) -> Ints:
    """Which document stands in the middle of each of these rising rows: numbers [N], equal where it is the same one.

    Documents that stand end to end tell it, by the end tokens between two middles. Elsewhere each row has a number of
    its own: nothing says which of the rows belong together that an isolated document was cut into.
    """
    if not isinstance(manifest.packing, WrapPacking):
        return np.arange(len(rows))
    source, length = reader(store, manifest, split), manifest.seq_len
    at_once = max(1, _LOOKED_THROUGH // length)

    def is_another(first: int, last: int) -> bool:
        for start in range(first, last + 1, at_once):
            stop = min(start + at_once, last + 1)
            is_end = source.read(("ids",), np.arange(start, stop))["ids"] == eos_id
            is_end[0, : length // 2 if start == first else 0] = False
            is_end[-1, length // 2 if stop > last else length :] = False
            if is_end.any():
                return True
        return False

    return np.cumsum([0, *(is_another(a, b) for a, b in pairwise(rows.tolist()))])[: len(rows)]


def reader(store: Store, manifest: CorpusManifest, split: Split) -> SplitReader:
    """Row access to one split of a corpus."""
    return SplitReader(store, corpus_prefix(manifest.fingerprint), split.shards)


class Batches(Protocol):
    """What a training loop reads from."""

    def batch(self, counter: int, rows: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Rank's share of the global batch of `rows` rows that starts at sample `counter`."""


class Loader:
    """Batches of the training split with their noise, read where it was written down and computed where not."""

    def __init__(self, store: Store, manifest: CorpusManifest, noise: CorpusNoise) -> None:
        prefix = corpus_prefix(manifest.fingerprint)
        shards = OpenShards(store, prefix)  # of tokens and noise together: what is bounded is a process's
        self._tokens = SplitReader(store, prefix, manifest.train.shards, shards)
        self._written = [SplitReader(store, prefix, infos, shards) for infos in manifest.noise_epochs]
        self._noise, self._seq_len = noise, manifest.seq_len
        self._ahead: tuple[int, Ints, Ints] = (0, np.empty(0, np.int64), np.empty(0, np.int64))

    @classmethod
    def open(cls, store: Store, manifest: CorpusManifest, mask_id: int) -> "Loader":
        """The loader of a finished corpus."""
        return cls(store, manifest, corpus_noise(manifest, mask_id))

    def in_blocks(self, block_length: int | None) -> "Loader":
        """The same rows in the same order, their noise computed for such blocks (None: whole rows), not read."""
        other = copy.copy(self)
        other._noise, other._written = replace(self._noise, block_length=block_length), []
        return other

    def batch(self, counter: int, rows: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Rank's share of the global batch of `rows` rows that starts at sample `counter`."""
        counters = counter + np.arange(rank * rows // world_size, (rank + 1) * rows // world_size, dtype=np.int64)
        epochs, ids = self._samples(counters)
        tokens = TokenRows(self._tokens, self._seq_len, ids)
        xt = np.empty_like(tokens.x0)
        t = np.empty(xt.shape, dtype=np.float32)
        for epoch in np.unique(epochs).tolist():
            at = epochs == epoch
            xt[at], times = self._noised(epoch, ids, tokens, at)
            t[at] = self._noise.per_token(times, self._seq_len)
        return Batch(
            x0=tokens.x0,
            xt=xt,
            t=t,
            loss_mask=tokens.is_learned,
            counters=counters,
            segment_ids=tokens.segment_ids,
            is_real=None if tokens.is_real.all() else tokens.is_real,
        )

    def _samples(self, counters: Ints) -> tuple[Ints, Ints]:
        """The order of consecutive counters, computed for many batches at once: one by one it took half the time."""
        if not len(counters):  # fewer rows than ranks
            return counters, counters
        first, epochs, ids = self._ahead
        if not first <= counters[0] <= counters[-1] < first + len(ids):
            first = int(counters[0])
            epochs, ids = self._noise.order.samples(first + np.arange(max(_ORDER_AHEAD, len(counters))))
            self._ahead = first, epochs, ids
        at = slice(int(counters[0]) - first, int(counters[-1]) - first + 1)
        return epochs[at], ids[at]

    def _noised(self, epoch: int, ids: Ints, tokens: TokenRows, at: Bools) -> tuple[Ints, Floats]:
        """Of the rows `at` [N] of a batch."""
        if epoch < len(self._written):
            return self._noise.from_columns(self._written[epoch].read(("t", "is_noised", "xt"), ids[at]), tokens.x0[at])
        is_noisable = None if tokens.is_noisable is None else tokens.is_noisable[at]
        starts = None if tokens.starts is None else tokens.starts[at]
        return self._noise.corrupt(epoch, ids[at], tokens.x0[at], is_noisable, starts)


class Prefetcher:
    """Batches read one ahead in a thread: it changes when a batch is read, never which."""

    def __init__(self, loader: Batches) -> None:
        self._loader = loader
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._next: tuple[tuple[int, int, int, int], Future[Batch]] | None = None

    def batch(self, counter: int, rows: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The batch, and the next one is on its way."""
        wanted = (counter, rows, rank, world_size)
        if self._next is not None and self._next[0] == wanted:
            found = self._next[1].result()
        else:
            found = self._loader.batch(*wanted)
        ahead = (counter + rows, rows, rank, world_size)
        self._next = ahead, self._thread.submit(self._loader.batch, *ahead)
        return found


def corpus_noise(manifest: CorpusManifest, mask_id: int) -> CorpusNoise:
    """The noise function of a corpus."""
    order = SampleOrder(manifest.seed, manifest.train.rows)
    process = manifest.process.bind(mask_id, manifest.vocab_size)
    return CorpusNoise(process, order, manifest.t_min, manifest.block_length, manifest.steps)


def evenly(rows: Ints, at_most: int) -> Ints:
    """Some of the rows, evenly spaced, the first and the last among them."""
    return rows[np.linspace(0, len(rows) - 1, min(at_most, len(rows))).astype(np.int64)]
