"""The score of held-out rows while a run trains: each rank scores its share, one small all-reduce makes the figure."""

import math
from collections.abc import Callable

import numpy as np
import torch

from dllm_core.objective.loss import DenoiserLike
from dllm_core.seeding import Doubles
from dllm_core.training.backend import Backend
from dllm_core.training.events import Score

HeldoutScorer = Callable[[DenoiserLike], tuple[Doubles, Doubles]]
"""Nats and counted tokens of each unit of all ranks' rows, float64 [U]: what this rank's own rows add to them. As many
forwards on every rank.
"""


def score(scorer: HeldoutScorer, backend: Backend, step: int) -> Score | None:
    """Nats a token over the rows of all ranks, by the weights as they are; None where that is no number. Collective.

    The standard error is that of a ratio of sums over units (Cochran, Sampling Techniques, eq. 2.46), of which those
    where nothing is counted are none; None where there is but one.
    """
    with torch.no_grad(), backend.autocast():  # in inference mode ZeRO would keep tensors that cannot be trained
        mine = np.concatenate(scorer(backend.denoiser))
    nats, tokens = np.split(np.array(backend.sum_over_ranks(mine.tolist())), 2)
    nats, tokens = nats[tokens > 0], tokens[tokens > 0]
    units, counted = len(tokens), float(tokens.sum())
    mean = float(nats.sum()) / max(counted, 1.0)
    if not units or not math.isfinite(mean):
        return None
    spread = float(((nats - mean * tokens) ** 2).sum())
    return Score(step, mean, math.sqrt(spread * units / (units - 1)) / counted if units > 1 else None)
