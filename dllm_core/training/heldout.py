"""The score of held-out rows while a run trains: each rank scores its share, one small all-reduce makes the figure."""

import math
from collections.abc import Callable

import torch

from dllm_core.objective.loss import DenoiserLike
from dllm_core.seeding import Doubles
from dllm_core.training.backend import Backend
from dllm_core.training.events import Score

HeldoutScorer = Callable[[DenoiserLike], tuple[Doubles, Doubles]]
"""Nats and counted tokens of each of a rank's rows, float64 [N]; as many forwards on every rank."""


def score(scorer: HeldoutScorer, backend: Backend, step: int) -> Score:
    """Nats a token over the rows of all ranks, by the weights as they are. Collective.

    The standard error is that of a ratio of sums, with rows as its unit (Cochran, Sampling Techniques, eq. 2.46).
    """
    with torch.no_grad(), backend.autocast():  # in inference mode ZeRO would keep tensors that cannot be trained
        nats, tokens = scorer(backend.denoiser)
    moments = [float(x) for x in (len(nats), nats.sum(), tokens.sum(), nats @ nats, nats @ tokens, tokens @ tokens)]
    rows, total, counted, nats2, both, tokens2 = backend.sum_over_ranks(moments)
    mean = total / max(counted, 1.0)
    spread = max(0.0, nats2 - 2 * mean * both + mean**2 * tokens2)
    error = math.sqrt(spread * rows / max(rows - 1, 1.0)) / max(counted, 1.0)
    return Score(step, mean, error)
