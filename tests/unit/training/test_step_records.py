"""Laws of what a step's record says: shares, time left, levels of t, held-out scores."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SmallCorpus
from hypothesis import given
from hypothesis import strategies as st
from trainers import Work, make_trainer, run_dir

from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.data.loader import evenly, split_rows
from dllm_core.estimate import ratio
from dllm_core.evaluation.estimators import Draw, HeldoutRows, estimator_of
from dllm_core.objective.config import DiffusionConfig
from dllm_core.objective.loss import LEVELS, by_level
from dllm_core.training.backend import LocalBackend
from dllm_core.training.config import TrainConfig
from dllm_core.training.events import Score
from dllm_core.training.heldout import score
from workflows.train import session
from workflows.train.flow import step_line
from workflows.train.session import heldout_scorer

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = st.lists(st.tuples(st.floats(0, 1e4), st.integers(0, 512), st.integers(0, 6)), min_size=2, max_size=40)


@pytest.fixture
def told(small_corpus: SmallCorpus, tmp_path):
    """Records of a run whose steps take a second each."""
    clock = Work()
    checkpoints = CheckpointStore(run_dir(tmp_path, "run"))
    trainer, _, told = make_trainer(small_corpus, checkpoints, clock=clock, wrap=clock.on, log_every=2)
    trainer.run()
    return told


def test_time_left_is_that_of_the_steps_that_are_left(told):
    assert [(record.step, record.eta_s) for record in told.records] == [(2, 4.0), (4, 2.0), (6, 0.0)]
    assert all(record.data_wait == record.save_wait == 0 for record in told.records)


def test_time_left_ends_with_the_time_budget(small_corpus, tmp_path):
    clock = Work()
    checkpoints = CheckpointStore(run_dir(tmp_path, "run"))
    given_ = {"clock": clock, "wrap": clock.on, "log_every": 2, "seconds": 4.5, "steps": 10**6}
    trainer, _, told = make_trainer(small_corpus, checkpoints, **given_)
    trainer.run()
    assert [(record.step, record.eta_s) for record in told.records] == [(2, 2.5), (4, 0.5)]


def test_the_levels_of_a_record_add_up_to_its_bound(small_corpus, tmp_path):
    sums = []

    def keep(objective):
        inner = objective.loss
        objective.loss = lambda *given: sums.append(inner(*given)) or sums[-1]
        return objective

    checkpoints = CheckpointStore(run_dir(tmp_path, "run"))
    trainer, _, told = make_trainer(
        small_corpus, checkpoints, wrap=keep, log_every=100, objective=DiffusionConfig(max_weight=2.0)
    )
    trainer.run()
    [record] = told.records
    levels = sum(loss.levels for loss in sums)
    assert float(levels[:LEVELS].sum()) == pytest.approx(float(sum(loss.bound_nats for loss in sums)), rel=1e-5)
    assert float(levels[LEVELS:].sum()) == sum(loss.num_tokens for loss in sums)
    expected = [float(n / k) if k else None for n, k in zip(levels[:LEVELS], levels[LEVELS:], strict=True)]
    assert record.by_level == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.floats(-5, 5, width=32)), max_size=30))
def test_a_level_is_a_tenth_of_t(pairs):
    t, values = (torch.tensor([pair[at] for pair in pairs], dtype=torch.float32) for at in (0, 1))
    found = by_level(t, values)
    for level in range(LEVELS):
        inside = [float(v) for u, v in zip(t, values, strict=True) if min(int(u * 10), 9) == level]
        assert float(found[level]) == pytest.approx(math.fsum(inside), abs=1e-4)


class Split(LocalBackend):
    """Adds up what this rank and another have, as an all-reduce does."""

    def __init__(self, backend: LocalBackend, theirs: list[float] | None) -> None:
        self.__dict__.update(backend.__dict__)
        self.theirs, self.mine = theirs, list[float]()

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        self.mine = values
        return values if self.theirs is None else [a + b for a, b in zip(values, self.theirs, strict=True)]


@pytest.fixture(scope="module")
def backend(small_corpus, tmp_path_factory):
    checkpoints = CheckpointStore(run_dir(tmp_path_factory.mktemp("score"), "run"))
    return make_trainer(small_corpus, checkpoints)[1]


@given(rows=ROWS, cut=st.integers(0, 40))
def test_a_heldout_score_is_the_ratio_over_all_ranks_units_with_its_error(backend, rows, cut):
    nats, tokens, units = (np.array([row[at] for row in rows], np.float64) for at in (0, 1, 2))
    nats[tokens == 0] = 0

    def scorer(at):
        sums = [np.bincount(units[at].astype(int), values[at], minlength=7) for values in (nats, tokens)]
        return lambda denoiser: (sums[0], sums[1])

    first = Split(backend, None)
    score(scorer(slice(0, cut)), first, 7)
    found = score(scorer(slice(cut, None)), Split(backend, first.mine), 7)
    if not tokens.any():
        assert found is None
        return
    expected = ratio(nats, tokens, units)
    assert found.step == 7
    assert found.nats == pytest.approx(expected.value, rel=1e-9)
    error = expected.standard_error  # None of one unit
    assert found.standard_error == (error and pytest.approx(error, rel=1e-6, abs=1e-9))


@pytest.mark.parametrize("rows", [9, 10**6])
def test_a_heldout_score_is_of_the_same_rows_for_any_number_of_ranks(small_corpus, backend, rows, monkeypatch):
    corpus, manifest, denoiser = small_corpus, small_corpus.manifest, backend.module
    monkeypatch.setattr(session, "_BATCH_ROWS", 2)
    monkeypatch.setattr(session, "documents_of", lambda store, manifest, split, ids, eos_id: ids // 3)
    recipe = corpus.recipe.model_copy(update={"train": corpus.recipe.train.model_copy(update={"heldout_rows": rows})})
    process, cpu = manifest.process.bind(corpus.tokenizer.mask_id, manifest.vocab_size), torch.device("cpu")
    estimator = estimator_of(recipe.objective, process, cpu)
    run = run_dir(corpus.store.root, "run")
    ids = evenly(np.arange(manifest.heldout.rows), rows)
    own = HeldoutRows.of(split_rows(corpus.store, manifest, manifest.heldout, ids), ids)
    with torch.no_grad():
        nats = estimator.nats(denoiser, own, Draw(recipe.seed, 0))
    expected = ratio(nats, own.counted.sum(1), ids // 3)
    assert 2 < expected.rows < len(ids)
    for ranks in (1, 2, 3, 5, len(ids) + 1):
        told, forwards, beats = [0.0], [], []
        for rank in range(ranks):
            stub = SimpleNamespace(rank=rank, world_size=ranks, module=denoiser)
            asked, alive = [], []
            scorer = heldout_scorer(recipe, run, manifest, estimator, stub, lambda alive=alive: alive.append(1))
            one = Split(backend, told if rank else None)
            one.denoiser = lambda *given, asked=asked, **more: asked.append(1) or denoiser(*given, **more)
            found = score(scorer, one, 7)
            told = one.sum_over_ranks(one.mine)
            forwards, beats = [*forwards, len(asked)], [*beats, len(alive)]
        assert found.nats == pytest.approx(expected.value, rel=1e-5)
        assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-4)
        assert len(set(forwards)) == 1 <= forwards[0]  # as many on each, and a sign of life after every one
        assert forwards == beats


def test_scores_come_at_their_steps_and_change_nothing(small_corpus, tmp_path):
    found = {}
    for every in (None, 2):
        checkpoints = CheckpointStore(run_dir(tmp_path, f"every-{every}"))
        scorer = {"heldout": lambda denoiser: (np.array([3.0, 5.0]), np.array([2.0, 2.0]))}
        trainer, _, told = make_trainer(small_corpus, checkpoints, options=scorer, heldout_every=every, log_every=1)
        trainer.run()
        found[every] = told.records, checkpoints.newest(pytest.fail).files["model.safetensors"].read_bytes()
    assert found[None][1] == found[2][1]
    assert all(record.heldout is None for record in found[None][0])
    steps = [record.heldout and record.heldout.step for record in found[2][0]]
    assert steps == [None, 2, 2, 4, 4, 6]
    assert found[2][0][-1].heldout.nats == 2.0


def test_a_score_that_is_no_number_is_none_and_spoils_no_checkpoint(small_corpus, tmp_path):
    checkpoints = CheckpointStore(run_dir(tmp_path, "run"))
    scorer = {"heldout": lambda denoiser: (np.array([math.nan, 5.0]), np.array([2.0, 2.0]))}
    options = {"heldout_every": 1, "checkpoint_every": 2, "average_from": "best", "steps": 2}
    trainer, _, told = make_trainer(small_corpus, checkpoints, options=scorer, **options)
    trainer.run()
    assert told.saves == [2]
    assert [record.heldout for record in told.records] == [None, None]
    assert checkpoints.manifest(2).heldout is None


def test_a_score_of_one_document_is_told_without_an_error(told):
    record = replace(told.records[0], heldout=Score(2, 2.5, None)).as_json()
    assert "  held-out 2.500  " in step_line(record)
    assert "held-out 2.500 ± 0.250" in step_line({**record, "heldout": {"nats": 2.5, "standard_error": 0.25}})


def test_bookkeeping_is_no_identity(small_corpus):
    recipe = small_corpus.recipe
    others = {"heldout_every": None, "heldout_rows": 5, "keep_every": 7, "keep_checkpoints": 9}
    other = recipe.model_copy(update={"train": TrainConfig.checked({**recipe.train.model_dump(), **others})})
    assert other.run_fingerprint("corpus") == recipe.run_fingerprint("corpus")
