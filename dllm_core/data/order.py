"""The training order: (seed, epoch, position) <-> sample id, a bijection that is computed, never stored.

A keyed Feistel permutation with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains",
2002): O(1) memory for any corpus, and its inverse costs the same.
"""

from dataclasses import dataclass

import numpy as np

from dllm_core.seeding import Ints, Purpose, Words, mixed, words

_ROUNDS = 6


@dataclass(frozen=True)
class SampleOrder:
    """One permutation of [0, num_samples) for each epoch. World size does not exist here."""

    seed: int
    num_samples: int

    def samples(self, counters: Ints) -> tuple[Ints, Ints]:
        """(epoch [N], sample id [N]) of sample counters [N], which run through all epochs."""
        epochs, positions = np.divmod(np.asarray(counters, np.int64), self.num_samples)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs):
            ids[epochs == epoch] = self.sample(int(epoch), positions[epochs == epoch])
        return epochs, ids

    def sample(self, epoch: int, position: Ints) -> Ints:
        """Sample ids [N] at positions [N] of an epoch."""
        return self._walk(epoch, position, inverse=False)

    def position(self, epoch: int, sample: Ints) -> Ints:
        """Where in an epoch the samples [N] come: the inverse of `sample`."""
        return self._walk(epoch, sample, inverse=True)

    def _walk(self, epoch: int, values: Ints, *, inverse: bool) -> Ints:
        values = np.asarray(values, dtype=np.int64)
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < self.num_samples:
            raise IndexError(f"must be in [0, {self.num_samples})")
        half = np.uint64(max(1, ((self.num_samples - 1).bit_length() + 1) // 2))
        keys = words(self.seed, Purpose.ORDER, epoch, np.zeros(1, np.int64), 2 * _ROUNDS)[0].astype(np.uint64)
        keys = keys[::2] | keys[1::2] << np.uint64(32)
        result = values.astype(np.uint64)
        outside = np.ones(result.shape, dtype=bool)
        while outside.any():  # the domain is < 4x the corpus, so a walk takes < 4 rounds on average
            result[outside] = _feistel(result[outside], half, keys[::-1] if inverse else keys, inverse=inverse)
            outside = result >= self.num_samples
        return result.astype(np.int64)


def _feistel(values: Words, half: np.uint64, keys: Words, *, inverse: bool) -> Words:
    low_bits = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & low_bits
    if inverse:
        left, right = right, left
    for key in keys:
        left, right = right, left ^ (mixed(right + key) & low_bits)
    if inverse:
        left, right = right, left
    return (left << half) | right
