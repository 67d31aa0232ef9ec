"""Laws of the forward processes, by enumeration: marginals, transitions, and the posterior that Bayes gives."""

import numpy as np
import pytest
import torch
from conftest import draws
from enumeration import IDS, MASK, PROCESSES, REPLACING, TEXT, VOCAB, any_process, kernel, one_hot, some_log_probs
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_core.noise.hybrid import HybridProcess

EVERY_PROCESS = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
TIMES = (
    st.tuples(st.floats(0, 0.999), st.floats(0, 0.999), st.floats(0.001, 1))
    .map(sorted)
    .filter(lambda times: times[0] + 1e-6 < times[1] < times[2] - 1e-6)
)


def transition(process, s, t):
    """q(xt | xs) as a matrix [V V], rows xs."""
    step = process.mixture(np.float64(t)).since(process.mixture(np.float64(s)))
    matrix = step.keep * np.eye(VOCAB)
    matrix[:, MASK] += step.mask
    matrix[:, TEXT] += step.text / len(TEXT)
    return matrix


@settings(max_examples=draws(300))
@given(any_process(), TIMES)
def test_transitions_are_laws_and_compose(process, times):
    """Chapman-Kolmogorov, from 0 and from any s: so q(xt | x0) is a Markov chain's."""
    r, s, t = times
    for early, late in ((0, r), (r, s), (s, t), (r, t)):
        matrix = transition(process, early, late)
        assert (matrix >= 0).all()
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(
        transition(process, r, s) @ transition(process, s, t), transition(process, r, t), atol=1e-12
    )
    np.testing.assert_allclose(transition(process, 0, t), kernel(process, t), atol=1e-12)


@settings(max_examples=draws(200))
@given(any_process(), st.floats(0, 1), st.integers(0, 1000))
def test_the_marginal_is_the_stated_mixture(process, t, seed):
    probs = np.exp(some_log_probs((5,), seed))
    times = np.full(5, t)
    found = process.marginal(probs, times)
    np.testing.assert_allclose(found, probs @ kernel(process, t), atol=1e-12)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-12)


@settings(max_examples=draws(300))
@given(any_process(), TIMES)
def test_the_posterior_of_a_known_text_is_bayes(process, times):
    """q(xs | xt, x0) = q(xt | xs) q(xs | x0) / q(xt | x0); and mixed over xt it is q(xs | x0) again."""
    _, s, t = times
    before, after, step = kernel(process, s), kernel(process, t), transition(process, s, t)
    for x0 in TEXT:
        found = process.posterior(one_hot(np.full(VOCAB, x0)), IDS, np.full(VOCAB, s), np.full(VOCAB, t))
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-12)
        assert (found >= 0).all()
        np.testing.assert_allclose(after[x0] @ found, before[x0], atol=1e-12)
        for xt in IDS[after[x0] > 1e-9]:
            np.testing.assert_allclose(found[xt], step[:, xt] * before[x0] / after[x0, xt], atol=1e-9)


@settings(max_examples=draws(200))
@given(any_process(), TIMES, st.integers(0, 1000))
def test_one_reverse_step_takes_a_laws_noise_to_less_of_it(process, times, seed):
    """For one token of known law p the plug-in posterior is the exact reverse: marginals at t go to those at s."""
    _, s, t = times
    p = np.exp(some_log_probs((), seed))
    found = process.posterior(np.tile(p, (VOCAB, 1)), IDS, np.full(VOCAB, s), np.full(VOCAB, t))
    np.testing.assert_allclose(p @ kernel(process, t) @ found, p @ kernel(process, s), atol=1e-12)


@EVERY_PROCESS
def test_the_posterior_at_zero_is_the_law_of_the_clean_token(process):
    """p(x0 | xt) ~ p(x0) q(xt | x0): how a denoiser's law becomes the one that has seen the token itself."""
    p = np.exp(some_log_probs((), 5))
    found = process.posterior(np.tile(p, (VOCAB, 1)), IDS, np.zeros(VOCAB), np.full(VOCAB, 0.4))
    joint = p[:, None] * kernel(process, 0.4)
    possible = joint.sum(0) > 0
    np.testing.assert_allclose(found[possible], (joint / joint.sum(0).clip(1e-300)).T[possible], atol=1e-12)


@EVERY_PROCESS
def test_a_token_that_the_denoiser_rules_out_stays(process):
    """Carry-over (SUBS): what has no probability under absorbing noise must not become NaN."""
    probs = one_hot(np.full(VOCAB, TEXT[0]))
    found = process.posterior(probs, IDS, np.full(VOCAB, 0.2), np.full(VOCAB, 0.6))
    assert np.isfinite(found).all()
    if not process.replaces:
        assert np.array_equal(found[TEXT], one_hot(TEXT))


@pytest.mark.parametrize("process", [p for n, p in REPLACING.items() if n.startswith("uniform")], ids=str)
def test_the_uniform_posterior_is_that_of_udlm(process):
    """arXiv:2412.10193, over the N text ids: written out as the paper's four terms."""
    n, s, t = len(TEXT), 0.35, 0.8
    a_s, a_t = (float(process.schedule.alpha(np.float64(time))) for time in (s, t))
    p = np.exp(some_log_probs((), 8))
    for z in TEXT:
        own, r = one_hot(z), a_t / a_s
        even = np.where(IDS == MASK, 0, 1 / n)
        top = n * a_t * p * own + (r - a_t) * own + (a_s - a_t) * p + (1 - r) * (1 - a_s) * even
        expected = top / (n * a_t * p[z] + 1 - a_t)
        found = process.posterior(p[None], np.array([z]), np.array([s]), np.array([t]))[0]
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("p_u", [0.1, 0.6])
def test_a_share_p_u_of_tokens_is_random_where_most_are(p_u, gamma):
    process = HybridProcess(mask_id=MASK, vocab_size=VOCAB, p_u=p_u, gamma=gamma)
    share = process.mixture(np.linspace(0, 1, 1001)).text
    assert share[500] == pytest.approx(p_u, rel=1e-12)
    assert share.max() == share[500]
    assert share[0] == share[-1] == 0


def test_beyond_gamma_two_noise_would_have_to_turn_back():
    """Why the section refuses it: a weight of the step would be negative."""
    values = {"mask_id": MASK, "vocab_size": VOCAB, "p_u": 0.3, "gamma": 2.5}
    with pytest.raises(ValueError, match="gamma"):
        HybridProcess(**values)
    process = HybridProcess.model_construct(**values)
    early, late = (process.mixture(np.float64(t)) for t in (0.9, 0.99))
    assert late.text - late.keep / early.keep * early.text < -1e-3


@EVERY_PROCESS
def test_torch_and_numpy_give_the_same_laws(process):
    probs = np.exp(some_log_probs((7, 5), 2))
    xt = np.random.default_rng(1).choice(IDS, (7, 5))
    s, t = np.full((7, 1), 0.3), np.full((7, 1), 0.7)
    ours = process.posterior(probs, xt, s, t)
    theirs = process.posterior(*(torch.from_numpy(part) for part in (probs, xt, s, t)))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-14)
    assert process.posterior(probs.astype(np.float32), xt, s, t).dtype == np.float32
