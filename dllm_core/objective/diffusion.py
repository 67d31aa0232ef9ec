"""Diffusion: costs at noised positions whose expectation is the NELBO, over a whole row or block by block."""

from typing import NamedTuple

import torch
from torch import Tensor

from dllm_core.data.batch import Batch
from dllm_core.model.pattern import training_pattern
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.discrete import step_nats
from dllm_core.noise.interpolating import InterpolatingProcess
from dllm_core.noise.law import Law
from dllm_core.objective.config import DiffusionOptions
from dllm_core.objective.context import context_weights, context_weights_in_blocks
from dllm_core.objective.loss import DenoiserLike, LossSum, Rows, by_level
from dllm_core.objective.vocabulary import LogitsLaw, nll


class _Noised(NamedTuple):
    """What a denoiser is shown: xt [B L], t [B L] and, of masks in continuous time, the NELBO's weight of each."""

    xt: Tensor
    t: Tensor
    weight: Tensor | None


class Diffusion:
    """E over t and xt of the process's cost of a token, summed over counted tokens.

    Masked diffusion: sum_i [xt_i = mask] w(t_i) (-log p(x0_i | xt)), MDLM, arXiv:2406.07524, eq. 11; logits are
    computed at masks only. With the linear schedule and t in (t_min, 1] that is LLaDA's loss (arXiv:2502.09992,
    eq. 3), and with `normalize: answer` its fine-tuning loss. Where tokens are replaced, every counted position costs.

    block_length: None for whole rows; else the denoiser reads [xt ; x0] and block b of xt sees x0 before it (BD3-LM,
    arXiv:2503.09573, eq. 8), so the cost is that of decoding block by block. steps: of a chain in discrete time, whose
    times are multiples of 1/steps. t_min: the noise's; no complement weighs more than it would there.
    """

    def __init__(
        self,
        config: DiffusionOptions,
        process: InterpolatingProcess,
        device: torch.device,
        *,
        block_length: int | None = None,
        steps: int | None = None,
        t_min: float = 0.0,
        time_conditioning: bool = False,
    ) -> None:
        self._config, self._process, self._device = config, process, device
        self._steps, self._t_min, self._time_conditioning = steps, t_min, time_conditioning
        self.pattern = training_pattern(block_length)
        self.passes = 2 if config.complementary else 1

    def loss(self, denoiser: DenoiserLike, batch: Batch) -> LossSum:
        """Sums over a batch; with `complementary` the mean of what a mask and its complement cost."""
        rows = Rows.of(batch, self._device)
        parts = [self._part(denoiser, rows, noised) for noised in self._shown(rows)]
        nats, bound, divisor, levels = (sum(values) / len(parts) for values in zip(*parts, strict=True))
        return LossSum(nats, bound, int(batch.loss_mask.sum()), divisor, levels)

    def divisor(self, batch: Batch) -> float:
        """Noise and counted tokens alone decide it."""
        rows = Rows.of(batch, self._device)
        shown = self._shown(rows)
        return sum(rows.divisor(self._read(rows, noised), self._config.normalize) for noised in shown) / len(shown)

    def _shown(self, rows: Rows) -> list[_Noised]:
        """What the denoiser is shown, in one pass each."""
        return [self._drawn(rows), *([self._complement(rows)] if self._config.complementary else [])]

    def _read(self, rows: Rows, noised: _Noised) -> Tensor:
        """Where the denoiser is asked, bool [B L]."""
        return rows.counted if self._process.replaces else rows.counted & (noised.xt == self._process.mask_id)

    def _part(self, denoiser: DenoiserLike, rows: Rows, noised: _Noised) -> tuple[Tensor, Tensor, float, Tensor]:
        read = self._read(rows, noised)
        given = torch.cat([noised.xt, rows.x0], dim=1) if self.pattern.has_clean_half else noised.xt
        when = {"t": noised.t} if self._time_conditioning else {}
        logits = denoiser(given, read=read, pattern=self.pattern, **rows.attention, **when)
        cost, bound = self._costs(logits, rows, noised, read)
        nats, divisor = rows.normalized(cost, read, self._config.normalize)
        bound, counted = bound.detach(), noised.t[rows.counted]
        levels = torch.cat([by_level(noised.t[read], bound), by_level(counted, torch.ones_like(counted))])
        return nats, bound.sum(), divisor, levels

    def _costs(self, logits: Tensor, rows: Rows, noised: _Noised, read: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised and what bounds the likelihood, each fp32 [n], at the n positions of `read`."""
        x0, xt, t = rows.x0[read], noised.xt[read], noised.t[read]
        if noised.weight is not None:
            plain, weight = nll(logits, x0, self._process.mask_id), noised.weight[read]
            return plain * self._training_weight(weight, rows, noised.xt, read), plain * weight
        law = LogitsLaw(logits, self._process.mask_id)
        if self._steps is None:
            exact = self._process.nelbo_rate(law, x0, xt, t)
        else:
            exact = chain_rate(self._process, law, x0, xt, t, self._steps).to(t.dtype)
        return exact, exact

    def _training_weight(self, weight: Tensor, rows: Rows, xt: Tensor, read: Tensor) -> Tensor:
        if self._config.weight == "none":
            return torch.ones_like(weight)
        if self._config.weight == "context":
            is_clean = xt != self._process.mask_id
            if rows.is_real is not None:
                is_clean = is_clean & rows.is_real
            rate, block_length = self._config.context_rate, self.pattern.block_length
            if block_length is None:
                return context_weights(is_clean, rows.segment_ids, rate)[read]
            return context_weights_in_blocks(is_clean, rows.is_real, rows.segment_ids, rate, block_length)[read]
        return weight if self._config.max_weight is None else weight.clamp(max=self._config.max_weight)

    def _drawn(self, rows: Rows) -> _Noised:
        weight = None
        if isinstance(self._process, AbsorbingProcess) and self._steps is None:
            weight = self._process.ce_weight(rows.t)
        return _Noised(rows.xt, rows.t, weight)

    def _complement(self, rows: Rows) -> _Noised:
        """Counted masks and counted clean tokens exchanged, at the time t' where that is as likely: alpha' = 1 - alpha.

        It is t that is even, not t', so a mask weighs -dalpha/dt(t) / alpha(t): w(t') and what t' is crowded by.
        """
        schedule, t = self._process.schedule, rows.t.double()
        alpha, fall = schedule.alpha(t), -schedule.dalpha_dt(t)
        least = 1 - float(schedule.alpha(torch.tensor(self._t_min, dtype=torch.float64)))
        weight = (fall / alpha.clamp_min(max(least, 1e-12))).to(rows.t.dtype)
        exchanged = torch.where(rows.xt == self._process.mask_id, rows.x0, self._process.mask_id)
        xt = torch.where(rows.counted, exchanged, rows.xt)
        return _Noised(xt, schedule.inverse(1 - alpha).to(rows.t.dtype), weight)


def chain_rate(
    process: InterpolatingProcess, law: Tensor | Law, x0: Tensor, xt: Tensor, t: Tensor, steps: int
) -> Tensor:
    """T times the nats of the step that ends at t = k/T, fp64 [n]: an even k pays a chain of T steps in the mean."""
    number = (t.double() * steps).round()  # a difference of two float32 times would hold few digits of 1/T
    nats: Tensor = step_nats(process, law, x0, xt, (number - 1) / steps, number / steps)
    return steps * nats
