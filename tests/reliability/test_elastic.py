"""The sample sequence knows nothing of who reads it: any world size, any switch between them, any batch size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_core.data.batch import Batch
from dllm_core.data.loader import Loader

FIELDS = ("x0", "xt", "t", "loss_mask", "counters")
SAMPLES = 600
worlds = st.sampled_from([1, 2, 4, 8])
spells = st.tuples(worlds, st.integers(1, 5), st.integers(1, 3))  # world size, rows a rank, steps


@pytest.fixture(scope="module")
def loader(small_corpus) -> Loader:
    return Loader.open(small_corpus.store, small_corpus.manifest, small_corpus.tokenizer.mask_id)


@pytest.fixture(scope="module")
def sequence(small_corpus, loader) -> Batch:
    """The first samples, one after the other: more than two epochs that are written down and some that are not."""
    assert 2 * small_corpus.manifest.train.rows < SAMPLES
    rows = [loader.batch(counter, 1) for counter in range(SAMPLES)]
    joined = {field: np.concatenate([getattr(row, field) for row in rows]) for field in FIELDS}
    return Batch(**joined, segment_ids=None)


@settings(max_examples=100, deadline=None)
@given(plan=st.lists(spells, min_size=1, max_size=4), start=st.integers(0, SAMPLES - 4 * 8 * 5 * 3))
def test_a_run_that_changes_its_world_at_any_step_reads_the_one_sequence(loader, sequence, plan, start):
    counter = start
    for world_size, rows_a_rank, steps in plan:
        for _ in range(steps):
            rows = world_size * rows_a_rank
            shares = [loader.batch(counter, rows, rank, world_size) for rank in range(world_size)]
            for field in FIELDS:
                found = np.concatenate([getattr(share, field) for share in shares])
                assert np.array_equal(found, getattr(sequence, field)[counter : counter + rows]), field
            counter += rows


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 40), world_size=st.integers(1, 8), counter=st.integers(0, SAMPLES - 40))
def test_ranks_share_a_batch_of_any_size_without_gap_or_overlap(loader, sequence, rows, world_size, counter):
    shares = [loader.batch(counter, rows, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate([share.xt for share in shares]), sequence.xt[counter : counter + rows])
    sizes = [len(share.x0) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=20, deadline=None)
@given(world_size=worlds, rows=st.integers(1, 64), epoch=st.integers(0, 3))
def test_an_epoch_holds_each_sample_once(small_corpus, loader, world_size, rows, epoch):
    samples = small_corpus.manifest.train.rows
    seen = []
    for start in range(0, samples, rows):
        counter, size = epoch * samples + start, min(rows, samples - start)
        for rank in range(world_size):
            seen += [row.tobytes() for row in loader.batch(counter, size, rank, world_size).x0]
    stored = loader.batch(0, samples).x0
    assert len(np.unique(stored, axis=0)) > 0.9 * samples
    assert sorted(seen) == sorted(row.tobytes() for row in stored)
