"""The likelihood of answers against all masks listed and all predecessors told; alone and in every company."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from conftest import in_long
from hypothesis import given
from hypothesis import strategies as st
from small import CPU, MASK, PROCESSES, TEXT, new_denoiser

from dllm_core.evaluation.answers import AnswerScorer, windows
from dllm_core.evaluation.estimators import Estimator, ExactCount, ExactNLL, HeldoutRows, StratifiedTime
from dllm_core.evaluation.likelihood import RowScores, estimate, score_rows
from dllm_core.evaluation.question import AnswerScore, Question
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import CAUSAL

CONTEXT = 32  # of `new_denoiser`
ESTIMATORS: dict[str, Estimator] = {
    "autoregressive": ExactNLL(MASK, CPU),
    "masks": ExactCount(MASK, CPU),
    "blocks": ExactCount(MASK, CPU, 2),
    "uniform": StratifiedTime(PROCESSES["uniform"], CPU),
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return new_denoiser()


@pytest.fixture(scope="module")
def speaker() -> Denoiser:
    """One whose mask and padding, which no text holds, are likelier than all that text has."""
    denoiser = new_denoiser(vocab_size=5)
    with torch.no_grad():
        for never in (MASK, denoiser.config.pad_id):
            denoiser.head.weight[never] = 5 * denoiser.head.weight[int(TEXT[int(never == MASK)])]
    return denoiser


def scored(denoiser: Denoiser, kind: str, questions: list[Question], **options: object) -> dict[Question, AnswerScore]:
    scorer = AnswerScorer(denoiser, ESTIMATORS[kind], **options)
    return {question: score for batch in scorer.score(questions) for question, score in batch.items()}


def some_questions(number: int = 40, seed: int = 0, longest: int = 80) -> list[Question]:
    """Contexts and answers of 0 to `longest` tokens, most of them short."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(0.12, (number, 2)) - 1, longest)
    lengths[: number // 8] = rng.integers(0, longest, (number // 8, 2))
    return [Question(*(tuple(rng.choice(TEXT, n).tolist()) for n in pair)) for pair in lengths]


def log_probs(denoiser: Denoiser, shown: list[int], **pattern: object) -> np.ndarray:
    """log p over text at every position of one row, the mask left out [L V]."""
    logits = denoiser(torch.tensor([shown]), **pattern)[0].detach()
    logits[:, MASK] = -torch.inf
    return logits.log_softmax(-1).double().numpy()


def told_before(denoiser: Denoiser, question: Question) -> float:
    """-log p of an answer that fits, autoregressively, by one plain forward."""
    text = [*question.context, *question.answer]
    laws = log_probs(denoiser, [MASK, *text[:-1]], pattern=CAUSAL)
    return -sum(laws[i, text[i]] for i in range(len(question.context), len(text)))


def all_masks(denoiser: Denoiser, question: Question) -> float:
    """The bound of masks: (n/k) times the mean over masks of k, for k even over 1 to n."""
    n, total = len(question.answer), 0.0
    for is_masked in itertools.product([False, True], repeat=n):
        k = sum(is_masked)
        if k:
            shown = [MASK if hidden else token for hidden, token in zip(is_masked, question.answer, strict=True)]
            laws = log_probs(denoiser, [*question.context, *shown])[len(question.context) :]
            cost = -sum(laws[i, question.answer[i]] for i in range(n) if is_masked[i])
            total += cost / (k * math.comb(n, k))
    return total


@given(st.data())
def test_windows_tell_each_token_once_what_fits_of_the_text_before_it(data):
    length = data.draw(st.integers(1, 9))
    overlap = data.draw(st.integers(0, length - 1))
    given_, asked = (data.draw(st.integers(0, 30)) for _ in range(2))
    text = tuple(range(given_ + asked))
    found = windows(Question(text[:given_], text[given_:]), length, overlap)
    assert sum((part.answer for part in found), ()) == text[given_:]
    for i, part in enumerate(found):
        at, stop = part.answer[0], part.answer[-1] + 1
        assert part.context == text[max(0, stop - length) : at]
        assert len(part.context) >= min(overlap, at)
        if i < len(found) - 1:
            assert len(part.answer) == length - min(overlap, at)
    if given_ + asked <= length:
        assert len(found) == min(asked, 1)


@pytest.mark.parametrize("kind", ["autoregressive", "masks", "blocks"])
@pytest.mark.parametrize("length", [0, 3, 31, 50])
def test_the_chances_of_all_answers_of_one_token_add_up_to_1(denoiser, kind, length):
    context = tuple(np.random.default_rng(length).choice(TEXT, length).tolist())
    found = scored(denoiser, kind, [Question(context, (int(token),)) for token in TEXT])
    assert sum(math.exp(-score.nats) for score in found.values()) == pytest.approx(1, abs=1e-6)
    assert all((score.error, score.draws) == (0, 1) for score in found.values())
    assert len({score.nats for score in found.values()}) == len(TEXT)


def test_the_chances_of_all_autoregressive_answers_of_a_length_add_up_to_1(denoiser):
    for n in (2, 3):
        answers = [Question((2, 0), answer) for answer in itertools.product(TEXT.tolist(), repeat=n)]
        found = scored(denoiser, "autoregressive", answers)
        assert sum(math.exp(-score.nats) for score in found.values()) == pytest.approx(1, abs=1e-5)


def test_an_autoregressive_answer_costs_what_its_tokens_cost_behind_all_before_them(denoiser):
    questions = some_questions()
    found = scored(denoiser, "autoregressive", questions, max_batch_tokens=128)
    for question in questions:
        exact = sum(told_before(denoiser, part) for part in windows(question, CONTEXT, 1))
        assert found[question].nats == pytest.approx(exact, rel=1e-5)
        assert found[question].error == 0


@pytest.mark.parametrize("target", [None, *in_long(0.5)])
def test_masked_answers_cost_their_bound_in_the_mean_with_the_error_that_is_told(denoiser, target):
    """Over seeds: the error may be too large, since it holds how strata differ; that of a target is a little too small,
    since draws end where it is small.
    """
    questions = [
        Question((2, 0, 3), (0, 2)),
        Question((), (3, 3, 0)),
        Question((0,) * 20, (2, 0, 3, 2)),
        Question((2,), (0,)),
    ]
    exact = np.array([all_masks(denoiser, question) for question in questions])
    seeds, drawn, told = 60, [], []
    for seed in range(seeds):
        found = scored(denoiser, "masks", questions, seed=seed, draws=8, target_error=target)
        drawn.append([found[question].nats for question in questions])
        told.append([found[question].error for question in questions])
    spread = np.std(drawn, axis=0, ddof=1)
    off = abs(np.mean(drawn, axis=0) - exact)
    assert (off < 4 * spread / math.sqrt(seeds) + 1e-5).all()
    assert (spread[:3] > 0.003).all()
    rms = np.sqrt(np.mean(np.square(told), axis=0))
    assert (rms[:3] > (0.85 if target is None else 0.7) * spread[:3]).all()
    assert (rms[:3] < 3.5 * spread[:3]).all()
    assert spread[3] < 1e-9
    assert not any(row[3] for row in told)


@pytest.mark.parametrize("kind", ESTIMATORS)
@pytest.mark.parametrize("target", [None, 0.3])
def test_a_score_is_the_same_alone_in_any_order_and_in_any_batch(denoiser, kind, target):
    """To the last bit; but torch's exp and log of many numbers are not, which only replaced tokens are weighed by."""
    questions = some_questions(24)
    options = {"draws": 12, "target_error": target}
    whole = scored(denoiser, kind, questions, **options)
    assert list(whole) != questions
    mixed = [random.Random(seed).sample(questions, len(questions)) + questions[:5] for seed in (1, 2)]
    for some, budget in [(mixed[0], 64), (mixed[1], 500), *(([question], 4096) for question in questions[::3])]:
        found = scored(denoiser, kind, some, max_batch_tokens=budget, **options)
        assert set(found) == set(some)
        for question, score in found.items():
            if kind == "uniform":
                assert score.draws == whole[question].draws
                assert score.nats == pytest.approx(whole[question].nats, rel=1e-6)
                assert score.error == pytest.approx(whole[question].error, rel=1e-5)
            else:
                assert score == whole[question]


@pytest.mark.parametrize("kind", ["masks", "uniform"])
def test_each_answer_ends_at_its_own_error_and_none_draws_more_than_allowed(denoiser, kind):
    questions = [question for question in some_questions(30, longest=40) if question.answer]
    target = 0.3
    found = scored(denoiser, kind, questions, draws=41, target_error=target)
    draws = {score.draws for score in found.values()}
    assert len(draws) >= 3
    assert max(draws) == 41
    for question, score in found.items():
        assert score.error <= target or score.draws == 41
        assert score.draws <= (1 if kind == "masks" and len(question.answer) == 1 else 41)
    full = scored(denoiser, kind, questions, draws=41)
    assert {score.draws for score in full.values()} <= {1, 41}
    off = [(found[q].nats - full[q].nats) / math.hypot(found[q].error, full[q].error) for q in found if found[q].error]
    assert np.abs(off).max() < 4
    assert 0.2 < np.std(off) < 1.3


def test_one_draw_of_what_another_could_contradict_has_no_error(denoiser):
    questions = [Question((2,), (0, 3)), Question((2,), (0,))]
    found = scored(denoiser, "masks", questions, draws=1, target_error=0.1)
    assert [found[question].error for question in questions] == [None, 0]
    assert scored(denoiser, "autoregressive", questions, draws=1)[questions[0]].error == 0


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_an_empty_answer_costs_nothing(denoiser, kind):
    assert scored(denoiser, kind, [Question((2,), ()), Question((), ())]) == {
        Question((2,), ()): AnswerScore(0, 0, 0),
        Question((), ()): AnswerScore(0, 0, 0),
    }


def test_equal_windows_of_one_text_draw_apart(denoiser):
    """Four of them spread twice as far as one, and not four times, which the sum of variances would not tell."""
    once, text = (Question((), (2, 0, 3, 2) * (8 * windows_)) for windows_ in (1, 4))
    found = [scored(denoiser, "masks", [once, text], seed=seed, draws=2, overlap=0) for seed in range(60)]
    spread = {question: np.std([scores[question].nats for scores in found]) for question in (once, text)}
    assert 1.4 < spread[text] / spread[once] < 2.8


@pytest.mark.parametrize("target", [None, 1e-9])
def test_a_score_is_what_the_held_out_estimate_says_of_the_row(denoiser, target):
    """Draws in rounds too: 6 and 5 of 11, each draw alike."""
    for question in (Question((2, 0, 3), (0, 2, 2)), Question((), (3, 0, 2, 3, 0))):
        x0 = np.array([question.context + question.answer])
        counted = np.arange(x0.shape[1])[None] >= len(question.context)
        rows = HeldoutRows(x0, counted, np.array([question.digest(0)]), np.ones_like(counted))

        def round_of(first: int, draws: int, rows: HeldoutRows = rows) -> RowScores:
            return score_rows(denoiser, ESTIMATORS["masks"], rows, seed=3, draws=draws, first=first)

        whole = estimate(round_of, 11, target)
        score = scored(denoiser, "masks", [question], seed=3, draws=11, target_error=target)[question]
        assert score.nats == pytest.approx(float(whole.nats[0]), rel=1e-5)
        assert score.error == pytest.approx(whole.monte_carlo_error * len(question.answer), rel=1e-5)
        assert score.draws == whole.draws == 11


def test_no_forward_holds_more_than_the_budget_and_no_answer_is_drawn_that_has_ended():
    denoiser, shapes = new_denoiser(), []
    denoiser.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    questions = some_questions(30, seed=3)
    for budget in (16, 100, 4096):
        shapes.clear()
        scorer = AnswerScorer(denoiser, ESTIMATORS["masks"], draws=12, target_error=0.3, max_batch_tokens=budget)
        batches = [batch for batch in scorer.score(questions) if all(question.answer for question in batch)]
        found = {question: score for batch in batches for question, score in batch.items()}
        assert (max(map(len, batches)) == 1) == (budget == 16)
        rows = sum(score.draws * len(windows(question, CONTEXT, 1)) for question, score in found.items())
        assert sum(shape[0] for shape in shapes) == rows
        assert all(shape[0] == 1 or shape.numel() <= budget for shape in shapes)
        assert len(shapes) == rows if budget == 16 else len(shapes) < rows / 3


@pytest.mark.parametrize("length", [1, 7, CONTEXT - 3])
def test_what_decoding_token_by_token_gives_is_the_likeliest_and_nothing_else_is(speaker, length):
    text = [2, 0, 3]
    for _ in range(length):
        laws = log_probs(speaker, [MASK, *text], pattern=CAUSAL)
        text.append(int(TEXT[laws[-1, TEXT].argmax()]))
    answer = tuple(text[3:])
    questions = [Question((2, 0, 3), answer)]
    for i in range(length):
        others = [token for token in TEXT.tolist() if token != answer[i]]
        questions += [Question((2, 0, 3), (*answer[:i], token, *answer[i + 1 :])) for token in others]
    scorer = AnswerScorer(speaker, ESTIMATORS["autoregressive"], max_batch_tokens=200)
    found = scorer.are_likeliest(questions)
    assert [found[question] for question in questions] == [True] + [False] * (len(questions) - 1)


def test_a_text_of_two_windows_is_the_likeliest_where_each_is(speaker):
    text: list[int] = []
    for start in (0, CONTEXT - 1):  # the second window is shown the last token of the first
        while len(text) < start + CONTEXT:
            laws = log_probs(speaker, [MASK, *text[start:]], pattern=CAUSAL)
            text.append(int(TEXT[laws[-1, TEXT].argmax()]))
    others = [(*text[:i], TEXT[text[i] != TEXT][0], *text[i + 1 :]) for i in range(len(text))]
    questions = [Question((), answer) for answer in (tuple(text), *others)]
    found = AnswerScorer(speaker, ESTIMATORS["autoregressive"], max_batch_tokens=100).are_likeliest(questions)
    assert [found[question] for question in questions] == [True] + [False] * len(text)


def test_one_of_all_tokens_that_text_has_is_the_likeliest(speaker):
    contexts = {question.context for question in some_questions(60)}
    questions = [Question(context, (token,)) for context in contexts for token in TEXT.tolist()]
    found = AnswerScorer(speaker, ESTIMATORS["autoregressive"]).are_likeliest(questions)
    assert all(sum(found[Question(context, (token,))] for token in TEXT.tolist()) == 1 for context in contexts)
