"""Laws of the bound, by enumeration over texts and noise: what it is the limit of, and when it is tight.

The time integral starts a little above 0; what lies before is one exact step to s = 0, as for a run with that t_min.
"""

import numpy as np
import pytest
from conftest import draws
from enumeration import (
    IDS,
    MASK,
    PROCESSES,
    TEXT,
    VOCAB,
    any_process,
    canvases,
    kernel,
    one_hot,
    quadrature,
    some_log_probs,
    texts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.discrete import snapped, step_nats, terminal_nats
from dllm_core.noise.hybrid import HybridProcess
from dllm_core.noise.interpolating import InterpolatingProcess
from dllm_core.noise.schedule import CosineSchedule, LinearSchedule, LogLinearSchedule
from dllm_core.noise.uniform import UniformProcess

EVERY_PROCESS = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def start_of(process):
    """Where the integral begins: so early that two tokens are hardly ever noised, as late as 1 - alpha has digits."""
    return next(t for t in 10.0 ** np.arange(-11, 0) if 1 - process.schedule.alpha(t) > 1e-10)


def steps_between(process, law_at, x0, times):
    """Nats of the steps between `times` [T + 1] in the mean over xt, for one token x0. law_at: t [T] -> [T V V]."""
    s, t = (np.repeat(part[:, None], VOCAB, 1) for part in (times[:-1], times[1:]))
    clean, noised = np.full(s.shape, x0), np.broadcast_to(IDS, s.shape)
    nats, q = step_nats(process, law_at(times[1:]), clean, noised, s, t), kernel(process, times[1:])[:, x0]
    return float((q * np.where(q > 0, nats, 0)).sum())


def terminal(process, law_at, x0):
    """Nats of the prior term for one token, in the mean over canvases."""
    canvas = process.prior(np.zeros(60, np.int64), (np.arange(60) + 0.5) / 60)
    return float(terminal_nats(process, law_at(np.ones(1))[0, canvas], np.full(60, x0)).mean())


def chain_nats(process, law_at, x0, steps):
    """The exact T-step bound for one token."""
    return steps_between(process, law_at, x0, np.arange(steps + 1) / steps) + terminal(process, law_at, x0)


def integral_nats(process, law_at, x0, start=None):
    """The continuous bound for one token: the step below `start`, the integral of the rate, the terminal term."""
    start = start_of(process) if start is None else start
    t, weights = quadrature(start)
    ids, times = np.broadcast_to(IDS, (t.size, VOCAB)), np.repeat(t[:, None], VOCAB, 1)
    rate, q = process.nelbo_rate(law_at(t), np.full(ids.shape, x0), ids, times), kernel(process, t)[:, x0]
    integral = float((weights[:, None] * q * np.where(q > 0, rate, 0)).sum())
    first = steps_between(process, law_at, x0, np.array([0, start]))
    return first + integral + terminal(process, law_at, x0)


def knowing(law):
    """A denoiser that says one law, whatever it is shown."""
    return lambda t: np.broadcast_to(law, (t.size, VOCAB, VOCAB))


@settings(max_examples=draws(100))
@given(any_process(), st.integers(0, 1000), st.floats(0.01, 0.99), st.floats(0, 0.99))
def test_a_steps_nats_are_the_divergence_of_its_two_posteriors(process, seed, t, ratio):
    law, s = some_log_probs((VOCAB,), seed), t * ratio
    for x0 in TEXT:
        times = np.full(VOCAB, s), np.full(VOCAB, t)
        true = process.posterior(one_hot(np.full(VOCAB, x0)), IDS, *times)
        ours = process.posterior(np.exp(law), IDS, *times)
        logs = np.log(np.where(true > 0, true, 1)) - np.log(np.where(true > 0, ours, 1).clip(1e-300))
        possible = kernel(process, t)[x0] > 1e-9
        found = step_nats(process, law, np.full(VOCAB, x0), IDS, *times)
        np.testing.assert_allclose(found[possible], (true * logs).sum(-1)[possible], atol=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_rate_is_the_limit_of_ever_more_steps(name):
    """An arbitrary denoiser, which reads the token itself and the time: 2000 steps cost what the integral says."""
    base, slope = some_log_probs((VOCAB,), 1), np.where(IDS == MASK, 0, some_log_probs((VOCAB,), 2))

    def law_at(t):
        logits = base + t[:, None, None] * slope
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    process = PROCESSES[name]
    # Random text that grows like t^0.5, or t^0.3, is plenty in the first step already.
    near = {"hybrid-cosine": 1.1e-3, "hybrid-root": 6e-3}.get(name, 1e-3)
    for x0 in TEXT:
        integral = integral_nats(process, law_at, x0)
        assert chain_nats(process, law_at, x0, 2000) == pytest.approx(integral, rel=near)
        assert chain_nats(process, law_at, x0, 32_000) == pytest.approx(integral, rel=near / 3)


@settings(max_examples=draws(60))
@given(any_process(), st.integers(0, 1000), st.sampled_from([1, 2, 7]))
def test_a_chain_of_any_length_pays_an_oracle_its_code_length(process, seed, steps):
    """One token of a known law, the law itself as the denoiser: -log p(x0), for every x0 and T, also T = 1."""
    law = some_log_probs((), seed)
    for x0 in TEXT:
        paid = chain_nats(process, knowing(law), x0, steps)
        assert paid == pytest.approx(-law[x0], abs=1e-9)


@EVERY_PROCESS
def test_an_oracle_denoiser_pays_exactly_the_entropy(process):
    """i.i.d. tokens and their true law as the denoiser: NELBO = H(p), text by text."""
    law = some_log_probs((), 3)
    paid = [integral_nats(process, knowing(law), x0) for x0 in TEXT]
    np.testing.assert_allclose(paid, -law[TEXT], rtol=1e-8)


class Joint:
    """A random law over texts of three tokens that are far from independent, and what an oracle knows of noised rows.

    others: log p(x0_i | xt_j, j != i) [R 3 V]. whole: log p(x0_i | xt) [R 3 V]. rows: q(xt | x0) [X R].
    """

    def __init__(self, seed=4):
        self.x0, self.xt = texts(3), canvases(3)
        self.p = np.random.default_rng(seed).dirichlet(np.full(len(self.x0), 0.4)).clip(1e-4)
        self.p /= self.p.sum()

    def seen(self, process, t):
        by_token = kernel(process, t)[self.x0[:, None, :], self.xt[None, :, :]]  # [X R 3]
        is_id = self.x0[:, :, None] == IDS  # [X 3 V]
        logs = {}
        for name in ("others", "whole"):
            laws = np.zeros((len(self.xt), 3, VOCAB))
            for i in range(3):
                told = by_token.prod(-1) if name == "whole" else np.delete(by_token, i, axis=2).prod(-1)
                laws[:, i] = (self.p[:, None] * told).T @ is_id[:, i]
            with np.errstate(divide="ignore", invalid="ignore"):
                logs[name] = np.log(laws / laws.sum(-1, keepdims=True))
        logs["rows"] = by_token.prod(-1)
        return logs

    def mean(self, rows, nats):
        """E over xt of the row's nats [X R 3], summed over its tokens: [X]."""
        return (rows[..., None] * np.where(rows[..., None] > 0, nats, 0)).sum((1, 2))

    def nelbo(self, process, knows):
        """The continuous bound of every text [X] with an oracle that knows `others` or `whole`."""
        shape = (len(self.x0), len(self.xt), 3)
        x0, xt = np.broadcast_to(self.x0[:, None], shape), np.broadcast_to(self.xt, shape)

        def laws(t):
            seen = self.seen(process, t)
            with np.errstate(invalid="ignore"):
                known = np.where(np.isnan(seen[knows]), np.where(IDS == MASK, -np.inf, -np.log(3)), seen[knows])
            return seen["rows"], np.broadcast_to(known, (*shape, VOCAB))

        start = start_of(process)
        rows, law = laws(start)
        total = self.mean(rows, step_nats(process, law, x0, xt, np.zeros(shape), np.full(shape, start)))
        for t, weight in zip(*quadrature(start, 101), strict=True):
            rows, law = laws(t)
            total += weight * self.mean(rows, process.nelbo_rate(law, x0, xt, np.full(shape, t)))
        return total


SMOOTH = {
    name: process
    for name, process in PROCESSES.items()
    if name.endswith(("-linear", "-cosine")) or name == "hybrid-square"
}


@pytest.mark.parametrize("process", SMOOTH.values(), ids=SMOOTH)
def test_an_oracle_of_the_other_tokens_pays_exactly_minus_log_p(process):
    """p(x0_i | all xt but the i-th) makes the plug-in exact: for every text of a joint law, for every process."""
    joint = Joint()
    np.testing.assert_allclose(joint.nelbo(process, "others"), -np.log(joint.p), rtol=1e-6)


@pytest.mark.parametrize("kind", ["absorbing", "uniform", "hybrid"])
def test_the_posterior_of_the_whole_row_is_tight_for_masks_alone(kind):
    """Plugging p(x0_i | xt) in counts a token's own evidence twice where it can be replaced: strictly more nats."""
    joint, process = Joint(), PROCESSES[f"{kind}-linear"]
    extra = joint.nelbo(process, "whole") + np.log(joint.p)
    if kind == "absorbing":
        np.testing.assert_allclose(extra, 0, atol=1e-6)
    else:
        assert float(joint.p @ extra) > 0.01


@EVERY_PROCESS
def test_a_law_of_the_others_becomes_one_of_the_whole_row_by_the_posterior_at_zero(process):
    joint, t = Joint(), 0.45
    seen = joint.seen(process, t)
    times = np.zeros(joint.xt.shape), np.full(joint.xt.shape, t)
    possible = seen["rows"].sum(0) > 0
    found = process.posterior(np.exp(seen["others"][possible]), joint.xt[possible], *(part[possible] for part in times))
    np.testing.assert_allclose(found, np.exp(seen["whole"][possible]), atol=1e-12)


@settings(max_examples=draws(20), deadline=None)
@given(any_process(), st.integers(0, 1000))
def test_no_denoiser_pays_less_than_the_entropy(process, seed):
    """For any denoiser, the mean over a law's texts of what it pays is at least the law's entropy."""
    law, wrong = np.exp(some_log_probs((), 0)), some_log_probs((VOCAB,), seed)
    entropy = -float((law[TEXT] * np.log(law[TEXT])).sum())
    for paid_by in (
        lambda x0: chain_nats(process, knowing(wrong), x0, 3),
        lambda x0: integral_nats(process, knowing(wrong), x0),
    ):
        assert sum(law[x0] * paid_by(x0) for x0 in TEXT) >= entropy - 1e-6


def test_log_linear_noise_without_its_terminal_term_is_eps_short_of_a_bound():
    law, eps = some_log_probs((), 3), 0.03
    process = AbsorbingProcess(mask_id=MASK, schedule=LogLinearSchedule(eps=eps))
    for x0 in TEXT:
        paid = integral_nats(process, knowing(law), x0)
        last = terminal(process, knowing(law), x0)
        assert last == pytest.approx(eps * -law[x0], rel=1e-9)
        assert paid - last == pytest.approx((1 - eps) * -law[x0], rel=1e-9)


@settings(max_examples=draws(200))
@given(any_process(), st.floats(0, 1), st.integers(0, 1000))
def test_the_rate_is_never_negative_and_nothing_for_a_sure_and_right_denoiser(process, t, seed):
    law, times = some_log_probs((VOCAB,), seed, spread=4), np.full(VOCAB, t)
    with np.errstate(divide="ignore"):
        sure = np.log(one_hot(IDS))
    for x0 in TEXT:
        possible = kernel(process, t)[x0] > 1e-14
        clean = np.full(VOCAB, x0)
        assert (process.nelbo_rate(law, clean, IDS, times)[possible] >= -1e-9).all()
        np.testing.assert_allclose(process.nelbo_rate(sure[clean], clean, IDS, times)[possible], 0, atol=1e-12)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()])
def test_the_rate_for_masks_is_the_weighted_cross_entropy(schedule):
    """MDLM's form against the general one, which goes the long way over the vocabulary."""
    process, law = AbsorbingProcess(mask_id=MASK, schedule=schedule), some_log_probs((50,), 6)
    x0, t = np.full(50, TEXT[1]), np.linspace(0.01, 0.99, 50)
    for xt in (np.full(50, MASK), x0):
        short, long = (kind.nelbo_rate(process, law, x0, xt, t) for kind in (AbsorbingProcess, InterpolatingProcess))
        np.testing.assert_allclose(short, long, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(short, 0)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()])
def test_a_hybrid_without_random_text_pays_what_masks_pay(schedule, gamma):
    """In float32 and for tokens that the denoiser all but rules out; clean ones, whose ratio overflows, pay nothing."""
    hybrid = HybridProcess(mask_id=MASK, vocab_size=VOCAB, schedule=schedule, p_u=0, gamma=gamma)
    absorbing, t = AbsorbingProcess(mask_id=MASK, schedule=schedule), np.linspace(0, 1, 50, dtype=np.float32)
    law = some_log_probs((50,), 6, spread=60).astype(np.float32)
    for x0 in TEXT:
        for xt in (np.full(50, MASK), np.full(50, x0)):
            ours, theirs = (kind.nelbo_rate(law, np.full(50, x0), xt, t) for kind in (hybrid, absorbing))
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours[1:], theirs[1:], rtol=1e-4, atol=1e-6)
            assert np.isfinite(ours).all()


@pytest.mark.parametrize("t", [0.02, 0.3, 0.7, 0.98])
@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule(), LogLinearSchedule()])
def test_the_rate_for_replaced_tokens_is_that_of_udlm_and_duo(schedule, t):
    """arXiv:2412.10193 and arXiv:2506.10892, over the N text ids; written out token by token."""
    process = UniformProcess(mask_id=MASK, vocab_size=VOCAB, schedule=schedule)
    alpha, slope = (float(f(np.float64(t))) for f in (schedule.alpha, schedule.dalpha_dt))
    n, law = len(TEXT), some_log_probs((VOCAB,), 9)
    for x0 in TEXT:
        for z in TEXT:
            bar = n * alpha * np.exp(law[z]) + 1 - alpha
            e = float(z == x0)
            clean = n * alpha * e + 1 - alpha
            c = (1 - alpha) / (n * alpha + 1 - alpha)
            total = np.log(bar[TEXT]).sum() - n * np.log(bar[z])
            inside = -(e * c + 1 - e) * total - (1 - e) * n * alpha / (1 - alpha) * np.log(bar[x0] / bar[z])
            inside += (e * (n - 1) * c - (1 - e) / c) * np.log(c)
            expected = slope / (n * alpha) * (n * (1 / clean - 1 / bar[z]) - inside)
            found = process.nelbo_rate(law[z], np.int64(x0), np.int64(z), np.float64(t))
            assert float(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("t", [0.02, 0.3, 0.7, 0.98])
@pytest.mark.parametrize(("p_u", "gamma"), [(0.1, 1.0), (0.2, 1.0), (0.5, 0.6), (0.3, 2.0)])
def test_the_rate_for_hybrid_noise_is_that_of_gidd(p_u, gamma, t):
    """arXiv:2503.04482, with its weights for masks, random and clean tokens."""
    process, law, n = (
        HybridProcess(mask_id=MASK, vocab_size=VOCAB, p_u=p_u, gamma=gamma),
        some_log_probs((), 9),
        len(TEXT),
    )
    c = 2**gamma * p_u / (1 - p_u) * (t * (1 - t)) ** (gamma / 2)
    slope = gamma / 2 * (1 - 2 * t) / (t * (1 - t)) * c
    for x0 in TEXT:
        q, p = (probs @ kernel(process, t) for probs in (one_hot(x0), np.exp(law)))
        for z in IDS:
            if z == MASK:
                weight = 1 / (t * (1 - t))
            elif z == x0:
                weight = (c + (1 - t) * slope) / n / ((1 - t) * (1 - t + c / n))
            else:
                weight = (c + (1 - t) * slope) / ((1 - t) * c)
            expected = weight * ((q * np.log(q / p)).sum() + q[z] / p[z] - np.log(q[z] / p[z]) - 1)
            found = process.nelbo_rate(law, np.int64(x0), np.int64(z), np.float64(t))
            assert float(found) == pytest.approx(expected, rel=1e-9)


@given(st.integers(1, 1 << 20), st.floats(0, 1, width=32))
def test_a_snapped_time_is_the_end_of_the_step_that_it_lies_in(steps, t):
    snap = snapped(np.array([t]), steps)
    assert snap[0] * steps == pytest.approx(min(np.floor(t * steps) + 1, steps), rel=1e-12)
    assert snap[0] >= t
    assert snap[0] <= 1
    assert np.array_equal(snapped(np.array([t], np.float32), 1), np.float32([1]))
