"""What an objective costs over the bare forward and backward of the same denoiser on the same inputs.

    python tests/benchmarks/objective.py [--rows 8] [--seq-len 256] [--vocab 8192] [--dim 256] [--layers 6]
        [--precision fp32] [--threads 1] [--rounds 7]

One JSON line. `over_bare`, for each objective: seconds of its loss and backward over those of the bare pass, which runs
the denoiser on what the objective showed it (the same ids, pattern, padding and `read`) and goes back from a gradient
of the logits that is there already. So all that the objective itself does counts: the batch as tensors, noise of its
own, weights, the loss over the vocabulary and its gradient. `bare_ms`: of the bare pass; `positions`: how many ran
through the head. Both medians of the same run, in turns; on one thread of CPU seconds, which no neighbour's burst
lengthens.
"""

import argparse
import sys
import time
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from figures import tell

from dllm_core.data.batch import Batch
from dllm_core.data.noising import CorpusNoise
from dllm_core.data.order import SampleOrder
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.noise.process import AbsorbingNoise, AnyNoise, HybridNoise, UniformNoise
from dllm_core.objective.build import new_objective
from dllm_core.objective.config import (
    AnyObjective,
    AutoregressiveConfig,
    BlockDiffusionConfig,
    DiffusionConfig,
    MaskedLMConfig,
)
from dllm_core.objective.loss import Objective

MASK, BLOCK = 0, 16
CPU = torch.device("cpu")
OBJECTIVES: dict[str, tuple[AnyObjective, AnyNoise]] = {
    "masked": (DiffusionConfig(), AbsorbingNoise()),
    "cart": (DiffusionConfig(weight="context"), AbsorbingNoise()),
    "uniform": (DiffusionConfig(), UniformNoise()),
    "hybrid": (DiffusionConfig(), HybridNoise()),
    "block_diffusion": (BlockDiffusionConfig(), AbsorbingNoise()),
    "autoregressive": (AutoregressiveConfig(), AbsorbingNoise()),
    "masked_lm": (MaskedLMConfig(), AbsorbingNoise()),
}


def new_batch(noise: AnyNoise, block_length: int | None, rows: int, seq_len: int, vocab: int) -> Batch:
    """Rows of even text under the noise that training draws."""
    x0 = np.random.default_rng(0).integers(1, vocab, (rows, seq_len))
    drawn = CorpusNoise(noise.bind(MASK, vocab), SampleOrder(0, 1 << 20), 1e-3, block_length)
    counters = np.arange(rows)
    xt, t = drawn.corrupt(0, counters, x0)
    return Batch(x0, xt, drawn.per_token(t, seq_len), np.ones(x0.shape, bool), counters)


class Case:
    """One objective, its batch, and the call that it makes of a denoiser."""

    def __init__(self, objective: Objective, batch: Batch, denoiser: Denoiser, precision: str) -> None:
        self._objective, self._batch, self._denoiser, self._precision = objective, batch, denoiser, precision
        self._call: tuple[torch.Tensor, dict[str, Any]] | None = None
        with torch.no_grad(), self._autocast():
            objective.loss(self._noted, batch)
            assert self._call is not None
            logits = self._noted(self._call[0], **self._call[1])
        self.positions = len(logits)
        self._gradient = torch.randn_like(logits)

    def _noted(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        self._call = ids, options
        return self._denoiser(ids, **options)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._precision == "bf16")

    def bare(self) -> float:
        """Seconds of the denoiser alone."""
        assert self._call is not None
        ids, options = self._call
        return self._seconds(lambda: self._denoiser(ids, **options), self._gradient)

    def whole(self) -> float:
        """Seconds of the objective."""
        return self._seconds(lambda: self._objective.loss(self._denoiser, self._batch).nats / self._batch.x0.size)

    def _seconds(self, forward: Any, gradient: torch.Tensor | None = None) -> float:
        self._denoiser.zero_grad()
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        begun = clock()
        with self._autocast():
            out = forward()
        out.backward(gradient)
        return clock() - begun


def measured(case: Case, rounds: int) -> dict[str, float]:
    """Medians in turns, after one round that does not count."""
    times = [(case.bare(), case.whole()) for _ in range(rounds + 1)][1:]
    bare, whole = (sorted(column)[rounds // 2] for column in zip(*times, strict=True))
    return {"over_bare": round(whole / bare, 3), "bare_ms": round(bare * 1e3), "positions": case.positions}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("rows", 8), ("seq-len", 256), ("vocab", 8192), ("dim", 256), ("layers", 6), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--only", nargs="*", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = ModelConfig(dim=options.dim, layers=options.layers, ffn_dim=3 * options.dim)
    config = DenoiserConfig(
        model=model, vocab_size=options.vocab, context_length=options.seq_len, mask_id=MASK, eos_id=1, pad_id=2
    )
    denoiser = Denoiser(config)
    found = {}
    for name in options.only:
        section, noise = OBJECTIVES[name]
        block_length = BLOCK if isinstance(section, BlockDiffusionConfig) else None
        process = noise.bind(MASK, options.vocab)
        objective = new_objective(section, config, process, CPU, seed=0, block_length=block_length)
        batch = new_batch(noise, block_length, options.rows, options.seq_len, options.vocab)
        found[name] = measured(Case(objective, batch, denoiser, options.precision), options.rounds)
    figures = {
        **{name: getattr(options, name) for name in ("rows", "seq_len", "vocab", "dim", "layers", "precision")},
        **{part: {name: of[part] for name, of in found.items()} for part in found[options.only[0]]},
    }
    tell("objective", **figures)


if __name__ == "__main__":
    sys.exit(main())
