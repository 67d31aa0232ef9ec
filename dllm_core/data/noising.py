"""The noise of a corpus: a pure function of (seed, epoch, sample id).

A stored noise file is this function written down.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dllm_core.data.order import SampleOrder
from dllm_core.noise.process import NoiseProcess
from dllm_core.noise.times import stratified_times
from dllm_core.seeding import Floats, Ints, Purpose, uniforms


@dataclass(frozen=True)
class CorpusNoise:
    """Draws t and xt for samples of one epoch. Holds no state: any worker computes any row, in any order."""

    process: NoiseProcess
    order: SampleOrder
    t_min: float

    def times(self, epoch: int, sample_ids: Ints) -> Floats:
        """Time t [N] of each row, in (t_min, 1], stratified along the training order."""
        return stratified_times(self.order.seed, epoch, self.order.position(epoch, sample_ids), self.t_min)

    def corrupt(self, epoch: int, sample_ids: Ints, x0: Ints) -> tuple[Ints, Floats]:
        """(xt [N L], t [N]) of rows x0 [N L]."""
        t = self.times(epoch, sample_ids)
        u = uniforms(self.order.seed, Purpose.NOISE, epoch, sample_ids, x0.shape[1])
        xt: Ints = self.process.corrupt(x0, t[:, None], u)
        return xt, t


def pack_bits(xt: Ints, x0: Ints) -> NDArray[np.uint8]:
    """One bit a token, set where xt differs from x0: [N ceil(L/8)]."""
    return np.packbits(xt != x0, axis=1)


def unpack_bits(bits: NDArray[np.uint8], seq_len: int) -> NDArray[np.bool_]:
    """The inverse of `pack_bits`: bool [N L]."""
    return np.unpackbits(bits, axis=1, count=seq_len).astype(bool)
