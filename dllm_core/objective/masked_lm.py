"""Masked language modelling as BERT does it: one rate of noise, no bound of any likelihood."""

import numpy as np
import torch
from numpy.typing import NDArray

from dllm_core.data.batch import Batch
from dllm_core.model.pattern import FULL
from dllm_core.noise.interpolating import text_ids
from dllm_core.objective.config import MaskedLMConfig
from dllm_core.objective.loss import DenoiserLike, LossSum, Rows
from dllm_core.objective.vocabulary import nll
from dllm_core.seeding import Ints, Purpose, uniforms, uniforms64


class MaskedLM:
    """Mean cross-entropy at chosen tokens. arXiv:1810.04805, section 3.1.

    The choice is a pure function of (seed, sample counter), drawn here: a corpus's written noise says nothing of it.
    """

    pattern, passes = FULL, 1

    def __init__(
        self, config: MaskedLMConfig, mask_id: int, vocab_size: int, device: torch.device, *, seed: int
    ) -> None:
        self._config, self._mask_id, self._vocab_size = config, mask_id, vocab_size
        self._device, self._seed = device, seed

    def loss(self, denoiser: DenoiserLike, batch: Batch) -> LossSum:
        """Sums over a batch; its noise is not read."""
        rows = Rows.of(batch, self._device)
        noised, chosen = self.corrupt(batch.x0, batch.counters, batch.loss_mask)
        read = torch.from_numpy(chosen).to(self._device)
        logits = denoiser(torch.from_numpy(noised).to(self._device), read=read, pattern=self.pattern, **rows.attention)
        nats, divisor = rows.normalized(nll(logits, rows.x0[read], self._mask_id), read, "noised")
        return LossSum(nats, torch.tensor(torch.nan), int(batch.loss_mask.sum()), divisor)

    def divisor(self, batch: Batch) -> float:
        """The number of chosen tokens."""
        return float(self.corrupt(batch.x0, batch.counters, batch.loss_mask)[1].sum())

    def corrupt(self, x0: Ints, counters: Ints, may_choose: NDArray[np.bool_]) -> tuple[Ints, NDArray[np.bool_]]:
        """(noised ids, which are asked), each [B L], for the samples with these counters [B]."""
        config, length = self._config, x0.shape[1]
        chosen = may_choose & (uniforms(self._seed, Purpose.MASKED_LM, 0, counters, length) < config.rate)
        v = uniforms64(self._seed, Purpose.MASKED_LM, 1, counters, length)
        is_replaced = (v >= config.masked) & (v < config.masked + config.replaced)
        # What is left of v inside its interval is uniform again: the random token.
        share = ((v - config.masked) / max(config.replaced, 1e-9)).clip(0, 1 - 2**-32)
        other = text_ids(share, self._mask_id, self._vocab_size, x0)
        noised = np.where(v < config.masked, self._mask_id, np.where(is_replaced, other, x0))
        return np.where(chosen, noised, x0), chosen
