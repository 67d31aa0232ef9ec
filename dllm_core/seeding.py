"""Counter-based uniforms: randomness as a pure function of (seed, purpose, epoch, index), never a stream.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) over whole numpy arrays.
A draw depends on its coordinates alone, so any worker, batch size or restart gives the same bits.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Words = NDArray[np.uint64]
Words32 = NDArray[np.uint32]

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MAX_EPOCH = 1 << 24


class Purpose(IntEnum):
    """What a draw is for; two purposes never share a uniform."""

    NOISE = 1
    TIME_OFFSET = 2
    ORDER = 3
    DECODE = 4
    EVALUATE = 5
    REPLACE = 6
    EVALUATE_REPLACE = 7
    MASKED_LM = 8
    EVALUATE_STRATUM = 9
    UNMASK = 10
    PREFERENCE = 11
    PREFERENCE_STRATUM = 12
    MASK_EMBEDDING = 14
    EDIT = 15


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int | Words, int | Words]) -> tuple[Words, ...]:
    """Ten Philox rounds. Counter words are uint64 arrays of 32-bit values that broadcast together, as the result is.

    key: two such values, or arrays of them that broadcast with the counter.
    """
    c0, c1, c2, c3 = counter
    for r in range(10):
        k0 = (key[0] + r * _WEYL[0]) & 0xFFFFFFFF
        k1 = (key[1] + r * _WEYL[1]) & 0xFFFFFFFF
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        if r < 3:  # until every word has its full shape
            c0, c2 = (p1 >> _SHIFT) ^ c1, (p0 >> _SHIFT) ^ c3
        else:  # in place: a new array for every step costs a fifth of the time
            c0, c2 = p1 >> _SHIFT, p0 >> _SHIFT
            c0 ^= c1
            c2 ^= c3
        c0 ^= k0
        c2 ^= k1
        p0 &= _LOW
        p1 &= _LOW
        c1, c3 = p1, p0
    return c0, c1, c2, c3


def mixed(values: Words) -> Words:
    """Each bit of the result depends on every bit of the value. SplitMix64's finaliser, Steele et al. 2014."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def words(seed: int | Words, purpose: Purpose, epoch: int | Ints, index: Any, count: int) -> Words32:
    """`count` 32-bit words for every index. index: int array [N]; result uint32 [N count].

    seed, epoch: one for all, or an array [N] of each index's own: a call costs 0.15 ms whatever its length.
    """
    if np.min(epoch, initial=0) < 0 or np.max(epoch, initial=0) >= _MAX_EPOCH:
        raise ValueError(f"epoch must be in [0, {_MAX_EPOCH}), got {epoch}")
    index = np.asarray(index, dtype=np.uint64).reshape(-1, 1)
    blocks = np.arange((count + 3) // 4, dtype=np.uint64).reshape(1, -1)
    shape = (index.shape[0], blocks.shape[1])
    tag = np.asarray((int(purpose) << 24) | epoch, dtype=np.uint64).reshape(-1, 1)
    own: Any = seed if isinstance(seed, int) else seed.reshape(-1, 1)
    counter = (blocks, tag, index & _LOW, index >> _SHIFT)
    drawn = np.empty((*shape, 4), np.uint32)
    for place, word in enumerate(philox(counter, (own & 0xFFFFFFFF, (own >> 32) & 0xFFFFFFFF))):
        drawn[..., place] = word
    return drawn.reshape(shape[0], 4 * shape[1])[:, :count]


def seeds_of(values: Iterable[int]) -> Words:
    """Seeds as `words` takes many: modulo 2**64, which is what it makes of one."""
    return np.array([value % (1 << 64) for value in values], np.uint64)


def uniforms(seed: int | Words, purpose: Purpose, epoch: int | Ints, index: Any, count: int) -> Floats:
    """Uniforms in [0, 1) on a grid of 2**-24, exact in float32. Arguments as of `words`; float32 [N count]."""
    bits = words(seed, purpose, epoch, index, count)
    bits >>= np.uint32(8)
    uniform: Floats = bits.view(np.int32).astype(np.float32)  # numpy converts signed integers several times faster
    uniform *= np.float32(2.0**-24)
    return uniform


def uniforms_below(p: Floats, seed: int, purpose: Purpose, epoch: int, index: Any, count: int) -> NDArray[np.bool_]:
    """`uniforms(...) < p`, bit for bit, at two thirds of the cost. p: float32 that broadcasts to [N count]."""
    bits = words(seed, purpose, epoch, index, count)
    bits >>= np.uint32(8)
    return bits < np.ceil(np.ldexp(p.astype(np.float64), 24)).clip(0, 1 << 24).astype(np.uint32)


def uniforms64(seed: int | Words, purpose: Purpose, epoch: int | Ints, index: Any, count: int) -> Doubles:
    """Uniforms in [0, 1) on a grid of 2**-32: fine enough to choose among a vocabulary. float64 [N count]."""
    return words(seed, purpose, epoch, index, count).astype(np.float64) * 2.0**-32
