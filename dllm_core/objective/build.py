"""From a recipe's section to the objective; the only place that knows them all."""

import torch

from dllm_core.model.config import DenoiserConfig
from dllm_core.noise.interpolating import InterpolatingProcess
from dllm_core.objective.autoregressive import Autoregressive
from dllm_core.objective.config import (
    AnyObjective,
    AutoregressiveConfig,
    BlockDiffusionConfig,
    MaskedLMConfig,
    PreferenceConfig,
)
from dllm_core.objective.diffusion import Diffusion
from dllm_core.objective.loss import DenoiserLike, Objective
from dllm_core.objective.masked_lm import MaskedLM
from dllm_core.objective.preference import Preference
from dllm_core.objective.warmup import Staged, block_of, ends_of


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
    reference: DenoiserLike | None = None,
    batch_rows: int = 1,
) -> Objective:
    """The objective of a section. block_length, steps, t_min: of the corpus's noise; reference: of a preference;
    batch_rows: of a step.
    """
    if isinstance(config, AutoregressiveConfig):
        return Autoregressive(config, denoiser.mask_id, device)
    if isinstance(config, MaskedLMConfig):
        return MaskedLM(config, denoiser.mask_id, denoiser.vocab_size, device, seed=seed)
    if isinstance(config, PreferenceConfig):
        assert reference is not None
        return Preference(config, reference, denoiser.mask_id, device, seed=seed, block_length=block_length)
    timed = denoiser.model.time_conditioning
    blocks = [block_of(stage.block_length, denoiser.context_length) for stage in config.block_warmup]
    blocks.append(block_length if isinstance(config, BlockDiffusionConfig) else None)
    stages = [
        Diffusion(config, process, device, block_length=length, steps=steps, t_min=t_min, time_conditioning=timed)
        for length in blocks
    ]
    return stages[0] if len(stages) == 1 else Staged(stages, ends_of(config), batch_rows)
