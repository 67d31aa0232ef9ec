"""From a recipe's section to the objective; the only place that knows them all."""

import torch

from dllm_core.model.config import DenoiserConfig
from dllm_core.noise.interpolating import InterpolatingProcess
from dllm_core.objective.autoregressive import Autoregressive
from dllm_core.objective.config import AnyObjective, AutoregressiveConfig, BlockDiffusionConfig, MaskedLMConfig
from dllm_core.objective.diffusion import Diffusion
from dllm_core.objective.loss import Objective
from dllm_core.objective.masked_lm import MaskedLM


def new_objective(
    config: AnyObjective,
    denoiser: DenoiserConfig,
    process: InterpolatingProcess,
    device: torch.device,
    *,
    seed: int,
    block_length: int | None = None,
    steps: int | None = None,
    t_min: float = 0.0,
) -> Objective:
    """The objective of a section. block_length, steps, t_min: of the corpus's noise."""
    if isinstance(config, AutoregressiveConfig):
        return Autoregressive(config, denoiser.mask_id, device)
    if isinstance(config, MaskedLMConfig):
        return MaskedLM(config, denoiser.mask_id, denoiser.vocab_size, device, seed=seed)
    return Diffusion(
        config,
        process,
        device,
        block_length=block_length if isinstance(config, BlockDiffusionConfig) else None,
        steps=steps,
        t_min=t_min,
        time_conditioning=denoiser.model.time_conditioning,
    )
