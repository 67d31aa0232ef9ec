"""The training order reads every sample once an epoch, whoever reads it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_core.data.order import SampleOrder


@given(st.integers(0, 2**63 - 1), st.integers(1, 600), st.integers(0, 9))
def test_an_epoch_is_a_bijection_with_position_as_its_inverse(seed, samples, epoch):
    order = SampleOrder(seed, samples)
    positions = np.arange(samples)
    ids = order.sample(epoch, positions)
    assert np.array_equal(np.sort(ids), positions)
    assert np.array_equal(order.position(epoch, ids), positions)


def test_epochs_and_seeds_have_orders_of_their_own():
    positions = np.arange(500)
    orders = [SampleOrder(seed, 500).sample(epoch, positions) for seed in (1, 2) for epoch in (0, 1)]
    for i, left in enumerate(orders):
        for right in orders[i + 1 :]:
            assert (left == right).mean() < 0.05


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_global_batch_has_the_same_rows_at_every_world_size(small_corpus, world_size):
    from dllm_core.data.loader import Loader

    loader = Loader.open(small_corpus.store, small_corpus.manifest, small_corpus.tokenizer.mask_id)
    seen = []
    for counter in range(0, small_corpus.manifest.train.rows - 8, 8):
        whole = loader.batch(counter, 8)
        parts = [loader.batch(counter, 8, rank, world_size) for rank in range(world_size)]
        for field in ("x0", "xt", "t", "loss_mask"):
            joined = np.concatenate([getattr(part, field) for part in parts])
            assert np.array_equal(joined, getattr(whole, field))
        seen.append(counter)
    assert len(seen) > 5
