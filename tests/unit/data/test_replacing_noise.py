"""The noise of a corpus where tokens are replaced: as pure a function of (seed, epoch, row) as masks are."""

import numpy as np
import pytest

from dllm_core.data.noising import CorpusNoise
from dllm_core.data.order import SampleOrder
from dllm_core.noise.process import AbsorbingNoise, HybridNoise, UniformNoise

MASK, VOCAB, ROWS, LENGTH = 5, 300, 200, 40
SECTIONS = {"uniform": UniformNoise(), "hybrid": HybridNoise(p_u=0.3)}


def noise_of(section, block_length=None) -> CorpusNoise:
    return CorpusNoise(section.bind(MASK, VOCAB), SampleOrder(3, ROWS), 1e-3, block_length)


def text() -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, VOCAB - 1, (ROWS, LENGTH))
    return ids + (ids >= MASK)


@pytest.mark.parametrize("block_length", [None, 7])
@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_a_rows_noise_depends_on_the_row_alone(section, block_length):
    noise, x0, ids = noise_of(section, block_length), text(), np.arange(ROWS)
    xt, t = noise.corrupt(1, ids, x0)
    chosen = np.random.default_rng(1).permutation(ROWS)[:77]
    part, times = noise.corrupt(1, chosen, x0[chosen])
    assert np.array_equal(part, xt[chosen])
    assert np.array_equal(times, t[chosen])
    as_stored, _ = noise.corrupt(1, ids, x0.astype(np.uint16))
    assert as_stored.dtype == np.uint16
    assert np.array_equal(as_stored, xt)
    assert not np.array_equal(noise.corrupt(2, ids, x0)[0], xt)


def test_uniform_noise_replaces_where_masks_would_stand():
    """u alone decides whether: the two processes differ in what they put there."""
    x0, ids = text(), np.arange(ROWS)
    masked, _ = noise_of(AbsorbingNoise()).corrupt(0, ids, x0)
    replaced, _ = noise_of(UniformNoise()).corrupt(0, ids, x0)
    assert np.array_equal(replaced[masked != MASK], x0[masked != MASK])
    assert (replaced != MASK).all()
    same = (replaced == x0)[masked == MASK].mean()
    assert same < 3 / VOCAB


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_a_prompt_is_never_replaced(section):
    x0, is_learned = text(), np.arange(LENGTH) >= 15
    xt, _ = noise_of(section).corrupt(0, np.arange(ROWS), x0, np.broadcast_to(is_learned, x0.shape))
    assert np.array_equal(xt[:, :15], x0[:, :15])
    assert (xt[:, 15:] != x0[:, 15:]).mean() > 0.2


def test_what_replaces_is_drawn_apart_from_whether():
    """Among tokens that are only just noised, replacements are as spread as among all."""
    x0, ids = text(), np.arange(ROWS)
    xt, t = noise_of(UniformNoise()).corrupt(0, ids, x0)
    for rows in (t < 0.2, t > 0.8):
        drawn = xt[rows][xt[rows] != x0[rows]]
        counts = np.bincount(drawn * 10 // VOCAB, minlength=10)
        assert abs(counts - drawn.size / 10).max() < 5 * np.sqrt(drawn.size / 10)
