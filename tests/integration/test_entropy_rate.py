"""What a model learns of a source whose entropy is known: a Markov chain, told to no one but by its rows.

The target is exact. A row of L tokens begins in the stationary law, so a token of it has (H(pi) + (L - 1) h) / L nats,
h being the chain's entropy rate. No model can be below it in the mean over rows, and no bound of one either.
"""

import numpy as np
import pytest
import torch

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.data.batch import Batch
from dllm_core.data.noising import CorpusNoise
from dllm_core.data.order import SampleOrder
from dllm_core.evaluation.estimators import HeldoutRows, estimator_of
from dllm_core.evaluation.likelihood import score_rows, side_by_side, summarize
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.objective.build import new_objective
from dllm_core.objective.config import AnyObjective, AutoregressiveConfig, DiffusionConfig
from dllm_core.storage.store import LocalStore
from dllm_core.training.backend import LocalBackend
from dllm_core.training.config import TrainConfig
from dllm_core.training.loop import Trainer
from workflows.train.session import Silence

pytestmark = pytest.mark.usefixtures("one_thread")
STATES, MASK, LENGTH = 8, 8, 16
HELDOUT_ROWS, DRAWS, BATCH_ROWS = 8192, 8, 128
CPU = torch.device("cpu")
PROCESS = AbsorbingProcess(mask_id=MASK)


class MarkovSource:
    """Endless fresh rows under the noise of training, as `Batches`; each is a function of its counter's batch alone."""

    def __init__(self, seed: int) -> None:
        self.transition = np.random.default_rng(seed).dirichlet(np.full(STATES, 0.5), STATES)
        values, vectors = np.linalg.eig(self.transition.T)
        stationary = np.real(vectors[:, np.argmax(np.real(values))])
        self.stationary = stationary / stationary.sum()
        self._seed, self._noise = seed, CorpusNoise(PROCESS, SampleOrder(seed, 1 << 30), 1e-3)

    @property
    def nats_per_token(self) -> float:
        """Exact, of rows of LENGTH tokens."""
        of_state = -(self.transition * np.log(self.transition)).sum(1)
        first = -(self.stationary * np.log(self.stationary)).sum()
        return float(first + (LENGTH - 1) * (self.stationary @ of_state)) / LENGTH

    def log_probs(self, rows: np.ndarray) -> np.ndarray:
        """log p [N] of rows [N L]."""
        return np.log(self.stationary[rows[:, 0]]) + np.log(self.transition[rows[:, :-1], rows[:, 1:]]).sum(1)

    def rows(self, number: int, stream: int) -> np.ndarray:
        """[number LENGTH]; each stream is apart from all others."""
        u = np.random.default_rng([self._seed, stream]).random((LENGTH, number, 1))
        rows = np.empty((number, LENGTH), np.int64)
        rows[:, 0] = (u[0] > self.stationary.cumsum()[:-1]).sum(1)
        for i in range(1, LENGTH):
            rows[:, i] = (u[i] > self.transition.cumsum(1)[rows[:, i - 1], :-1]).sum(1)
        return rows

    def batch(self, counter: int, rows: int, rank: int = 0, world_size: int = 1) -> Batch:
        x0, counters = self.rows(rows, 1 + counter), counter + np.arange(rows)
        xt, t = self._noise.corrupt(0, counters, x0)
        return Batch(x0, xt, self._noise.per_token(t, LENGTH), np.ones(x0.shape, bool), counters)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("objective", "steps"),
    [(DiffusionConfig(), 2500), (AutoregressiveConfig(), 800)],
    ids=["masked-diffusion", "autoregressive"],
)
def test_a_model_reaches_the_entropy_of_a_markov_source(tmp_path, capsys, objective: AnyObjective, steps: int):
    source = MarkovSource(seed=3)
    model = ModelConfig(dim=64, layers=3, heads=4, ffn_dim=192)
    config = DenoiserConfig(model=model, vocab_size=STATES + 1, context_length=LENGTH, mask_id=MASK, eos_id=0, pad_id=0)
    torch.manual_seed(0)
    denoiser = Denoiser(config)
    train = TrainConfig(
        steps=steps,
        batch_rows=BATCH_ROWS,
        precision="fp32",
        learning_rate=3e-3,
        final_lr_fraction=0.01,
        weight_decay=0.0,
        checkpoint_every=steps,
        log_every=steps,
    )
    Trainer(
        train,
        LocalBackend(denoiser, train),
        new_objective(objective, config, PROCESS, CPU, seed=0, t_min=1e-3),
        source,
        CheckpointStore(RunDir(LocalStore(tmp_path), "markov")),
        Silence(),
        samples_per_epoch=1 << 30,
    ).run()

    x0 = source.rows(HELDOUT_ROWS, stream=0)
    estimator = estimator_of(objective, PROCESS, CPU)
    every = np.ones(x0.shape, bool)
    parts = []
    for start in range(0, HELDOUT_ROWS, BATCH_ROWS):
        at = slice(start, start + BATCH_ROWS)
        rows = HeldoutRows(x0[at], every[at], np.arange(HELDOUT_ROWS)[at], every[at])
        parts.append(score_rows(denoiser.eval(), estimator, rows, seed=0, draws=DRAWS))
    scores = side_by_side(parts)
    counts = np.bincount(x0.ravel(), minlength=STATES + 1)
    found = summarize(scores, counts, np.ones(STATES + 1, np.int64), estimator.name)
    excess = (scores.nats + source.log_probs(x0)).mean() / LENGTH  # over what these very rows cost the source itself
    with capsys.disabled():
        print(
            f"\n{estimator.name}: {found.nelbo:.4f} +- {found.standard_error:.4f} nats/token, entropy"
            f" {source.nats_per_token:.4f}, unigram {found.unigram_entropy:.4f}; over the rows' own {excess:.4f}"
        )
    assert found.standard_error < 0.005
    assert abs(found.nelbo - source.nats_per_token) < 0.02
    assert excess > -3 * max(found.monte_carlo_error, 1e-4)
