"""Diffusion: costs at noised positions whose expectation is the NELBO, over a whole row or block by block."""

import torch
from torch import Tensor

from dllm_core.data.batch import Batch
from dllm_core.model.pattern import FULL, AttentionPattern
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.discrete import step_nats
from dllm_core.noise.interpolating import InterpolatingProcess
from dllm_core.objective.config import DiffusionOptions
from dllm_core.objective.context import context_weights
from dllm_core.objective.loss import DenoiserLike, LossSum, Rows, nll


class Diffusion:
    """E over t and xt of the process's cost of a token, summed over counted tokens.

    Masked diffusion: sum_i [xt_i = mask] w(t_i) (-log p(x0_i | xt)), MDLM, arXiv:2406.07524, eq. 11; logits are
    computed at masks only. With the linear schedule and t in (t_min, 1] that is LLaDA's loss (arXiv:2502.09992,
    eq. 3), and with `normalize: answer` its fine-tuning loss. Where tokens are replaced, every counted position costs.

    block_length: None for whole rows; else the denoiser reads [xt ; x0] and block b of xt sees x0 before it (BD3-LM,
    arXiv:2503.09573, eq. 8), so the cost is that of decoding block by block. steps: of a chain in discrete time.
    """

    def __init__(
        self,
        config: DiffusionOptions,
        process: InterpolatingProcess,
        device: torch.device,
        *,
        block_length: int | None = None,
        steps: int | None = None,
        time_conditioning: bool = False,
    ) -> None:
        self._config, self._process, self._device = config, process, device
        self._steps, self._time_conditioning = steps, time_conditioning
        self.pattern = FULL if block_length is None else AttentionPattern("block_diffusion", block_length)

    def loss(self, denoiser: DenoiserLike, batch: Batch) -> LossSum:
        """Sums over a batch; with `complementary` the mean of what a mask and its complement cost."""
        rows = Rows.of(batch, self._device)
        parts = [self._part(denoiser, rows, rows.xt, rows.t)]
        if self._config.complementary:
            parts.append(self._part(denoiser, rows, *self._complement(rows)))
        nats, bound, divisor = (sum(values) for values in zip(*parts, strict=True))
        share = 1 / len(parts)
        return LossSum(nats * share, bound * share, int(batch.loss_mask.sum()), divisor * share)

    def _part(self, denoiser: DenoiserLike, rows: Rows, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor, float]:
        read = rows.counted if self._process.replaces else rows.counted & (xt == self._process.mask_id)
        given = torch.cat([xt, rows.x0], dim=1) if self.pattern.has_clean_half else xt
        when = {"t": t} if self._time_conditioning else {}
        logits = denoiser(given, read=read, pattern=self.pattern, **rows.attention, **when)
        cost, bound = self._costs(logits, rows, xt, t, read)
        nats, divisor = rows.normalized(cost, read, self._config.normalize)
        return nats, bound.detach().sum(), divisor

    def _costs(self, logits: Tensor, rows: Rows, xt: Tensor, t: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised and what bounds the likelihood, each [n], at the n positions of `read`."""
        x0, xt_read, t_read = rows.x0[read], xt[read], t[read]
        if self._steps is not None:
            log_probs = self._process.x0_log_probs(logits.float())
            before = (t_read - 1 / self._steps).clamp_min(0)
            exact = self._steps * step_nats(self._process, log_probs, x0, xt_read, before, t_read)
            return exact, exact
        if not isinstance(self._process, AbsorbingProcess):
            exact = self._process.nelbo_rate(self._process.x0_log_probs(logits.float()), x0, xt_read, t_read)
            return exact, exact
        plain = nll(logits, x0, self._process.mask_id)
        weight = self._process.ce_weight(t_read)
        return plain * self._training_weight(weight, rows, xt, read), plain * weight

    def _training_weight(self, weight: Tensor, rows: Rows, xt: Tensor, read: Tensor) -> Tensor:
        if self._config.weight == "none":
            return torch.ones_like(weight)
        if self._config.weight == "context":
            is_clean = xt != self._process.mask_id
            if rows.is_real is not None:
                is_clean = is_clean & rows.is_real
            return context_weights(is_clean, rows.segment_ids, self._config.context_rate)[read]
        return weight if self._config.max_weight is None else weight.clamp(max=self._config.max_weight)

    def _complement(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(xt, t) with the counted masks and the counted clean tokens exchanged, at the time when that is as likely."""
        mask_id, schedule = self._process.mask_id, self._process.schedule
        is_masked = rows.xt == mask_id
        xt = torch.where(rows.counted, torch.where(is_masked, rows.x0, mask_id), rows.xt)
        return xt, schedule.inverse(1 - schedule.alpha(rows.t.double())).to(rows.t.dtype)
