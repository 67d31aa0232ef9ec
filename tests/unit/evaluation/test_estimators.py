"""Every estimator against the exact figure of a tiny model: all masks of a text listed, all its predecessors told."""

import math

import numpy as np
import pytest
import torch
from small import (
    ABSORBING,
    CPU,
    MASK,
    PROCESSES,
    TEXT,
    VOCAB,
    Recorded,
    autoregressive,
    batch_of,
    diffusion,
    expected,
    new_denoiser,
    nodes,
)

from dllm_core.evaluation.estimators import (
    Draw,
    Estimator,
    ExactCount,
    ExactNLL,
    HeldoutRows,
    StratifiedTime,
    estimator_of,
)
from dllm_core.evaluation.likelihood import score_rows
from dllm_core.noise.hybrid import HybridProcess
from dllm_core.noise.schedule import CosineSchedule, LogLinearSchedule, PolynomialSchedule
from dllm_core.noise.uniform import UniformProcess
from dllm_core.objective.config import AutoregressiveConfig, BlockDiffusionConfig, DiffusionConfig, MaskedLMConfig

pytestmark = pytest.mark.usefixtures("one_thread")
ROW = np.array([0, 3, 3, 2])
REPEATS = 4000
LINEAR = PROCESSES["absorbing"]


def rows_of(x0: np.ndarray, **others: np.ndarray) -> HeldoutRows:
    every = np.ones(x0.shape, bool)
    return HeldoutRows(**{"x0": x0, "counted": every, "ids": np.arange(len(x0)), "is_real": every, **others})


def repeated(estimator: Estimator, denoiser, text=ROW, draws=2, **others) -> np.ndarray:
    """The same row under many row ids, so under many draws, [REPEATS]."""
    x0 = np.tile(text, (REPEATS, 1))
    rows = rows_of(x0, **{name: np.tile(part, (REPEATS, 1)) for name, part in others.items()})
    return score_rows(denoiser, estimator, rows, seed=5, draws=draws).nats


def assert_mean(found: np.ndarray, exact: float) -> None:
    error = found.std(ddof=1) / math.sqrt(len(found))
    assert error < 0.03 * exact
    assert abs(found.mean() - exact) < 4 * error + 1e-5 * exact


def exact_bound(denoiser, process=LINEAR, block_length=None, text=ROW, **options) -> float:
    with torch.inference_mode():
        objective = diffusion(process, block_length, **options)
        return expected(objective, denoiser, process, text, nodes(4 if process == LINEAR else 16))


@pytest.mark.parametrize("block_length", [None, 1, 2, 3, 4])
def test_both_estimators_of_masks_have_the_exact_bound_as_their_mean_and_counts_spread_less(block_length):
    denoiser = new_denoiser()
    exact = exact_bound(denoiser, block_length=block_length)
    by_time = repeated(StratifiedTime(LINEAR, CPU, block_length=block_length), denoiser)
    by_count = repeated(ExactCount(MASK, CPU, block_length), denoiser)
    assert_mean(by_time, exact)
    assert_mean(by_count, exact)
    assert by_count.var() < 0.5 * by_time.var()


def test_one_draw_of_a_count_of_each_is_exact_over_its_masks():
    """n draws of n strata hold every k once: the mean over masks of one size is all that is left to chance."""
    denoiser = new_denoiser()
    found = repeated(ExactCount(MASK, CPU), denoiser, draws=4)
    assert_mean(found, exact_bound(denoiser))
    assert found.var() < 0.3 * repeated(ExactCount(MASK, CPU), denoiser, draws=1).var()


@pytest.mark.parametrize("name", ["absorbing-cosine", "absorbing-square"])
def test_a_bound_of_masks_is_that_of_every_schedule(name):
    denoiser = new_denoiser()
    exact = exact_bound(denoiser)
    assert exact_bound(denoiser, PROCESSES[name]) == pytest.approx(exact, rel=1e-4)
    assert_mean(repeated(StratifiedTime(PROCESSES[name], CPU), denoiser), exact)


@pytest.mark.parametrize("schedule", [*(PolynomialSchedule(exponent=w) for w in (0.1, 20)), CosineSchedule()])
@pytest.mark.parametrize("name", ["absorbing", "uniform", "hybrid"])
def test_a_figure_and_its_spread_are_those_of_linear_noise_however_steep_a_schedule_is(name, schedule):
    """Half of its noise may stand before t = 0.001, where times that are crowded by t hardly ever fall."""
    rows, denoiser = rows_of(np.tile(ROW, (300, 1))), new_denoiser()
    processes = (PROCESSES[name], PROCESSES[name].model_copy(update={"schedule": schedule}))
    linear, steep = (score_rows(denoiser, StratifiedTime(one, CPU), rows, seed=5, draws=2).nats for one in processes)
    np.testing.assert_allclose(steep, linear, rtol=1e-3)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["absorbing-cosine", "uniform", "hybrid"])
def test_the_bound_of_a_chain_is_the_sum_of_its_steps(name, steps):
    process, denoiser, text = PROCESSES[name], new_denoiser(), ROW[:2]
    ends = [(k / steps, 1 / steps) for k in range(1, steps + 1)]
    with torch.inference_mode():
        exact = expected(diffusion(process, steps=steps), denoiser, process, text, ends)
    assert_mean(repeated(StratifiedTime(process, CPU, steps=steps), denoiser, text, draws=3), exact)


@pytest.mark.parametrize("block_length", [None, 1])
def test_a_denoiser_that_is_told_t_is_told_the_time_of_each_row_or_block(block_length):
    denoiser = new_denoiser(time_conditioning=True)
    torch.nn.init.normal_(denoiser.time.modulation.weight, std=0.15)
    process, text = PROCESSES["uniform"], ROW[:2]
    with torch.inference_mode():
        options = {"time_conditioning": True}
        exact, without = (
            expected(diffusion(process, block_length, **told), model, process, text, nodes(24))
            for told, model in ((options, denoiser), ({}, new_denoiser()))
        )
    assert abs(exact - without) > 0.05
    found = repeated(StratifiedTime(process, CPU, block_length=block_length, **options), denoiser, text, draws=4)
    assert_mean(found, exact)


def test_a_prompt_is_given_and_filler_is_not_seen():
    """The conditional likelihood of an answer: the tokens that count, behind those that do not."""
    denoiser = new_denoiser()
    text, counted = np.array([2, 0, 3, 2, 0]), np.array([False, True, True, True, False])
    is_real = np.array([True, True, True, True, False])
    exact = 0.0
    for number in range(1, 8):
        mask = np.array([False, *(c == "1" for c in f"{number:03b}"), False])
        logits = denoiser(torch.from_numpy(np.where(mask, MASK, text)[None, :4])).detach()[0]
        logits[:, MASK] = -torch.inf
        ce = -logits.log_softmax(-1)[np.arange(4)[mask[:4]], text[:4][mask[:4]]].sum()
        k = int(mask.sum())
        exact += float(ce) / (k * math.comb(3, k))  # (n/k) times the mean over masks of k, k even over 1 to n
    others = {"counted": counted, "is_real": is_real}
    for estimator in (ExactCount(MASK, CPU), StratifiedTime(LINEAR, CPU)):
        assert_mean(repeated(estimator, denoiser, text, **others), exact)
        changed = np.array([*text[:4], 3])
        again = repeated(estimator, denoiser, changed, **others)
        np.testing.assert_allclose(again, repeated(estimator, denoiser, text, **others), rtol=1e-6)


@pytest.mark.parametrize("block_length", [None, 2])
@pytest.mark.parametrize("name", ["count", *PROCESSES, "short"])
def test_what_does_not_count_is_shown_as_it_is(name, block_length):
    """Prompts; under a schedule that stops early also on the last canvas. What counts is asked."""
    rng = np.random.default_rng(0)
    x0, counted = rng.choice(TEXT, (30, 8)), rng.random((30, 8)) < 0.6
    short = UniformProcess(mask_id=MASK, vocab_size=VOCAB, schedule=LogLinearSchedule(eps=0.2))
    estimator = StratifiedTime({**PROCESSES, "short": short}.get(name, LINEAR), CPU, block_length=block_length)
    recorded = Recorded(new_denoiser())
    score_rows(
        recorded,
        ExactCount(MASK, CPU, block_length) if name == "count" else estimator,
        rows_of(x0, counted=counted),
        seed=0,
        draws=3,
    )
    assert len(recorded.asked) == (6 if name == "short" else 3)
    assert np.mean([(ids[:, :8] != x0)[counted].mean() for ids, _, _ in recorded.asked]) > 0.1
    for ids, read, _ in recorded.asked:
        assert ids.shape[1] == (8 if block_length is None else 16)
        assert np.array_equal(ids[:, :8][~counted], x0[~counted])
        assert np.array_equal(ids[:, 8:], x0[:, : ids.shape[1] - 8])
        assert np.array_equal(read, counted & (ids[:, :8] == MASK) if name in ("count", *ABSORBING) else counted)


NOISED_AT: list[np.ndarray] = []


class Heard(UniformProcess):
    """Keeps the times that it noises at."""

    def corrupt(self, x0, t, u, v=None):
        NOISED_AT.append(t)
        return super().corrupt(x0, t, u, v)


def test_each_token_is_noised_at_the_time_that_the_denoiser_is_told():
    NOISED_AT.clear()
    told: list[np.ndarray] = []

    def hears(ids, *, read, t, **isolated):
        told.append(t.numpy())
        return torch.zeros(int(read.sum()), VOCAB)

    process = Heard(mask_id=MASK, vocab_size=VOCAB)
    estimator = StratifiedTime(process, CPU, block_length=2, time_conditioning=True)
    score_rows(hears, estimator, rows_of(np.zeros((5, 6), np.int64)), seed=0, draws=2)
    assert len(told) == 2
    for noised_at, t in zip(NOISED_AT, told, strict=True):
        assert np.array_equal(noised_at.astype(np.float32), t)
        assert len(np.unique(t)) == 15


@pytest.mark.parametrize("block_length", [None, 2])
def test_isolated_documents_cost_in_a_row_what_they_cost_alone(block_length):
    denoiser = new_denoiser()
    first, second = ROW[:3], np.array([2, 0])
    alone = sum(exact_bound(denoiser, block_length=block_length, text=text) for text in (first, second))
    segment_ids = np.array([1, 1, 1, 2, 2], np.int32)
    text = np.concatenate([first, second])
    for estimator in (ExactCount(MASK, CPU, block_length), StratifiedTime(LINEAR, CPU, block_length=block_length)):
        assert_mean(repeated(estimator, denoiser, text, segment_ids=segment_ids), alone)


def test_autoregression_is_scored_exactly_and_once():
    denoiser, rng = new_denoiser(), np.random.default_rng(0)
    x0 = rng.choice(TEXT, (6, 7))
    counted, is_real = rng.random(x0.shape) < 0.6, np.ones(x0.shape, bool)
    segment_ids = np.cumsum(rng.random(x0.shape) < 0.3, axis=1, dtype=np.int32)
    scores = score_rows(
        denoiser, ExactNLL(MASK, CPU), rows_of(x0, counted=counted, segment_ids=segment_ids), seed=0, draws=8
    )
    for row in range(6):
        at = slice(row, row + 1)
        others = {"segment_ids": segment_ids[at], "is_real": is_real[at], "loss_mask": counted[at]}
        loss = autoregressive().loss(denoiser, batch_of(x0[at], x0[at], 1.0, **others))
        assert scores.nats[row] == pytest.approx(float(loss.nats.detach()), rel=1e-6)
    assert scores.draws == 1
    assert (scores.variance == 0).all()


def test_blocks_of_one_token_are_scored_like_autoregression_over_masks():
    """k is 1 of 1: every token masked behind its clean past, so no draw changes anything."""
    denoiser = new_denoiser()
    found = repeated(ExactCount(MASK, CPU, 1), denoiser, draws=1)
    with torch.inference_mode():
        loss = diffusion(block_length=1).loss(denoiser, batch_of(ROW[None], np.full((1, 4), MASK), 1.0))
    np.testing.assert_allclose(found, float(loss.nats), rtol=1e-5)


@pytest.mark.parametrize("block_length", [None, 2])
@pytest.mark.parametrize("name", ["absorbing", "uniform", "hybrid"])
def test_a_row_of_a_real_denoiser_scores_alike_alone_and_in_any_batch(name, block_length):
    rng, denoiser = np.random.default_rng(0), new_denoiser()
    x0 = rng.choice(TEXT, (9, 8))
    rows = rows_of(x0, is_real=np.arange(8) < rng.integers(3, 9, (9, 1)), ids=np.arange(9) * 7)
    rows = HeldoutRows(rows.x0, rows.is_real, rows.ids, rows.is_real)
    kind = DiffusionConfig() if block_length is None else BlockDiffusionConfig()
    estimator = estimator_of(kind, PROCESSES[name], CPU, block_length=block_length)
    whole = score_rows(denoiser, estimator, rows, seed=1, draws=3)
    for part in (slice(0, 1), slice(2, 6), slice(8, 9)):
        some = HeldoutRows(x0[part], rows.counted[part], rows.ids[part], rows.is_real[part])
        found = score_rows(denoiser, estimator, some, seed=1, draws=3)
        np.testing.assert_allclose(found.nats, whole.nats[part], rtol=1e-6)


def test_a_row_that_has_nothing_to_count_costs_nothing():
    x0 = np.tile(ROW, (3, 1))
    counted = np.array([[True] * 4, [False] * 4, [False, False, True, False]])
    for estimator in (
        ExactCount(MASK, CPU),
        ExactCount(MASK, CPU, 2),
        StratifiedTime(LINEAR, CPU),
        ExactNLL(MASK, CPU),
    ):
        nats = estimator.nats(new_denoiser(), rows_of(x0, counted=counted), Draw(0, 0))
        assert nats[1] == 0
        assert nats.dtype == np.float64


@pytest.mark.parametrize(
    ("section", "process", "options", "name"),
    [
        (DiffusionConfig(), LINEAR, {}, "exact-count"),
        (DiffusionConfig(weight="context"), PROCESSES["absorbing-cosine"], {}, "exact-count"),
        (BlockDiffusionConfig(), LINEAR, {"block_length": 4}, "exact-count"),
        (DiffusionConfig(), LINEAR, {"time_conditioning": True}, "stratified-time"),
        (DiffusionConfig(), LINEAR, {"steps": 8}, "stratified-time"),
        (DiffusionConfig(), PROCESSES["uniform"], {}, "stratified-time"),
        (BlockDiffusionConfig(), HybridProcess(mask_id=MASK, vocab_size=VOCAB, p_u=0.1, gamma=1), {"block_length": 4},
         "stratified-time"),
        (AutoregressiveConfig(), PROCESSES["uniform"], {}, "exact"),
        (MaskedLMConfig(), LINEAR, {}, None),
    ],
)  # fmt: skip
def test_a_model_is_scored_by_what_it_was_trained_for(section, process, options, name):
    found = estimator_of(section, process, CPU, **options)
    assert (None if found is None else found.name) == name
