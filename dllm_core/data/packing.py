"""Section `packing` and what it does: token runs -> rows of fixed length. Pure.

wrap: one document after the other, cut where a row is full. isolated: whole documents, best fit; a row says where each
begins, so that attention stays inside it. padded: one document a row, for fine-tuning. pairs: a preference a row.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from dllm_core.config.base import Frozen
from dllm_core.seeding import Bools

Ids = NDArray[np.unsignedinteger[Any]]


class PackingBase(Frozen):
    """What every kind has. isolates: whether rows say where documents begin."""

    isolates: ClassVar[bool] = False
    seq_len: int = Field(64, ge=8, le=1 << 20)


class WrapPacking(PackingBase):
    """Documents end to end, no waste but the last row's."""

    type: Literal["wrap"] = "wrap"


class IsolatedPacking(PackingBase):
    """Documents whole, best fit decreasing; one longer than a row is cut into rows. arXiv:2404.10830."""

    isolates: ClassVar[bool] = True
    type: Literal["isolated"] = "isolated"


class PaddedPacking(PackingBase):
    """One document a row; one longer than a row is left out and counted as `packing.too_long`."""

    type: Literal["padded"] = "padded"
    learn_padding: bool = Field(False, description="end tokens behind the answer are learned (LLaDA, section 2.3)")


class PairsPacking(PackingBase):
    """One preference a row: prompt and chosen answer, then, isolated, prompt and rejected answer, then filler.

    A record whose two documents together are longer than a row is left out and counted as `packing.too_long`.
    """

    isolates: ClassVar[bool] = True
    type: Literal["pairs"] = "pairs"


def _wrap_unless_said(section: Any) -> Any:
    return {"type": "wrap", **section} if isinstance(section, dict) else section


AnyPacking = Annotated[
    WrapPacking | IsolatedPacking | PaddedPacking | PairsPacking,
    Field(discriminator="type"),
    BeforeValidator(_wrap_unless_said),
]


@dataclass(frozen=True)
class TokenRun:
    """Documents end to end. ids [N]; offsets int64 [D+1]; is_learned bool [N], None where all tokens are."""

    ids: Ids
    offsets: NDArray[np.int64]
    is_learned: Bools | None = None

    @property
    def num_documents(self) -> int:
        """The number of documents D."""
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Rows:
    """Packed rows. ids [N L]; num_tokens int32 [N]: real tokens, the rest of a row is end tokens as filler.

    starts bool [N L]: where a document (and the filler) begins, None where rows are not isolated. is_learned
    bool [N L]: None where every real token is.
    """

    ids: Ids
    num_tokens: NDArray[np.int32]
    starts: Bools | None
    is_learned: Bools | None


def pack(config: PackingBase, run: TokenRun, eos_id: int) -> Rows:
    """Rows of documents that end with an end token each (`with_end`); what is `too_long` is left out."""
    if isinstance(config, WrapPacking):
        return _wrap(run, config.seq_len, eos_id)
    if isinstance(config, IsolatedPacking):
        return _place(run, *_best_fit(np.diff(run.offsets), config.seq_len), config.seq_len, eos_id)
    if isinstance(config, PairsPacking):
        return _pairs(run, config, eos_id)
    assert isinstance(config, PaddedPacking)
    return _pad(run, config, eos_id)


def too_long(config: PackingBase, run: TokenRun) -> NDArray[np.int64]:
    """Of documents that have their end token, by number (of pairs, records): those that fit no row."""
    lengths = np.diff(run.offsets)
    if isinstance(config, PairsPacking):
        lengths = lengths.reshape(-1, 2).sum(1)
    elif not isinstance(config, PaddedPacking):
        return np.empty(0, np.int64)
    return np.flatnonzero(lengths > config.seq_len)


def with_end(run: TokenRun, eos_id: int) -> TokenRun:
    """An end token after every document; it is learned."""
    offsets = run.offsets + np.arange(len(run.offsets))
    is_text = np.ones(len(run.ids) + run.num_documents, dtype=bool)
    is_text[offsets[1:] - 1] = False
    ids = np.full(len(is_text), eos_id, dtype=run.ids.dtype)
    ids[is_text] = run.ids
    is_learned = None
    if run.is_learned is not None:
        is_learned = np.ones(len(ids), dtype=bool)
        is_learned[is_text] = run.is_learned
    return TokenRun(ids, offsets, is_learned)


def repeated(run: TokenRun, times: Sequence[int]) -> TokenRun:
    """Each record, one document of the run or of pairs two, so many times: all once, then those taken again, and so on.

    Side by side, a row would show in one copy what is hidden in another.
    """
    counts = np.asarray(times, np.int64)
    if (counts == 1).all():
        return run
    lengths = np.diff(run.offsets).reshape(len(counts), -1)
    ids, of_documents, learned = [], [np.zeros(1, np.int64)], []
    for fewer, count in pairwise([0, *np.unique(counts).tolist()]):
        taken, turns = counts >= count, count - fewer
        is_taken = np.repeat(taken, lengths.sum(1))
        ids.append(np.tile(run.ids[is_taken], turns))
        of_documents.append(np.tile(lengths[taken].ravel(), turns))
        if run.is_learned is not None:
            learned.append(np.tile(run.is_learned[is_taken], turns))
    offsets = np.cumsum(np.concatenate(of_documents))
    return TokenRun(np.concatenate(ids), offsets, np.concatenate(learned) if learned else None)


def joined(runs: list[TokenRun], dtype: type[np.unsignedinteger[Any]]) -> TokenRun:
    """One run of several, which the list then holds no more: so the whole of the tokens is there twice, not thrice."""
    lengths = [np.diff(run.offsets) for run in runs]
    learned = None
    if any(run.is_learned is not None for run in runs):
        every = [np.ones(len(run.ids), bool) if run.is_learned is None else run.is_learned for run in runs]
        learned = np.concatenate(every)
    ids = np.concatenate([np.empty(0, dtype), *(run.ids for run in runs)])
    runs.clear()
    return TokenRun(ids, np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths])), learned)


def _wrap(run: TokenRun, seq_len: int, eos_id: int) -> Rows:
    num_rows = -(-len(run.ids) // seq_len)

    def in_rows(values: NDArray[np.generic], filler: int) -> NDArray[np.generic]:
        rows = np.full(num_rows * seq_len, filler, dtype=values.dtype)
        rows[: len(values)] = values
        return rows.reshape(num_rows, seq_len)

    counts = np.full(num_rows, seq_len, dtype=np.int32)
    if num_rows:
        counts[-1] = len(run.ids) - (num_rows - 1) * seq_len
    learned = None if run.is_learned is None else in_rows(run.is_learned, 0)
    return Rows(in_rows(run.ids, eos_id), counts, None, learned)  # type: ignore[arg-type]


def _best_fit(lengths: NDArray[np.int64], seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pieces [P 3] of (document, begin, end) in the order of their rows, and the row of each [P].

    Longest first, each into the fullest row that still holds it; ties by document, so the result is one function of
    the lengths. O(P log L): at most L different room sizes are kept sorted.
    """
    full = lengths // seq_len
    pieces = [(d, k * seq_len, (k + 1) * seq_len) for d in np.flatnonzero(full) for k in range(full[d])]
    rows = list(range(len(pieces)))
    rest = lengths % seq_len
    order = np.argsort(-rest, kind="stable")
    rooms: list[int] = []  # sorted distinct room sizes, each with its rows
    rows_with: dict[int, list[int]] = {}
    num_rows = len(pieces)
    for document in order[rest[order] > 0].tolist():
        size = int(rest[document])
        at = bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[room], rooms[at]
        else:
            room, row = seq_len, num_rows
            num_rows += 1
        pieces.append((document, int(lengths[document]) - size, int(lengths[document])))
        rows.append(row)
        if room > size:
            if room - size not in rows_with:
                insort(rooms, room - size)
            rows_with.setdefault(room - size, []).append(row)
    in_order = np.argsort(np.array(rows, np.int64), kind="stable")
    return np.array(pieces, np.int64).reshape(-1, 3)[in_order], np.array(rows, np.int64)[in_order]


def _place(run: TokenRun, pieces: NDArray[np.int64], rows: NDArray[np.int64], seq_len: int, eos_id: int) -> Rows:
    num_rows = int(rows[-1]) + 1 if len(rows) else 0
    ids = np.full((num_rows, seq_len), eos_id, dtype=run.ids.dtype)
    starts = np.zeros((num_rows, seq_len), dtype=bool)
    learned = None if run.is_learned is None else np.zeros((num_rows, seq_len), dtype=bool)
    used = np.zeros(num_rows, dtype=np.int32)
    for (document, begin, end), row in zip(pieces.tolist(), rows.tolist(), strict=True):
        source = slice(int(run.offsets[document]) + begin, int(run.offsets[document]) + end)
        place = slice(int(used[row]), int(used[row]) + end - begin)
        ids[row, place] = run.ids[source]
        starts[row, place.start] = True
        if learned is not None and run.is_learned is not None:
            learned[row, place] = run.is_learned[source]
        used[row] = place.stop
    with_filler = np.flatnonzero(used < seq_len)
    starts[with_filler, used[with_filler]] = True
    return Rows(ids, used, starts, learned)


def _pad(run: TokenRun, config: PaddedPacking, eos_id: int) -> Rows:
    lengths = np.diff(run.offsets)
    kept = np.flatnonzero(lengths <= config.seq_len)
    pieces = np.stack([kept, np.zeros_like(kept), lengths[kept]], axis=1)
    packed = _place(run, pieces, np.arange(len(kept)), config.seq_len, eos_id)
    num_tokens, learned = packed.num_tokens, packed.is_learned
    if config.learn_padding:
        if learned is not None:
            learned |= np.arange(config.seq_len) >= num_tokens[:, None]
        num_tokens = np.full_like(num_tokens, config.seq_len)
    return Rows(packed.ids, num_tokens, None, learned)


def _pairs(run: TokenRun, config: PairsPacking, eos_id: int) -> Rows:
    """Documents 2k and 2k + 1 are those of record k."""
    lengths = np.diff(run.offsets).reshape(-1, 2)
    kept = np.flatnonzero(lengths.sum(1) <= config.seq_len)
    documents = (2 * kept[:, None] + [0, 1]).ravel()
    pieces = np.stack([documents, np.zeros_like(documents), lengths[kept].ravel()], axis=1)
    return _place(run, pieces, np.repeat(np.arange(len(kept)), 2), config.seq_len, eos_id)
