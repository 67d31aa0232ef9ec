"""Counter-based uniforms: the published Philox vectors, and a draw that depends on its coordinates alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_core.seeding import Purpose, philox, uniforms, words

# Random123-1.14.0, examples/kat_vectors, philox4x32 10 rounds: counter, key, answer.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 2**24 - 1)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, answer):
    drawn = philox(tuple(np.array([word], dtype=np.uint64) for word in counter), key)
    assert tuple(int(word[0]) for word in drawn) == answer


@given(seed=SEEDS, epoch=EPOCHS, index=st.lists(st.integers(0, 2**62), min_size=1, max_size=5), count=st.integers(1, 9))
def test_a_draw_depends_on_its_coordinates_alone(seed, epoch, index, count):
    together = uniforms(seed, Purpose.NOISE, epoch, index, count)
    alone = np.concatenate([uniforms(seed, Purpose.NOISE, epoch, [i], count) for i in index])
    longer = uniforms(seed, Purpose.NOISE, epoch, index, count + 5)[:, :count]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, longer)


def test_no_two_coordinates_share_their_words():
    settings = [
        (seed, purpose, epoch, index)
        for seed in (0, 1, 1 << 32)
        for purpose in Purpose
        for epoch in (0, 1, 2**24 - 1)
        for index in (0, 1, 1 << 32, 1 << 40)
    ]
    drawn = {tuple(words(seed, purpose, epoch, [index], 4)[0].tolist()) for seed, purpose, epoch, index in settings}
    assert len(drawn) == len(settings)


def test_uniforms_lie_in_the_half_open_interval_on_an_exact_grid_and_are_flat():
    u = uniforms(3, Purpose.NOISE, 0, np.arange(1000), 100)
    assert u.dtype == np.float32
    assert u.min() >= 0
    assert u.max() < 1
    np.testing.assert_array_equal(u.astype(np.float64) * 2**24 % 1, 0)
    counts, _ = np.histogram(u, bins=20, range=(0, 1))
    chi_square = ((counts - 5000) ** 2 / 5000).sum()  # 19 degrees of freedom; beyond 60 is one in a million
    assert chi_square < 60


@pytest.mark.parametrize("epoch", [-1, 2**24])
def test_an_epoch_that_does_not_fit_its_counter_word_is_refused(epoch):
    with pytest.raises(ValueError, match="epoch"):
        words(0, Purpose.NOISE, epoch, [0], 1)
