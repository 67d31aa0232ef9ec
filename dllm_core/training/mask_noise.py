"""Gaussian noise on what a mask's embedding reads as, in the first steps of a conversion.

An autoregressive model has never met the mask: its row is a mean or a spare one, a canvas of masks is a canvas of equal
vectors, and gradients explode. Noise, drawn apart for each mask, tells them apart until the model does. LLaDA2.0.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dllm_core.data.batch import Batch
from dllm_core.model.denoiser import Denoiser
from dllm_core.objective.loss import DenoiserLike, LossSum, Objective
from dllm_core.seeding import Ints, Purpose, words
from dllm_core.training.start import MaskNoiseConfig


class MaskNoise:
    """An objective whose denoiser reads masks with noise while `config.steps` last, and then as they are.

    A row's noise is a function of (seed, sample counter) and a token's of its position in it: a resume, micro-batches
    and workers change nothing. It is added to the output of `embed` by a hook, which stays where a backend cuts or
    wraps the module; that is before the blocks, so those computed again in a backward are given what they were given.
    Outside of `loss` nothing is added. batch_rows: of a step, over all workers.
    """

    def __init__(
        self, objective: Objective, module: Denoiser, config: MaskNoiseConfig, *, seed: int, batch_rows: int
    ) -> None:
        self._objective, self._config, self._seed, self._batch_rows = objective, config, seed, batch_rows
        self.pattern, self.passes, self.divisor = objective.pattern, objective.passes, objective.divisor
        model = module.config.model
        self._mask_id, self._dim = module.config.mask_id, model.dim
        # The blocks read tied embeddings times sqrt(dim); std is of what they read.
        self._unit = model.dim**-0.5 if model.tie_embeddings and model.scale_embeddings else 1.0
        self._batch: Batch | None = None
        module.embed.register_forward_hook(self._with_noise)

    def loss(self, denoiser: DenoiserLike, batch: Batch) -> LossSum:
        """As the objective's own, the denoiser's masks with noise."""
        self._batch = batch
        try:
            return self._objective.loss(denoiser, batch)
        finally:
            self._batch = None

    def std_at(self, step: int) -> float:
        """How large the noise is at a step: it falls linearly and is 0 from `config.steps` on."""
        return self._config.std * max(0.0, 1 - step / self._config.steps)

    def _with_noise(self, embed: nn.Module, given: tuple[Any, ...], embedded: Tensor) -> Tensor | None:
        """Embedded [B L D] or, of [xt ; x0], [B 2L D]; None leaves it as it is. No clean half holds a mask."""
        batch = self._batch
        if batch is None or not len(batch.counters):
            return None
        std = self.std_at(int(batch.counters[0]) // self._batch_rows)
        if std == 0:
            return None
        length = batch.x0.shape[1]
        noise = row_noise(self._seed, batch.counters, length, self._dim, embedded.device) * (std * self._unit)
        noise = noise * (given[0][:, :length] == self._mask_id)[..., None]
        return embedded + functional.pad(noise, (0, 0, 0, embedded.shape[1] - length)).to(embedded.dtype)


def row_noise(seed: int, counters: Ints, length: int, dim: int, device: torch.device) -> Tensor:
    """Standard normal [B L D], each row a function of (seed, counter) alone; fp32, drawn where it is needed."""
    drawn = torch.empty(len(counters), length, dim, device=device)
    generator = torch.Generator(device)
    for row, (high, low) in zip(drawn, words(seed, Purpose.MASK_EMBEDDING, 0, counters, 2).tolist(), strict=True):
        row.normal_(generator=generator.manual_seed((high << 31) ^ low))
    return drawn
