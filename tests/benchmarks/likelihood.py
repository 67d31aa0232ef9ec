"""Likelihood of held-out rows through the estimators, against the bare forwards that it needs.

    python tests/benchmarks/likelihood.py [--rows 1000] [--batch-rows 32] [--draws 2] [--seq-len 128] [--vocab 8192]
        [--dim 128] [--layers 4] [--threads 1]

One JSON line. For each estimator: rows times draws a second, of `score_rows` over batches of rows, and `of_forward`,
its share of the rate of bare forwards without gradients: the same calls of the same denoiser (ids, pattern, `read`),
made again without an estimator around them, in turns batch by batch. On one thread CPU seconds are counted, which no
neighbour's burst lengthens.
"""

import argparse
import sys
import time
from typing import Any

import numpy as np
import torch
from figures import tell

from dllm_core.evaluation.estimators import HeldoutRows, estimator_of
from dllm_core.evaluation.likelihood import score_rows
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.noise.process import AbsorbingNoise, AnyNoise, UniformNoise
from dllm_core.objective.config import AnyObjective, AutoregressiveConfig, BlockDiffusionConfig, DiffusionConfig

MASK, BLOCK = 0, 16
CPU = torch.device("cpu")
MODELS: dict[str, tuple[AnyObjective, AnyNoise]] = {
    "masked": (DiffusionConfig(), AbsorbingNoise()),
    "uniform": (DiffusionConfig(), UniformNoise()),
    "block_diffusion": (BlockDiffusionConfig(), AbsorbingNoise()),
    "autoregressive": (AutoregressiveConfig(), AbsorbingNoise()),
}


class Noted:
    """A denoiser that remembers what it was asked."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self.calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def __call__(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        self.calls.append((ids, options))
        return self._denoiser(ids, **options)

    @torch.inference_mode()
    def again(self) -> None:
        """The calls alone, which are then forgotten."""
        for ids, options in self.calls:
            self._denoiser(ids, **options)
        self.calls.clear()


def main() -> None:
    parser = argparse.ArgumentParser()
    sizes = {"rows": 1000, "batch-rows": 32, "draws": 2, "seq-len": 128, "vocab": 8192, "dim": 128, "layers": 4}
    for name, default in {**sizes, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    model = ModelConfig(dim=options.dim, layers=options.layers, ffn_dim=3 * options.dim)
    config = DenoiserConfig(
        model=model, vocab_size=options.vocab, context_length=options.seq_len, mask_id=MASK, eos_id=1, pad_id=2
    )
    noted = Noted(Denoiser(config).eval())
    x0 = np.random.default_rng(0).integers(1, options.vocab, (options.rows, options.seq_len))

    def batch(start: int) -> HeldoutRows:
        at = slice(start, start + options.batch_rows)
        ids = np.arange(options.rows)[at]
        return HeldoutRows(x0[at], np.ones(x0[at].shape, bool), ids, np.ones(x0[at].shape, bool))

    rates, shares = {}, {}
    for name, (section, noise) in MODELS.items():
        block_length = BLOCK if isinstance(section, BlockDiffusionConfig) else None
        estimator = estimator_of(section, noise.bind(MASK, options.vocab), CPU, block_length=block_length)
        score_rows(noted, estimator, batch(0), seed=0, draws=1)
        noted.again()
        whole = bare = drawn = 0.0
        for start in range(0, options.rows, options.batch_rows):
            rows = batch(start)
            begun = clock()
            scores = score_rows(noted, estimator, rows, seed=0, draws=options.draws)
            between = clock()
            noted.again()
            bare += clock() - between
            whole += between - begun
            drawn += len(rows.ids) * scores.draws
        rates[name], shares[name] = round(drawn / whole, 1), round(bare / whole, 3)
    figures = {
        **{name: getattr(options, name.replace("-", "_")) for name in (*sizes, "threads")},
        "rows_times_draws_per_s": rates,
        "of_forward": shares,
    }
    tell("likelihood", **figures)


if __name__ == "__main__":
    sys.exit(main())
