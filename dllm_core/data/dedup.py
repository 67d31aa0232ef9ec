"""Removal of equal and nearly equal documents, over a whole corpus, in two passes that any number of workers share.

Pass 1, `signatures`: the texts of a unit -> a few numbers a document, each row a function of its text alone. Pass 2,
`duplicates`: the signatures of all units, in unit order -> which documents go. Documents are numbered through the
units (their global index), and nothing but that order decides: not how it is cut into units, not which worker reads.

Similarity is the Jaccard index of two texts' sets of shingles: runs of `shingle` words. Words are lower-case runs of
letters, marks and digits after NFC, single letters in scripts without spaces; punctuation, symbols and layout do not
count. MinHash: Broder, "On the resemblance and containment of documents", 1997; its slots are filled as in
arXiv:1704.04370; banding: Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", ch. 3.
Measured on one core of an AMD EPYC at the defaults: pass 1 does 75 MB/s, or 25,000 documents of 3 kB a second (100,000
of 55 bytes; equal texts alone 760 MB/s), pass 2 370,000 documents a second. 10 million documents are 4 GB of
signatures, which may be files mapped in turn, 0.8 GB of memory beside them and half a minute for the second pass.
"""

import hashlib
import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Self

import numpy as np
import rensa  # type: ignore[import-untyped]
from numpy.typing import NDArray
from pydantic import Field

from dllm_core.config.base import Frozen
from dllm_core.data.filters import CATEGORIES, category_table, unspaced_letters
from dllm_core.errors import DataError

U64 = NDArray[np.uint64]
Index = NDArray[np.int64]

_SEED = 1
_RECALL_AT_THRESHOLD = 0.9
_CHARS_AT_ONCE = 1 << 17  # twelve arrays of this many uint64 stay in the second and third level cache
_PAIRS_AT_ONCE = 1 << 16  # two gathered blocks of 16 MB at 128 hashes
_LEADERS = 16  # turns in a group of one band value: bounds the work on a template that fills a whole corpus
_BASE = 0x9E3779B97F4A7C15  # odd, so that its powers have inverses modulo 2**64
_NO_WORDS = np.uint64(0)  # band value of a text without words; no real band is 0


class NearDuplicates(Frozen):
    """When two texts are nearly equal, and how well that is known.

    A pair is a candidate if one of `num_bands` bands of `rows` hashes agrees, and a duplicate if then at least
    `threshold` of all its hashes agree: a share with mean J and standard deviation sqrt(J (1 - J) / num_hashes). At the
    defaults (16 bands of 8 hashes) a pair of Jaccard index

        J            0.5    0.6    0.7    0.8    0.85   0.9
        is compared  0.061  0.24   0.61   0.95   0.994  0.9999
        agrees       1e-12  6e-7   0.005  0.50   0.94   0.9996
    """

    threshold: float = Field(0.8, ge=0.3, le=1, description="Jaccard index of their shingles")
    num_hashes: int = Field(128, ge=16, le=1024, description="a power of 2 is fastest")
    shingle: int = Field(5, ge=1, le=64, description="words")

    @property
    def rows(self) -> int:
        """Hashes in a band: as many as still find 0.9 of the pairs at the threshold, so that few others are found."""
        fits = [r for r in range(1, self.num_hashes + 1) if self._probability(self.threshold, r) > _RECALL_AT_THRESHOLD]
        return max(fits, default=1)

    @property
    def num_bands(self) -> int:
        """Bands that the hashes are cut into."""
        return self.num_hashes // self.rows

    def _probability(self, jaccard: float, rows: int) -> float:
        """The S-curve: how likely a pair of this Jaccard index is compared at all, with so many rows a band."""
        return float(1 - (1 - jaccard**rows) ** (self.num_hashes // rows))


class DedupConfig(Frozen):
    """What counts as the same document."""

    exact: bool = Field(True, description="texts equal to the last character")
    near: NearDuplicates | None = Field(None, description="null: nearly equal texts are kept")


@dataclass(frozen=True)
class Signatures:
    """What the second pass knows of N documents: 16 + 8 num_bands + 2 num_hashes bytes each, 400 at the defaults.

    digest: uint64 [N 2], BLAKE2b-128 of the UTF-8 text. bands: uint64 [N num_bands], a hash of the band's rows, 0 for
    a text without words. hashes: uint16 [N num_hashes], 16 bits of each MinHash (b-bit MinHash, arXiv:0910.3349): two
    unequal hashes agree in them with probability 2**-16, which moves an estimate by less than 0.00002.
    Without near-duplicates num_bands = num_hashes = 0.
    """

    digest: U64
    bands: U64
    hashes: NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.digest)

    def to_columns(self) -> dict[str, NDArray[Any]]:
        """Columns [N K] for an Arrow file; the empty ones are left out."""
        columns: dict[str, NDArray[Any]] = {"digest": self.digest, "bands": self.bands, "hashes": self.hashes}
        return {name: values for name, values in columns.items() if values.shape[1]}

    @classmethod
    def from_columns(cls, columns: dict[str, NDArray[Any]]) -> Self:
        """From the columns of `to_columns`, which may be views into a mapped file: they are read where needed."""
        digest = columns["digest"]
        bands = columns.get("bands", np.empty((len(digest), 0), np.uint64))
        return cls(digest, bands, columns.get("hashes", np.empty((len(digest), 0), np.uint16)))


@dataclass(frozen=True)
class Duplicates:
    """Which of a unit's N documents go.

    representative: int64 [N], -1 to keep the document, else the global index of the one kept in its place, which is
    the first of its cluster. is_exact: bool [N], the document goes because an earlier one has the very same text.
    """

    representative: Index
    is_exact: NDArray[np.bool_]


def text_digest(text: str) -> bytes:
    """16 bytes, which as two little-endian uint64 are a row of `Signatures.digest`."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def signatures(texts: Iterable[str], config: DedupConfig) -> Signatures:
    """The signatures of texts, in their order; each depends on its text and `config` alone. Few texts are held."""
    near, raw = config.near, bytearray()
    width = (near.num_bands, near.num_hashes) if near else (0, 0)
    bands, hashes = [np.empty((0, width[0]), np.uint64)], [np.empty((0, width[1]), np.uint16)]
    for group in _groups(texts):
        raw += b"".join(map(text_digest, group))
        if near:
            full = _min_hashes(group, near)
            bands.append(_bands(full, near))
            hashes.append((full * np.uint32(0x9E3779B1) >> np.uint32(16)).astype(np.uint16))  # a product's best mixed
    digest = np.frombuffer(raw, "<u8").reshape(-1, 2).astype(np.uint64)
    shapes = [(len(digest), k) for k in width]
    return Signatures(digest, np.concatenate(bands).reshape(shapes[0]), np.concatenate(hashes).reshape(shapes[1]))


def duplicates(parts: Sequence[Signatures], config: DedupConfig) -> list[Duplicates]:
    """For the signatures of all units in unit order: what goes, a value for each part. No part is held beyond its turn.

    Clusters are the connected components of the similar pairs found: a document goes if a chain of them leads to an
    earlier document, which it need not resemble itself. What is kept, deduplicated again, is kept whole. Needs about 80
    bytes a document beside `parts`, of which it reads one band at a time, and the hashes of candidates alone. DataError
    if a part was made with another config.
    """
    near = config.near
    width = (near.num_bands, near.num_hashes) if near else (0, 0)
    sizes = []
    for position, part in enumerate(parts):
        sizes.append(len(part))
        if near and (part.bands.shape[1], part.hashes.shape[1]) != width:
            found = (part.bands.shape[1], part.hashes.shape[1])
            raise DataError(
                f"signatures.{position}", f"must have {width} bands and hashes", found, "make them with this config"
            )
    offsets = np.cumsum([0, *sizes])
    parent = np.arange(offsets[-1], dtype=np.int64)
    if config.exact:
        _link_equal(parent, *_gathered(parts, offsets, "digest", 0, 2))
    is_exact = parent != np.arange(len(parent))
    if near:
        _link_near(parent, parts, offsets, near)
    representative = _roots(parent, np.arange(len(parent)))
    representative[representative == np.arange(len(parent))] = -1
    return [Duplicates(representative[start:stop], is_exact[start:stop]) for start, stop in itertools.pairwise(offsets)]


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _CHARS_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _min_hashes(texts: list[str], near: NearDuplicates) -> NDArray[np.uint32]:
    """[N num_hashes]; all ones for a text without words."""
    shingles, offsets = shingle_hashes(texts, near.shingle)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, near.num_hashes, _SEED)
    return np.array(matrix.to_rows(), np.uint32)


def _bands(full: NDArray[np.uint32], near: NearDuplicates) -> U64:
    rows = full[:, : near.num_bands * near.rows].reshape(len(full), near.num_bands, near.rows).astype(np.uint64)
    odd = _mixed(np.arange(1, near.rows + 1, dtype=np.uint64)) | np.uint64(1)
    bands = np.maximum(_mixed((rows * odd).sum(axis=2, dtype=np.uint64)), np.uint64(1))
    bands[(full == np.uint32(0xFFFFFFFF)).all(axis=1)] = _NO_WORDS
    return bands


def shingle_hashes(texts: Sequence[str], length: int) -> tuple[U64, U64]:
    """(hashes [S], offsets [N + 1]): text i has the shingles [offsets[i], offsets[i + 1]), repeated ones repeated.

    A text of fewer than `length` words is one shingle, one without words has none. A word is the polynomial of its code
    points in _BASE modulo 2**64, mixed; a shingle that of its words: a few numpy passes, no Python loop over words.
    Memory: 40 bytes a character of the longest text (88 where each character is a word).
    """
    normal = [unicodedata.normalize("NFC", text).lower() for text in texts]
    begins = np.cumsum([0, *(len(text) + 1 for text in normal)])
    codes = np.frombuffer("\n".join([*normal, ""]).encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _word_kinds()[codes]
    is_first = kinds == 1
    is_first[1:] &= kinds[:-1] != 1
    is_first |= kinds == 2
    starts = np.flatnonzero(is_first)
    if not len(starts):
        return np.empty(0, np.uint64), np.zeros(len(texts) + 1, np.uint64)
    powers, inverses = _powers(len(codes))
    letters = (codes * (kinds != 0)) * powers[: len(codes)]
    words = _mixed(np.add.reduceat(letters, starts) * inverses[starts])
    word_of = np.searchsorted(starts, begins)  # [N + 1]: the first word at or after each text's begin
    counts = np.diff(word_of)
    counts = np.where(counts >= length, counts - length + 1, np.minimum(counts, 1))
    offsets = np.cumsum([0, *counts])
    first = np.arange(offsets[-1]) + np.repeat(word_of[:-1] - offsets[:-1], counts)
    last = np.minimum(first + length, np.repeat(word_of[1:], counts))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(words * powers[: len(words)])])
    return _mixed((sums[last] - sums[first]) * inverses[first]), offsets.astype(np.uint64)


@cache
def _word_kinds() -> NDArray[np.uint8]:
    """[0x110000]: 0 between words, 1 in a word, 2 a word of its own."""
    kinds = np.array([name[0] in "LMN" for name in CATEGORIES], np.uint8)[category_table()]
    return kinds * (1 + unspaced_letters())


def _powers(count: int) -> tuple[U64, U64]:
    """Powers of _BASE and of its inverse modulo 2**64, at least `count` of each."""
    usual = 2 * _CHARS_AT_ONCE
    return _usual_powers(usual) if count <= usual else _powers_of(count)  # a very long text's are not kept


def _powers_of(count: int) -> tuple[U64, U64]:
    both = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        values = np.full(count, base, np.uint64)
        values[0] = 1
        both.append(np.multiply.accumulate(values))
    return both[0], both[1]


_usual_powers = lru_cache(maxsize=1)(_powers_of)


def _mixed(values: U64) -> U64:
    """Each bit of the result depends on every bit of the value. Source: MurmurHash3's 64-bit finaliser."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def _gathered(parts: Sequence[Signatures], offsets: Index, name: str, start: int, stop: int) -> U64:
    """Columns [start, stop) of all documents [K N], copied part by part: views of them all would keep all mapped."""
    found = np.empty((stop - start, offsets[-1]), np.uint64)
    for part, (first, last) in zip(parts, itertools.pairwise(offsets), strict=True):
        found[:, first:last] = getattr(part, name)[:, start:stop].T
    return found


def _link_equal(parent: Index, high: U64, low: U64) -> None:
    """Link each document to the first of the same digest."""
    order = np.lexsort((low, high))  # stable, so equal digests stay in the order of their documents
    high, low = high[order], low[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    parent[order] = order[is_new][np.cumsum(is_new) - 1]


@dataclass(frozen=True)
class _Comparison:
    """Whether documents are similar by the hashes of all parts, looked up by global index."""

    parts: Sequence[Signatures]
    offsets: Index
    threshold: float

    def is_similar(self, left: Index, right: Index) -> NDArray[np.bool_]:
        """One answer for each pair, [n]."""
        found = np.empty(len(left), bool)
        for start in range(0, len(left), _PAIRS_AT_ONCE):
            pairs = slice(start, start + _PAIRS_AT_ONCE)
            is_equal = self.hashes_at(left[pairs]) == self.hashes_at(right[pairs])
            found[pairs] = is_equal.mean(axis=1) >= self.threshold  # 0.55 * 100 is above 55
        return found

    def hashes_at(self, indices: Index) -> NDArray[np.uint16]:
        """Rows [n num_hashes], a part at a time: a mapped file is touched only where it is asked."""
        found = np.empty((len(indices), self.parts[0].hashes.shape[1]), np.uint16)
        of_part = np.searchsorted(self.offsets, indices, side="right") - 1
        order = np.argsort(of_part, kind="stable")
        used, begins = np.unique(of_part[order], return_index=True)
        for part, rows in zip(used, np.split(order, begins[1:]), strict=True):
            found[rows] = self.parts[part].hashes[indices[rows] - self.offsets[part]]
        return found


def _link_near(parent: Index, parts: Sequence[Signatures], offsets: Index, near: NearDuplicates) -> None:
    """Union the documents of each candidate pair that is similar; of equal documents only the first takes part.

    Groups too large to be compared in full are taken up again, with those of their documents that are still kept, until
    nothing changes: a corpus of what was kept then meets the same comparisons, and all is kept.
    """
    comparison = _Comparison(parts, offsets, near.threshold)
    live = np.flatnonzero(parent == np.arange(len(parent)))
    cut_short = []
    for band in range(near.num_bands):
        [values] = _gathered(parts, offsets, "bands", band, band + 1)
        cut_short.append(_link_groups(parent, *_groups_of_equal(live, values[live]), comparison))
    is_changing = True
    while is_changing:
        is_changing = False
        for position, (members, group) in enumerate(cut_short):
            is_root = parent[members] == members
            if not is_root.all():  # else the same comparisons would give the same answers
                is_changing = True
                cut_short[position] = _link_groups(parent, members[is_root], group[is_root], comparison)


def _groups_of_equal(live: Index, values: U64) -> tuple[Index, Index]:
    """(members, group): the documents that share their value with another, by value and then by index."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    group = np.cumsum(np.concatenate([np.ones(len(order[:1]), bool), ordered[1:] != ordered[:-1]]))
    is_shared = np.zeros(len(order), bool)
    is_shared[1:] = group[1:] == group[:-1]
    is_shared[:-1] |= is_shared[1:]
    is_shared &= ordered != _NO_WORDS
    return live[order[is_shared]], group[is_shared]


def _link_groups(parent: Index, members: Index, group: Index, comparison: _Comparison) -> tuple[Index, Index]:
    """Compare the pairs in each group, the first member with all others, then the second with all after it, and so on.

    members: indices, ascending within a group; group: its ascending number. A pair of one cluster need not be compared
    any more, nor a group of one cluster. Returns the groups that are not done after _LEADERS turns, whole.
    """
    for turn in range(_LEADERS + 1):
        begins = np.flatnonzero(np.concatenate([np.ones(len(group[:1]), bool), group[1:] != group[:-1]]))
        sizes = np.diff(np.append(begins, len(group)))
        roots = _roots(parent, members)
        is_apart = roots != np.repeat(roots[begins], sizes)
        is_open = (np.logical_or.reduceat(is_apart, begins) if len(begins) else is_apart) & (sizes > turn + 1)
        members, group, roots = (values[np.repeat(is_open, sizes)] for values in (members, group, roots))
        if turn == _LEADERS or not len(members):
            break
        sizes = sizes[is_open]
        begins = np.cumsum(sizes) - sizes
        leader = np.repeat(begins + turn, sizes)
        pairs = np.flatnonzero((np.arange(len(members)) > leader) & (roots != roots[leader]))
        if len(pairs):
            left, right = members[leader[pairs]], members[pairs]
            is_similar = comparison.is_similar(left, right)
            _union(parent, left[is_similar], right[is_similar])
    return members, group


def _roots(parent: Index, indices: Index) -> Index:
    """The first document of each one's cluster; shortens the paths it went."""
    roots = parent[indices]
    while True:
        above = parent[roots]
        if np.array_equal(above, roots):
            parent[indices] = roots
            return roots
        roots = above


def _union(parent: Index, left: Index, right: Index) -> None:
    """Join the clusters of each pair; the smaller index is the root, so the order of the pairs has no effect."""
    while len(left):
        left, right = _roots(parent, left), _roots(parent, right)
        is_apart = left != right
        left, right = left[is_apart], right[is_apart]
        np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
