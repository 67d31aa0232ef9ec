"""The noise of a corpus: a pure function of (seed, epoch, sample id).

A stored noise file is this function written down.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dllm_core.data.order import SampleOrder
from dllm_core.noise.process import NoiseProcess
from dllm_core.noise.times import stratified_times
from dllm_core.seeding import Floats, Ints, Purpose, uniforms, uniforms64

_ROWS_AT_ONCE = 64  # Philox's arrays stay in the second level cache: 1.5x over one pass at 64 x 1024
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class CorpusNoise:
    """Draws t and xt for samples of one epoch. Holds no state: any worker computes any row, in any order.

    block_length: None for one t a row, else one for each block of so many tokens.
    """

    process: NoiseProcess
    order: SampleOrder
    t_min: float
    block_length: int | None = None

    def times(self, epoch: int, sample_ids: Ints, seq_len: int) -> Floats:
        """Times in (t_min, 1], stratified along the training order: [N], or [N blocks] with one t a block."""
        positions = self.order.position(epoch, sample_ids)
        if self.block_length is None:
            return stratified_times(self.order.seed, epoch, positions, self.t_min)
        blocks = -(-seq_len // self.block_length)
        positions = positions[:, None] * blocks + np.arange(blocks)
        return stratified_times(self.order.seed, epoch, positions, self.t_min)

    def per_token(self, t: Floats, seq_len: int) -> Floats:
        """Times of rows [N] or of blocks [N blocks] as times of tokens [N L]."""
        if t.ndim == 1:
            return np.repeat(t[:, None], seq_len, axis=1)
        assert self.block_length is not None
        return np.repeat(t, self.block_length, axis=1)[:, :seq_len]

    def corrupt(self, epoch: int, sample_ids: Ints, x0: Ints, is_learned: Bools | None = None) -> tuple[Ints, Floats]:
        """(xt [N L], t [N] or [N blocks]) of rows x0 [N L]. What is not learned (a prompt) is never noised."""
        seq_len = x0.shape[1]
        t = self.times(epoch, sample_ids, seq_len)
        xt = np.empty_like(x0)
        for start in range(0, len(x0), _ROWS_AT_ONCE):
            at = slice(start, start + _ROWS_AT_ONCE)
            u = uniforms(self.order.seed, Purpose.NOISE, epoch, sample_ids[at], seq_len)
            times = t[at, None] if self.block_length is None else self.per_token(t[at], seq_len)
            v = None
            if self.process.replaces:
                v = uniforms64(self.order.seed, Purpose.REPLACE, epoch, sample_ids[at], seq_len)
            xt[at] = self.process.corrupt(x0[at], times, u, v)
        return (xt if is_learned is None else np.where(is_learned, xt, x0)), t


def pack_bits(flags: Bools) -> NDArray[np.uint8]:
    """One bit a token, most significant first: [N ceil(L/8)]."""
    return np.packbits(flags, axis=1)


def unpack_bits(bits: NDArray[np.uint8], seq_len: int) -> Bools:
    """The inverse of `pack_bits`: bool [N L]."""
    return np.unpackbits(bits, axis=1, count=seq_len).astype(bool)
