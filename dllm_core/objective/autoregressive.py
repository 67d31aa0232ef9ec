"""Autoregression: every counted token from what stands before it, so the loss is the likelihood itself."""

import torch
from torch import Tensor

from dllm_core.data.batch import Batch
from dllm_core.model.pattern import CAUSAL
from dllm_core.model.visibility import document_starts
from dllm_core.objective.config import AutoregressiveConfig
from dllm_core.objective.loss import DenoiserLike, LossSum, Rows
from dllm_core.objective.vocabulary import nll


class Autoregressive:
    """-sum_i log p(x_i | x_<i). The mask token, which no text holds, stands for nothing before it.

    So the first token of a row, and of an isolated document, is asked too: as many tokens count as in diffusion.
    """

    pattern, passes = CAUSAL, 1

    def __init__(self, config: AutoregressiveConfig, mask_id: int, device: torch.device) -> None:
        self._config, self._mask_id, self._device = config, mask_id, device

    def loss(self, denoiser: DenoiserLike, batch: Batch) -> LossSum:
        """Sums over a batch; its noise is not read."""
        rows = Rows.of(batch, self._device)
        before = shifted(rows.x0, rows.segment_ids, self._mask_id)
        logits = denoiser(before, read=rows.counted, pattern=self.pattern, **rows.attention)
        cost = nll(logits, rows.x0[rows.counted], self._mask_id)
        nats, divisor = rows.normalized(cost, rows.counted, self._config.normalize)
        return LossSum(nats, cost.detach().sum(), int(batch.loss_mask.sum()), divisor)

    def divisor(self, batch: Batch) -> float:
        """Every counted token is asked."""
        rows = Rows.of(batch, self._device)
        return rows.divisor(rows.counted, self._config.normalize)


def shifted(x0: Tensor, segment_ids: Tensor | None, mask_id: int) -> Tensor:
    """The token before each position [B L], the mask where there is none in its segment."""
    starts = document_starts(torch.zeros_like(x0) if segment_ids is None else segment_ids)
    return x0.roll(1, dims=1).masked_fill_(starts, mask_id)
