"""The held-out NELBO in nats a token with its standard error, beside the unigram entropy of the same rows.

The weight is exact (1/t for linear noise, never clipped) and t is stratified over (0, 1] across a row's draws.
Figures are sums in float64; rows are the unit of the error, since tokens of a row are not independent.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dllm_core.noise.process import NoiseProcess
from dllm_core.objective.loss import DenoiserLike
from dllm_core.seeding import Ints, Purpose, uniforms, uniforms64

_GOLDEN = 0.6180339887498949
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class RowScores:
    """Per row: estimated nats [N] (float64) and counted tokens [N]."""

    nats: NDArray[np.float64]
    tokens: Ints


@dataclass(frozen=True)
class Likelihood:
    """nelbo: nats a token, an upper bound of the negative log-likelihood in expectation; its standard error."""

    nelbo: float
    standard_error: float
    unigram_entropy: float
    rows: int
    tokens: int

    @property
    def gain(self) -> float:
        """Nats a token below the unigram entropy."""
        return self.unigram_entropy - self.nelbo


@torch.inference_mode()
def score_rows(
    denoiser: DenoiserLike,
    process: NoiseProcess,
    x0: Ints,
    counted: Bools,
    row_ids: Ints,
    *,
    seed: int,
    draws: int,
    device: torch.device,
    segment_ids: NDArray[np.int32] | None = None,
    not_noised: Bools | None = None,
) -> RowScores:
    """Monte Carlo estimate for rows x0 [N L]; `row_ids` [N] make it a pure function of the row, not of the batch.

    segment_ids [N L]: isolated documents. not_noised bool [N L]: a prompt, on which the likelihood is conditioned.
    """
    isolated: Any = {} if segment_ids is None else {"segment_ids": torch.from_numpy(segment_ids).to(device)}
    nats = np.zeros(len(x0))
    offsets = uniforms(seed, Purpose.EVALUATE, 0, row_ids, 1)[:, 0].astype(np.float64)
    for draw in range(draws):
        # Within a row: one t in each of `draws` equal strata. Across rows: a random shift of the strata.
        t = 1 - (draw + np.mod(offsets + _GOLDEN * draw, 1.0)) / draws
        times = np.repeat(t.astype(np.float32)[:, None], x0.shape[1], axis=1)
        u = uniforms(seed, Purpose.EVALUATE, 1 + draw, row_ids, x0.shape[1])
        v = None
        if process.replaces:
            v = uniforms64(seed, Purpose.EVALUATE_REPLACE, 1 + draw, row_ids, x0.shape[1])
        xt = process.corrupt(x0, times, u, v)
        if not_noised is not None:
            xt = np.where(not_noised, x0, xt)
        read = counted if process.replaces else (xt != x0) & counted  # a clean look is evidence, and costs nats
        if not read.any():
            continue
        logits = denoiser(torch.from_numpy(xt).to(device), read=torch.from_numpy(read).to(device), **isolated)
        log_probs = process.x0_log_probs(logits.float())
        clean, noised, at = (torch.from_numpy(part[read]).to(device) for part in (x0, xt, times.astype(np.float64)))
        rate = process.nelbo_rate(log_probs, clean, noised, at).double().cpu().numpy()
        np.add.at(nats, np.nonzero(read)[0], rate / draws)
    return RowScores(nats, counted.sum(1).astype(np.int64))


def summarize(scores: RowScores, token_counts: Ints) -> Likelihood:
    """Ratio of sums over rows with its delta-method standard error; token_counts [V] of the same rows' tokens."""
    total = int(scores.tokens.sum())
    nelbo = float(scores.nats.sum() / total)
    residual = scores.nats - nelbo * scores.tokens
    n = len(scores.nats)
    error = math.sqrt(float((residual**2).sum()) * n / max(n - 1, 1)) / total
    share = token_counts[token_counts > 0] / token_counts.sum()
    return Likelihood(
        nelbo=nelbo,
        standard_error=error,
        unigram_entropy=float(-(share * np.log(share)).sum()),
        rows=n,
        tokens=total,
    )
