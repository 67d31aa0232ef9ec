"""The noise of a corpus: a pure function of (seed, epoch, sample id).

A stored noise file is this function written down.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dllm_core.data.order import SampleOrder
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.discrete import snapped
from dllm_core.noise.process import NoiseProcess
from dllm_core.noise.times import stratified_times
from dllm_core.seeding import Bools, Floats, Ints, Purpose, uniforms, uniforms64, uniforms_below

_ROWS_AT_ONCE = 64  # Philox's arrays stay in the second level cache: 1.5x over one pass at 64 x 1024


@dataclass(frozen=True)
class CorpusNoise:
    """Draws t and xt for samples of one epoch. Holds no state: any worker computes any row, in any order.

    block_length: None for one t a row, else one for each block of so many tokens, counted from where a document
    starts. steps: None for continuous time, else T of a chain whose times are 1/T, 2/T, ..., 1.
    """

    process: NoiseProcess
    order: SampleOrder
    t_min: float
    block_length: int | None = None
    steps: int | None = None

    def times(self, epoch: int, sample_ids: Ints, seq_len: int, starts: Bools | None = None) -> Floats:
        """Times in (t_min, 1], stratified along the training order.

        [N]; [N blocks] with one t a block; [N L], a time for each token, where blocks follow the documents that
        begin at `starts` bool [N L]: then a row leaves out positions for which it has no block, and a window is less
        evenly spread.
        """
        positions = self.order.position(epoch, sample_ids)
        if self.block_length is not None:
            blocks = -(-seq_len // self.block_length)
            number = np.arange(blocks)
            if starts is not None:
                blocks, number = seq_len, block_numbers(starts, self.block_length)
            positions = positions[:, None] * blocks + number
        t = stratified_times(self.order.seed, epoch, positions, 0.0 if self.steps else self.t_min)
        return t if self.steps is None else snapped(t, self.steps)

    def per_token(self, t: Floats, seq_len: int) -> Floats:
        """Times of rows [N], of blocks [N blocks] or of tokens [N L] as times of tokens [N L]."""
        if t.ndim == 1:
            return np.repeat(t[:, None], seq_len, axis=1)
        assert self.block_length is not None
        return t if t.shape[1] == seq_len else np.repeat(t, self.block_length, axis=1)[:, :seq_len]

    def corrupt(
        self,
        epoch: int,
        sample_ids: Ints,
        x0: Ints,
        is_learned: Bools | None = None,
        starts: Bools | None = None,
    ) -> tuple[Ints, Floats]:
        """(xt [N L], t as `times` gives it) of rows x0 [N L]. What is not learned (a prompt) is never noised."""
        seq_len = x0.shape[1]
        t = self.times(epoch, sample_ids, seq_len, starts)
        xt = np.empty_like(x0)
        for at, times in self._some_rows(t, seq_len):
            u = uniforms(self.order.seed, Purpose.NOISE, epoch, sample_ids[at], seq_len)
            v = None
            if self.process.replaces:
                v = uniforms64(self.order.seed, Purpose.REPLACE, epoch, sample_ids[at], seq_len)
            xt[at] = self.process.corrupt(x0[at], times, u, v)
        return (xt if is_learned is None else np.where(is_learned, xt, x0)), t

    def _some_rows(self, t: Floats, seq_len: int) -> Iterator[tuple[slice, Floats]]:
        """(rows, their times, which broadcast to their tokens), some rows at a time."""
        for start in range(0, len(t), _ROWS_AT_ONCE):
            at = slice(start, start + _ROWS_AT_ONCE)
            yield at, t[at, None] if self.block_length is None else self.per_token(t[at], seq_len)

    def mask_columns(self, epoch: int, sample_ids: Ints, seq_len: int) -> dict[str, NDArray[Any]]:
        """`columns` of rows that are learned whole, for a process of masks: the same bits, and no token is needed."""
        assert isinstance(self.process, AbsorbingProcess)
        t = self.times(epoch, sample_ids, seq_len)
        bits = np.empty((len(sample_ids), -(-seq_len // 8)), np.uint8)
        for at, times in self._some_rows(t, seq_len):
            survival = self.process.survival(times)
            kept = uniforms_below(survival, self.order.seed, Purpose.NOISE, epoch, sample_ids[at], seq_len)
            bits[at] = pack_bits(~kept)
        return {"t": t, "is_noised": bits}

    def columns(self, x0: NDArray[Any], xt: NDArray[Any], t: Floats) -> dict[str, NDArray[Any]]:
        """What is written down: t, and one bit a token where noise is masks, else the noised ids."""
        return {"t": t, "xt": xt} if self.process.replaces else {"t": t, "is_noised": pack_bits(xt != x0)}

    def from_columns(self, columns: dict[str, NDArray[Any]], x0: Ints) -> tuple[Ints, Floats]:
        """The inverse of `columns`, for rows x0 int64 [N L]: (xt int64 [N L], t)."""
        if self.process.replaces:
            return columns["xt"].astype(np.int64), columns["t"]
        is_noised = unpack_bits(columns["is_noised"], x0.shape[1])
        return np.where(is_noised, self.process.prior(x0), x0), columns["t"]


def block_numbers(starts: Bools, block_length: int) -> Ints:
    """Which block of its row each token [N L] is in; a document's blocks are counted from its own first token."""
    index = np.arange(starts.shape[1])
    offset = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    begins = offset % block_length == 0
    return np.cumsum(begins, axis=1) - 1


def pack_bits(flags: Bools) -> NDArray[np.uint8]:
    """One bit a token, most significant first: [N ceil(L/8)]."""
    return np.packbits(flags, axis=1)


def token_flags(columns: dict[str, NDArray[Any]], seq_len: int) -> dict[str, Bools]:
    """Those of `is_learned` and `starts` that rows of tokens are stored with, as `corrupt` takes them: bool [N L]."""
    return {name: unpack_bits(columns[name], seq_len) for name in ("is_learned", "starts") if name in columns}


def unpack_bits(bits: NDArray[np.uint8], seq_len: int) -> Bools:
    """The inverse of `pack_bits`: bool [N L]."""
    return np.unpackbits(bits, axis=1, count=seq_len).astype(bool)
