"""Autoregression and masked language modelling: documents alone, shares as said, choices of a sample's own."""

import numpy as np
import pytest
import torch
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st
from small import MASK, TEXT, autoregressive, batch_of, masked_lm, new_denoiser

from dllm_core.model.pattern import CAUSAL
from dllm_core.objective.autoregressive import shifted

pytestmark = pytest.mark.usefixtures("one_thread")
CHI_SQUARE_1E_4 = {1: 15.14, 3: 21.11, 20: 52.39}  # the 1 - 1e-4 quantiles


@settings(max_examples=draws(25), deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 1000))
def test_a_documents_tokens_cost_in_a_row_what_they_cost_alone(lengths, filler, seed):
    rng, denoiser = np.random.default_rng(seed), new_denoiser(seed)
    width = sum(lengths) + filler
    x0 = rng.choice(TEXT, (1, width))
    segment_ids = np.repeat(np.arange(len(lengths) + 1), [*lengths, filler])[None].astype(np.int32)
    is_real = (np.arange(width) < sum(lengths))[None]
    batch = batch_of(x0, x0, 1.0, loss_mask=is_real, is_real=is_real, segment_ids=segment_ids)
    row = autoregressive().loss(denoiser, batch)
    first, alone = 0, 0.0
    for length in lengths:
        document = x0[:, first : first + length]
        loss = autoregressive().loss(denoiser, batch_of(document, document, 1.0))
        assert loss.num_tokens == length  # the first is asked too
        alone += float(loss.nats.detach())
        first += length
    assert float(row.nats.detach()) == pytest.approx(alone, rel=1e-5)
    assert float(row.bound_nats) == float(row.nats.detach())


def test_a_token_costs_its_law_behind_the_tokens_before_it():
    denoiser, x0 = new_denoiser(), np.array([[0, 3, 2, 2]])
    nats = 0.0
    for i in range(4):
        given = torch.tensor([[MASK, *x0[0, :i]]])
        logits = denoiser(given, pattern=CAUSAL)[0, -1].detach()
        logits[MASK] = -torch.inf
        nats -= float(logits.log_softmax(-1)[x0[0, i]])
    loss = autoregressive().loss(denoiser, batch_of(x0, x0, 1.0))
    assert float(loss.nats.detach()) == pytest.approx(nats, rel=1e-5)


def test_each_token_is_shown_one_place_later_and_none_across_documents():
    x0 = torch.tensor([[5, 6, 7, 8, 9]])
    assert shifted(x0, None, MASK).tolist() == [[MASK, 5, 6, 7, 8]]
    assert shifted(x0, torch.tensor([[0, 0, 1, 2, 2]]), MASK).tolist() == [[MASK, 5, MASK, MASK, 8]]
    assert x0.tolist() == [[5, 6, 7, 8, 9]]


def chi_square(counts: np.ndarray, shares: np.ndarray) -> float:
    expected = counts.sum() * shares
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_15_in_100_are_chosen_and_8_1_1_of_10_become_mask_another_token_and_stay(seed):
    vocab = 22
    x0 = np.random.default_rng(seed).integers(2, vocab, (400, 256))
    objective = masked_lm(vocab, seed=seed)
    noised, chosen = objective.corrupt(x0, np.arange(400), np.ones(x0.shape, bool))
    assert chi_square(np.array([chosen.sum(), (~chosen).sum()]), np.array([0.15, 0.85])) < CHI_SQUARE_1E_4[1]
    assert np.array_equal(noised[~chosen], x0[~chosen])
    was, now = x0[chosen], noised[chosen]
    same = 0.1 / (vocab - 1)  # a random token may be the old one
    found = np.array([(now == MASK).sum(), ((now != MASK) & (now != was)).sum(), (now == was).sum()])
    assert chi_square(found, np.array([0.8, 0.1 - same, 0.1 + same])) < CHI_SQUARE_1E_4[3]
    others = now[(now != MASK) & (now != was)]
    assert (others != MASK).all()
    counts = np.bincount(others, minlength=vocab)
    assert counts[0] > 0  # a token that this text does not hold
    shares = np.where(np.arange(vocab) == MASK, 0, 1.0)
    shares = (shares[None] - np.eye(vocab)[was] * shares).sum(0)  # none replaces itself here
    kept = shares > 0
    assert chi_square(counts[kept], shares[kept] / shares.sum()) < CHI_SQUARE_1E_4[20]


@pytest.mark.parametrize(("masked", "replaced"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_shares_of_all_and_none_are_all_and_none(masked, replaced):
    x0 = np.full((200, 50), 3)
    noised, chosen = masked_lm(rate=1.0, masked=masked, replaced=replaced).corrupt(
        x0, np.arange(200), np.ones(x0.shape, bool)
    )
    assert chosen.all()
    if replaced:
        counts = np.bincount(noised.ravel(), minlength=4)
        assert counts[MASK] == 0
        assert chi_square(counts[TEXT], np.full(3, 1 / 3)) < CHI_SQUARE_1E_4[3]
    else:
        assert (noised == (MASK if masked else 3)).all()


def test_a_samples_choice_depends_on_its_number_and_the_seed_alone():
    x0, counters = np.random.default_rng(0).choice(TEXT, (12, 40)), np.arange(100, 112)
    every = np.ones(x0.shape, bool)
    noised, chosen = masked_lm().corrupt(x0, counters, every)
    order = np.random.default_rng(1).permutation(12)
    for part in np.array_split(order, 3):
        again, asked = masked_lm().corrupt(x0[part], counters[part], every[part])
        assert np.array_equal(again, noised[part])
        assert np.array_equal(asked, chosen[part])
    assert not np.array_equal(masked_lm(seed=1).corrupt(x0, counters, every)[1], chosen)
    assert not np.array_equal(masked_lm().corrupt(x0, counters + 12, every)[1], chosen)


def test_the_loss_is_the_mean_cross_entropy_at_the_chosen():
    x0, denoiser = np.random.default_rng(0).choice(TEXT, (6, 20)), new_denoiser()
    batch, objective = batch_of(x0, x0, 1.0, counters=np.arange(6) + 40), masked_lm(rate=0.5)
    noised, chosen = objective.corrupt(x0, batch.counters, batch.loss_mask)
    logits = denoiser(torch.from_numpy(noised)).detach()[torch.from_numpy(chosen)]
    logits[:, MASK] = -torch.inf
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(x0[chosen]))
    loss = objective.loss(denoiser, batch)
    assert float(loss.nats.detach()) / loss.divisor == pytest.approx(float(expected), rel=1e-5)
    assert np.isnan(float(loss.bound_nats))  # no likelihood is bounded
