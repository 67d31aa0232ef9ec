"""Counter-based uniforms: the published known answers, and purity."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_core.seeding import Purpose, philox, seeds_of, uniforms, uniforms64, uniforms_below, words


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, answer):
    drawn = philox(tuple(np.array([word], np.uint64) for word in counter), key)
    assert tuple(int(word[0]) for word in drawn) == answer


def test_a_draw_depends_on_its_coordinates_alone():
    index = np.arange(50)
    together = uniforms(9, Purpose.NOISE, 3, index, 13)
    alone = np.concatenate([uniforms(9, Purpose.NOISE, 3, index[i : i + 1], 13) for i in range(50)])
    assert np.array_equal(together, alone)
    assert np.array_equal(together[:, :5], uniforms(9, Purpose.NOISE, 3, index, 5))


EPOCHS, INDICES = st.integers(0, 2**24 - 1), st.lists(st.integers(0, 2**63 - 1), max_size=4)


@given(st.lists(st.tuples(st.integers(-(2**63), 2**65), EPOCHS, INDICES), min_size=1, max_size=5))
def test_words_of_many_seeds_are_those_of_each(rows):
    flat = [(seed, epoch, one) for seed, epoch, index in rows for one in index]
    epochs, indices = (np.array([row[i] for row in flat], np.int64) for i in (1, 2))
    found = words(seeds_of(row[0] for row in flat), Purpose.DECODE, epochs, indices, 5)
    assert found.dtype == np.uint32
    alone = [words(seed, Purpose.DECODE, epoch, index, 5) for seed, epoch, index in rows if index]
    assert found.tolist() == [row for part in alone for row in part.tolist()]


def test_an_epoch_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="epoch"):
        words(1, Purpose.DECODE, 1 << 24, np.zeros(1), 1)
    with pytest.raises(ValueError, match="epoch"):
        words(1, Purpose.DECODE, np.array([0, 1 << 24]), np.zeros(2), 1)


@pytest.mark.parametrize("change", [{"seed": 10}, {"purpose": Purpose.DECODE}, {"epoch": 4}, {"index": [51]}])
def test_every_coordinate_matters(change):
    base = {"seed": 9, "purpose": Purpose.NOISE, "epoch": 3, "index": [50], "count": 8}
    assert not np.array_equal(words(**base), words(**{**base, **change}))


def test_uniforms_lie_in_the_unit_interval_and_are_uniform():
    u = uniforms(1, Purpose.NOISE, 0, np.arange(2000), 50)
    assert u.min() >= 0
    assert u.max() < 1
    counts, _ = np.histogram(u, bins=20, range=(0, 1))
    assert abs(counts - 5000).max() < 5 * np.sqrt(5000)


def test_wide_uniforms_are_whole_words():
    """On the grid of 2^-32, in [0, 1), and the same draw as the narrow ones, with eight bits more."""
    wide, narrow = (draw(1, Purpose.REPLACE, 0, np.arange(2000), 50) for draw in (uniforms64, uniforms))
    assert wide.dtype == np.float64
    assert np.array_equal(np.floor(wide * 2**24) / 2**24, narrow)
    bits = wide * 2**32
    assert np.array_equal(bits, np.floor(bits))
    assert bits.max() < 2**32
    low = np.bincount((bits % 256).astype(np.int64).ravel(), minlength=256)
    assert abs(low - 100_000 / 256).max() < 6 * np.sqrt(100_000 / 256)


def test_purposes_do_not_share_uniforms():
    drawn = [words(9, purpose, 3, np.arange(20), 8) for purpose in Purpose]
    assert len(np.unique(np.concatenate(drawn))) == len(Purpose) * 160


@pytest.mark.parametrize("edge", ["grid", "between", "ends"])
def test_comparing_words_is_comparing_uniforms(edge):
    u = uniforms(5, Purpose.NOISE, 2, np.arange(64), 256)
    edges = {
        "grid": u.copy(),
        "between": np.nextafter(u, np.float32(2)),
        "ends": np.tile(np.float32([0, 1]), (64, 128)),
    }
    p = edges[edge]
    assert np.array_equal(uniforms_below(p, 5, Purpose.NOISE, 2, np.arange(64), 256), u < p)
    column = p[:, :1]
    assert np.array_equal(uniforms_below(column, 5, Purpose.NOISE, 2, np.arange(64), 256), u < column)
