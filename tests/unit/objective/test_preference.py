"""Preference: its bounds' difference is unbiased, exact where nothing was learned, and varies less than bounds apart.

Draws are not sampled here but listed: every time that changes a number of masks, every order of the places.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CPU, LINEAR, MASK, PROCESSES, TEXT, VOCAB, batch_of, diffusion, new_denoiser, nodes, rows_at

from dllm_core.data.batch import Batch
from dllm_core.noise.exact_count import exact_counts
from dllm_core.noise.interpolating import InterpolatingProcess
from dllm_core.objective import preference
from dllm_core.objective.config import PreferenceConfig
from dllm_core.objective.preference import Preference, offsets
from dllm_core.seeding import Purpose

pytestmark = pytest.mark.usefixtures("one_thread")
Asked = Callable[..., torch.Tensor]


def uniform(ids: torch.Tensor, *, read: torch.Tensor, **ignored: object) -> torch.Tensor:
    """A denoiser that knows nothing: its bound is n log(V - 1) for every mask, without any spread."""
    return torch.zeros(int(read.sum()), VOCAB)


@dataclass(frozen=True)
class Pair:
    """Ids of a prompt and two answers, the end tokens among them, and how much filler stands behind."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    filler: int = 0

    @property
    def swapped(self) -> "Pair":
        return Pair(self.prompt, self.rejected, self.chosen, self.filler)


PAIR = Pair([2, 0], [3, 2, 0], [0, 3], filler=2)


def pairs_batch(*pairs: Pair, first: int = 0) -> Batch:
    """Rows as `packing.type: pairs` makes them; their written noise is nonsense."""
    ids, learned, segments, real = [], [], [], []
    for pair in pairs:
        documents = [*pair.prompt, *pair.chosen, *pair.prompt, *pair.rejected]
        lengths = [len(pair.prompt) + len(pair.chosen), len(pair.prompt) + len(pair.rejected), pair.filler]
        ids.append(documents + [0] * pair.filler)
        flags = [[False] * len(pair.prompt) + [True] * len(answer) for answer in (pair.chosen, pair.rejected)]
        learned.append([*flags[0], *flags[1]] + [False] * pair.filler)
        segments.append(np.repeat([1, 2, 3], lengths))
        real.append(np.arange(sum(lengths)) < len(documents))
    x0 = np.array(ids)
    return batch_of(
        x0,
        np.full_like(x0, MASK),
        0.5,
        loss_mask=np.array(learned),
        counters=first + np.arange(len(x0)),
        segment_ids=np.array(segments, np.int32),
        is_real=np.array(real),
    )


def objective(reference: Asked, block_length: int | None = None, seed: int = 0, **options: object) -> Preference:
    return Preference(PreferenceConfig(**options), reference, MASK, CPU, seed=seed, block_length=block_length)


def nudged(size: float = 0.3, seed: int = 0, like: int = 0) -> torch.nn.Module:
    """`new_denoiser(like)` after a step in some direction."""
    denoiser = new_denoiser(like)
    torch.manual_seed(100 + seed)
    with torch.no_grad():
        for p in denoiser.parameters():
            p += size * p.std(correction=0).clamp(min=0.05) * torch.randn_like(p)
    return denoiser


@dataclass(frozen=True)
class Draws:
    """Listed draws, one a row: chance [N], uniforms of the time [N draws blocks] and of the places [N draws L]."""

    chance: np.ndarray
    share: np.ndarray
    u: np.ndarray


def within(n: set[int], stratum: int, strata: int) -> list[tuple[float, float]]:
    """(chance, uniform) of a stratum's stretches over which no number of masks of n tokens changes."""
    cuts = {k / size for size in n for k in range(size + 1)} | {stratum / strata, (stratum + 1) / strata}
    edges = sorted(cut * strata - stratum for cut in cuts if stratum / strata <= cut <= (stratum + 1) / strata)
    return [(b - a, (a + b) / 2) for a, b in itertools.pairwise(edges) if b - a > 1e-12]


def listed(pair: Pair, draws: int = 1, varied: tuple[int, ...] | None = None, block: int | None = None) -> Draws:
    """Every outcome of the draws `varied`, together; the others stand still."""
    head, length = len(pair.prompt), max(len(pair.chosen), len(pair.rejected))
    sizes = {len(pair.chosen), len(pair.rejected)} if block is None else set(range(1, block + 1))
    blocks = 1 if block is None else -(-(head + length) // block)
    chances, shares, places = [], [], []

    def outcomes(draw: int) -> Iterator[tuple[float, list[float], list[float]]]:
        still = varied is not None and draw not in varied
        times = within(sizes, draw, draws)
        for time in itertools.product(times, repeat=blocks):
            for order in itertools.permutations(range(length)):
                u = [0.0] * head + [(k + 0.5) / length for k in order]
                chance = math.prod(part for part, _ in time) / math.factorial(length)
                yield (1.0 if still else chance), [at for _, at in time], u
                if still:
                    return

    for outcome in itertools.product(*map(list, map(outcomes, range(draws)))):
        chances.append(math.prod(chance for chance, _, _ in outcome))
        shares.append([share for _, share, _ in outcome])
        places.append([u for _, _, u in outcome])
    return Draws(np.array(chances), np.array(shares), np.array(places))


@contextmanager
def drawn(draws: Draws, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, sample number i is noised by the i-th of the listed draws."""

    def given(seed: int, purpose: Purpose, draw: int, counters: np.ndarray, count: int) -> np.ndarray:
        of = draws.share if purpose is Purpose.PREFERENCE_STRATUM else draws.u
        found = np.zeros((len(counters), count))
        width = min(count, of.shape[2])
        found[:, :width] = of[counters, draw, :width]
        return found

    with monkeypatch.context() as patch:
        patch.setattr(preference, "uniforms64", given)
        yield


def every_gain(
    policy: Asked, tuned: Preference, pair: Pair, draws: Draws, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """The gain of a pair under each of the listed draws, [N]."""
    with drawn(draws, monkeypatch):
        return tuned.margins(policy, pairs_batch(*[pair] * len(draws.chance))).gain


def mean_and_variance(values: torch.Tensor, draws: Draws) -> tuple[float, float]:
    found = values.detach().double().numpy()
    mean = draws.chance @ found
    return float(mean), float(draws.chance @ (found - mean) ** 2)


def bound(
    denoiser: Asked, prompt: list[int], answer: list[int], block: int | None = None, by: InterpolatingProcess = LINEAR
) -> torch.Tensor:
    """An answer's NELBO given its prompt, in a row of its own, by quadrature over t and all sets of masks."""
    x0 = np.array([[*prompt, *answer]] * 2 ** len(answer))
    counted = np.arange(x0.shape[1]) >= len(prompt)
    sets = itertools.product((False, True), repeat=len(answer))
    is_masked = np.array([[False] * len(prompt) + list(one) for one in sets])
    total = torch.zeros(())
    for t, weight in nodes(6):
        alpha = float(by.schedule.alpha(np.float64(t)))
        chance = np.where(is_masked, 1 - alpha, alpha)[:, counted].prod(1)
        for row, p in enumerate(chance):
            given = batch_of(x0[:1], np.where(is_masked[row], MASK, x0[:1]), t, loss_mask=counted[None])
            total = total + weight * p * diffusion(by, block).loss(denoiser, given).nats
    return total


def true_gain(policy: Asked, reference: Asked, pair: Pair, block: int | None = None) -> torch.Tensor:
    of = [bound(d, pair.prompt, answer, block) for answer in (pair.chosen, pair.rejected) for d in (reference, policy)]
    return (of[0] - of[1]) - (of[2] - of[3])


@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("draws", [1, 2])
def test_the_gain_is_unbiased(block, draws, monkeypatch):
    pair = PAIR if draws == 1 and block is None else Pair([2], [3, 2], [0, 3], filler=1)
    reference, policy = new_denoiser(), nudged()
    every = listed(pair, draws, block=block)
    assert every.chance.sum() == pytest.approx(1)
    tuned = objective(reference, block, draws=draws)
    mean, _ = mean_and_variance(every_gain(policy, tuned, pair, every, monkeypatch), every)
    expected = float(true_gain(policy, reference, pair, block).detach())
    assert abs(expected) > 0.05
    assert mean == pytest.approx(expected, rel=2e-4)


def test_no_schedule_is_in_it():
    denoiser, bounds = new_denoiser(), []
    for name in ("absorbing", "absorbing-square"):
        bounds.append(float(bound(denoiser, PAIR.prompt, PAIR.chosen, by=PROCESSES[name]).detach()))
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-4)


@settings(max_examples=draws(20), deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([None, 2, 3]))
def test_where_nothing_was_learned_each_pair_costs_log_2_under_every_draw(seed, draws, block):
    rng, denoiser = np.random.default_rng(seed), new_denoiser(seed)
    lengths = rng.integers(1, 5, 2)
    pairs = [Pair(*(rng.choice(TEXT, n).tolist() for n in (2, *lengths)), filler=1) for _ in range(4)]
    tuned = objective(denoiser, block, seed, draws=draws, beta=3.0)
    batch = pairs_batch(*pairs)
    assert tuned.margins(denoiser, batch).gain.abs().max() < 2e-5  # the passes with and without a gradient round apart
    loss = tuned.loss(denoiser, batch)
    assert float(loss.nats.detach()) / loss.divisor == pytest.approx(math.log(2), abs=1e-4)


def test_there_the_gradient_is_that_of_the_exact_bounds(monkeypatch):
    reference, policy = new_denoiser(), new_denoiser()
    every = listed(PAIR)
    tuned = objective(reference, draws=1, beta=0.4)
    with drawn(every, monkeypatch):
        gain = tuned.margins(policy, pairs_batch(*[PAIR] * len(every.chance))).gain
    loss = (torch.from_numpy(every.chance).float() * torch.nn.functional.softplus(-0.4 * gain)).sum()
    found = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
    exact = -0.4 / 2 * true_gain(policy, reference, PAIR)
    wanted = torch.autograd.grad(exact, list(policy.parameters()), allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-5)
    assert any(one is not None and one.abs().max() > 1e-2 for one in found)


def test_the_loss_is_of_the_mean_over_draws_and_of_each_pair():
    pairs = [PAIR, Pair([0, 0], [2, 2, 3], [3, 2], filler=2)]
    batch, policy = pairs_batch(*pairs), nudged()
    tuned = objective(new_denoiser(), draws=3, beta=0.7)
    gains = tuned.margins(policy, batch).gain.detach()
    loss = tuned.loss(policy, batch)
    by_hand = [-math.log(1 / (1 + math.exp(-0.7 * gain))) for gain in gains.tolist()]
    assert float(loss.nats.detach()) == pytest.approx(sum(by_hand), rel=1e-5)
    assert loss.divisor == tuned.divisor(batch) == 2
    assert loss.num_tokens == 6


@pytest.mark.parametrize(("size", "share"), [(0.03, 0.01), (0.1, 0.1), (0.3, 1.0)])
def test_shared_masks_vary_less_than_masks_of_their_own(size, share, monkeypatch):
    reference, policy = new_denoiser(), nudged(size)
    every = listed(PAIR)

    def variance(policy: Asked, reference: Asked) -> float:
        return mean_and_variance(every_gain(policy, objective(reference, draws=1), PAIR, every, monkeypatch), every)[1]

    assert variance(uniform, uniform) < 1e-10
    shared, apart = variance(policy, reference), variance(policy, uniform) + variance(reference, uniform)
    assert shared < apart * share


@pytest.mark.parametrize("seed", range(3))
def test_more_draws_vary_as_little_as_their_number_says_or_less(seed, monkeypatch):
    reference, policy = new_denoiser(seed), nudged(0.3, seed, like=seed)
    variances = {}
    for number in (1, 2, 4, 8):
        tuned, of_draw = objective(reference, draws=number), []
        for varied in range(number):  # draws are independent: their variances add up
            some = listed(PAIR, number, varied=(varied,))
            of_draw.append(mean_and_variance(every_gain(policy, tuned, PAIR, some, monkeypatch), some)[1])
        variances[number] = sum(of_draw)
    both = listed(PAIR, 2)
    _, together = mean_and_variance(every_gain(policy, objective(reference, draws=2), PAIR, both, monkeypatch), both)
    assert together == pytest.approx(variances[2], rel=1e-3)
    for number in (2, 4, 8):  # strata can only take away
        assert variances[number] <= variances[1] / number * (1 + 1e-4)
    assert variances[8] > variances[1] / 8 / 10, "what orders of places add is left"


@settings(max_examples=draws(20), deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([None, 2]))
def test_exchanged_answers_mirror_the_gain(seed, block):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, 2)
    pairs = [Pair(*(rng.choice(TEXT, n).tolist() for n in (2, *lengths)), filler=2) for _ in range(3)]
    policy, tuned = nudged(seed=seed), objective(new_denoiser(), block, seed)
    gain = tuned.margins(policy, pairs_batch(*pairs)).gain
    mirrored = tuned.margins(policy, pairs_batch(*(pair.swapped for pair in pairs))).gain
    torch.testing.assert_close(gain, -mirrored, rtol=1e-3, atol=1e-4)


@settings(max_examples=draws(50), deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([None, 1, 3]))
def test_only_answers_are_masked_at_one_time_and_alike(seed, block):
    rng = np.random.default_rng(seed)
    prompt, chosen, rejected, filler = (rng.integers(0, 6, 4) + np.array([1, 1, 1, 0])).tolist()
    pairs = [Pair(*(rng.choice(TEXT, n).tolist() for n in (prompt, chosen, rejected)), filler=filler) for _ in range(5)]
    batch, tuned = pairs_batch(*pairs), objective(uniform, block, seed, draws=3)
    place = offsets(batch)
    for draw in range(3):
        is_masked, weight = tuned.masks(batch, draw)
        assert not (is_masked & ~batch.loss_mask).any()
        assert len(weight) == is_masked.sum()
        for row in range(5):
            of_chosen = is_masked[row] & (batch.segment_ids[row] == 1)
            of_rejected = is_masked[row] & (batch.segment_ids[row] == 2)
            assert of_chosen.any()
            assert of_rejected.any()
            if block is None:  # one time: shares of masks that differ by less than the coarser grid
                share, other = of_chosen.sum() / chosen, of_rejected.sum() / rejected
                assert abs(share - other) < 1 / min(chosen, rejected) + 1e-9
            if chosen == rejected:
                assert place[row][of_chosen].tolist() == place[row][of_rejected].tolist()


def test_the_stated_share_of_masks_is_spread_over_all_times():
    pairs = [Pair([0], [2] * 8, [3] * 8)] * 200
    tuned = objective(uniform, draws=4)
    counts = np.array([tuned.masks(pairs_batch(*pairs), draw)[0][:, :9].sum(1) for draw in range(4)])
    assert all(set(row) == {2 * j + 1, 2 * j + 2} for j, row in enumerate(counts))


@pytest.mark.parametrize(("share", "masks"), [(0.0, 1), (1 - 2**-32, 5)])
def test_the_smallest_and_the_largest_share_mask_one_and_all(share, masks):
    counted = np.array([[False, True, True, True, True, True]])
    u = np.linspace(0, 0.9, 6)[None]
    is_masked, weight = exact_counts(counted, np.zeros((1, 6), int), np.full((1, 1), share), u)
    assert is_masked.sum() == masks
    assert weight.tolist() == [5 / masks] * masks


def test_answers_do_not_see_each_other_and_filler_costs_nothing():
    rng, policy = np.random.default_rng(0), nudged()
    for block in (None, 2):
        tuned = objective(new_denoiser(), block)
        pair = Pair([2, 0], [3, 2, 0], [0, 3], filler=3)
        before = tuned.margins(policy, pairs_batch(pair))
        other = Pair([2, 0], [3, 2, 0], rng.permutation([2, 2]).tolist(), filler=3)
        after = tuned.margins(policy, pairs_batch(other))
        assert torch.equal(before.chosen_nats, after.chosen_nats)
        assert not torch.equal(before.gain, after.gain)
        batch = pairs_batch(pair)
        batch.x0[:, -3:] = 3
        assert torch.equal(tuned.margins(policy, batch).gain, before.gain)


def test_a_pair_costs_the_same_in_any_batch_and_draws_by_its_number():
    rng = np.random.default_rng(0)
    pairs = [Pair(*(rng.choice(TEXT, n).tolist() for n in (2, 4, 3)), filler=2) for _ in range(8)]
    policy, tuned = nudged(), objective(new_denoiser(), seed=5)
    batch = pairs_batch(*pairs, first=40)
    together, loss = tuned.margins(policy, batch), tuned.loss(policy, batch)
    parts = [rows_at(batch, slice(a, b)) for a, b in ((0, 1), (1, 5), (5, 8))]
    apart = [tuned.margins(policy, part) for part in parts]
    assert torch.equal(torch.cat([one.gain for one in apart]), together.gain)
    assert torch.equal(torch.cat([one.chosen_nats for one in apart]), together.chosen_nats)
    sums = [tuned.loss(policy, part) for part in parts]
    assert sum(float(one.nats.detach()) for one in sums) == pytest.approx(float(loss.nats.detach()), rel=1e-5)
    assert (sum(one.num_tokens for one in sums), sum(one.divisor for one in sums)) == (loss.num_tokens, loss.divisor)
    assert not torch.equal(tuned.margins(policy, pairs_batch(*pairs, first=41)).gain, together.gain)
    assert not torch.equal(objective(new_denoiser(), seed=6).margins(policy, batch).gain, together.gain)


def test_the_chosen_answers_bound_is_told_and_may_be_added(monkeypatch):
    policy, every = nudged(), listed(PAIR)
    plain, with_sft = (objective(new_denoiser(), draws=1, sft_weight=weight) for weight in (0.0, 0.5))
    batch = pairs_batch(*[PAIR] * len(every.chance))
    with drawn(every, monkeypatch):
        nats = plain.margins(policy, batch).chosen_nats
        losses = [one.loss(policy, batch) for one in (plain, with_sft)]
    mean, _ = mean_and_variance(nats, every)
    assert mean == pytest.approx(float(bound(policy, PAIR.prompt, PAIR.chosen).detach()), rel=2e-4)
    assert float(losses[0].bound_nats) == pytest.approx(float(nats.detach().sum()), rel=1e-5)
    assert losses[0].num_tokens == 3 * len(every.chance)
    added = float((losses[1].nats - losses[0].nats).detach())
    assert added == pytest.approx(0.5 * float(nats.detach().sum()) / 3, rel=1e-4)


def test_the_reference_is_never_trained():
    reference, policy = new_denoiser(), nudged()
    objective(reference).loss(policy, pairs_batch(PAIR)).nats.backward()
    assert all(p.grad is None for p in reference.parameters())
    assert any(p.grad is not None for p in policy.parameters())
