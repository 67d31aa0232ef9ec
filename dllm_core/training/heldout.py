"""The score of held-out rows while a run trains: each rank scores its share, one small all-reduce makes the figure."""

from collections.abc import Callable

import numpy as np
import torch

from dllm_core.estimate import ratio
from dllm_core.objective.loss import DenoiserLike
from dllm_core.seeding import Doubles
from dllm_core.training.backend import Backend
from dllm_core.training.events import Score

HeldoutScorer = Callable[[DenoiserLike], tuple[Doubles, Doubles]]
"""Nats and counted tokens of each unit of all ranks' rows, float64 [U]: what this rank's own rows add to them. It runs
as many forwards on every rank.
"""


def score(scorer: HeldoutScorer, backend: Backend, step: int) -> Score | None:
    """Nats a token over the rows of all ranks, by the weights as they are; None where that is no number. Collective.

    The standard error is that of `ratio`: units where nothing is counted take no part.
    """
    with torch.no_grad(), backend.autocast():  # in inference mode ZeRO would keep tensors that cannot be trained
        mine = np.concatenate(scorer(backend.denoiser))
    nats, tokens = np.split(np.array(backend.sum_over_ranks(mine.tolist())), 2)
    if not tokens.any() or not np.isfinite(nats).all():
        return None
    found = ratio(nats, tokens)
    return Score(step, found.value, found.standard_error)
