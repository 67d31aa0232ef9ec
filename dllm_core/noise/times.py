"""Diffusion times along the training order: every contiguous window is near-evenly spread over (t_min, 1].

Position k gets frac(offset + k * golden ratio) (a Kronecker sequence), in exact 64-bit integer arithmetic: for
every window of n positions, whatever the batch or world size, no gap on the circle exceeds 2.7 / n.
"""

import numpy as np

from dllm_core.seeding import Floats, Ints, Purpose, words

GOLDEN = np.uint64(11400714819323198485)  # round(2**64 * (sqrt(5) - 1) / 2)


def stratified_times(seed: int, epoch: int, positions: Ints, t_min: float) -> Floats:
    """Times in (t_min, 1], float32 [N], for positions [N] of an epoch's order; each epoch has its own offset."""
    low, high = words(seed, Purpose.TIME_OFFSET, epoch, np.zeros(1, np.int64), 2)[0].astype(np.uint64)
    offset = (high << np.uint64(32)) | low
    fraction = (positions.astype(np.uint64) * GOLDEN + offset) >> np.uint64(40)  # 24 bits: exact in float32
    u = fraction.astype(np.float32) * np.float32(2.0**-24)
    times: Floats = np.float32(1) - np.float32(1 - t_min) * u
    return times
