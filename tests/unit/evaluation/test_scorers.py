"""A scorer is a law: it sums to one after every context, and its nats are those of the formula it names."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.data.batch import Batch
from dllm_core.errors import CheckpointError
from dllm_core.evaluation.scorers import AutoregressiveScorer, NGramModel
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.objective.autoregressive import Autoregressive
from dllm_core.objective.config import AutoregressiveConfig

CPU = torch.device("cpu")
VOCAB, MASK = 5, 1
TEXT = [0, 2, 3, 4]


def fitted(rows: np.ndarray, order: int, is_real=None, segment_ids=None, vocab_size=VOCAB) -> NGramModel:
    is_real = np.ones(rows.shape, bool) if is_real is None else is_real
    return NGramModel.fit(rows, is_real, order=order, vocab_size=vocab_size, never={MASK}, segment_ids=segment_ids)


def probability(model, context: tuple[int, ...], token: int) -> float:
    row = np.array([[*context, token]])
    return math.exp(-model.nats(row, np.ones(row.shape, bool))[0, -1])


def witten_bell(documents: list[list[int]], context: tuple[int, ...], token: int, num_text: int) -> float:
    """The formula, read aloud: counts of `context` followed by something, by this token, by how many kinds."""
    size = len(context)
    after = [d[i + size] for d in documents for i in range(len(d) - size) if tuple(d[i : i + size]) == context]
    lower = witten_bell(documents, context[1:], token, num_text) if size else 1 / num_text
    types = len(set(after))
    return (after.count(token) + types * lower) / (len(after) + types) if after else lower


def test_a_toy_by_hand():
    """Rows `2 2 3` and `2 3`: c(2) = 3, c(3) = 2, two kinds; after 2 came 2 once and 3 twice."""
    rows, is_real = np.array([[2, 2, 3], [2, 3, 0]]), np.array([[1, 1, 1], [1, 1, 0]], bool)
    model = fitted(rows, 2, is_real)
    of_2, of_3, of_0 = (3 + 2 / 4) / 7, (2 + 2 / 4) / 7, (2 / 4) / 7
    assert probability(model, (), 2) == pytest.approx(of_2)
    assert probability(model, (), 0) == pytest.approx(of_0)
    assert probability(model, (2,), 3) == pytest.approx((2 + 2 * of_3) / 5)
    assert probability(model, (2,), 2) == pytest.approx((1 + 2 * of_2) / 5)
    assert probability(model, (3,), 2) == pytest.approx(of_2), "nothing ever followed 3"
    assert probability(model, (4, 2), 3) == pytest.approx((2 + 2 * of_3) / 5), "two tokens back is out of sight"
    assert "5 tokens" in model.name


@st.composite
def corpora(draw):
    """Rows, their documents as lists, and what tells them apart."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    rows = rng.choice(TEXT, (draw(st.integers(1, 5)), draw(st.integers(1, 12))), p=[0.5, 0.3, 0.15, 0.05])
    is_real = np.arange(rows.shape[1]) < rng.integers(1, rows.shape[1] + 1, (len(rows), 1))
    segments = np.cumsum(rng.random(rows.shape) < 0.25, axis=1, dtype=np.int32) if draw(st.booleans()) else None
    documents = []
    for row in range(len(rows)):
        labels = np.zeros(rows.shape[1], int) if segments is None else segments[row]
        for label in np.unique(labels):
            documents.append(rows[row][(labels == label) & is_real[row]].tolist())
    return rows, is_real, segments, documents


@settings(max_examples=draws(60), deadline=None)
@given(corpora(), st.integers(1, 4))
def test_every_law_is_the_formula_and_sums_to_one(corpus, order):
    rows, is_real, segments, documents = corpus
    model = fitted(rows, order, is_real, segments)
    contexts = [c for size in range(3) for c in itertools.product(TEXT, repeat=size)]
    contexts += [tuple(d[-4:]) for d in documents if d]
    for context in contexts:
        known = [probability(model, context, token) for token in TEXT]
        assert sum(known) == pytest.approx(1)
        seen = context[max(0, len(context) - order + 1) :]
        expected = [witten_bell(documents, seen, token, len(TEXT)) for token in TEXT]
        assert known == pytest.approx(expected)
    assert probability(model, (0,), MASK) == 0


@given(corpora(), st.integers(1, 3))
@settings(max_examples=draws(30), deadline=None)
def test_a_row_s_nats_are_those_of_its_tokens_one_by_one_and_filler_costs_nothing(corpus, order):
    rows, is_real, segments, _ = corpus
    model = fitted(rows, order, is_real, segments)
    nats = model.nats(rows, is_real)
    assert (nats[~is_real] == 0).all()
    for row, i in zip(*np.nonzero(is_real), strict=True):
        alone = probability(model, tuple(rows[row, :i].tolist()), int(rows[row, i]))
        assert nats[row, i] == pytest.approx(-math.log(alone))


def markov_rows(rows: int, width: int, seed: int, vocab: int = 20) -> np.ndarray:
    """A second-order chain over `vocab` ids from 2 on: mostly, the next is one of two, or of six by the last alone."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, vocab, (rows, width))
    for i in range(2, width):
        likely = (text[:, i - 1] + 2 * (text[:, i - 2] % 3) + (rng.random(rows) < 0.3)) % vocab
        text[:, i] = np.where(rng.random(rows) < 0.9, likely, text[:, i])
    return text + 2


def test_longer_contexts_are_cheaper_on_held_out_text_and_come_near_the_truth():
    train, held = markov_rows(3000, 40, 1), markov_rows(300, 40, 2)
    real = np.ones(held.shape, bool)
    nats = [fitted(train, order, vocab_size=22).nats(held, real)[:, 2:].mean() for order in (1, 2, 3)]
    chances = np.array([0.9 * 0.7 + 0.1 / 20, 0.9 * 0.3 + 0.1 / 20, *[0.1 / 20] * 18])
    truth = -(chances * np.log(chances)).sum()
    assert nats[0] == pytest.approx(math.log(20), abs=0.02)
    assert nats[0] > nats[1] > nats[2] > truth
    assert nats[2] < truth + 0.15


def test_nothing_to_count_is_the_uniform_law():
    model = fitted(np.empty((0, 8), np.int64), 3)
    assert model.nats(np.array([[0, 2, 4]]), np.ones((1, 3), bool)) == pytest.approx(np.full((1, 3), math.log(4)))


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    torch.manual_seed(3)
    model = ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24)
    config = DenoiserConfig(model=model, vocab_size=VOCAB, context_length=16, mask_id=MASK, eos_id=0, pad_id=4)
    return Denoiser(config).eval()


def test_an_autoregressive_scorer_is_a_law_over_texts(denoiser):
    """All 4^4 rows together have probability one, and no row's depends on its batch."""
    rows = np.array(list(itertools.product(TEXT, repeat=4)))
    scorer = AutoregressiveScorer(denoiser, MASK, CPU, name="tiny", batch_rows=50)
    nats = scorer.nats(rows, np.ones(rows.shape, bool))
    assert np.exp(-nats.sum(1)).sum() == pytest.approx(1, abs=1e-5)
    assert scorer.nats(rows[7:9], np.ones((2, 4), bool)) == pytest.approx(nats[7:9], abs=1e-5)


def test_it_is_the_objective_s_own_nats_and_filler_behind_a_row_costs_and_changes_nothing(denoiser):
    rows = np.random.default_rng(4).choice(TEXT, (6, 10))
    is_real = np.arange(10) < np.array([10, 3, 1, 7, 0, 9])[:, None]
    nats = AutoregressiveScorer(denoiser, MASK, CPU, name="tiny", batch_rows=4).nats(rows, is_real)
    assert (nats[~is_real] == 0).all()
    other = np.where(is_real, rows, 3)
    again = AutoregressiveScorer(denoiser, MASK, CPU, name="tiny").nats(other, is_real)
    assert again == pytest.approx(nats, abs=1e-5)
    batch = Batch(rows, rows, np.zeros(rows.shape, np.float32), is_real, np.arange(6))
    with torch.no_grad():
        loss = Autoregressive(AutoregressiveConfig(), MASK, CPU).loss(denoiser, batch)
    assert nats.sum() == pytest.approx(float(loss.bound_nats), rel=1e-5)


def test_a_bundle_that_has_no_exact_nats_or_other_tokens_is_refused(small_bundle):
    bundle = read_bundle(small_bundle)
    digest = bundle.tokenizer().digest
    with pytest.raises(CheckpointError, match="no autoregressive model"):
        AutoregressiveScorer.of(bundle, digest, 32)
    causal = type(bundle)(bundle.folder, bundle.manifest.model_copy(update={"objective": AutoregressiveConfig()}))
    assert "step 0" in AutoregressiveScorer.of(causal, digest, 32).name
    with pytest.raises(CheckpointError, match="another tokenizer"):
        AutoregressiveScorer.of(causal, "0" * 64, 32)
    with pytest.raises(CheckpointError, match="reads fewer tokens than the 33 of the rows to be scored, got 32"):
        AutoregressiveScorer.of(causal, digest, 33)
