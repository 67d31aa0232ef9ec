"""Masked diffusion: the weighted cross-entropy at noised positions whose expectation is the NELBO."""

import torch
from torch import Tensor
from torch.nn import functional

from dllm_core.data.batch import Batch
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.process import NoiseProcess
from dllm_core.objective.config import MaskedDiffusionConfig
from dllm_core.objective.loss import DenoiserLike, LossSum


class MaskedDiffusion:
    """sum_i [xt_i != x0_i] w(t_i) (-log p(x0_i | xt)). MDLM, arXiv:2406.07524, eq. 11.

    With `max_weight` the weight is min(w(t), max_weight): less variance in training, but no longer the bound.
    """

    def __init__(self, config: MaskedDiffusionConfig, process: NoiseProcess, device: torch.device) -> None:
        assert isinstance(process, AbsorbingProcess)  # the recipe refuses any other
        self._config, self._process, self._device = config, process, device

    def loss(self, denoiser: DenoiserLike, batch: Batch) -> LossSum:
        """Logits are computed at noised, counted positions only; the mask's own logit never takes part."""
        x0 = torch.from_numpy(batch.x0).to(self._device)
        xt = torch.from_numpy(batch.xt).to(self._device)
        t = torch.from_numpy(batch.t).to(self._device)
        counted = torch.from_numpy(batch.loss_mask).to(self._device)
        read = (xt == self._process.mask_id) & counted
        isolated: dict[str, Tensor] = {}
        if batch.segment_ids is not None:
            isolated["segment_ids"] = torch.from_numpy(batch.segment_ids).to(self._device)
        logits = denoiser(xt, read=read, **isolated).float()  # bf16 would round a sum of 1e5 nats to the nearest 512
        is_mask = torch.arange(logits.shape[-1], device=self._device) == self._process.mask_id
        nll = functional.cross_entropy(logits.masked_fill(is_mask, -torch.inf), x0[read], reduction="none")
        exact = self._process.ce_weight(t[read])
        weight = exact if self._config.max_weight is None else exact.clamp(max=self._config.max_weight)
        return LossSum(
            nats=(nll * weight).sum(),
            bound_nats=(nll.detach() * exact).sum(),
            num_tokens=int(batch.loss_mask.sum()),
        )
